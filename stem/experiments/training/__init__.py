"""Experiment of notebook 05: small models trained with dense and with sparse attention."""

"""Notebook 05: small models trained with Stem."""

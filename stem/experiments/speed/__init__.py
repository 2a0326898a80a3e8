"""Notebook 04: time of operators and models."""

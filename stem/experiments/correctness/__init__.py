"""Notebook 03: claims that must hold, each with its tolerance."""

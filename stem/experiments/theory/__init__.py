"""Notebook 01: information flow, the paper's equations, the explorer."""

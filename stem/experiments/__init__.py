"""Experiments of the notebooks: one folder per experiment, and modules that all experiments share."""

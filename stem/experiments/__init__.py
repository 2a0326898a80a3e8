"""What the notebooks measure: one folder per experiment, and what all experiments share."""

"""Notebook 06: answers and losses of pretrained models on long prompts."""

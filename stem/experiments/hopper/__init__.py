"""Notebook 08: the kernels for Hopper stage by stage, each timed, with stamps of the clock inside the kernel."""

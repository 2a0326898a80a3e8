"""Triton kernels of Stem, installed as `stem.kernels`: raw tensors and integers in, tensors out."""

"""Pretrained models by packaged name (offline), GGUF file, folder or Hugging Face name; the code is stem.hf.weights."""

from stem.hf.weights import PACKAGES, cache_folder, keep, load, resolve

__all__ = ["PACKAGES", "cache_folder", "keep", "load", "resolve"]

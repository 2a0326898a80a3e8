"""Stem: block-sparse causal attention that keeps more key blocks for early positions and scores them by value too."""

from importlib import import_module

from stem.kernels.mode import ensure_triton_mode

TRITON_MODE = ensure_triton_mode()

from stem import metrics, patterns, reference  # noqa: E402
from stem.attention import block_sparse_attention, stem_attention  # noqa: E402
from stem.budget import block_budget  # noqa: E402
from stem.config import StemConfig  # noqa: E402
from stem.scores import block_scores  # noqa: E402
from stem.selection import BlockSelection, select_blocks  # noqa: E402
from stem.warming import warm_up  # noqa: E402

__all__ = [
    "TRITON_MODE",
    "BlockSelection",
    "StemConfig",
    "block_budget",
    "block_scores",
    "block_sparse_attention",
    "metrics",
    "patterns",
    "reference",
    "select_blocks",
    "stem_attention",
    "warm_up",
]


def __getattr__(name: str):
    if name in {"distributed", "evaluate", "hf", "pretrained", "vllm"}:  # they import more than torch, or much of it
        return import_module(f"stem.{name}")
    if name == "calibrate":
        return import_module("stem.hf.calibration").calibrate
    raise AttributeError(f"module 'stem' has no attribute {name!r}")

"""Patterns of recent blocks: sliding window, StreamingLLM's A-shape, Longformer."""

import torch
from torch import Tensor

from stem.config import StemConfig
from stem.patterns.common import block_counts, select_by_scores
from stem.selection import BlockSelection


def select_sliding(q: Tensor, k: Tensor, v: Tensor, config: StemConfig) -> BlockSelection:
    """The most recent blocks only; the window's width follows from the density."""
    return select_by_scores(_recency(q, k, config), q, k, config, sink_blocks=0, local_blocks=1)


def select_a_shape(q: Tensor, k: Tensor, v: Tensor, config: StemConfig) -> BlockSelection:
    """`config.sink_blocks` first blocks and a window (StreamingLLM, A-shape)."""
    return select_by_scores(_recency(q, k, config), q, k, config, sink_blocks=config.sink_blocks, local_blocks=1)


def select_longformer(q: Tensor, k: Tensor, v: Tensor, config: StemConfig) -> BlockSelection:
    """Window and one global block at the start, seen by all rows (Longformer, arXiv 2004.05150, made causal).

    The global block's own row sees all of its past anyway.
    """
    return select_by_scores(_recency(q, k, config), q, k, config, sink_blocks=1, local_blocks=1)


def _recency(q: Tensor, k: Tensor, config: StemConfig) -> Tensor:
    """Scores that rise towards the diagonal: fp32 [nk], the key block's index."""
    return torch.arange(block_counts(q, k, config)[1], device=q.device, dtype=torch.float32)

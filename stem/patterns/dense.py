"""Full causal attention as a selection."""

import torch
from torch import Tensor

from stem.config import StemConfig
from stem.patterns.common import block_counts
from stem.selection import BlockSelection


def select(q: Tensor, k: Tensor, v: Tensor, config: StemConfig) -> BlockSelection:
    """Every causal block; uses the config's block size only."""
    nq, nk = block_counts(q, k, config)
    mask = torch.ones(*q.shape[:2], nq, nk, dtype=torch.bool, device=q.device).tril(nk - nq)
    return BlockSelection.from_mask(mask, config.block_size, q_len=q.shape[2], kv_len=k.shape[2])

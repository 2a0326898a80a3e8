"""Full causal attention as a selection."""

from torch import Tensor

from stem.config import StemConfig
from stem.selection import BlockSelection


def select(q: Tensor, k: Tensor, v: Tensor, config: StemConfig) -> BlockSelection:
    """Keep every causal block. Only the block size of the config is read."""
    return BlockSelection.every_block(*q.shape[:2], q.shape[2], k.shape[2], config.block_size, q.device)

"""Random blocks, alone and with BigBird's window and global block."""

import torch
from torch import Tensor

from stem.config import StemConfig
from stem.patterns.common import block_counts, select_by_scores
from stem.selection import BlockSelection


def select(q: Tensor, k: Tensor, v: Tensor, config: StemConfig) -> BlockSelection:
    """First block, the last three, and random blocks for the rest of the budget (BigBird, arXiv 2007.14062, causal)."""
    return select_by_scores(_random_scores(q, k, config), q, k, config, sink_blocks=1, local_blocks=3)


def select_random(q: Tensor, k: Tensor, v: Tensor, config: StemConfig) -> BlockSelection:
    """Random blocks beside the config's sink and local blocks: the floor that a scored method must beat."""
    scores = _random_scores(q, k, config)
    return select_by_scores(scores, q, k, config, sink_blocks=config.sink_blocks, local_blocks=config.local_blocks)


def _random_scores(q: Tensor, k: Tensor, config: StemConfig) -> Tensor:
    """fp32 [Hq, nq, nk], drawn per row of the key grid so that they do not depend on the prompt's length."""
    nq, nk = block_counts(q, k, config)
    scores = torch.zeros(q.shape[1], nq, nk, device="cpu")
    for row in range(nq):
        position = nk - nq + row
        generator = torch.Generator().manual_seed(position)
        scores[:, row, : position + 1] = torch.rand(q.shape[1], position + 1, generator=generator, device="cpu")
    return scores.to(q.device)

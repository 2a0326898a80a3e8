"""Patterns of recent blocks: sliding window and Longformer."""

import torch
from torch import Tensor

from stem.config import StemConfig
from stem.patterns.common import block_counts, check_blocks, distances, fill_rows, select_mask, target_pairs
from stem.selection import BlockSelection


def select_sliding(
    q: Tensor, k: Tensor, v: Tensor, config: StemConfig, *, window_blocks: int | None = None
) -> BlockSelection:
    """The most recent blocks only: keep j where i - j < window.

    window_blocks: Width, the diagonal included, >= 1; None solves it for the config's density, a width between two
        whole numbers as the wider window in the first rows.
    """
    check_blocks(1, window_blocks=window_blocks)
    kept = distances(block_counts(q, k, config)[1], q.device) == 0
    return select_mask(add_window(kept, config, window_blocks), q, k, config)


def select_longformer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: StemConfig,
    *,
    window_blocks: int | None = None,
    global_blocks: int = 1,
    dilation: int = 1,
) -> BlockSelection:
    """Window and global blocks (Longformer, arXiv 2004.05150, made causal): keep j where i - j < window or j < global.

    A global row sees all of its past: the global blocks come first, so it does anyway. Global blocks and the diagonal
    are the least density.

    window_blocks: Blocks in the window, the diagonal included, >= 1; None solves it for the config's density.
    global_blocks: First blocks, seen by every row, >= 0; the paper's choice depends on the task.
    dilation: Steps between the window's blocks, >= 1: every dilation-th of the last window * dilation blocks. A
        dilation d alone reaches no more than 1 / d of the pairs.
    """
    check_blocks(1, window_blocks=window_blocks, dilation=dilation)
    check_blocks(0, global_blocks=global_blocks)
    distance = distances(block_counts(q, k, config)[1], q.device)
    kept = (distance == 0) | (torch.arange(distance.shape[1], device=q.device) < global_blocks)
    return select_mask(add_window(kept, config, window_blocks, dilation), q, k, config)


def add_window(kept: Tensor, config: StemConfig, window_blocks: int | None, dilation: int = 1) -> Tensor:
    """Add the last `window_blocks` blocks (at steps of `dilation`) to each row of bool [nk, nk].

    None: as wide as the config's density allows, one block wider in the first rows to use it up.
    """
    distance = distances(kept.shape[0], kept.device)
    steps = distance % dilation == 0
    if window_blocks is not None:
        return kept | steps & (distance < window_blocks * dilation)
    scores = torch.where(steps, -distance.double(), -torch.inf)
    return fill_rows(kept, scores, pairs=target_pairs(config, kept.shape[0]))

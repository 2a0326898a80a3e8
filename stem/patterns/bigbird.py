"""Random blocks, alone and with BigBird's window and global blocks."""

import torch
from torch import Tensor

from stem.config import StemConfig
from stem.patterns.common import (
    block_counts,
    check_blocks,
    distances,
    fill_rows,
    select_by_scores,
    select_mask,
    target_pairs,
)
from stem.selection import BlockSelection


def select(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: StemConfig,
    *,
    random_blocks: int | None = None,
    window_blocks: int = 3,
    global_blocks: int = 2,
    seed: int = 0,
) -> BlockSelection:
    """Window, global blocks and random ones between them (BigBird, arXiv 2007.14062, made causal).

    The random blocks of a row are drawn once for its head and position; rows with fewer candidates keep all. Window and
    global blocks are the least density, five blocks a row: 0.15 at 64 blocks, 0.08 at 128.

    random_blocks: Random blocks of a row, >= 0, 3 in the paper; None solves it for the config's density, one more in
        the first rows where it falls between two whole numbers.
    window_blocks: Most recent blocks, the diagonal included, >= 1.
    global_blocks: First blocks, >= 0.
    seed: Other draws, for example in other layers.
    """
    check_blocks(0, random_blocks=random_blocks, global_blocks=global_blocks, seed=seed)
    check_blocks(1, window_blocks=window_blocks)
    nk = block_counts(q, k, config)[1]
    kept = distances(nk, q.device) < window_blocks
    kept = kept | (torch.arange(nk, device=q.device) < global_blocks)
    scores = _random_scores(q.shape[1], nk, seed, q.device)
    pairs = target_pairs(config, nk) if random_blocks is None else None
    return select_mask(fill_rows(kept, scores, pairs=pairs, count=random_blocks), q, k, config)


def select_random(q: Tensor, k: Tensor, v: Tensor, config: StemConfig, *, seed: int = 0) -> BlockSelection:
    """Random blocks beside the config's sink and local blocks: the floor that a scored method must beat.

    Drawn once for a head and position; forced blocks are inside the budget, so any density is met.

    seed: Other draws, for example in other layers.
    """
    check_blocks(0, seed=seed)
    nq, nk = block_counts(q, k, config)
    scores = _random_scores(q.shape[1], nk, seed, q.device)[:, -nq:]
    return select_by_scores(scores, q, k, config, sink_blocks=config.sink_blocks, local_blocks=config.local_blocks)


def _random_scores(heads: int, nk: int, seed: int, device: torch.device) -> Tensor:
    """fp32 [heads, nk, nk] in [0, 1), a hash of seed, head, row and column: no longer prompt changes a row's draw."""
    index = torch.arange(max(heads, nk), device=device)
    state = _mix(torch.tensor(seed, device=device)) + index[:heads, None, None]
    state = _mix(_mix(state) + index[:nk, None]) + index[:nk]
    return (_mix(state) >> 40 & 0xFFFFFF).float() / 2**24


def _mix(x: Tensor) -> Tensor:
    """Spread the bits of int64 numbers: a bijection of 64 bits; products overflow on purpose."""
    for multiplier in (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15):  # odd, bits of no pattern
        x = (x ^ (x >> 30 & 0x3FFFFFFFF) ^ 0x5DEECE66D) * multiplier
    return x ^ (x >> 31 & 0x1FFFFFFFF)

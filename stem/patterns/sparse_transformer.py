"""Sparse Transformers (arXiv 1904.10509) in blocks: strided and fixed, their two heads merged into one."""

import math

import numpy as np
import torch
from torch import Tensor

from stem.config import StemConfig
from stem.patterns.common import block_counts, check_blocks, distances, select_mask, target_pairs
from stem.patterns.window import add_window
from stem.selection import BlockSelection

SMALL = 0.01  # difference of density at which the fixed pattern prefers fewer summary blocks


def select_strided(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: StemConfig,
    *,
    window_blocks: int | None = None,
    stride_blocks: int | None = None,
) -> BlockSelection:
    """A window and every stride-th block before: keep j where i - j < window or (i - j) mod stride = 0.

    window_blocks: Width, the diagonal included, >= 1; None solves it for the config's density.
    stride_blocks: Distance of the strided blocks, >= 1. None is the paper's square root of the number of blocks,
        rounded up, where the window is given; where the window is solved, it is the smallest stride whose blocks cost
        at most half of the density, so that both parts get about as much.
    """
    check_blocks(1, window_blocks=window_blocks, stride_blocks=stride_blocks)
    n = block_counts(q, k, config)[1]
    if stride_blocks is None and window_blocks is not None:
        stride_blocks = math.isqrt(n - 1) + 1
    elif stride_blocks is None:
        half = target_pairs(config, n) / 2
        stride_blocks = next((s for s in range(1, n) if strided_pairs(n, s) <= half), n)
    kept = distances(n, q.device) % stride_blocks == 0
    return select_mask(add_window(kept, config, window_blocks), q, k, config)


def select_fixed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: StemConfig,
    *,
    stride_blocks: int | None = None,
    summary_blocks: int | None = None,
) -> BlockSelection:
    """The own group of blocks and the last ones of every group: floor(j / s) = floor(i / s) or j mod s >= s - c.

    None for both solves them for the config's density: of the groups and summaries that come within 0.01 of it, the
    fewest summary blocks, then the longest group; where none does, the nearest. No stride of n blocks costs less than
    about 2 / sqrt(n) of the pairs: the least density is 0.24 at 64 blocks, 0.17 at 128.

    stride_blocks: s, blocks in a group, >= 1; None beside a given c is the square root of the number of blocks.
    summary_blocks: c in 1..s; None beside a given s is 1.
    """
    check_blocks(1, stride_blocks=stride_blocks, summary_blocks=summary_blocks)
    n = block_counts(q, k, config)[1]
    if stride_blocks is None and summary_blocks is None:
        stride_blocks, summary_blocks = _solve_fixed(n, target_pairs(config, n))
    stride_blocks = math.isqrt(n - 1) + 1 if stride_blocks is None else stride_blocks
    summary_blocks = 1 if summary_blocks is None else summary_blocks
    if summary_blocks > stride_blocks:
        raise ValueError(f"summary_blocks must be at most stride_blocks={stride_blocks}, got {summary_blocks}")
    block = torch.arange(n, device=q.device)
    group = block // stride_blocks
    kept = (group[:, None] == group) | (block % stride_blocks >= stride_blocks - summary_blocks)
    return select_mask(kept, q, k, config)


def strided_pairs(n: int, stride: int) -> int:
    """Causal block pairs of n blocks whose distance is a multiple of the stride."""
    return sum(n - distance for distance in range(0, n, stride))


def fixed_pairs(n: int, stride: int) -> np.ndarray:
    """Causal block pairs that the fixed pattern keeps, for every c in 1..stride: int64 [stride]."""
    block = np.arange(n)
    own = (block % stride + 1).sum()
    later = (n - (block // stride + 1) * stride).clip(0)  # rows of later groups, for each key block
    place = np.bincount(block % stride, weights=later, minlength=stride)[::-1]  # from the last place of a group
    return own + place.cumsum().astype(np.int64)


def _solve_fixed(n: int, pairs: int) -> tuple[int, int]:
    """(s, c) as the docstring of `select_fixed` says."""
    tolerance = SMALL * n * (n + 1) / 2
    found = []
    for stride in range(1, n + 1):
        off = np.abs(fixed_pairs(n, stride) - pairs)
        found += [(max(gap, tolerance), c, -stride) for c, gap in enumerate(off.tolist(), 1)]
    _, summary, stride = min(found)
    return -stride, summary

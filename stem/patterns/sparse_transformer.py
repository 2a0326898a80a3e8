"""Sparse Transformers (arXiv 1904.10509) in blocks: strided and fixed, each with its two kinds of heads in one."""

import math

import numpy as np
import torch

from stem.patterns.common import Prompt, check_blocks, select_mask, select_window
from stem.selection import BlockSelection

SMALL = 0.01  # difference of density at which the fixed pattern prefers fewer summary blocks


def select_strided(
    prompt: Prompt, *, window_blocks: int | None = None, stride_blocks: int | None = None
) -> BlockSelection:
    """Keep a window and every stride-th block before it: i - j < window or (i - j) mod stride = 0.

    Args:
        window_blocks: Width of the window, >= 1 [blocks]. None solves it for the config's density.
        stride_blocks: Distance between the strided blocks, >= 1 [blocks]. None beside a given window is the paper's
            choice, the square root of the number of blocks, rounded up. None beside a solved window is the smallest
            stride whose blocks cost at most half of the density, so that window and strided blocks cost about as much.
    """
    check_blocks(1, window_blocks=window_blocks, stride_blocks=stride_blocks)
    n = prompt.nk
    if stride_blocks is None and window_blocks is not None:
        stride_blocks = _root(n)
    elif stride_blocks is None:
        half = prompt.pairs / 2
        stride_blocks = next((s for s in range(1, n) if sum(range(n, 0, -s)) <= half), n)  # causal pairs of stride s
    return select_window(prompt, prompt.distances % stride_blocks == 0, window_blocks)


def select_fixed(
    prompt: Prompt, *, stride_blocks: int | None = None, summary_blocks: int | None = None
) -> BlockSelection:
    """Keep the row's own group of s blocks and the last c of every group: floor(j/s) = floor(i/s) or j mod s >= s - c.

    None for both parameters solves them for the config's density. Of all (s, c) within 0.01 of the density, the method
    takes the fewest summary blocks, then the longest group. Where none is that close, it takes the nearest density. The
    pattern costs at least about 2 / sqrt(n) of the causal pairs of n blocks: 0.25 at 64 blocks, 0.17 at 128.

    Args:
        stride_blocks: s, the group's length, >= 1 [blocks]. None beside a given c is the square root of the number of
            blocks, rounded up.
        summary_blocks: c, summary blocks of a group, in 1..s [blocks]. None beside a given s is 1.
    """
    check_blocks(1, stride_blocks=stride_blocks, summary_blocks=summary_blocks)
    n = prompt.nk
    if stride_blocks is None and summary_blocks is None:
        stride_blocks, summary_blocks = _solve_fixed(n, prompt.pairs)
    stride_blocks = _root(n) if stride_blocks is None else stride_blocks
    summary_blocks = 1 if summary_blocks is None else summary_blocks
    if summary_blocks > stride_blocks:
        raise ValueError(f"summary_blocks must be at most stride_blocks={stride_blocks}, got {summary_blocks}")
    block = torch.arange(n, device=prompt.q.device)
    group = block // stride_blocks
    kept = (group[:, None] == group) | (block % stride_blocks >= stride_blocks - summary_blocks)
    return select_mask(prompt, kept)


def _root(n: int) -> int:
    """Return the square root of n >= 1, rounded up."""
    return math.isqrt(n - 1) + 1


def _solve_fixed(n: int, pairs: int) -> tuple[int, int]:
    """Return (s, c) for `pairs` block pairs of n blocks; see `select_fixed`."""
    tolerance = SMALL * n * (n + 1) / 2
    found = []
    for stride in range(1, n + 1):
        off = np.abs(_fixed_pairs(n, stride) - pairs)
        found += [(max(gap, tolerance), c, -stride) for c, gap in enumerate(off.tolist(), 1)]
    _, summary, stride = min(found)
    return -stride, summary


def _fixed_pairs(n: int, stride: int) -> np.ndarray:
    """Return the causal block pairs that the fixed pattern keeps for each c in 1..stride: int64 [stride]."""
    block = np.arange(n)
    own = (block % stride + 1).sum()
    later = (n - (block // stride + 1) * stride).clip(0)  # rows of later groups, for each key block
    place = np.bincount(block % stride, weights=later, minlength=stride)[::-1]  # from the last place of a group
    return own + place.cumsum().astype(np.int64)

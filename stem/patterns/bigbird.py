"""Random blocks: BigBird's, beside a window and global blocks, and random blocks alone."""

import torch
from torch import Tensor

from stem.patterns.common import Prompt, check_blocks, fill_rows, select_even, select_mask
from stem.selection import BlockSelection


def select(
    prompt: Prompt, *, random_blocks: int | None = None, window_blocks: int = 3, global_blocks: int = 2, seed: int = 0
) -> BlockSelection:
    """Keep a window, global blocks, and random blocks between them (BigBird, arXiv 2007.14062, made causal).

    The random blocks of a row depend on seed, head and position only. Rows with too few candidates keep all. Window
    and global blocks are the least density: five blocks a row, 0.15 at 64 blocks, 0.08 at 128.

    Args:
        random_blocks: Random blocks of a row, >= 0 [blocks], 3 in the paper. None solves it for the config's density.
            Where the density lies between two numbers, the first rows have one more.
        window_blocks: Width of the window, >= 1 [blocks].
        global_blocks: First blocks that every row sees, >= 0 [blocks].
        seed: Seed of the random blocks, >= 0, for example the layer.
    """
    check_blocks(0, random_blocks=random_blocks, global_blocks=global_blocks, seed=seed)
    check_blocks(1, window_blocks=window_blocks)
    kept = prompt.local_and_first(local_blocks=window_blocks, first_blocks=global_blocks)
    pairs = prompt.pairs if random_blocks is None else None
    return select_mask(prompt, fill_rows(kept, _random_scores(prompt, seed), pairs=pairs, count=random_blocks))


def select_random(prompt: Prompt, *, seed: int = 0) -> BlockSelection:
    """Keep random blocks and the config's sink and local blocks: the floor that a scored method must beat.

    The random blocks of a row depend on seed, head and position only. Every row keeps the same number of blocks, which
    is solved for the config's density; sink and local blocks are inside it. No paper source: our choice.

    Args:
        seed: Seed of the random blocks, >= 0, for example the layer.
    """
    check_blocks(0, seed=seed)
    scores, config = _random_scores(prompt, seed)[:, -prompt.nq :], prompt.config
    return select_even(prompt, scores, sink_blocks=config.sink_blocks, local_blocks=config.local_blocks)


def _random_scores(prompt: Prompt, seed: int) -> Tensor:
    """Return a hash of seed, head, row and column: fp32 [Hq, nk, nk] in [0, 1).

    A hash, unlike a generator, gives a row the same scores at every prompt length.
    """
    heads, nk, device = prompt.q.shape[1], prompt.nk, prompt.q.device
    index = torch.arange(max(heads, nk), device=device)
    state = _mix(torch.tensor(seed, device=device)) + index[:heads, None, None]
    state = _mix(_mix(state) + index[:nk, None]) + index[:nk]
    return (_mix(state) >> 40 & 0xFFFFFF).float() / 2**24


def _mix(x: Tensor) -> Tensor:
    """Return a bijective hash of int64 numbers. The products overflow on purpose."""
    for multiplier in (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15):  # odd, bits of no pattern
        x = (x ^ (x >> 30 & 0x3FFFFFFFF) ^ 0x5DEECE66D) * multiplier
    return x ^ (x >> 31 & 0x1FFFFFFFF)

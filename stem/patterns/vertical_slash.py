"""Vertical-slash pattern of MInference (arXiv 2407.02490) in blocks."""

import torch
from torch import Tensor

from stem.config import StemConfig
from stem.patterns.common import (
    block_counts,
    check_blocks,
    distances,
    last_probabilities,
    offset_sums,
    select_mask,
    target_pairs,
)
from stem.selection import BlockSelection

LAST_QUERIES = 64
FORCED_VERTICALS, FORCED_SLASHES = 30, 100  # first tokens, nearest offsets, ranked before all others
LEAST_VERTICALS, LEAST_SLASHES = 30, 50
VERTICALS, SLASHES = 1000, 6096  # MInference's setting for heads that its search does not know


def select(
    q: Tensor, k: Tensor, v: Tensor, config: StemConfig, *, verticals: int | None = None, slashes: int | None = None
) -> BlockSelection:
    """Key columns and diagonals that the last 64 queries attend to most; one number of each for all heads.

    Their exact attention to all keys gives every column its sum (the first 30 tokens come first) and every diagonal its
    sum (the nearest 100 offsets come first). A block pair is kept if it holds a kept column or touches a kept diagonal.
    MInference gathers single columns; in blocks, a column costs its whole block. Which blocks a column or a diagonal
    touches is counted in whole blocks, also at the prompt's end.

    The last 64 queries are those of q: every chunk of a prompt fed in chunks estimates with its own. The 30 columns and
    50 offsets that are the minimum are the least density.

    verticals: Columns, at least 30 [tokens]. None for both solves them for the config's density: MInference's default
        of 1000 columns to 6096 offsets, scaled, then as many columns as fit; None beside given slashes is 1000.
    slashes: Diagonals, at least 50 [tokens of offset]; None beside given verticals is 6096.
    """
    check_blocks(0, verticals=verticals, slashes=slashes)
    size, nk = config.block_size, block_counts(q, k, config)[1]
    probabilities = last_probabilities(q, k, LAST_QUERIES)
    columns = _first_ranks(probabilities.sum(2), FORCED_VERTICALS)  # [B, Hq, Nkv]
    offsets = _first_ranks(offset_sums(probabilities), FORCED_SLASHES)
    column_rank = _block_minimum(columns, size)  # [B, Hq, nk]
    own = _block_minimum(offsets, size)
    inside = _block_minimum(
        offsets.index_fill(2, torch.arange(0, offsets.shape[2], size, device=q.device), _NEVER), size
    )
    slash_rank = own.minimum(torch.nn.functional.pad(inside, (1, 0), value=_NEVER)[..., :-1])
    levels = torch.broadcast_tensors(
        column_rank[:, :, None], slash_rank[..., distances(nk, q.device).clamp_min(0)]
    )  # [B, Hq, nk, nk] each: how many columns, or diagonals, must be kept to keep the pair
    if verticals is None and slashes is None:
        solved = [_solve(*pair, q.shape[1] * target_pairs(config, nk)) for pair in zip(*levels, strict=True)]
        counts = torch.tensor(solved, device=q.device)
    else:
        default = (VERTICALS if verticals is None else verticals, SLASHES if slashes is None else slashes)
        counts = torch.tensor([default] * q.shape[0], device=q.device)
    least = torch.tensor([LEAST_VERTICALS, LEAST_SLASHES], device=q.device)
    counts = counts.maximum(least)[:, :, None, None, None]  # [B, 2, 1, 1, 1]
    return select_mask((levels[0] < counts[:, 0]) | (levels[1] < counts[:, 1]), q, k, config)


_NEVER = 2**40  # a rank that no count reaches


def _first_ranks(sums: Tensor, forced: int) -> Tensor:
    """Place of each entry in descending order, int64; the first `forced` entries come before all others."""
    sums = sums.clone()
    sums[..., :forced] = torch.inf
    return sums.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


def _block_minimum(ranks: Tensor, size: int) -> Tensor:
    """Smallest rank in each block: [..., N] -> [..., nk]."""
    ranks = torch.nn.functional.pad(ranks, (0, -ranks.shape[-1] % size), value=_NEVER)
    return ranks.unflatten(-1, (-1, size)).amin(-1)


def _solve(column: Tensor, slash: Tensor, pairs: int) -> tuple[int, int]:
    """Numbers of columns and diagonals that keep about `pairs` block pairs; ranks [Hq, nk, nk] each."""
    causal = torch.ones_like(column, dtype=torch.bool).tril()
    column, slash = column[causal], slash[causal]

    def kept(verticals: int, slashes: int) -> int:
        return int(((column < verticals) | (slash < slashes)).sum())

    low, high = LEAST_SLASHES, max(LEAST_SLASHES, int(slash[slash < _NEVER].max()) + 1)
    while low < high:
        middle = (low + high + 1) // 2
        fits = kept(_verticals(middle), middle) <= pairs
        low, high = (middle, high) if fits else (low, middle - 1)
    slashes, low, high = low, _verticals(low), max(_verticals(low), int(column.max()) + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if kept(middle, slashes) <= pairs else (low, middle)
    return min((low, high), key=lambda verticals: abs(kept(verticals, slashes) - pairs)), slashes


def _verticals(slashes: int) -> int:
    return max(LEAST_VERTICALS, slashes * VERTICALS // SLASHES)

"""Vertical-slash pattern of MInference (arXiv 2407.02490) in blocks."""

import torch
from torch import Tensor

from stem.config import StemConfig
from stem.patterns.common import (
    block_counts,
    check_blocks,
    distances,
    largest,
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
        counts = _solve(*levels, q.shape[1] * target_pairs(config, nk))
    else:
        default = (VERTICALS if verticals is None else verticals, SLASHES if slashes is None else slashes)
        least = (max(least, given) for least, given in zip((LEAST_VERTICALS, LEAST_SLASHES), default, strict=True))
        counts = tuple(torch.full((q.shape[0],), count, device=q.device) for count in least)
    columns, diagonals = (level < count[:, None, None, None] for level, count in zip(levels, counts, strict=True))
    return select_mask(columns | diagonals, q, k, config)


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


def _solve(column: Tensor, slash: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    """Numbers of columns and diagonals that keep about `pairs` block pairs of a prompt: int64 [B] each.

    column, slash: [B, Hq, nk, nk], how many of either must be kept to keep the pair.
    """
    causal = torch.ones_like(column[0, 0], dtype=torch.bool).tril()
    column, slash = column[..., causal].flatten(1), slash[..., causal].flatten(1)

    def kept(verticals: Tensor, slashes: Tensor) -> Tensor:
        return ((column < verticals[:, None]) | (slash < slashes[:, None])).sum(1)

    least = torch.full((column.shape[0],), LEAST_SLASHES, device=column.device)
    most = int(column[column < _NEVER].max()) + 1  # ranks of columns and offsets have one range
    slashes = largest(lambda count: kept(_verticals(count), count) <= pairs, least, most)
    verticals = largest(lambda count: kept(count, slashes) <= pairs, _verticals(slashes), most)
    further = kept(verticals + 1, slashes) - pairs < pairs - kept(verticals, slashes)
    return verticals + further, slashes


def _verticals(slashes: Tensor) -> Tensor:
    return (slashes * VERTICALS // SLASHES).clamp_min(LEAST_VERTICALS)

"""Vertical-slash pattern of MInference (arXiv 2407.02490) in blocks."""

from collections.abc import Callable

import torch
from torch import Tensor

from stem.patterns.common import Prompt, by_block, check_blocks, last_probabilities, offset_sums, ranks, select_mask
from stem.selection import BlockSelection

LAST_QUERIES = 64
FORCED_VERTICALS, FORCED_SLASHES = 30, 100  # first tokens, nearest offsets, ranked before all others
LEAST_VERTICALS, LEAST_SLASHES = 30, 50
VERTICALS, SLASHES = 1000, 6096  # MInference's setting for heads that its search does not know
NEVER = 2**40  # a rank that no number of columns or diagonals reaches


def select(prompt: Prompt, *, verticals: int | None = None, slashes: int | None = None) -> BlockSelection:
    """Keep the key columns and the diagonals that the last 64 queries attend to most (MInference's vertical-slash).

    The exact attention of these queries to all keys ranks columns and diagonals by their sums. The first 30 tokens and
    the nearest 100 offsets rank before all others. A block pair is kept if it holds a kept column or touches a kept
    diagonal. MInference gathers single columns, here a column costs its whole block. A block touches a diagonal by its
    grid of whole blocks, also at the ragged end of the prompt.

    The last 64 queries are those of q: each chunk of a prompt has its own. All heads keep the same numbers of columns
    and diagonals. The minimum of 30 columns and 50 diagonals is the least density.

    Args:
        verticals: Number of columns [tokens]; values below 30 count as 30. None beside given slashes is 1000.
        slashes: Number of diagonals [tokens]; values below 50 count as 50. None beside given verticals is 6096. None
            for both solves them for the config's density: MInference's ratio of 1000 columns to 6096 diagonals, then
            as many more columns as fit.
    """
    check_blocks(0, verticals=verticals, slashes=slashes)
    q, k, _, config = prompt
    size = config.block_size
    probabilities = last_probabilities(q, k, LAST_QUERIES)
    columns = _ranks(probabilities.sum(2), FORCED_VERTICALS)  # [B, Hq, Nkv]
    offsets = _ranks(offset_sums(probabilities), FORCED_SLASHES)
    column_rank = by_block(columns, size, NEVER).amin(-1)  # [B, Hq, nk]
    offsets = by_block(offsets, size, NEVER)
    inside = torch.nn.functional.pad(offsets[..., 1:].amin(-1), (1, 0), value=NEVER)[..., :-1]
    slash_rank = offsets.amin(-1).minimum(inside)[..., prompt.distances.clamp_min(0)]
    # [B, Hq, nk, nk] each: how many columns, or diagonals, must be kept to keep the pair
    levels = torch.broadcast_tensors(column_rank[:, :, None], slash_rank)
    if verticals is None and slashes is None:
        counts = _solve(*levels, q.shape[1] * prompt.pairs)
    else:
        default = (VERTICALS if verticals is None else verticals, SLASHES if slashes is None else slashes)
        least = (max(least, given) for least, given in zip((LEAST_VERTICALS, LEAST_SLASHES), default, strict=True))
        counts = tuple(torch.full((q.shape[0],), count, device=q.device) for count in least)
    columns, diagonals = (level < count[:, None, None, None] for level, count in zip(levels, counts, strict=True))
    return select_mask(prompt, columns | diagonals)


def _ranks(sums: Tensor, forced: int) -> Tensor:
    """Return each entry's place in descending order, int64; the first `forced` entries come before all others."""
    sums = sums.clone()
    sums[..., :forced] = torch.inf
    return ranks(sums)


def _solve(column: Tensor, slash: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    """Return the numbers of columns and diagonals that keep about `pairs` block pairs of a prompt: int64 [B] each.

    Args:
        column, slash: Number of columns, or diagonals, that must be kept to keep the pair, [B, Hq, nk, nk].
    """
    causal = torch.ones_like(column[0, 0], dtype=torch.bool).tril()
    column, slash = column[..., causal].flatten(1), slash[..., causal].flatten(1)

    def kept(verticals: Tensor, slashes: Tensor) -> Tensor:
        return ((column < verticals[:, None]) | (slash < slashes[:, None])).sum(1)

    least = torch.full((column.shape[0],), LEAST_SLASHES, device=column.device)
    most = int(column[column < NEVER].max()) + 1  # ranks of columns and offsets have one range
    slashes = _largest(lambda count: kept(_verticals(count), count) <= pairs, least, most)
    verticals = _largest(lambda count: kept(count, slashes) <= pairs, _verticals(slashes), most)
    further = kept(verticals + 1, slashes) - pairs < pairs - kept(verticals, slashes)
    return verticals + further, slashes


def _verticals(slashes: Tensor) -> Tensor:
    """Return MInference's number of columns for these numbers of diagonals."""
    return (slashes * VERTICALS // SLASHES).clamp_min(LEAST_VERTICALS)


def _largest(fits: Callable[[Tensor], Tensor], low: Tensor, high: int) -> Tensor:
    """Return for each prompt the largest number in low..high that fits, low if none does: int64 [B]."""
    high = torch.full_like(low, high).maximum(low)
    for _ in range(int(high.max() - low.min()).bit_length()):
        middle = (low + high + 1) // 2
        good = fits(middle)
        low, high = torch.where(good, middle, low), torch.where(good, high, (middle - 1).maximum(low))
    return low

"""SubBlock (sglang, pull request 34148): logits of pairs of cells, exponentials before the sum over a block pair."""

import torch
from torch import Tensor

from stem.cells import cell_features, mask_future
from stem.patterns.common import Prompt, check_blocks, select_best, with_even_rows
from stem.selection import BlockSelection


def select(prompt: Prompt, *, row_blocks: int | None = None, cells: int = 4) -> BlockSelection:
    """Keep the blocks with the largest log-sum-exp of mean q . mean k / sqrt(d) over cells x cells pairs (SubBlock).

    Scores are fp32. The nearest public relative of this repository's `allocation="adaptive"`. The config's sink and
    local blocks are inside the budget.

    Args:
        row_blocks: Blocks of every row, >= 1 [blocks]. None solves it for the config's density.
        cells: Cells of a block, a divisor of the block size, 4 in the source.
    """
    check_blocks(1, row_blocks=row_blocks, cells=cells)
    if prompt.config.block_size % cells:
        raise ValueError(f"cells must divide block_size={prompt.config.block_size}, got {cells}")
    return select_best(with_even_rows(prompt, row_blocks), _scores(prompt, cells))


def _scores(prompt: Prompt, cells: int) -> Tensor:
    """Return the log-sum-exp of each block pair over the cells that hold tokens, -inf in the future."""
    q, k, _, config = prompt
    size, first = config.block_size // cells, (prompt.nk - prompt.nq) * config.block_size
    offset = k.shape[2] - q.shape[2] - first
    queries = cell_features(q, size, 1, offset, prompt.nq * cells, 0.0).unflatten(1, (k.shape[1], -1))
    keys = cell_features(k, size, 1, 0, prompt.nk * cells, 0.0)
    logits = (queries @ keys[:, :, None].mT * q.shape[-1] ** -0.5).flatten(1, 2)
    starts = torch.arange(prompt.nk * cells, device=q.device) * size
    rows = starts[: prompt.nq * cells] + first
    has_query = (rows + size > k.shape[2] - q.shape[2]) & (rows < k.shape[2])
    logits = logits.masked_fill_(~(has_query[:, None] & (starts < k.shape[2])), -torch.inf)
    return mask_future(logits.unflatten(3, (-1, cells)).logsumexp(-1).unflatten(2, (-1, cells)).logsumexp(3))

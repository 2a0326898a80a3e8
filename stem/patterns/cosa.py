"""CoSA (arXiv 2607.25291): the largest antidiagonal sums, blocks that hold the maximum of some row first."""

import torch
from torch import Tensor

from stem.cells import group_sums
from stem.config import StemConfig, check_config
from stem.patterns.common import Prompt, check_blocks, check_share, select_even, select_share
from stem.selection import BlockSelection
from stem.validation import check_qkv


def select(
    prompt: Prompt, *, top_p: float | None = None, sink_blocks: int = 1, local_blocks: int = 1
) -> BlockSelection:
    """Keep first and local blocks, blocks that hold the largest logit of some row, then others by mass (CoSA).

    Rows and key cells have the length of the config's score_stride, 8 tokens in the source. Their logit is the mean of
    q . k / sqrt(d) over an antidiagonal. The mass of a block is the sum over rows of exp(largest logit of the block -
    largest of the row). Our lists are ascending: CoSA's order decides which blocks are kept. Its kernel visits them
    in that order and skips blocks: `patterns.skip_negligible(selection, ..., priority=patterns.cosa_priority(...))`.

    Args:
        top_p: Share of the row's mass that the kept blocks reach, in [0, 1], 0.8 or 0.95 in the sources; the density
            follows. None keeps the same number of blocks in every row, solved for the config's density.
        sink_blocks, local_blocks: First and most recent blocks that are kept, inside the density [blocks]. The diagonal
            is kept in any case.
    """
    check_share(top_p=top_p)
    check_blocks(0, sink_blocks=sink_blocks, local_blocks=local_blocks)
    kept = dict(sink_blocks=sink_blocks, local_blocks=local_blocks)
    masses, holds_maximum = _masses(prompt)
    priority = _priority(prompt, masses, holds_maximum)
    if top_p is None:
        return select_even(prompt, priority, **kept)
    return select_share(prompt, masses, top_p, priority=priority, **kept)


def cosa_priority(q: Tensor, k: Tensor, config: StemConfig) -> Tensor:
    """Return CoSA's order of the key blocks of each row, larger first: fp32 (fp64 for fp64 inputs) [B, Hq, nq, nk].

    Args:
        q, k: [B, Hq, Nq, D], the last Nq positions, and [B, Hkv, Nkv, D].
        config: Its block_size and score_stride.
    """
    check_qkv(q, k, k)
    check_config(config)
    prompt = Prompt(q, k, k, config)
    return _priority(prompt, *_masses(prompt))


def _priority(prompt: Prompt, masses: Tensor, holds_maximum: Tensor) -> Tensor:
    """Return the masses, raised above all others where a block holds the largest logit of some row."""
    cells = prompt.config.block_size // prompt.config.score_stride  # no mass is larger
    return masses + (cells + 1) * holds_maximum


def _masses(prompt: Prompt) -> tuple[Tensor, Tensor]:
    """Return the mass of each block, and whether it holds the largest logit of some row: [B, Hq, nq, nk] each."""
    q, k, _, config = prompt
    stride, cells, q_start = config.score_stride, config.block_size // config.score_stride, k.shape[2] - q.shape[2]
    queries = group_sums(q, stride, stride, reverse=True, offset=q_start).unflatten(1, (k.shape[1], -1))
    keys = group_sums(k, stride, stride)
    logits = (queries @ keys[:, :, None].mT * (q.shape[-1] ** -0.5 / stride)).flatten(1, 2)  # [B, Hq, rows, cells]
    rows = torch.arange(logits.shape[2], device=q.device) + q_start // stride
    logits.masked_fill_(rows[:, None] < torch.arange(logits.shape[3], device=q.device), -torch.inf)
    front = q_start // stride % cells
    edges = (0, -logits.shape[3] % cells, front, -(front + logits.shape[2]) % cells)
    logits = torch.nn.functional.pad(logits, edges, value=-torch.inf)
    largest = logits.unflatten(3, (-1, cells)).amax(-1)  # [B, Hq, nq * cells, nk]
    maxima = largest.amax(-1, keepdim=True)
    exists = maxima.isfinite()
    masses = (largest - torch.where(exists, maxima, 0)).exp()
    holds_maximum = (largest == maxima) & exists
    return masses.unflatten(2, (-1, cells)).sum(3), holds_maximum.unflatten(2, (-1, cells)).any(3)

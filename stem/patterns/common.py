"""The arguments of a method, and functions that several methods share: equal cost, filling rows, statistics."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stem.budget import block_budget, causal_pairs
from stem.config import StemConfig
from stem.reference import attention_probabilities
from stem.scores import mask_future, pad_to_grid
from stem.selection import BlockSelection, select_blocks
from stem.validation import check_integer, check_number, compute_dtype


class Prompt(NamedTuple):
    """Queries, keys and values of a whole prompt or of its last chunk, and the config that a method follows."""

    q: Tensor
    k: Tensor
    v: Tensor
    config: StemConfig

    @property
    def nk(self) -> int:
        """Number of key blocks."""
        return -(-self.k.shape[2] // self.config.block_size)

    @property
    def nq(self) -> int:
        """Number of query blocks."""
        return self.nk - (self.k.shape[2] - self.q.shape[2]) // self.config.block_size

    @property
    def distances(self) -> Tensor:
        """i - j of every block pair of the whole prompt: int64 [nk, nk], negative in the future."""
        index = torch.arange(self.nk, device=self.q.device)
        return index[:, None] - index

    @property
    def pairs(self) -> int:
        """Block pairs that the config's schedule keeps in one head of the whole prompt."""
        if self.config.allocation == "adaptive":
            raise ValueError("allocation='adaptive' belongs to the pattern 'stem', got it for one of fixed density")
        return int(block_budget(self.nk, self.config).sum())

    def local_and_first(self, *, local_blocks: int = 1, first_blocks: int = 0) -> Tensor:
        """Return a mask of local blocks, diagonal included, and first blocks: bool [nk, nk], True in the future too."""
        return (self.distances < local_blocks) | (torch.arange(self.nk, device=self.q.device) < first_blocks)


def target_of_rows(prompt: Prompt) -> float:
    """Return the block pairs of all heads that give the rows of q the density of the config's schedule."""
    whole = causal_pairs(prompt.nk)
    return prompt.pairs / whole * prompt.q.shape[1] * (whole - causal_pairs(prompt.nk - prompt.nq))


def with_even_rows(prompt: Prompt, row_blocks: int | None = None, **changes: object) -> Prompt:
    """Return the prompt with a constant budget, forced blocks inside: `row_blocks`, or solved for the config's cost."""
    even = dict(decay=1.0, threshold=None, k_start_regimes=None, min_blocks=0, decay_from="first_row", forced="inside")
    never_dense = dict(dense_up_to=0, dense_first_blocks=0, dense_last_blocks=0)
    density = prompt.pairs / causal_pairs(prompt.nk) if row_blocks is None else None
    budget = dict(allocation="position_decay", density=density, k_start=row_blocks)
    return prompt._replace(config=prompt.config.replace(**even, **never_dense, **budget, **changes))


def select_best(prompt: Prompt, scores: Tensor) -> BlockSelection:
    """Keep the blocks with the best scores [B, Hq, nq, nk], -inf in the future, by the config's budget."""
    q, k, _, config = prompt
    return select_blocks(scores, block_budget(prompt.nk, config), config, q_len=q.shape[2], kv_len=k.shape[2])


def select_even(prompt: Prompt, scores: Tensor, *, sink_blocks: int, local_blocks: int) -> BlockSelection:
    """Keep the same number of best-scoring blocks in every row, at the cost of the config; forced blocks are inside it.

    Args:
        scores: Broadcastable to [B, Hq, nq, nk], larger = keep. The future is masked here.
    """
    scores = mask_future(scores.expand(*prompt.q.shape[:2], prompt.nq, prompt.nk).clone())
    return select_best(with_even_rows(prompt, sink_blocks=sink_blocks, local_blocks=local_blocks), scores)


def select_levels(prompt: Prompt, levels: Tensor) -> BlockSelection:
    """Keep the blocks above one level for all heads of a prompt, which gives the rows of q the config's density.

    Args:
        levels: [B, Hq, nq, nk], larger = keep, +inf = forced, -inf in the future.
    """
    count = max(1, round(target_of_rows(prompt)))
    least = levels.flatten(1).sort(-1, descending=True)[0][:, count - 1, None, None, None]
    return select_mask(prompt, levels >= least)


def select_share(
    prompt: Prompt,
    shares: Tensor,
    least: float,
    *,
    sink_blocks: int,
    local_blocks: int = 1,
    priority: Tensor | None = None,
) -> BlockSelection:
    """Keep sink blocks, local blocks, and blocks in descending order until they hold the share `least` of their row.

    Args:
        shares: [B, Hq, nq, nk], >= 0, zero in the future. Rows need not sum to 1. Ties go to the lower index.
        least: In [0, 1]. The block that reaches it is kept.
        priority: Like shares, its order is taken instead of theirs.
    """
    forced = prompt.local_and_first(local_blocks=max(local_blocks, 1), first_blocks=sink_blocks)[-prompt.nq :]
    order = torch.where(forced, torch.inf, shares if priority is None else priority).argsort(
        dim=-1, descending=True, stable=True
    )
    ordered = shares.gather(-1, order)
    before = ordered.cumsum(-1) - ordered
    kept = torch.zeros_like(shares, dtype=torch.bool)
    kept.scatter_(-1, order, before < least * shares.sum(-1, keepdim=True))
    return select_mask(prompt, kept | forced)


def select_mask(prompt: Prompt, mask: Tensor) -> BlockSelection:
    """Return the selection of bool expandable to [B, Hq, >= nq, nk], which holds the last rows; masks the future."""
    q, k, _, config = prompt
    nq, nk = prompt.nq, prompt.nk
    mask = mask[..., -nq:, :].expand(*q.shape[:2], nq, nk).tril(nk - nq)
    return BlockSelection.from_mask(mask, config.block_size, q_len=q.shape[2], kv_len=k.shape[2])


def select_window(prompt: Prompt, kept: Tensor, window_blocks: int | None, dilation: int = 1) -> BlockSelection:
    """Keep bool [nk, nk] and the last `window_blocks` blocks of each row, at steps of `dilation`.

    None takes the widest window that the config's density allows, one block wider in the first rows to use it up.
    """
    distance = prompt.distances
    steps = distance % dilation == 0
    if window_blocks is not None:
        return select_mask(prompt, kept | steps & (distance < window_blocks * dilation))
    scores = torch.where(steps, -distance.double(), -torch.inf)
    return select_mask(prompt, fill_rows(kept, scores, pairs=prompt.pairs))


def fill_rows(kept: Tensor, scores: Tensor, *, pairs: int | None = None, count: int | None = None) -> Tensor:
    """Add the same number of best-scoring blocks to every row of a whole prompt. Give `pairs` or `count`.

    Args:
        kept: bool [nk, nk], blocks that a row keeps anyway.
        scores: [..., nk, nk], larger = added first, -inf = never. The future is masked here.
        pairs: Block pairs to keep in one head. Every row gets as many blocks as fit, the first rows one more. A row
            that runs out of blocks leaves its share to the others. If `kept` alone exceeds `pairs`, nothing is added.
        count: Blocks to add to a row [blocks].
    Returns:
        bool [..., nk, nk].
    """
    scores = mask_future(scores.masked_fill(kept, -torch.inf))
    free = scores.isfinite().sum(-1).reshape(-1, kept.shape[0])[0].cpu()  # [nk], equal in all heads
    if pairs is None:
        quota = free.clamp_max(count)
    else:
        left = max(0, pairs - int(kept.tril().sum()))
        levels = torch.arange(kept.shape[0] + 1)
        low = int((free.minimum(levels[:, None]).sum(-1) <= left).sum()) - 1  # the most blocks that fit in every row
        quota = free.clamp_max(low)
        quota[(free > low).nonzero()[: left - int(quota.sum()), 0]] += 1
    return kept | (ranks(scores) < quota.to(scores.device)[:, None])


def ranks(x: Tensor) -> Tensor:
    """Return each entry's place in descending order over the last dimension, int64; ties go to the lower index."""
    return x.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


def last_probabilities(q: Tensor, k: Tensor, count: int) -> Tensor:
    """Return attention probabilities of the last `count` queries: [B, Hq, count, Nkv], fp64 for fp64 q, else fp32."""
    kv_position = torch.arange(k.shape[2], device=q.device)
    q = q[:, :, -count:]
    causal = kv_position <= torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device)[:, None]
    return attention_probabilities(q, k, causal)[0]


def offset_sums(probabilities: Tensor) -> Tensor:
    """Return sums over diagonals: [..., rows, N] -> [..., N], entry o for the keys o tokens before their query."""
    rows, tokens = probabilities.shape[-2:]
    sums = probabilities.new_zeros(*probabilities.shape[:-2], tokens)
    for row in range(rows):
        visible = tokens - rows + row + 1
        sums[..., :visible] += probabilities[..., row, :visible].flip(-1)
    return sums


def by_block(x: Tensor, block_size: int, fill: int = 0) -> Tensor:
    """Return the last dimension cut into blocks, `fill` past its end: [..., N] -> [..., nk, block_size]."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % block_size), value=fill).unflatten(-1, (-1, block_size))


def block_means(x: Tensor, block_size: int, offset: int = 0) -> Tensor:
    """Return means over the tokens that exist in each block: [B, H, N, D] -> [B, H, blocks, D].

    Row 0 of x stands at position `offset`. The means are fp64 for fp64 inputs, fp32 otherwise.
    """
    compute = compute_dtype(x.dtype)
    exists = pad_to_grid(x.new_ones(1, 1, x.shape[2], 1, dtype=compute), block_size, offset)
    x = pad_to_grid(x.to(compute), block_size, offset)
    return x.unflatten(2, (-1, block_size)).sum(3) / exists.unflatten(2, (-1, block_size)).sum(3)


def check_blocks(low: int, **values: int | None) -> None:
    """Raise unless every value is None or an int >= low; the keyword is the argument's name."""
    for name, value in values.items():
        if value is not None:
            check_integer(name, value, low)


def check_share(**values: float | None) -> None:
    """Raise unless every value is None or a number in [0, 1]; the keyword is the argument's name."""
    for name, value in values.items():
        if value is not None:
            check_number(name, value, 0.0, 1.0)

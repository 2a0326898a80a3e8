"""What the methods share: the block grid, budgets of equal cost, filling rows, and the sources' ways to keep blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stem.budget import block_budget, causal_pairs
from stem.config import StemConfig
from stem.reference import attention_probabilities
from stem.scores import mask_future, pad_to_grid
from stem.selection import BlockSelection, select_blocks
from stem.validation import check_integer, check_number, compute_dtype

BISECTIONS = 30


def block_counts(q: Tensor, k: Tensor, config: StemConfig) -> tuple[int, int]:
    """Query and key blocks of these tensors."""
    nk = -(-k.shape[2] // config.block_size)
    return nk - (k.shape[2] - q.shape[2]) // config.block_size, nk


def distances(num_kv_blocks: int, device: torch.device) -> Tensor:
    """i - j of every block pair of a whole prompt: int64 [nk, nk], negative in the future."""
    index = torch.arange(num_kv_blocks, device=device)
    return index[:, None] - index


def target_pairs(config: StemConfig, num_kv_blocks: int) -> int:
    """Block pairs that the config's own schedule costs at this length, in one head of a whole prompt."""
    if config.allocation == "adaptive":
        raise ValueError("allocation='adaptive' belongs to the pattern 'stem', got it for a pattern of fixed density")
    return int(block_budget(num_kv_blocks, config).sum())


def uniform_budget(config: StemConfig, num_kv_blocks: int, row_blocks: int | None = None) -> StemConfig:
    """A config with constant rows, forced blocks inside: `row_blocks` each, or costing what `config` costs here."""
    if row_blocks is None:
        budget = dict(density=target_pairs(config, num_kv_blocks) / causal_pairs(num_kv_blocks), k_start=None)
    else:
        budget = dict(density=None, k_start=row_blocks)
    return config.replace(
        allocation="position_decay",
        decay=1.0,
        threshold=None,
        k_start_regimes=None,
        min_blocks=0,
        dense_up_to=0,
        dense_first_blocks=0,
        dense_last_blocks=0,
        decay_from="first_row",
        forced="inside",
        **budget,
    )


def select_by_scores(
    scores: Tensor, q: Tensor, k: Tensor, config: StemConfig, *, sink_blocks: int, local_blocks: int
) -> BlockSelection:
    """The best-scoring blocks of each row at equal cost, forced blocks inside the budget.

    scores: broadcastable to [B, Hq, nq, nk], larger = keep; future blocks are masked here.
    """
    nq, nk = block_counts(q, k, config)
    config = uniform_budget(config, nk).replace(sink_blocks=sink_blocks, local_blocks=local_blocks)
    scores = mask_future(scores.expand(q.shape[0], q.shape[1], nq, nk).clone())
    return select_blocks(scores, block_budget(nk, config), config, q_len=q.shape[2], kv_len=k.shape[2])


def select_mask(mask: Tensor, q: Tensor, k: Tensor, config: StemConfig) -> BlockSelection:
    """A selection from a mask of the prompt's last rows, or of all: bool, broadcastable to [B, Hq, >= nq, nk]."""
    nq, nk = block_counts(q, k, config)
    mask = mask[..., -nq:, :].expand(q.shape[0], q.shape[1], nq, nk).tril(nk - nq)
    return BlockSelection.from_mask(mask, config.block_size, q_len=q.shape[2], kv_len=k.shape[2])


def fill_rows(kept: Tensor, scores: Tensor, *, pairs: int | None = None, count: int | None = None) -> Tensor:
    """Add the same number of best-scoring blocks to every row of a whole prompt.

    Args:
        kept: bool [nk, nk], what a row keeps anyway.
        scores: [..., nk, nk], larger = added first, -inf = never; future blocks are masked here.
        pairs: Block pairs to keep in one head: as many in every row as fit, then one more in the first rows. A row that
            runs out of blocks leaves its share to the others; nothing is added where `kept` alone exceeds `pairs`.
        count: The number itself; give one of the two.
    Returns:
        bool [..., nk, nk].
    """
    scores = mask_future(scores.masked_fill(kept, -torch.inf))
    free = scores.isfinite().sum(-1).reshape(-1, kept.shape[0])[0].cpu()  # [nk], equal in all heads
    if pairs is None:
        quota = free.clamp_max(count)
    else:
        left = max(0, pairs - int(kept.tril().sum()))
        low, high = 0, kept.shape[0]
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if int(free.clamp_max(middle).sum()) <= left else (low, middle - 1)
        quota = free.clamp_max(low)
        quota[(free > low).nonzero()[: left - int(quota.sum()), 0]] += 1
    rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return kept | (rank < quota.to(rank.device)[:, None])


def top_share(shares: Tensor, forced: Tensor, share: float) -> Tensor:
    """Forced blocks, then blocks in descending order, until they hold `share` of their row: bool, shaped like shares.

    Args:
        shares: >= 0 [..., nq, nk], zero in the future; rows need not sum to 1.
        forced: bool [nq, nk].
        share: In (0, 1]; the block that reaches it is kept, ties go to the lower index.
    """
    order = torch.where(forced, torch.inf, shares).argsort(dim=-1, descending=True, stable=True)
    ordered = shares.gather(-1, order)
    before = ordered.cumsum(-1) - ordered
    kept = torch.zeros_like(shares, dtype=torch.bool)
    kept.scatter_(-1, order, before < share * shares.sum(-1, keepdim=True))
    return kept | forced


def last_probabilities(q: Tensor, k: Tensor, count: int) -> Tensor:
    """Attention probabilities of the last `count` queries: [B, Hq, count, Nkv], fp64 for fp64 inputs, else fp32."""
    kv_position = torch.arange(k.shape[2], device=q.device)
    q = q[:, :, -count:]
    causal = kv_position <= torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device)[:, None]
    return attention_probabilities(q, k, causal)[0]


def offset_sums(probabilities: Tensor) -> Tensor:
    """Sum over each diagonal: [..., rows, N] -> [..., N], entry o sums what the rows give to the key o before them."""
    rows, tokens = probabilities.shape[-2:]
    sums = probabilities.new_zeros(*probabilities.shape[:-2], tokens)
    for row in range(rows):
        visible = tokens - rows + row + 1
        sums[..., :visible] += probabilities[..., row, :visible].flip(-1)
    return sums


def pool_blocks(x: Tensor, block_size: int) -> Tensor:
    """Sum over blocks of the last dimension: [..., N] -> [..., nk]."""
    x = torch.nn.functional.pad(x, (0, -x.shape[-1] % block_size))
    return x.unflatten(-1, (-1, block_size)).sum(-1)


def block_means(x: Tensor, block_size: int, offset: int = 0) -> Tensor:
    """Mean of the rows that exist in each block: [B, H, N, D], row 0 at position `offset` -> [B, H, blocks, D].

    fp64 for fp64 inputs, fp32 otherwise.
    """
    compute = compute_dtype(x.dtype)
    exists = pad_to_grid(x.new_ones(1, 1, x.shape[2], 1, dtype=compute), block_size, offset)
    x = pad_to_grid(x.to(compute), block_size, offset)
    return x.unflatten(2, (-1, block_size)).sum(3) / exists.unflatten(2, (-1, block_size)).sum(3)


def bisect(realised: Callable[[Tensor], Tensor], target: float, like: Tensor) -> Tensor:
    """For each prompt the parameter in [0, 1] whose realised count, which rises with it, is nearest to the target.

    realised: fp64 [B] -> int64 [B]; like: any tensor on the device, of B entries.
    """
    low, high = torch.zeros_like(like, dtype=torch.float64), torch.ones_like(like, dtype=torch.float64)
    best, gap = low, (realised(low) - target).abs()
    for step in range(BISECTIONS + 1):
        tried = high if step == 0 else (low + high) / 2
        count = realised(tried)
        best, gap = torch.where((count - target).abs() < gap, tried, best), gap.minimum((count - target).abs())
        if step:
            low, high = torch.where(count < target, tried, low), torch.where(count < target, high, tried)
    return best


def largest(fits: Callable[[Tensor], Tensor], low: Tensor, high: int) -> Tensor:
    """For each prompt the largest whole number in low..high that fits; low if none does: int64 [B]."""
    high = torch.full_like(low, high).maximum(low)
    for _ in range(int(high.max() - low.min()).bit_length()):
        middle = (low + high + 1) // 2
        good = fits(middle)
        low, high = torch.where(good, middle, low), torch.where(good, high, (middle - 1).maximum(low))
    return low


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

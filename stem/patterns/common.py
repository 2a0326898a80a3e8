"""Functions that several methods share: the block grid, equal cost, filling rows, and statistics of q and k."""

from __future__ import annotations

import torch
from torch import Tensor

from stem.budget import block_budget, causal_pairs
from stem.config import StemConfig
from stem.reference import attention_probabilities
from stem.scores import mask_future, pad_to_grid
from stem.selection import BlockSelection, select_blocks
from stem.validation import check_integer, check_number, compute_dtype


def block_counts(q: Tensor, k: Tensor, config: StemConfig) -> tuple[int, int]:
    """Return the numbers of query and key blocks."""
    nk = -(-k.shape[2] // config.block_size)
    return nk - (k.shape[2] - q.shape[2]) // config.block_size, nk


def distances(num_kv_blocks: int, device: torch.device) -> Tensor:
    """Return i - j of every block pair of a whole prompt: int64 [nk, nk], negative in the future."""
    index = torch.arange(num_kv_blocks, device=device)
    return index[:, None] - index


def local_and_first(
    q: Tensor, k: Tensor, config: StemConfig, *, local_blocks: int = 1, first_blocks: int = 0
) -> Tensor:
    """Return a mask of local blocks, diagonal included, and first blocks: bool [nk, nk], True in the future too."""
    nk = block_counts(q, k, config)[1]
    return (distances(nk, q.device) < local_blocks) | (torch.arange(nk, device=q.device) < first_blocks)


def target_pairs(config: StemConfig, num_kv_blocks: int) -> int:
    """Return the block pairs that the config's schedule keeps in one head of a whole prompt."""
    if config.allocation == "adaptive":
        raise ValueError("allocation='adaptive' belongs to the pattern 'stem', got it for a pattern of fixed density")
    return int(block_budget(num_kv_blocks, config).sum())


def target_of_rows(q: Tensor, k: Tensor, config: StemConfig) -> float:
    """Return the block pairs of all heads that give the rows of q the density of the config's schedule."""
    nq, nk = block_counts(q, k, config)
    rows = causal_pairs(nk) - causal_pairs(nk - nq)
    return target_pairs(config, nk) / causal_pairs(nk) * q.shape[1] * rows


def uniform_budget(config: StemConfig, num_kv_blocks: int, row_blocks: int | None = None) -> StemConfig:
    """Return the config with a constant budget, forced blocks inside: `row_blocks`, or solved for the config's cost."""
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
    """Keep the same number of best-scoring blocks in every row, at the cost of the config; forced blocks are inside it.

    Args:
        scores: Broadcastable to [B, Hq, nq, nk], larger = keep. The future is masked here.
    """
    nq, nk = block_counts(q, k, config)
    config = uniform_budget(config, nk).replace(sink_blocks=sink_blocks, local_blocks=local_blocks)
    scores = mask_future(scores.expand(q.shape[0], q.shape[1], nq, nk).clone())
    return select_blocks(scores, block_budget(nk, config), config, q_len=q.shape[2], kv_len=k.shape[2])


def select_share(
    shares: Tensor, least: float, q: Tensor, k: Tensor, config: StemConfig, *, sink_blocks: int
) -> BlockSelection:
    """Keep sink blocks, the diagonal, and blocks in descending order until they hold the share `least` of their row.

    Args:
        shares: [B, Hq, nq, nk], >= 0, zero in the future. Rows need not sum to 1. Ties go to the lower index.
        least: In [0, 1]. The block that reaches it is kept.
    """
    forced = local_and_first(q, k, config, first_blocks=sink_blocks)[-shares.shape[2] :]
    order = torch.where(forced, torch.inf, shares).argsort(dim=-1, descending=True, stable=True)
    ordered = shares.gather(-1, order)
    before = ordered.cumsum(-1) - ordered
    kept = torch.zeros_like(shares, dtype=torch.bool)
    kept.scatter_(-1, order, before < least * shares.sum(-1, keepdim=True))
    return select_mask(kept | forced, q, k, config)


def select_mask(mask: Tensor, q: Tensor, k: Tensor, config: StemConfig) -> BlockSelection:
    """Return the selection of bool expandable to [B, Hq, >= nq, nk], which holds the last rows; masks the future."""
    nq, nk = block_counts(q, k, config)
    mask = mask[..., -nq:, :].expand(q.shape[0], q.shape[1], nq, nk).tril(nk - nq)
    return BlockSelection.from_mask(mask, config.block_size, q_len=q.shape[2], kv_len=k.shape[2])


def add_window(kept: Tensor, config: StemConfig, window_blocks: int | None, dilation: int = 1) -> Tensor:
    """Add the last `window_blocks` blocks, at steps of `dilation`, to each row of bool [nk, nk].

    None takes the widest window that the config's density allows, one block wider in the first rows to use it up.
    """
    distance = distances(kept.shape[0], kept.device)
    steps = distance % dilation == 0
    if window_blocks is not None:
        return kept | steps & (distance < window_blocks * dilation)
    scores = torch.where(steps, -distance.double(), -torch.inf)
    return fill_rows(kept, scores, pairs=target_pairs(config, kept.shape[0]))


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
        low, high = 0, kept.shape[0]
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if int(free.clamp_max(middle).sum()) <= left else (low, middle - 1)
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

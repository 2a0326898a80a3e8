"""reduction="softmax": each key block's share of a query block's attention, estimated on cells of a few tokens."""

from functools import lru_cache

import torch
from torch import Tensor

from stem.config import StemConfig
from stem.validation import compute_dtype

CHUNK_LOGITS = 1 << 24  # logits of one chunk of query blocks, so that memory stays O(N)


def cell_scores(
    q: Tensor, k: Tensor, bonus: Tensor | None, config: StemConfig, scale: float, *, impl: str = "torch"
) -> Tensor:
    """Log of each block's share of its row's attention, estimated from logits of cell pairs.

    Our choice; softmax before the sum: XAttention, arXiv 2503.16428. Without a peak, a pair's logit is the mean over
    its antidiagonal samples. With `score_peak`, a cell has two corners (see `cell_features`): positive coordinates of
    the query multiply the key's upper corner, negative ones the lower. (At peak 1 with one query a cell, the logit is
    the bound of Quest, arXiv 2406.10774.) The softmax runs over all key cells that a query cell sees. A block's share
    is the sum over its key cells, and the mean or root mean square over its query cells, made to sum to 1 over the row.
    The last `exact_last_blocks` query blocks take cells of one token, which gives exact shares.

    Args:
        q, k: [B, Hq, Nq, D], the last Nq positions, and [B, Hkv, Nkv, D]: fp16, bf16, fp32, or fp64 with "torch".
        bonus: [B, Hkv, nk], added to the logits of a key block's cells; None is zero.
        impl: "torch" or "triton".
    Returns:
        fp32 (fp64 for fp64 inputs) [B, lists, nq, nk]; exp of it sums to 1 over a row; -inf in the future.
    """
    if impl == "triton":
        from stem.kernels.cell_scores import cell_scores as score_cells

        cells = kernel_cells(q.shape[2], k.shape[2], config, config.pooled_heads(q.shape[1], k.shape[1]))
        return score_cells(q, k, bonus, cells, scale, config.exact_last_blocks)
    scores = pair_features(*prompt_features(q, k, config, scale), bonus, config, q.shape[2], k.shape[2])
    if config.exact_last_blocks:
        size, q_start = config.block_size, k.shape[2] - q.shape[2]
        first = q_start // size
        block = max(first, blocks_at_least_half_full(k.shape[2], size) - config.exact_last_blocks)  # where they begin
        one_token = config.replace(
            exact_last_blocks=0, score_cells=size, score_query_cells=None, score_stride=1, score_peak=0.0, lists="head"
        )
        last_q = q[:, :, max(0, block * size - q_start) :]
        exact = cell_scores(last_q, k, bonus, one_token, scale).exp().unflatten(1, (scores.shape[1], -1))
        scores[:, :, block - first :] = exact.mean(2).log()
    return scores


def prompt_features(q: Tensor, k: Tensor, config: StemConfig, scale: float) -> tuple[Tensor, Tensor]:
    """Cell features of queries, times the scale, and of keys; see cell_features."""
    size, stride, peak = config.block_size, config.score_stride, config.score_peak
    key_cells, query_cells = config.score_cells, config.score_query_cells or config.score_cells
    q_start, nk = k.shape[2] - q.shape[2], -(-k.shape[2] // size)
    grid = size // query_cells, stride, q_start % size, (nk - q_start // size) * query_cells
    heads = config.pooled_heads(q.shape[1], k.shape[1])
    q_rows = cell_features(q, *grid, peak, queries=True, heads=heads) * (scale * stride)
    return q_rows, cell_features(k, size // key_cells, stride, 0, nk * key_cells, peak)


def pair_features(
    q_rows: Tensor, k_rows: Tensor, bonus: Tensor | None, config: StemConfig, q_len: int, kv_len: int
) -> Tensor:
    """cell_scores without exact blocks, from prompt_features [B, H, cells, features] of q_len queries, kv_len keys."""
    size, key_cells = config.block_size, config.score_cells
    query_cells = config.score_query_cells or key_cells
    q_cell, k_cell = size // query_cells, size // key_cells
    q_start, nk = kv_len - q_len, -(-kv_len // size)
    first = q_start // size  # key block at which the query blocks begin
    starts = torch.arange(nk * key_cells, device=k_rows.device) * k_cell
    begins = torch.arange(first * query_cells, nk * query_cells, device=k_rows.device) * q_cell
    ends = (begins + q_cell).clamp_max(kv_len)  # of the query cells
    counts = (ends > q_start) & (ends > begins)  # cells that hold a query
    if bonus is not None:
        bonus_of_cells = bonus.repeat_interleave(key_cells, -1)[:, :, None, None]  # [B, Hkv, 1, 1, cells]

    scores = q_rows.new_full((*q_rows.shape[:2], nk - first, nk), -torch.inf)
    step = max(1, CHUNK_LOGITS // (q_rows.shape[0] * q_rows.shape[1] * query_cells * key_cells * nk))
    for row in range(0, nk - first, step):
        rows, last = slice(row * query_cells, (row + step) * query_cells), min(row + step, nk - first) + first
        seen = slice(0, last * key_cells)
        logits = q_rows[:, :, rows].unflatten(1, (k_rows.shape[1], -1)) @ k_rows[:, :, None, seen].mT
        logits = logits if bonus is None else logits + bonus_of_cells[..., seen]
        logits = logits.flatten(1, 2).masked_fill_(starts[seen] >= ends[rows, None], -torch.inf)
        shares = logits.softmax(-1).unflatten(-1, (-1, key_cells)).sum(-1)  # [B, Hq, query cells, blocks]
        counted = counts[rows].unflatten(0, (-1, query_cells)).to(shares.dtype)
        shares = shares.unflatten(2, (-1, query_cells)) * counted[..., None]
        if config.score_pooling == "rms":
            shares = shares.norm(dim=3)
            shares /= shares.sum(-1, keepdim=True)
        else:
            shares = shares.sum(3) / counted.sum(1)[:, None]
        scores[:, :, row : row + step, :last] = shares.log()
    return mask_future(scores)


def blocks_at_least_half_full(tokens: int, size: int) -> int:
    """Blocks of a prompt without a last one that is less than half full; exact_last_blocks counts back from here."""
    return (tokens + size // 2) // size


@lru_cache(maxsize=256)
def kernel_cells(q_len: int, kv_len: int, config: StemConfig, heads: int = 1):
    """Cells of a config for these lengths, as the kernels take them: stem.kernels.cell_scores.Cells."""
    from stem.kernels.cell_scores import Cells

    grid = dict(block_size=config.block_size, q_len=q_len, kv_len=kv_len, heads=heads)
    cells = dict(query_cells=config.score_query_cells or config.score_cells, key_cells=config.score_cells)
    return Cells(**grid, **cells, stride=config.score_stride, peak=config.score_peak, rms=config.score_pooling == "rms")


def cell_features(
    x: Tensor, cell: int, stride: int, front: int, num_cells: int, peak: float, *, queries: bool = False, heads: int = 1
) -> Tensor:
    """One factor of the logits: cell means, or with a peak the upper and the lower corner of each cell side by side.

    The product of a query cell's and a key cell's row, times `stride`, is the mean of q.k over their samples.

    Args:
        x: [B, H, N, D]; row 0 stands `front` rows into cell 0, which has `cell` rows like all of the `num_cells`.
        stride: Groups of a cell; group g holds its rows g, g + stride, ... With a peak, stride is 1.
        peak: How far a corner lies from the mean (0) to the largest or smallest value of a dimension (1).
        queries: Reverse the groups; keep the positive part of the upper corner and the negative part of the lower one.
        heads: Consecutive heads whose cells are pooled as those of one head.
    Returns:
        fp32 (fp64 for fp64 inputs) [B, H / heads, num_cells, stride * D], twice as wide if peak > 0; 0 where no row is.
    """
    around = (0, 0, front, num_cells * cell - front - x.shape[2])
    sums = group_sums(torch.nn.functional.pad(x, around), cell, stride, reverse=queries)
    edges = (torch.arange(num_cells + 1, device=x.device) * cell - front).clamp(0, x.shape[2])
    means = sums.unflatten(1, (-1, heads)).mean(2) / edges.diff().clamp_min(1).to(sums.dtype)[:, None]
    if not peak:
        return means
    corners = []
    for reduce, nothing in ((torch.amax, -torch.inf), (torch.amin, torch.inf)):
        rows = torch.nn.functional.pad(x, around, value=nothing).unflatten(2, (num_cells, cell))
        extreme = reduce(rows.unflatten(1, (-1, heads)), (2, 4)).to(means.dtype)
        corners.append(means.lerp(torch.where(extreme == nothing, 0, extreme), peak))
    upper, lower = corners
    return torch.cat([upper.clamp_min(0), lower.clamp_max(0)] if queries else corners, -1)


def group_sums(x: Tensor, size: int, stride: int, *, reverse: bool = False, offset: int = 0) -> Tensor:
    """Sums of every `stride`-th row of each block, the factors of the antidiagonal score (exact by linearity).

    Args:
        x: [B, H, N, D]; row 0 stands at position `offset` of the key grid. `stride` divides `size`, the rows per block.
        reverse: Store group g at slot stride - 1 - g, as queries need it so that equal slots form antidiagonals.
    Returns:
        fp32 (fp64 for fp64 inputs) [B, H, blocks, stride * D]; rows that do not exist count as zeros.
    """
    x = pad_to_grid(x, size, offset).to(compute_dtype(x.dtype)).contiguous()  # the bits of sums depend on strides
    sums = x.unflatten(2, (-1, size // stride, stride)).sum(3)  # [B, H, blocks, stride, D]
    return (sums.flip(3) if reverse else sums).flatten(3)


def pad_to_grid(x: Tensor, size: int, offset: int = 0) -> Tensor:
    """Pad x [B, H, N, D], which starts at `offset`, with zero rows to whole blocks; x itself where none is missing."""
    front = offset % size
    behind = -(front + x.shape[2]) % size
    return torch.nn.functional.pad(x, (0, 0, front, behind)) if front or behind else x


def mask_future(scores: Tensor) -> Tensor:
    """Put -inf where the key block comes after the query block; scores [..., nq, nk], queries are the last rows."""
    nq, nk = scores.shape[-2:]
    future = torch.ones(nq, nk, dtype=torch.bool, device=scores.device).triu(nk - nq + 1)
    return scores.masked_fill_(future, -torch.inf)

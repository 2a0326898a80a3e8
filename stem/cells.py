"""reduction="softmax": each key block's share of a query block's attention, estimated on cells of a few tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from stem.config import StemConfig

CHUNK_LOGITS = 1 << 24  # logits of one chunk of query blocks, so that memory stays O(N)


def cell_scores(
    q: Tensor, k: Tensor, bonus: Tensor, config: StemConfig, scale: float, *, impl: str = "torch"
) -> Tensor:
    """Log of the share (our choice; XAttention, arXiv 2503.16428, with cells of `score_stride` tokens).

    A cell pair gets the mean logit of its antidiagonal samples, which with `score_stride=1` is the product of the cell
    means; softmax over all key cells that a query cell sees; sum over a key block's cells; mean over a query block's
    cells. Peaks survive the block sum because the softmax comes first.

    Args:
        q: [B, Hq, Nq, D], fp16, bf16, fp32 or fp64 (not with "triton"), the last Nq positions.
        k: [B, Hkv, Nkv, D].
        bonus: [B, Hkv, nk], added to the logits of a key block's cells.
        config: block_size, score_cells and score_stride are used.
        scale: Softmax scale.
        impl: "torch" or "triton".
    Returns:
        fp32 (fp64 for fp64 inputs) [B, Hq, nq, nk]; exp of it sums to 1 over a row; -inf in the future.
    """
    size, cells, stride = config.block_size, config.score_cells, config.score_stride
    if impl == "triton":
        from stem.kernels import cell_scores

        cell_counts = dict(q_cells=cells, k_cells=cells)
        return cell_scores.cell_scores(q, k, bonus, block_size=size, stride=stride, scale=scale, **cell_counts)
    kv_len, cell = k.shape[2], size // cells
    q_start, nk = kv_len - q.shape[2], -(-kv_len // size)
    first = q_start // size  # key block at which the query blocks begin
    q_means = cell_means(q, cell, stride, q_start - first * size, (nk - first) * cells, reverse=True) * (scale * stride)
    k_means = cell_means(k, cell, stride, 0, nk * cells)
    starts = torch.arange(nk * cells, device=k.device) * cell
    ends = (starts[first * cells :] + cell).clamp_max(kv_len)  # of the query cells
    counts = (ends > q_start) & (ends > starts[first * cells :])  # cells that hold a query
    bonus = bonus.repeat_interleave(cells, -1)[:, :, None, None]  # [B, Hkv, 1, 1, key cells]

    scores = q_means.new_full((*q.shape[:2], nk - first, nk), -torch.inf)
    step = max(1, CHUNK_LOGITS // (q.shape[0] * q.shape[1] * cells**2 * nk))
    for row in range(0, nk - first, step):
        rows, last = slice(row * cells, (row + step) * cells), min(row + step, nk - first) + first
        seen = slice(0, last * cells)
        logits = q_means[:, :, rows].unflatten(1, (k.shape[1], -1)) @ k_means[:, :, None, seen].mT + bonus[..., seen]
        logits = logits.flatten(1, 2).masked_fill_(starts[seen] >= ends[rows, None], -torch.inf)
        shares = logits.softmax(-1).unflatten(-1, (-1, cells)).sum(-1)  # [B, Hq, query cells, blocks]
        counted = counts[rows].unflatten(0, (-1, cells)).to(shares.dtype)
        shares = (shares.unflatten(2, (-1, cells)) * counted[..., None]).sum(3) / counted.sum(1)[:, None]
        scores[:, :, row : row + step, :last] = shares.log()
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(first + 1)
    return scores.masked_fill_(future, -torch.inf)


def cell_means(x: Tensor, cell: int, stride: int, front: int, num_cells: int, *, reverse: bool = False) -> Tensor:
    """Sums of the stride groups of each cell over the number of its rows: means if `stride` is 1.

    The product of a query cell's and a key cell's row, times `stride`, is the mean of q.k over their samples.

    Args:
        x: [B, H, N, D]; row 0 stands `front` rows into cell 0, which has `cell` rows like all of the `num_cells`.
        stride: Groups of a cell; group g holds its rows g, g + stride, ...
        reverse: Store group g at slot stride - 1 - g, as queries need it so that equal slots form antidiagonals.
    Returns:
        fp32 (fp64 for fp64 inputs) [B, H, num_cells, stride * D]; 0 for a cell without rows.
    """
    accumulator = torch.float64 if x.dtype == torch.float64 else torch.float32
    padded = torch.nn.functional.pad(x, (0, 0, front, num_cells * cell - front - x.shape[2])).to(accumulator)
    sums = padded.unflatten(2, (num_cells, cell // stride, stride)).sum(3)  # [B, H, cells, stride, D]
    edges = (torch.arange(num_cells + 1, device=x.device) * cell - front).clamp(0, x.shape[2])
    rows = edges.diff().clamp_min(1).to(accumulator)
    return (sums.flip(3) if reverse else sums).flatten(3) / rows[:, None]

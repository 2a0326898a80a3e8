"""impl="torch": block-sparse attention by gathering the kept key blocks, fast on a CPU, differentiable, memory O(N)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stem.scores import pad_to_grid
from stem.selection import BlockSelection

CHUNK_LOGITS = 1 << 20  # logits of one chunk of rows: 4 MiB in fp32, so that softmax finds them in cache


def gather_attention(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, scale: float) -> tuple[Tensor, Tensor]:
    """Attention over the kept blocks, a few query blocks at a time; see stem.block_sparse_attention.

    Query blocks of all heads are sorted by the length of their lists, so that a chunk wastes little on padding. With
    gradients each chunk is recomputed in the backward pass.
    """
    size, offset = selection.block_size, k.shape[2] - q.shape[2]
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    q_blocks = pad_to_grid(q, size, offset).to(compute).unflatten(2, (-1, size)).flatten(0, 2) * scale  # [M, size, D]
    k_blocks, v_blocks = (pad_to_grid(x, size).to(compute).unflatten(2, (-1, size)).flatten(0, 2) for x in (k, v))
    lists, counts = selection.kv_indices.flatten(0, 2).long(), selection.kv_num_blocks.flatten().long()
    diagonal, kv_start = _rows(selection, k.shape[1])

    order = counts.argsort(stable=True)
    widths = counts[order].tolist()
    first = widths.count(0)  # rows without blocks come first and give zeros
    chunks = [(q_blocks[order[:first]] * 0, q_blocks.new_full((first, size), -torch.inf))]
    for chunk in _chunks(widths, first, size):
        rows, width = order[chunk], widths[chunk.stop - 1]
        slots = torch.arange(width, device=q.device) - (width - counts[rows])[:, None]  # right-aligned, < 0 = unused
        columns = lists[rows].gather(1, slots.clamp_min(0))  # [R, W], the diagonal block last if it is kept
        blocks = (columns + kv_start[rows, None]).flatten()
        future = (columns[:, -1] == diagonal[rows])[:, None, None] & _above_diagonal(size, q.device)
        unused = (slots < 0).repeat_interleave(size, 1)[:, None] if widths[chunk.start] < width else None
        args = (q_blocks[rows], k_blocks, v_blocks, blocks, future, unused)
        if torch.is_grad_enabled() and q_blocks.requires_grad | k_blocks.requires_grad | v_blocks.requires_grad:
            chunks.append(checkpoint(_attend, *args, use_reentrant=False))
        else:
            chunks.append(_attend(*args))
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=q.device))
    heads_and_blocks = (*q.shape[:2], selection.num_q_blocks)
    queries = slice(offset % size, offset % size + q.shape[2])
    out, lse = (torch.cat(x)[inverse].unflatten(0, heads_and_blocks).flatten(2, 3) for x in zip(*chunks, strict=True))
    return out[:, :, queries].to(q.dtype), lse[:, :, queries]


def _attend(
    q: Tensor, k_blocks: Tensor, v_blocks: Tensor, blocks: Tensor, future: Tensor, unused: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Softmax attention of R query blocks [R, size, D], scaled, over W key blocks each: out and lse [R, size]."""
    rows, size, dim = q.shape
    k, v = (x.flatten(1).index_select(0, blocks).view(rows, -1, dim) for x in (k_blocks, v_blocks))  # [R, W * size, D]
    logits = torch.bmm(q, k.mT)
    logits[..., -size:].masked_fill_(future, -torch.inf)  # causality reaches the last block only
    if unused is not None:
        logits.masked_fill_(unused, -torch.inf)
    weights = logits.softmax(-1)
    return torch.bmm(weights, v), logits.amax(-1) - weights.amax(-1).log()


def _rows(selection: BlockSelection, kv_heads: int) -> tuple[Tensor, Tensor]:
    """For each of the B * Hq * nq rows: its diagonal key block, and where its KV head's blocks start; int64."""
    (batch, q_heads, nq), nk = selection.kv_num_blocks.shape, selection.num_kv_blocks
    device = selection.kv_indices.device
    head = torch.arange(batch * q_heads, device=device).repeat_interleave(nq)
    kv_head = head // q_heads * kv_heads + head % q_heads // (q_heads // kv_heads)
    return torch.arange(nk - nq, nk, device=device).repeat(batch * q_heads), kv_head * nk


def _chunks(widths: list[int], start: int, size: int) -> list[slice]:
    """Consecutive sorted rows, at most CHUNK_LOGITS logits where one row fits."""
    chunks = []
    for stop in range(start + 1, len(widths) + 1):
        if stop == len(widths) or (stop + 1 - start) * widths[stop] * size**2 > CHUNK_LOGITS:
            chunks.append(slice(start, stop))
            start = stop
    return chunks


def _above_diagonal(size: int, device: torch.device) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool, device=device).triu(1)

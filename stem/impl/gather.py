"""impl="torch": block-sparse attention by gathering the kept key blocks, fast on a CPU, differentiable, memory O(N)."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from stem.scores import pad_to_grid
from stem.selection import BlockSelection
from stem.transforms import is_transformed
from stem.validation import compute_dtype

PIECE_KEYS = 512  # keys of a row in one product
PIECE_NUMBERS = 1 << 21  # weights, keys and values of one product: 8 MiB in fp32, so that exp2 finds them in cache
CHUNK_LOGITS = 1 << 20  # of one chunk of rows: 4 MiB in fp32, so that softmax finds them in cache
LARGEST_SUM = 2.0**64  # of a row's weights exp(logit); and its inverse is the smallest


def gather_attention(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, scale: float) -> tuple[Tensor, Tensor]:
    """Attention over the kept blocks, a few query blocks at a time; see stem.block_sparse_attention."""
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    size, offset, kv_heads = selection.block_size, k.shape[2] - q.shape[2], k.shape[1]
    blocks = _blocks(q, size, offset), _blocks(k, size), _blocks(v, size)
    if q.device.type == "cpu" and not needs_grad and not is_transformed(q, k, v):
        out, lse, rest = _plain_attention(blocks, selection, kv_heads, scale)
        if len(rest):
            out[rest], lse[rest] = _softmax_attention(blocks, selection, kv_heads, scale, rest)
    else:
        everything = torch.arange(len(blocks[0]), device=q.device)
        out, lse = _softmax_attention(blocks, selection, kv_heads, scale, everything)
    heads_and_blocks = (*q.shape[:2], selection.num_q_blocks)
    queries = slice(offset % size, offset % size + q.shape[2])
    out, lse = (x.unflatten(0, heads_and_blocks).flatten(2, 3)[:, :, queries] for x in (out, lse))
    return out.to(q.dtype), lse


def gather_gradients(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, scale: float, dout: Tensor, dlse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gather_attention's out and lse, by formula and chunk by chunk: dq, dk and dv like q, k and v.

    With weights P and dP = dO V^T, the gradient of the logits is P (dP - sum(P dP) + dlse).
    """
    size, offset = selection.block_size, k.shape[2] - q.shape[2]
    q_blocks, k_blocks, v_blocks = _blocks(q, size, offset) * scale, _blocks(k, size), _blocks(v, size)
    dout_blocks, dlse_blocks = _blocks(dout, size, offset), _blocks(dlse[..., None], size, offset)  # [M, size, D or 1]
    dq, dk, dv = torch.zeros_like(q_blocks), torch.zeros_like(k_blocks), torch.zeros_like(v_blocks)
    order, widths = _sorted_rows(selection, torch.arange(len(q_blocks), device=q.device))
    for rows, blocks, future, unused in _chunked_lists(selection, k.shape[1], order, widths):
        k_rows, v_rows = (_gathered(x, blocks, len(rows)) for x in (k_blocks, v_blocks))  # [R, W * size, D]
        weights = _masked_logits(q_blocks[rows], k_rows, future, unused).softmax(-1)
        dweights = torch.bmm(dout_blocks[rows], v_rows.mT)
        mean = (weights * dweights).sum(-1, keepdim=True)
        dlogits = weights * (dweights - mean + dlse_blocks[rows])
        dq[rows] = torch.bmm(dlogits, k_rows) * scale
        dk.index_add_(0, blocks, torch.bmm(dlogits.mT, q_blocks[rows]).view(-1, *dk.shape[1:]))
        dv.index_add_(0, blocks, torch.bmm(weights.mT, dout_blocks[rows]).view(-1, *dv.shape[1:]))
    starts = offset % size, 0, 0
    blocks_of = (x.unflatten(0, (*y.shape[:2], -1)).flatten(2, 3) for x, y in zip((dq, dk, dv), (q, k, v), strict=True))
    return tuple(x[:, :, i : i + y.shape[2]].to(y.dtype) for x, y, i in zip(blocks_of, (q, k, v), starts, strict=True))


def _plain_attention(
    all_blocks: tuple[Tensor, Tensor, Tensor], selection: BlockSelection, kv_heads: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax without subtracting the row maximum: out and lse [M, size], and the query blocks where it overflows."""
    # exp2: PyTorch's exp can take three times as long on a CPU. Reused buffers: fresh pages cost several copies.
    q_blocks, k_blocks, v_blocks = all_blocks
    size, dim = q_blocks.shape[1:]
    counts = selection.kv_num_blocks.flatten().long()
    diagonal, kv_start = _rows(selection, kv_heads)
    lists = selection.kv_indices.flatten(0, 2)  # [M, max]
    has_diagonal = (lists.gather(1, (counts - 1).clamp_min(0)[:, None])[:, 0] == diagonal) & (counts > 0)
    blocks = lists + kv_start[:, None]  # rows of k_blocks and v_blocks
    wide = max(1, PIECE_KEYS // size)  # blocks of a row in one product
    most = max(wide, PIECE_NUMBERS // (size * (size + 2 * dim)))  # pairs of blocks in one product
    k_room, v_room, weights_room = (q_blocks.new_empty(most * size * columns) for columns in (dim, dim, size))
    out, sums = torch.empty_like(q_blocks), q_blocks.new_empty(*q_blocks.shape[:2], 1)
    kinds = 2 * counts + has_diagonal
    order = kinds.argsort(stable=True)
    kinds, repeats = kinds[order].unique_consecutive(return_counts=True)
    for kind, group in zip(kinds.tolist(), order.split(repeats.tolist()), strict=True):
        width, causal = kind // 2, kind % 2
        for rows in group.split(most // max(1, min(width, wide))):
            q = q_blocks.index_select(0, rows)
            total, weighted = q.new_zeros(len(rows), size, 1), torch.zeros_like(q)
            for start in range(0, width, wide):
                piece = blocks[rows, start : min(start + wide, width)]
                keys = piece.shape[1] * size
                k, v = (room[: len(rows) * keys * dim].view(-1, size, dim) for room in (k_room, v_room))
                torch.index_select(k_blocks, 0, piece.flatten(), out=k)
                torch.index_select(v_blocks, 0, piece.flatten(), out=v)
                k, v = (x.view(len(rows), keys, dim) for x in (k, v))
                weights = weights_room[: len(rows) * size * keys].view(len(rows), size, keys)
                torch.baddbmm(weights, q, k.mT, beta=0, alpha=scale * math.log2(math.e), out=weights).exp2_()
                if causal and start + wide >= width:
                    weights[..., -size:].tril_()
                total += weights.sum(-1, keepdim=True)
                weighted.baddbmm_(weights, v)
            sums.index_copy_(0, rows, total)
            out.index_copy_(0, rows, weighted.div_(total.clamp_min(1 / LARGEST_SUM)))
    within = ((sums >= 1 / LARGEST_SUM) & (sums <= LARGEST_SUM)).flatten(1).all(1)
    return out, sums.log_()[..., 0], (~within & (counts > 0)).nonzero()[:, 0]


def _softmax_attention(
    all_blocks: tuple[Tensor, Tensor, Tensor], selection: BlockSelection, kv_heads: int, scale: float, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Out and lse [R, size] of the query blocks `rows`, ascending, in chunks sorted by the lengths of their lists."""
    q_blocks, k_blocks, v_blocks = all_blocks
    order, widths = _sorted_rows(selection, rows)
    first = widths.count(0)  # rows without blocks come first and give zeros
    chunks = [(q_blocks[order[:first]] * 0, q_blocks.new_full((first, q_blocks.shape[1]), -torch.inf))]
    for chunk, *kept in _chunked_lists(selection, kv_heads, order, widths):
        chunks.append(_attend(q_blocks[chunk] * scale, k_blocks, v_blocks, *kept))
    inverse = order.argsort()
    return tuple(torch.cat(x)[inverse] for x in zip(*chunks, strict=True))


def _attend(
    q: Tensor, k_blocks: Tensor, v_blocks: Tensor, blocks: Tensor, future: Tensor, unused: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Softmax attention of R query blocks [R, size, D], scaled, over W key blocks each: out and lse [R, size]."""
    k, v = (_gathered(x, blocks, len(q)) for x in (k_blocks, v_blocks))  # [R, W * size, D]
    logits = _masked_logits(q, k, future, unused)
    weights = logits.softmax(-1)
    return torch.bmm(weights, v), logits.amax(-1) - weights.amax(-1).log()


def _gathered(x_blocks: Tensor, blocks: Tensor, rows: int) -> Tensor:
    """Listed blocks of x_blocks [M, size, D], equally many for each row: [rows, W * size, D]."""
    return x_blocks.flatten(1)[blocks].view(rows, -1, x_blocks.shape[2])


def _masked_logits(q: Tensor, k: Tensor, future: Tensor, unused: Tensor | None) -> Tensor:
    logits = torch.bmm(q, k.mT)
    logits[..., -q.shape[1] :].masked_fill_(future, -torch.inf)  # causality reaches the last block only
    return logits if unused is None else logits.masked_fill_(unused, -torch.inf)


def _blocks(x: Tensor, size: int, offset: int = 0) -> Tensor:
    """Blocks of x [B, H, N, D] on the key grid, zero-padded: fp32 (fp64 for fp64 inputs) [B * H * blocks, size, D]."""
    return pad_to_grid(x, size, offset).to(compute_dtype(x.dtype)).unflatten(2, (-1, size)).flatten(0, 2)


def _sorted_rows(selection: BlockSelection, rows: Tensor) -> tuple[Tensor, list[int]]:
    """Query blocks `rows`, int64 [R] of B * Hq * nq, sorted by the lengths of their lists, and these lengths."""
    counts = selection.kv_num_blocks.flatten()[rows]
    order = counts.argsort(stable=True)
    return rows[order], counts[order].tolist()


def _chunked_lists(
    selection: BlockSelection, kv_heads: int, order: Tensor, widths: list[int]
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Chunks of the query blocks with a list: rows [R], key blocks [R * W], masks [R, size, size], [R, 1, W * size]."""
    size, device = selection.block_size, selection.kv_indices.device
    lists, counts = selection.kv_indices.flatten(0, 2).long(), selection.kv_num_blocks.flatten().long()
    diagonal, kv_start = _rows(selection, kv_heads)
    above = torch.ones(size, size, dtype=torch.bool, device=device).triu(1)
    for chunk in _chunks(widths, widths.count(0), size):
        rows, width = order[chunk], widths[chunk.stop - 1]
        slots = torch.arange(width, device=device) - (width - counts[rows])[:, None]  # right-aligned, < 0 = unused
        columns = lists[rows].gather(1, slots.clamp_min(0))  # [R, W], the diagonal block last if it is kept
        blocks = (columns + kv_start[rows, None]).flatten()
        future = (columns[:, -1] == diagonal[rows])[:, None, None] & above
        unused = (slots < 0).repeat_interleave(size, 1)[:, None] if widths[chunk.start] < width else None
        yield rows, blocks, future, unused


def _rows(selection: BlockSelection, kv_heads: int) -> tuple[Tensor, Tensor]:
    """Diagonal key block of each of the B * Hq * nq rows, and the index of its KV head's first block; int64."""
    (batch, q_heads, nq), nk = selection.kv_num_blocks.shape, selection.num_kv_blocks
    device = selection.kv_indices.device
    head = torch.arange(batch * q_heads, device=device).repeat_interleave(nq)
    kv_head = head // q_heads * kv_heads + head % q_heads // (q_heads // kv_heads)
    return torch.arange(nk - nq, nk, device=device).repeat(batch * q_heads), kv_head * nk


def _chunks(widths: list[int], start: int, size: int) -> list[slice]:
    """Slices of sorted rows, each of at most CHUNK_LOGITS logits or of one row."""
    chunks = []
    for stop in range(start + 1, len(widths) + 1):
        if stop == len(widths) or (stop + 1 - start) * widths[stop] * size**2 > CHUNK_LOGITS:
            chunks.append(slice(start, stop))
            start = stop
    return chunks

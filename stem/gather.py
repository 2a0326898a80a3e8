"""impl="torch": block-sparse attention by gathering the kept key blocks, fast on a CPU, differentiable, memory O(N)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stem.scores import pad_to_grid
from stem.selection import BlockSelection

CHUNK_KEYS = 1 << 21  # gathered key elements of one call of the flash kernel: 8 MiB in fp32
CHUNK_LOGITS = 1 << 20  # logits of one chunk of rows: 4 MiB in fp32, so that softmax finds them in cache


def gather_attention(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, scale: float) -> tuple[Tensor, Tensor]:
    """Attention over the kept blocks, a few query blocks at a time; see stem.block_sparse_attention.

    Query blocks of all heads are sorted by the length of their lists, so that a chunk wastes little on padding. With
    gradients each chunk is recomputed in the backward pass. Without gradients on the CPU, torch's own flash kernel does
    the work, which keeps no logits at all.
    """
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if q.device.type == "cpu" and not needs_grad:
        return _flash_attention(q, k, v, selection, scale)
    size, offset = selection.block_size, k.shape[2] - q.shape[2]
    q_blocks, k_blocks, v_blocks = _blocks(q, size, offset) * scale, _blocks(k, size), _blocks(v, size)
    order, widths = _sorted_rows(selection)
    first = widths.count(0)  # rows without blocks come first and give zeros
    chunks = [(q_blocks[order[:first]] * 0, q_blocks.new_full((first, size), -torch.inf))]
    for rows, *kept in _chunked_lists(selection, k.shape[1], order, widths):
        args = (q_blocks[rows], k_blocks, v_blocks, *kept)
        if needs_grad:
            chunks.append(checkpoint(_attend, *args, use_reentrant=False))
        else:
            chunks.append(_attend(*args))
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=q.device))
    heads_and_blocks = (*q.shape[:2], selection.num_q_blocks)
    queries = slice(offset % size, offset % size + q.shape[2])
    out, lse = (torch.cat(x)[inverse].unflatten(0, heads_and_blocks).flatten(2, 3) for x in zip(*chunks, strict=True))
    return out[:, :, queries].to(q.dtype), lse[:, :, queries]


def gather_gradients(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, scale: float, dout: Tensor, dlse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gather_attention's out and lse, by formula and chunk by chunk: dq, dk and dv like q, k and v.

    For stem.ops, below autograd. With weights P and dP = dO V^T, the logits' gradient is P (dP - sum(P dP) + dlse).
    """
    size, offset = selection.block_size, k.shape[2] - q.shape[2]
    q_blocks, k_blocks, v_blocks = _blocks(q, size, offset) * scale, _blocks(k, size), _blocks(v, size)
    dout_blocks, dlse_blocks = _blocks(dout, size, offset), _blocks(dlse[..., None], size, offset)  # [M, size, D or 1]
    dq, dk, dv = torch.zeros_like(q_blocks), torch.zeros_like(k_blocks), torch.zeros_like(v_blocks)
    for rows, blocks, future, unused in _chunked_lists(selection, k.shape[1], *_sorted_rows(selection)):
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


def _flash_attention(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, scale: float) -> tuple[Tensor, Tensor]:
    """The same on the CPU without gradients: the diagonal blocks in one causal call, then the others, merged by lse.

    Blocks before the diagonal need no mask, so rows with equally many of them go together without padding. The operator
    is the one behind SDPA on the CPU, called by name because SDPA does not return the log-sum-exp. Keys and values are
    gathered into the same memory again and again: fresh pages would cost several times the copy.
    """
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    size, offset = selection.block_size, k.shape[2] - q.shape[2]
    q_blocks, k_blocks, v_blocks = _blocks(q, size, offset), _blocks(k, size), _blocks(v, size)  # [M, size, D]
    counts = selection.kv_num_blocks.flatten().long()
    diagonal, kv_start = _rows(selection, k.shape[1])
    blocks = selection.kv_indices.flatten(0, 2) + kv_start[:, None]  # [M, max], rows of k_blocks
    diagonal = diagonal + kv_start
    has_diagonal = (blocks.gather(1, (counts - 1).clamp_min(0)[:, None])[:, 0] == diagonal) & (counts > 0)
    earlier = counts - has_diagonal.long()  # blocks before the diagonal
    block_keys = size * q.shape[3]  # elements of a block
    rooms = [k_blocks.new_empty(max(CHUNK_KEYS, (int(earlier.max()) or 1) * block_keys)) for _ in range(2)]

    def attend(rows: Tensor, columns: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """Query blocks `rows` [R] over key blocks `columns` [R, W]: out [R, size, D] and lse [R, size, 1]."""
        chosen = []
        for x, room in zip((k_blocks, v_blocks), rooms, strict=True):
            gathered = room[: columns.numel() * block_keys].view(-1, *x.shape[1:])
            torch.index_select(x, 0, columns.flatten(), out=gathered)
            chosen.append(gathered.view(len(rows), 1, columns.shape[1] * size, -1))
        out, lse = flash(q_blocks.index_select(0, rows)[:, None], *chosen, is_causal=causal, scale=scale)
        return out[:, 0], lse.view(len(rows), size, 1)

    out, lse = torch.empty_like(q_blocks), q_blocks.new_empty(*q_blocks.shape[:2], 1)
    for rows in torch.arange(len(counts)).split(max(1, CHUNK_KEYS // block_keys)):
        out[rows[0] : rows[-1] + 1], lse[rows[0] : rows[-1] + 1] = attend(rows, diagonal[rows, None], True)
    out.masked_fill_(~has_diagonal[:, None, None], 0)
    lse.masked_fill_(~has_diagonal[:, None, None], -torch.inf)
    order = earlier.argsort(stable=True)
    widths, repeats = earlier[order].unique_consecutive(return_counts=True)
    for width, group in zip(widths.tolist(), order.split(repeats.tolist()), strict=True):
        for rows in group.split(max(1, CHUNK_KEYS // (width * block_keys))) if width else ():
            new_out, new_lse = attend(rows, blocks[rows, :width], False)
            old_out, old_lse = out.index_select(0, rows), lse.index_select(0, rows)
            total = torch.logaddexp(old_lse, new_lse)
            lse.index_copy_(0, rows, total)
            old_out.mul_((old_lse - total).exp_()).addcmul_(new_out, (new_lse - total).exp_())
            out.index_copy_(0, rows, old_out)
    heads_and_blocks = (*q.shape[:2], selection.num_q_blocks)
    queries = slice(offset % size, offset % size + q.shape[2])
    out, lse = (x.unflatten(0, heads_and_blocks).flatten(2, 3)[:, :, queries] for x in (out, lse))
    return out.to(q.dtype), lse[..., 0]


def _attend(
    q: Tensor, k_blocks: Tensor, v_blocks: Tensor, blocks: Tensor, future: Tensor, unused: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Softmax attention of R query blocks [R, size, D], scaled, over W key blocks each: out and lse [R, size]."""
    k, v = (_gathered(x, blocks, len(q)) for x in (k_blocks, v_blocks))  # [R, W * size, D]
    logits = _masked_logits(q, k, future, unused)
    weights = logits.softmax(-1)
    return torch.bmm(weights, v), logits.amax(-1) - weights.amax(-1).log()


def _gathered(x_blocks: Tensor, blocks: Tensor, rows: int) -> Tensor:
    """The listed blocks of x_blocks [M, size, D], as many for each of the rows: [rows, W * size, D]."""
    return x_blocks.flatten(1)[blocks].view(rows, -1, x_blocks.shape[2])


def _masked_logits(q: Tensor, k: Tensor, future: Tensor, unused: Tensor | None) -> Tensor:
    logits = torch.bmm(q, k.mT)
    logits[..., -q.shape[1] :].masked_fill_(future, -torch.inf)  # causality reaches the last block only
    return logits if unused is None else logits.masked_fill_(unused, -torch.inf)


def _blocks(x: Tensor, size: int, offset: int = 0) -> Tensor:
    """x [B, H, N, D] cut at the key grid: fp32 (fp64 for fp64 inputs) [B * H * blocks, size, D], zeros where no row."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    return pad_to_grid(x, size, offset).to(compute).unflatten(2, (-1, size)).flatten(0, 2)


def _sorted_rows(selection: BlockSelection) -> tuple[Tensor, list[int]]:
    """The B * Hq * nq query blocks in the order of their lists' lengths, int64, and these lengths."""
    counts = selection.kv_num_blocks.flatten().long()
    order = counts.argsort(stable=True)
    return order, counts[order].tolist()


def _chunked_lists(
    selection: BlockSelection, kv_heads: int, order: Tensor, widths: list[int]
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """A few query blocks at a time, of those that have a list: rows [R], their key blocks [R * W] and two masks.

    future [R, size, size] holds for the last block of a row, unused [R, 1, W * size] (None if all are used) for all.
    """
    size, device = selection.block_size, selection.kv_indices.device
    lists, counts = selection.kv_indices.flatten(0, 2).long(), selection.kv_num_blocks.flatten().long()
    diagonal, kv_start = _rows(selection, kv_heads)
    for chunk in _chunks(widths, widths.count(0), size):
        rows, width = order[chunk], widths[chunk.stop - 1]
        slots = torch.arange(width, device=device) - (width - counts[rows])[:, None]  # right-aligned, < 0 = unused
        columns = lists[rows].gather(1, slots.clamp_min(0))  # [R, W], the diagonal block last if it is kept
        blocks = (columns + kv_start[rows, None]).flatten()
        future = (columns[:, -1] == diagonal[rows])[:, None, None] & _above_diagonal(size, device)
        unused = (slots < 0).repeat_interleave(size, 1)[:, None] if widths[chunk.start] < width else None
        yield rows, blocks, future, unused


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

"""Attention of a chunk in FP8 to its prompt so far; keys and values of earlier chunks stay in FP8 until it ends.

fp8_quantize.py says what is quantized and how. The mean key and the scales of the values are those of a prompt's first
chunk: any vector may be taken off all keys, and values of later chunks get room, which costs FP8 no precision.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stem.budget import BlockRows
from stem.config import StemConfig
from stem.vllm.pages import Sums, chosen, gather

ROOM = 4.0  # values of later chunks may be this many times as large as those of the first; larger ones saturate


class Past(NamedTuple):
    """Memory for a whole prompt in FP8, filled by its chunks so far."""

    stop: int  # position after the last key
    sums: Sums | None  # see pages.attend_to_pages
    keys: Tensor  # e4m3 [1, Hkv, blocks * size, D], without the mean key
    key_scales: Tensor  # fp32 [1, Hkv, blocks]
    values: Tensor  # e4m3 [1, Hkv, blocks * D, size]
    mean_key: Tensor  # fp32 [1, Hkv, D]
    value_scales: Tensor  # fp32 [1, Hkv, D]


def attend_in_fp8(
    q: Tensor,
    kv_cache: Tensor,
    views: tuple[Tensor, Tensor, int],
    pages: Tensor,
    stop: int,
    config: StemConfig,
    rows: BlockRows,
    scale: float,
    out: Tensor,
    prompt_length: int,
    past: Past | None = None,
) -> tuple[Tensor, Past]:
    """Store in `out` the attention of queries [1, Hq, Nq, D], the last positions before `stop`; see attend_to_pages.

    Args:
        kv_cache, pages: See pages.gather.
        views: From pages.readable_rows.
        past: Of the request's chunk before, which its blocks are written into.
    Returns:
        Kept blocks of each row, int32 [1, Hq, nq], and what the next chunk needs.
    """
    k, v, step = views
    scaled = pages * step if step > 1 else pages
    lists, sums, _ = chosen(q, k, v, scaled, stop, config, rows, scale, past and past.sums, leave_out=False)
    size, (_, num_kv_heads, _, head_dim) = config.block_size, k.shape
    done = past.stop // size if past else 0  # blocks
    k, v = gather(kv_cache, pages[done:], stop - done * size)
    by_first = (past.mean_key, past.value_scales) if past else statistics(k, v, ROOM if stop < prompt_length else 1.0)
    q8, q_scales, lse, *new = quantized(q, k, v, *by_first, size, scale)
    if stop == prompt_length and past is None:  # the whole prompt
        past = Past(stop, None, *new, *by_first)
    else:
        num_blocks = -(-prompt_length // size)
        shapes = (num_blocks * size, head_dim), (num_blocks,), (num_blocks * head_dim, size)
        memory = past[2:5] if past else [new_like(x, 1, num_kv_heads, *y) for x, y in zip(new, shapes, strict=True)]
        for whole, part, start in zip(memory, new, (done * size, done, done * head_dim), strict=True):
            as_bytes(whole)[:, :, start : start + part.shape[2]].copy_(as_bytes(part))
        past = Past(stop, sums, *memory, *by_first)
    launch_attention(q8, q_scales, lse, past, *lists, size, out)
    return lists[1], past


def new_like(x: Tensor, *shape: int) -> Tensor:
    """Memory of the dtype and on the device of x."""
    return torch.empty(shape, dtype=x.dtype, device=x.device)


def as_bytes(x: Tensor) -> Tensor:
    """FP8 as uint8, which torch copies everywhere; other tensors as they are."""
    return x.view(torch.uint8) if x.itemsize == 1 else x


def statistics(k: Tensor, v: Tensor, room: float) -> tuple[Tensor, Tensor]:
    """Mean key, and scales for values `room` times as large, of k and v [1, Hkv, N, D], fp32 [1, Hkv, D] each."""
    from stem.kernels.fp8_quantize import STATISTICS_TOKENS, reduce_kernel, statistics_kernel
    from stem.kernels.launch import launch

    _, heads, tokens, dims = k.shape
    parts = -(-tokens // STATISTICS_TOKENS)
    sums, maxima = (k.new_empty(1, heads, parts, dims, dtype=torch.float32) for _ in "kv")
    mean_key, scales = (k.new_empty(1, heads, dims, dtype=torch.float32) for _ in "kv")
    numbers, sizes = (*k.stride()[:3], *v.stride()[:3], tokens, heads, parts), dict(ROWS=64, HEAD_DIM=dims)
    launch(statistics_kernel, (parts, heads), (k, v, sums, maxima), numbers, TOKENS=STATISTICS_TOKENS, **sizes)
    launch(reduce_kernel, (heads,), (sums, maxima, mean_key, scales), (tokens, parts), PARTS=16, HEAD_DIM=dims)
    return mean_key, scales * room


def quantized(
    q: Tensor, k: Tensor, v: Tensor, mean_key: Tensor, value_scales: Tensor, size: int, scale: float
) -> list[Tensor]:
    """Queries in FP8, their scales, logits of the mean key, keys in FP8, their scales, and values in FP8."""
    from stem.kernels.common import SMALLEST_SCALE
    from stem.kernels.fp8_quantize import quantize_kernel
    from stem.kernels.launch import launch

    (_, num_q_heads, num_queries, head_dim), (num_kv_heads, num_keys) = q.shape, k.shape[1:3]
    kv_blocks = -(-num_keys // size)
    q_blocks = kv_blocks - (num_keys - num_queries) // size
    fp8 = torch.float8_e4m3fn
    q8, k8 = q.new_empty(q.shape, dtype=fp8), k.new_empty(k.shape, dtype=fp8)
    v8 = v.new_empty(1, num_kv_heads, kv_blocks * head_dim, size, dtype=fp8)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    q_scales, k_scales = (
        q.new_empty(1, heads, blocks, dtype=torch.float32)
        for heads, blocks in ((num_q_heads, q_blocks), (num_kv_heads, kv_blocks))
    )
    launch(
        quantize_kernel,
        (kv_blocks, num_q_heads + 2 * num_kv_heads),
        (q, k, v, mean_key, value_scales, q8, k8, v8, q_scales, k_scales, lse),
        (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], num_queries, num_keys, num_q_heads, num_kv_heads)
        + (q_blocks, kv_blocks, max(scale, SMALLEST_SCALE)),
        BLOCK=size,
        HEAD_DIM=head_dim,
    )
    return [q8, q_scales, lse, k8, k_scales, v8]


def launch_attention(
    q8: Tensor, q_scales: Tensor, lse: Tensor, past: Past, indices: Tensor, counts: Tensor, size: int, out: Tensor
) -> None:
    """Attention over lists of blocks, stored in `out`; see fp8_forward.sparse_forward."""
    from stem.kernels.fp8_forward import describe_tiles, fp8_forward_kernel
    from stem.kernels.hopper_forward import LAUNCH_OPTIONS, NUM_CONSUMERS
    from stem.kernels.launch import Tiles
    from stem.kernels.tasks import Tasks, launch_scratch

    head_dim, device = q8.shape[3], q8.device
    tasks = Tasks.of(device, q8.shape, past.keys.shape[1], past.stop, out.stride(), 1, size)
    tiles = [
        Tiles(x, (1, 1, *shape), describe_tiles)
        for x, shape in (
            (q8, (size // NUM_CONSUMERS.value, head_dim)),
            (past.keys, (size, head_dim)),
            (past.values, (head_dim, size)),
        )
    ]
    tensors = *tiles, out, lse, q_scales, past.key_scales, past.value_scales, indices.contiguous(), counts.contiguous()
    scratch = launch_scratch(device, tasks.number)
    numbers = (past.key_scales.shape[2],)
    tasks.launch(fp8_forward_kernel, (*tensors, scratch), indices.shape[3], numbers, **LAUNCH_OPTIONS)

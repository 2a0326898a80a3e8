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
    from stem.kernels.fp8_quantize import quantize, statistics

    k, v, step = views
    scaled = pages * step if step > 1 else pages
    lists, sums, _ = chosen(q, k, v, scaled, stop, config, rows, scale, past and past.sums, leave_out=False)
    size, (_, num_kv_heads, _, head_dim) = config.block_size, k.shape
    done = past.stop // size if past else 0  # blocks
    k, v = gather(kv_cache, pages[done:], stop - done * size)
    if past:
        by_first = past.mean_key, past.value_scales
    else:
        mean_key, value_scales = statistics(k, v)
        by_first = mean_key, value_scales * (ROOM if stop < prompt_length else 1.0)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    (q8, q_scales), new_keys, (new_values, _) = quantize(q, k, v, size, scale, lse, by_first)
    new = *new_keys, new_values
    if stop == prompt_length and past is None:  # the whole prompt
        past = Past(stop, None, *new, *by_first)
    else:
        num_blocks = -(-prompt_length // size)
        shapes = (num_blocks * size, head_dim), (num_blocks,), (num_blocks * head_dim, size)
        memory = past[2:5] if past else [new_like(x, 1, num_kv_heads, *y) for x, y in zip(new, shapes, strict=True)]
        for whole, part, start in zip(memory, new, (done * size, done, done * head_dim), strict=True):
            as_bytes(whole)[:, :, start : start + part.shape[2]].copy_(as_bytes(part))
        past = Past(stop, sums, *memory, *by_first)
    launch_attention(q8, q_scales, lse, past, lists, out)
    return lists[1], past


def new_like(x: Tensor, *shape: int) -> Tensor:
    """Memory of the dtype and on the device of x."""
    return torch.empty(shape, dtype=x.dtype, device=x.device)


def as_bytes(x: Tensor) -> Tensor:
    """FP8 as uint8, which torch copies everywhere; other tensors as they are."""
    return x.view(torch.uint8) if x.itemsize == 1 else x


def launch_attention(
    q8: Tensor, q_scales: Tensor, lse: Tensor, past: Past, lists: tuple[Tensor, Tensor], out: Tensor
) -> None:
    """Attention over lists of blocks to what FP8 holds, stored in `out`."""
    from stem.kernels.fp8_forward import attend_quantized

    scales = q_scales, past.key_scales, past.value_scales
    attend_quantized(q8, past.keys, past.values, scales, lists, past.stop, out, lse)

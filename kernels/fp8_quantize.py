"""q, k and v as FP8 (e4m3) with scales, for fp8_forward.py: one pass over them, after one over k and v for statistics.

Queries and keys have one scale for each block and head, values one for each channel and head. The mean key is taken off
the keys first: that changes all logits of a row alike, so weights stay, and outliers that all keys share cost no bits.
"""

import torch
import triton
import triton.language as tl

from .common import LOG2_E, SMALLEST_SCALE
from .launch import launch

LARGEST = tl.constexpr(448.0)  # of e4m3
STATISTICS_TOKENS = 1024  # that one program of the first pass reads
FP8 = torch.float8_e4m3fn


@triton.jit
def load_rows(ptr, first_row, num_rows, stride, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Rows of a head, fp32 [ROWS, D]; rows that do not exist are 0."""
    rows = first_row + tl.arange(0, ROWS)
    pointers = ptr + rows.to(tl.int64)[:, None] * stride + tl.arange(0, HEAD_DIM)[None, :]
    return tl.load(pointers, mask=((rows >= 0) & (rows < num_rows))[:, None], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["num_keys", "num_kv_heads", "num_parts"])
def statistics_kernel(
    k_ptr, v_ptr, sums_ptr, maxima_ptr, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    num_keys, num_kv_heads, num_parts, TOKENS: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Sum of keys and largest |value| of each channel, of TOKENS tokens of a head. Grid: (parts, heads)."""
    part, batch_head = tl.program_id(0), tl.program_id(1)
    batch, head = (batch_head // num_kv_heads).to(tl.int64), (batch_head % num_kv_heads).to(tl.int64)
    sums, maxima = tl.zeros([HEAD_DIM], tl.float32), tl.zeros([HEAD_DIM], tl.float32)
    for start in range(0, TOKENS, ROWS):
        row = part * TOKENS + start
        k = load_rows(k_ptr + batch * stride_kb + head * stride_kh, row, num_keys, stride_kn, ROWS, HEAD_DIM)
        v = load_rows(v_ptr + batch * stride_vb + head * stride_vh, row, num_keys, stride_vn, ROWS, HEAD_DIM)
        sums += tl.sum(k, axis=0)
        maxima = tl.maximum(maxima, tl.max(tl.abs(v), axis=0))
    place = (batch_head * num_parts + part) * HEAD_DIM + tl.arange(0, HEAD_DIM)
    tl.store(sums_ptr + place, sums)
    tl.store(maxima_ptr + place, maxima)


@triton.jit(do_not_specialize=["num_keys", "num_parts"])
def reduce_kernel(
    sums_ptr, maxima_ptr, means_ptr, v_scales_ptr, num_keys, num_parts, PARTS: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """Mean key and scales of the values of a head, from the statistics of its parts. Grid: (heads,)."""
    head = tl.program_id(0)
    dims = tl.arange(0, HEAD_DIM)
    sums, maxima = tl.zeros([HEAD_DIM], tl.float32), tl.zeros([HEAD_DIM], tl.float32)
    for start in range(0, num_parts, PARTS):
        parts = start + tl.arange(0, PARTS)
        places = (head * num_parts + parts)[:, None] * HEAD_DIM + dims[None, :]
        exists = (parts < num_parts)[:, None]
        sums += tl.sum(tl.load(sums_ptr + places, mask=exists, other=0.0), axis=0)
        maxima = tl.maximum(maxima, tl.max(tl.load(maxima_ptr + places, mask=exists, other=0.0), axis=0))
    tl.store(means_ptr + head * HEAD_DIM + dims, sums / num_keys)
    tl.store(v_scales_ptr + head * HEAD_DIM + dims, tl.where(maxima > 0, maxima / LARGEST, 1.0))


@triton.jit
def to_fp8(x):
    """x in e4m3; quotients above its largest number by a rounding error become that number."""
    return tl.clamp(x, -LARGEST, LARGEST).to(tl.float8e4nv)


@triton.jit
def scale_of(x):
    """The scale that maps the largest |x| to the largest FP8 number; 1 if all are 0."""
    largest = tl.max(tl.abs(x))
    return tl.where(largest > 0, largest / LARGEST, 1.0)


LENGTHS = ["num_queries", "num_keys", "num_q_heads", "num_kv_heads", "num_q_blocks", "num_kv_blocks"]


@triton.jit(do_not_specialize=LENGTHS)
def quantize_kernel(
    q_ptr, k_ptr, v_ptr, means_ptr, v_scales_ptr, q8_ptr, k8_ptr, v8_ptr, q_scales_ptr, k_scales_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    num_queries, num_keys, num_q_heads, num_kv_heads, num_q_blocks, num_kv_blocks, scale,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """FP8 tiles and scales. Grid: (blocks, batch * (query heads + 2 key-value heads)).

    lse_ptr gets scale * q . mean key of each query. A tile of values is transposed, [D, BLOCK], with the tokens in the
    order of fp8_forward's weights.
    """
    block, member = tl.program_id(0), tl.program_id(1)
    heads = num_q_heads + 2 * num_kv_heads
    batch, member = (member // heads).to(tl.int64), member % heads
    dims, rows = tl.arange(0, HEAD_DIM), tl.arange(0, BLOCK)
    tile = rows[:, None] * HEAD_DIM + dims[None, :]
    if member < num_q_heads:
        if block < num_q_blocks:
            head = member
            kv_row = batch * num_kv_heads + head // (num_q_heads // num_kv_heads)
            offset = num_keys - num_queries
            first = (offset // BLOCK + block) * BLOCK - offset  # negative if the first query block is partial
            x = load_rows(q_ptr + batch * stride_qb + head * stride_qh, first, num_queries, stride_qn, BLOCK, HEAD_DIM)
            means = tl.load(means_ptr + kv_row * HEAD_DIM + dims)
            exists = (first + rows >= 0) & (first + rows < num_queries)
            q_row = batch * num_q_heads + head
            by_mean = tl.sum(x * means[None, :], axis=1) * scale
            tl.store(lse_ptr + q_row * num_queries + first + rows, by_mean, mask=exists)
            x_scale = scale_of(x)
            tl.store(q_scales_ptr + q_row * num_q_blocks + block, x_scale * scale * LOG2_E)
            to = q8_ptr + (q_row * num_queries + first) * HEAD_DIM
            tl.store(to + tile, to_fp8(x / x_scale), mask=exists[:, None])
    else:
        head = (member - num_q_heads) % num_kv_heads
        kv_row = batch * num_kv_heads + head
        first = block * BLOCK
        if block < num_kv_blocks:
            if member < num_q_heads + num_kv_heads:
                x = load_rows(k_ptr + batch * stride_kb + head * stride_kh, first, num_keys, stride_kn, BLOCK, HEAD_DIM)
                exists = first + rows < num_keys
                x -= tl.load(means_ptr + kv_row * HEAD_DIM + dims)[None, :]
                x = tl.where(exists[:, None], x, 0.0)
                x_scale = scale_of(x)
                tl.store(k_scales_ptr + kv_row * num_kv_blocks + block, x_scale)
                to = k8_ptr + (kv_row * num_keys + first) * HEAD_DIM
                tl.store(to + tile, to_fp8(x / x_scale), mask=exists[:, None])
            else:
                x = load_rows(v_ptr + batch * stride_vb + head * stride_vh, first, num_keys, stride_vn, BLOCK, HEAD_DIM)
                x /= tl.load(v_scales_ptr + kv_row * HEAD_DIM + dims)[None, :]
                values = to_fp8(x).reshape([BLOCK // 16, 2, 4, 2, HEAD_DIM])
                values = tl.permute(values, [4, 0, 2, 1, 3]).reshape([HEAD_DIM, BLOCK])
                to = v8_ptr + (kv_row * num_kv_blocks + block) * (BLOCK * HEAD_DIM)
                tl.store(to + dims[:, None] * BLOCK + rows[None, :], values)


def statistics(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean key, and scales of the values, of each channel of k and v [B, Hkv, N, D]: fp32 [B, Hkv, D] each."""
    batch, num_heads, num_keys, head_dim = k.shape
    num_parts = -(-num_keys // STATISTICS_TOKENS)
    sums, maxima = (k.new_empty(batch, num_heads, num_parts, head_dim, dtype=torch.float32) for _ in "kv")
    means, v_scales = (k.new_empty(batch, num_heads, head_dim, dtype=torch.float32) for _ in "kv")
    launch(
        statistics_kernel,
        (num_parts, batch * num_heads),
        (k, v, sums, maxima),
        (*k.stride()[:3], *v.stride()[:3], num_keys, num_heads, num_parts),
        TOKENS=STATISTICS_TOKENS,
        ROWS=64,
        HEAD_DIM=head_dim,
    )
    launch(
        reduce_kernel,
        (batch * num_heads,),
        (sums, maxima, means, v_scales),
        (num_keys, num_parts),
        PARTS=16,
        HEAD_DIM=head_dim,
    )
    return means, v_scales


def quantize(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_size: int,
    scale: float,
    lse: torch.Tensor,
    by_channel: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """FP8 tensors and their fp32 scales.

    Args:
        q, k, v: [B, Hq, Nq, D] and [B, Hkv, Nkv, D].
        block_size: Tokens of a block; blocks of queries end where blocks of keys do.
        scale: Softmax scale, put into the scales of the queries together with log2(e).
        lse: fp32 [B, Hq, Nq]; gets scale * q . mean key.
        by_channel: Mean key and scales of the values to take; None for the `statistics` of k and v.
    Returns:
        (q8 like q, [B, Hq, n_q_blocks]), (k8 like k, [B, Hkv, n_kv_blocks]) without the mean key, and
        (v8 [B, Hkv, n_kv_blocks * D, block_size], [B, Hkv, D]).
    """
    if scale < 0:
        q, scale = -q, -scale
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    (batch, num_q_heads, num_queries, head_dim), (num_kv_heads, num_keys) = q.shape, k.shape[1:3]
    num_kv_blocks = -(-num_keys // block_size)
    num_q_blocks = num_kv_blocks - (num_keys - num_queries) // block_size
    means, v_scales = by_channel or statistics(k, v)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    q8, k8 = new(*q.shape, dtype=FP8), new(*k.shape, dtype=FP8)
    v8 = new(batch, num_kv_heads, num_kv_blocks * head_dim, block_size, dtype=FP8)
    q_scales, k_scales = new(batch, num_q_heads, num_q_blocks), new(batch, num_kv_heads, num_kv_blocks)
    launch(
        quantize_kernel,
        (num_kv_blocks, batch * (num_q_heads + 2 * num_kv_heads)),
        (q, k, v, means, v_scales, q8, k8, v8, q_scales, k_scales, lse),
        (
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            num_queries,
            num_keys,
            num_q_heads,
            num_kv_heads,
            num_q_blocks,
            num_kv_blocks,
            max(float(scale), SMALLEST_SCALE),
        ),
        BLOCK=block_size,
        HEAD_DIM=head_dim,
    )
    return [(q8, q_scales), (k8, k_scales), (v8, v_scales)]

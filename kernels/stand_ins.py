"""Dropped blocks stand in by means of their keys and values.

A stand-in is the mean of TOKENS consecutive keys, and of their values; its logit is raised by ln(TOKENS). A query sees
those of the blocks before its own that its list does not hold. The forward kernel for sm_90 attends to them itself,
from `block_means` and `masks_of_kept_blocks`. Results of the other forward kernels are merged with them in place: the
online softmax continues, its state is out, with a running sum of 1 relative to the log-sum-exp.
"""

import math
from functools import cache, partial

import torch
import triton
import triton.language as tl
from torch.library import custom_op

from .common import LN_2, LOG2_E, for_all_lengths, operand_dtype, padded_dim, with_dense_rows
from .launch import Tiles, launch
from .sparse_forward import can_describe, describe_tiles, load_keys, load_rows, online_softmax_update

MASKS = 1024  # that a program writes at a time
MASKS_AT_ONCE = 128  # most masks that an attention kernel reads at a time; rows of masks are multiples of it
MEANS_TILE, MEANS_WARPS = 32 * 128, 2  # numbers that a program of means_kernel holds, and its warps
LOWEST = tl.constexpr(-1e38)  # running maximum of a row without keys; -inf - -inf would be NaN
CHUNK_LOGITS = 1 << 26  # of the backward pass at a time: 256 MiB


@for_all_lengths
def means_kernel(
    k_ptr,
    v_ptr,
    means_ptr,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    num_heads,
    num_means,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program computes a mean of TOKENS rows of k or v, ROWS at a time. Grid: (num_means, B * H, 2)."""
    mean, batch_head, of_v = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    batch, head = batch_head // num_heads, batch_head % num_heads
    x_ptr, stride_n = k_ptr + batch * stride_kb + head * stride_kh, stride_kn
    if of_v > 0:
        x_ptr, stride_n = v_ptr + batch * stride_vb + head * stride_vh, stride_vn
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for row in tl.static_range(0, TOKENS, ROWS):
        total += load_rows(
            x_ptr, mean * TOKENS + row, 0, stride_n, ROWS, HEAD_DIM, BLOCK_D, tl.float32, CHECK_ROWS=False
        )
    dims = tl.arange(0, BLOCK_D)
    means_ptr += ((of_v * tl.num_programs(1) + batch_head) * num_means + mean) * HEAD_DIM
    tl.store(means_ptr + dims, tl.sum(total, axis=0) / TOKENS, mask=dims < HEAD_DIM)


@partial(for_all_lengths, aligned="row_size")  # always a multiple of 16
def masks_kernel(
    masks_ptr,
    kv_indices_ptr,
    kv_num_blocks_ptr,
    num_q_blocks,
    num_kv_blocks,
    max_blocks,
    row_size,
    PER_BLOCK: tl.constexpr,
    NUMBERS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """One program writes the masks of a query block, as far as one is read. Grid: (B * Hq * nq,)."""
    row = tl.program_id(0).to(tl.int64)
    q_block = num_kv_blocks - num_q_blocks + row % num_q_blocks
    masks_ptr += row * row_size
    kv_indices_ptr += row * max_blocks
    places = tl.arange(0, NUMBERS)
    visible = q_block * PER_BLOCK
    read = tl.cdiv(visible, AT_ONCE) * AT_ONCE
    for first in range(0, read, NUMBERS):
        mask = tl.where(first + places < visible, 0.0, float("-inf"))
        tl.store(masks_ptr + first + places, mask.to(masks_ptr.dtype.element_ty), mask=first + places < read)
    tl.debug_barrier()  # the same program overwrites them
    num_blocks = tl.load(kv_num_blocks_ptr + row)
    nothing = tl.full([NUMBERS], float("-inf"), masks_ptr.dtype.element_ty)
    for first in range(0, num_blocks, NUMBERS):
        exists = first + places < num_blocks
        blocks = tl.load(kv_indices_ptr + first + places, mask=exists, other=0)
        for stand_in in tl.static_range(PER_BLOCK):
            tl.store(masks_ptr + blocks * PER_BLOCK + stand_in, nothing, mask=exists & (blocks < q_block))


@partial(for_all_lengths, aligned="row_size")
def stand_ins_kernel(
    q_ptr,
    k_source,
    v_source,
    out_ptr,
    lse_ptr,
    masks_ptr,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_ob,
    stride_oh,
    stride_on,
    num_q_heads,
    heads_per_kv_head,
    num_queries,
    num_keys,
    num_q_blocks,
    num_means,
    row_size,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    LOG2_TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr,
    TMA: tl.constexpr,
):
    """One program merges the stand-ins into BLOCK_M rows of out and lse. Grid: (nq * BLOCK_SIZE / BLOCK_M, B * Hq).

    The means of keys and values, [B, Hkv, num_means, HEAD_DIM], have the same strides; see sparse_forward_kernel.
    """
    TILES: tl.constexpr = BLOCK_SIZE // BLOCK_M
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    row, tile_in_block = tile // TILES, tile % TILES
    batch_head = tl.program_id(1).to(tl.int64)
    batch, head = batch_head // num_q_heads, batch_head % num_q_heads
    kv_head = head // heads_per_kv_head
    if not TMA:
        k_source += batch * stride_kb + kv_head * stride_kh
        v_source += batch * stride_kb + kv_head * stride_kh
    masks_ptr += (batch_head * num_q_blocks + row) * row_size
    offset = num_keys - num_queries  # absolute position of query 0
    q_block = offset // BLOCK_SIZE + row  # on the key grid
    first_query = q_block * BLOCK_SIZE + tile_in_block * BLOCK_M - offset
    queries, dims = first_query + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    q_ptr += batch * stride_qb + head * stride_qh
    q_tile = load_rows(q_ptr, first_query, num_queries, stride_qn, BLOCK_M, HEAD_DIM, BLOCK_D, DTYPE, CHECK_ROWS=True)
    exists = (queries >= 0) & (queries < num_queries)
    out_ptr += batch * stride_ob + head * stride_oh + first_query.to(tl.int64) * stride_on
    out_pointers = out_ptr + tl.arange(0, BLOCK_M)[:, None] * stride_on + dims[None, :]
    out_mask = exists[:, None] & (dims < HEAD_DIM)[None, :]
    lse_pointers = lse_ptr + batch_head * num_queries + queries
    lse = tl.load(lse_pointers, mask=exists, other=float("-inf"))
    running_sum = tl.where(lse == float("-inf"), 0.0, 1.0)
    running_max = tl.maximum(lse * LOG2_E, LOWEST)  # [M], in powers of two
    accumulator = tl.load(out_pointers, mask=out_mask, other=0.0).to(tl.float32)  # [M, BLOCK_D]

    scale_log2 = scale * LOG2_E
    visible = q_block * (BLOCK_SIZE // TOKENS)
    batch, kv_head = batch.to(tl.int32), kv_head.to(tl.int32)
    for first in range(0, visible, BLOCK_N):
        k_tile = load_keys(
            k_source, batch, kv_head, first, num_means, stride_kn, BLOCK_N, HEAD_DIM, BLOCK_D, DTYPE, True, TMA
        )
        v_tile = load_keys(
            v_source, batch, kv_head, first, num_means, stride_kn, BLOCK_N, HEAD_DIM, BLOCK_D, DTYPE, True, TMA
        )
        masks = tl.load(masks_ptr + (first + tl.arange(0, BLOCK_N)) // (BLOCK_SIZE // TOKENS))
        raises = masks.to(tl.float32) + LOG2_TOKENS  # [BLOCK_N]
        logits = tl.dot(q_tile, k_tile.T, input_precision="ieee") * scale_log2 + raises[None, :]
        accumulator, running_max, running_sum = online_softmax_update(
            logits, v_tile, accumulator, running_max, running_sum
        )
    lse = tl.where(running_sum == 0.0, float("-inf"), (running_max + tl.log2(running_sum)) * LN_2)
    running_sum = tl.where(running_sum == 0.0, 1.0, running_sum)  # no key at all: out 0
    tl.store(lse_pointers, lse, mask=exists)
    tl.store(out_pointers, (accumulator / running_sum[:, None]).to(out_ptr.dtype.element_ty), mask=out_mask)


@cache
def tile_sizes(head_dim: int, block_size: int, dtype: torch.dtype) -> dict[str, int]:
    """Rows, means, warps and pipeline stages of a program (our choice, measured on an NVIDIA H200)."""
    if dtype == torch.float32 and not triton.knobs.runtime.interpret:
        rows = 32 if head_dim <= 128 else 16
        return dict(BLOCK_M=min(block_size, rows), BLOCK_N=rows, num_warps=8, num_stages=1)
    rows = min(block_size, 128 if head_dim <= 128 else 64)
    return dict(BLOCK_M=rows, BLOCK_N=64, num_warps=4, num_stages=2)


def block_means(k: torch.Tensor, v: torch.Tensor, block_size: int, tokens: int) -> torch.Tensor:
    """Means of `tokens` consecutive rows of k and v [B, H, N, D], of all blocks but the last: [2, B, H, means, D]."""
    k, v = with_dense_rows(k), with_dense_rows(v)
    batch, num_heads, num_tokens, head_dim = k.shape
    num_means = (-(-num_tokens // block_size) - 1) * (block_size // tokens)
    means = k.new_empty(2, batch, num_heads, num_means, head_dim)
    launch(
        means_kernel,
        (num_means, batch * num_heads, 2),
        (k, v, means),
        (*k.stride()[:3], *v.stride()[:3], num_heads, num_means),
        HEAD_DIM=head_dim,
        BLOCK_D=padded_dim(head_dim),
        TOKENS=tokens,
        ROWS=min(tokens, MEANS_TILE // padded_dim(head_dim)),
        num_warps=MEANS_WARPS,
    )
    return means


def masks_of_kept_blocks(
    kv_indices: torch.Tensor, kv_num_blocks: torch.Tensor, num_kv_blocks: int, per_block: int, dtype: torch.dtype
) -> torch.Tensor:
    """Masks [1, B * Hq * nq, 1, n]: 0 for each of the `per_block` stand-ins of a dropped block, -inf for all others.

    A block is dropped if it lies before the query block and its list lacks it. n is num_kv_blocks * per_block or more.
    """
    num_q_blocks, max_blocks = kv_indices.shape[2:]
    row_size = -(-num_kv_blocks * per_block // MASKS_AT_ONCE) * MASKS_AT_ONCE
    masks = kv_indices.new_empty(1, kv_num_blocks.numel(), 1, row_size, dtype=dtype)
    launch(
        masks_kernel,
        (kv_num_blocks.numel(),),
        (masks, kv_indices.contiguous(), kv_num_blocks.contiguous()),
        (num_q_blocks, num_kv_blocks, max_blocks, row_size),
        PER_BLOCK=per_block,
        NUMBERS=MASKS,
        AT_ONCE=MASKS_AT_ONCE,
        num_warps=1,
    )
    return masks


def add_stand_ins(
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_num_blocks: torch.Tensor,
    block_size: int,
    tokens: int,
    scale: float,
    tiles: dict[str, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the stand-ins of the blocks that the lists drop into out and lse, which are changed and returned.

    Args:
        out, lse: Results of sparse_forward for the other arguments, see there.
        tokens: Tokens of a stand-in, a divisor of block_size.
        tiles: Like the result of `tile_sizes`, which None takes.
    """
    (batch, num_q_heads, num_queries, head_dim), (num_kv_heads, num_keys) = q.shape, k.shape[1:3]
    num_q_blocks, num_kv_blocks = kv_indices.shape[2], -(-num_keys // block_size)
    if num_kv_blocks == 1:
        return out, lse
    tiles = tile_sizes(head_dim, block_size, q.dtype) if tiles is None else tiles
    q, means = with_dense_rows(q), block_means(k, v, block_size, tokens)
    masks = masks_of_kept_blocks(kv_indices, kv_num_blocks, num_kv_blocks, 1, torch.float16)
    tma = can_describe(means[0])
    sources = (Tiles(x, (1, 1, tiles["BLOCK_N"], head_dim), describe_tiles) if tma else x for x in means)
    launch(
        stand_ins_kernel,
        (num_q_blocks * (block_size // tiles["BLOCK_M"]), batch * num_q_heads),
        (q, *sources, out, lse, masks),
        (
            *(stride for x in (q, means[0], out) for stride in x.stride()[:3]),
            *(num_q_heads, num_q_heads // num_kv_heads, num_queries, num_keys, num_q_blocks),
            *(means[0].shape[2], masks.shape[3], float(scale)),
        ),
        HEAD_DIM=head_dim,
        BLOCK_D=padded_dim(head_dim),
        BLOCK_SIZE=block_size,
        TOKENS=tokens,
        LOG2_TOKENS=math.log2(tokens),
        DTYPE=operand_dtype(q.dtype),
        TMA=tma,
        **tiles,
    )
    return out, lse


@custom_op("stem::add_stand_ins", mutates_args=())
def stand_ins_op(
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_num_blocks: torch.Tensor,
    block_size: int,
    tokens: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """add_stand_ins that leaves out and lse as they are and is differentiable once."""
    copies = (torch.empty_like(x).copy_(x) for x in (out, lse))
    return add_stand_ins(*copies, q, k, v, kv_indices, kv_num_blocks, block_size, tokens, scale)


@stand_ins_op.register_fake
def _(out, lse, *others):
    return torch.empty_like(out), torch.empty_like(lse)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.block_size, ctx.tokens, ctx.scale = inputs
    ctx.save_for_backward(*output, *tensors)


@torch.autocast("cuda", enabled=False)
@torch.autocast("cpu", enabled=False)
def _differentiate(ctx, dout: torch.Tensor, dlse: torch.Tensor):
    """Gradients by formula, products by torch, some query blocks at a time; see sparse_backward for the letters."""
    merged, merged_lse, out, lse, q, k, v, kv_indices, kv_num_blocks = ctx.saved_tensors
    block_size, tokens, nk = ctx.block_size, ctx.tokens, -(-k.shape[2] // ctx.block_size)
    offset, nq, dtype = k.shape[2] - q.shape[2], kv_indices.shape[2], lse.dtype
    first, grouped, whole = nk - nq, (k.shape[1], -1), (nk - 1) * block_size
    delta = (merged.to(dtype) * dout).sum(-1) - dlse
    share = (lse - merged_lse).exp().nan_to_num(nan=0.0)  # of the kept blocks; NaN where no key exists
    dlse = share * ((out.to(dtype) * dout).sum(-1) - delta)
    unused = torch.arange(kv_indices.shape[3], device=q.device) >= kv_num_blocks[..., None]
    dropped = torch.ones(*kv_indices.shape[:3], nk + 1, dtype=torch.bool, device=q.device)
    dropped = dropped.scatter(3, kv_indices.long().masked_fill(unused, nk), False)[..., :nk].tril(first - 1)
    dropped = dropped[..., :-1].repeat_interleave(block_size // tokens, 3)
    k_means, v_means = (x[:, :, :whole].to(dtype).unflatten(2, (-1, tokens)).mean(3) for x in (k, v))
    dk_means, dv_means, dqs = torch.zeros_like(k_means), torch.zeros_like(v_means), []
    step = max(1, CHUNK_LOGITS // max(1, dropped[:, :, 0].numel() * block_size))
    for row in range(0, nq, step):
        start, stop = (min(max((first + x) * block_size - offset, 0), q.shape[2]) for x in (row, row + step))
        rows = dropped[:, :, (torch.arange(start, stop, device=q.device) + offset) // block_size - first]
        queries, grad = (x[:, :, start:stop].to(dtype).unflatten(1, grouped) for x in (q, dout))
        logits = (queries @ k_means[:, :, None].mT).flatten(1, 2) * ctx.scale + math.log(tokens)
        weights = (logits - merged_lse[:, :, start:stop, None]).exp().masked_fill(~rows, 0.0)
        dweights = (grad @ v_means[:, :, None].mT).flatten(1, 2) - delta[:, :, start:stop, None]
        weights, dlogits = (x.unflatten(1, grouped) for x in (weights, weights * dweights * ctx.scale))
        dqs.append((dlogits @ k_means[:, :, None]).flatten(1, 2).to(q.dtype))
        dk_means += (dlogits.mT @ queries).sum(2)
        dv_means += (weights.mT @ grad).sum(2)
    rest = (0, 0, 0, k.shape[2] - whole)
    dk, dv = ((x / tokens).to(k.dtype).repeat_interleave(tokens, 2) for x in (dk_means, dv_means))
    dk, dv = (torch.nn.functional.pad(x, rest) for x in (dk, dv))
    return (share[..., None] * dout).to(out.dtype), dlse, torch.cat(dqs, 2), dk, dv, *[None] * 5


stand_ins_op.register_autograd(_differentiate, setup_context=_save)

"""Inputs of the block scores: group sums of queries and keys, and the value term, in one pass over q, k and v.

Sums of 16-bit inputs are stored as two bf16 parts, high + low, which together keep 16 bits of the fp32 sum. Sums of
fp32 inputs stay fp32.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from .common import at_least_sm90, for_all_lengths, split_pair
from .launch import launch
from .value_norms import DIM_TILE, largest_norms, standardize

MAX_GROUPS_PER_TILE = 16  # rows of the [groups, D] tile that one program holds in registers
WARPS = 8  # of a program of score_inputs; with 4, an NVIDIA H200 starts attention to short prompts 1 us later


@triton.jit
def store_split(ptr, offsets, x, part_stride, mask):
    """Store fp32 `x` as it is, or as high and low bf16 parts, `part_stride` elements apart."""
    if ptr.dtype.element_ty == tl.bfloat16:
        high = x.to(tl.bfloat16)
        tl.store(ptr + offsets, high, mask=mask)
        tl.store(ptr + part_stride + offsets, (x - high.to(tl.float32)).to(tl.bfloat16), mask=mask)
    else:
        tl.store(ptr + offsets, x, mask=mask)


@triton.jit
def add_groups(
    x_ptr,
    sums_ptr,
    first_row,
    first_group,
    num_rows,
    stride_h,
    stride_n,
    stride_d,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    GROUPS: tl.constexpr,
    REVERSE: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Store the sums of GROUPS groups of the block that starts at first_row of HEADS heads (< 0 before a chunk)."""
    groups, dims = first_group + tl.arange(0, GROUPS), tl.arange(0, BLOCK_D)
    sums = tl.zeros([GROUPS, BLOCK_D], tl.float32)
    for _ in range(HEADS):
        for sample in tl.static_range(BLOCK_SIZE // STRIDE):
            rows = first_row + sample * STRIDE + groups
            exists = ((rows >= 0) & (rows < num_rows))[:, None] & (dims < HEAD_DIM)[None, :]
            tile = tl.load(x_ptr + rows[:, None] * stride_n + dims[None, :] * stride_d, mask=exists, other=0.0)
            sums += tile.to(tl.float32)  # [GROUPS, BLOCK_D]
        x_ptr += stride_h
    slots = STRIDE - 1 - groups if REVERSE else groups
    store_split(
        sums_ptr, slots[:, None] * HEAD_DIM + dims[None, :], sums, STRIDE * HEAD_DIM, (dims < HEAD_DIM)[None, :]
    )


@for_all_lengths
def score_inputs_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    q_sums_ptr,
    k_sums_ptr,
    values_ptr,
    pages_ptr,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_vd,
    num_q_heads,
    num_kv_heads,
    num_queries,
    num_keys,
    num_q_blocks,
    num_kv_blocks,
    num_kv_programs,
    first_q_block,
    first_kv_block,
    num_read_blocks,
    offset,
    value_weight,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DIM_TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    GROUPS: tl.constexpr,
    PARTS: tl.constexpr,
    HEADS: tl.constexpr,
    LOG_TERM: tl.constexpr,
    CAN_OVERLAP: tl.constexpr,
):
    """One program reads one block of v, of k or of HEADS query heads, which count as one of the num_q_heads.

    Grid: (2 * num_kv_programs + B * num_q_heads * nq, STRIDE / GROUPS), num_kv_programs = B * Hkv * num_read_blocks,
    the key blocks from first_kv_block on. LOG_TERM: values_ptr takes the weighted value term of the block, [nk];
    otherwise the largest norm of each of its groups, [nk, groups]. pages_ptr: block of k and v in memory for each key
    block; None if they are in order.
    """
    if CAN_OVERLAP:
        gdc_launch_dependents()
    program = tl.program_id(0)
    first_group = tl.program_id(1) * GROUPS
    depth: tl.constexpr = STRIDE * HEAD_DIM
    if program >= 2 * num_kv_programs:
        program -= 2 * num_kv_programs
        block, batch_head = program % num_q_blocks, program // num_q_blocks
        batch, head = split_pair(batch_head, num_q_heads)
        first_row = (offset // BLOCK_SIZE + first_q_block + block).to(tl.int64) * BLOCK_SIZE - offset
        add_groups(
            q_ptr + batch * stride_qb + head * HEADS * stride_qh, q_sums_ptr + program.to(tl.int64) * PARTS * depth,
            first_row, first_group, num_queries, stride_qh, stride_qn, stride_qd,
            HEAD_DIM, BLOCK_D, BLOCK_SIZE, STRIDE, GROUPS, True, HEADS,
        )  # fmt: skip
    else:
        kv_program = program % num_kv_programs
        block, batch_head = first_kv_block + kv_program % num_read_blocks, kv_program // num_read_blocks
        kv_row = batch_head.to(tl.int64) * num_kv_blocks + block
        batch, head = split_pair(batch_head, num_kv_heads)
        first_row = block.to(tl.int64) * BLOCK_SIZE
        end_row = num_keys
        if pages_ptr is not None:
            page_row = tl.load(pages_ptr + block).to(tl.int64) * BLOCK_SIZE
            first_row, end_row = page_row, page_row - first_row + num_keys
        if program >= num_kv_programs:
            add_groups(
                k_ptr + batch * stride_kb + head * stride_kh, k_sums_ptr + kv_row * PARTS * depth,
                first_row, first_group, end_row, stride_kh, stride_kn, stride_kd,
                HEAD_DIM, BLOCK_D, BLOCK_SIZE, STRIDE, GROUPS, False, 1,
            )  # fmt: skip
        elif first_group == 0:
            v_ptr += batch * stride_vb + head * stride_vh
            norms = largest_norms(
                v_ptr, first_row, end_row, stride_vn, stride_vd, HEAD_DIM, DIM_TILE, BLOCK_SIZE, STRIDE
            )
            if LOG_TERM:
                tl.store(values_ptr + kv_row, value_weight * tl.maximum(tl.log(tl.max(norms, axis=0)), 0.0))
            else:
                num_groups: tl.constexpr = BLOCK_SIZE // STRIDE
                tl.store(values_ptr + kv_row * num_groups + tl.arange(0, num_groups), norms)


@for_all_lengths
def block_sums_kernel(
    x_ptr,
    sums_ptr,
    stride_xb,
    stride_xh,
    stride_xn,
    stride_xd,
    num_heads,
    num_tokens,
    offset,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    GROUPS: tl.constexpr,
    PARTS: tl.constexpr,
    REVERSE: tl.constexpr,
    HEADS: tl.constexpr,
):
    """One program computes the sums of GROUPS groups of one block of HEADS heads, which count as one of num_heads.

    Grid: (blocks, STRIDE / GROUPS, B * num_heads).
    """
    block = tl.program_id(0)
    batch, head = split_pair(tl.program_id(2), num_heads)
    first_row = (offset // BLOCK_SIZE + block) * BLOCK_SIZE - offset
    sums_ptr += (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + block) * PARTS * STRIDE * HEAD_DIM
    add_groups(
        x_ptr + batch * stride_xb + head * HEADS * stride_xh, sums_ptr, first_row.to(tl.int64),
        tl.program_id(1) * GROUPS, num_tokens, stride_xh, stride_xn, stride_xd,
        HEAD_DIM, BLOCK_D, BLOCK_SIZE, STRIDE, GROUPS, REVERSE, HEADS,
    )  # fmt: skip


def num_parts(dtype: torch.dtype) -> int:
    """Number of bf16 parts in which sums of inputs of a dtype are stored; 1 means one fp32 number."""
    return 1 if dtype == torch.float32 else 2


def empty_sums(batch: int, num_heads: int, num_blocks: int, depth: int, x: torch.Tensor) -> torch.Tensor:
    """Memory for the group sums of inputs like `x`."""
    if num_parts(x.dtype) == 1:
        return torch.empty(batch, num_heads, num_blocks, depth, dtype=x.dtype, device=x.device)
    return torch.empty(batch, num_heads, num_blocks, 2, depth, dtype=torch.bfloat16, device=x.device)


@cache
def key_shapes(
    blocks: tuple[int, int, int], head_dim: int, block_size: int, stride: int, dtype: torch.dtype, log_term: bool
) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Shape and dtype of the group sums of keys and of the values of `raw_inputs`, for B, Hkv and nk."""
    sums = ((), torch.float32) if num_parts(dtype) == 1 else ((2,), torch.bfloat16)
    values = blocks if log_term else (*blocks, block_size // stride)
    return ((*blocks, *sums[0], stride * head_dim), sums[1]), (values, torch.float32)


@cache
def group_constants(head_dim: int, block_size: int, stride: int, dtype: torch.dtype) -> dict[str, int]:
    """Compile-time constants of the kernels that add groups; cached, since they cost some us of host time."""
    return dict(
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_SIZE=block_size,
        STRIDE=stride,
        GROUPS=min(stride, MAX_GROUPS_PER_TILE),
        PARTS=num_parts(dtype),
    )


def score_inputs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_size: int,
    stride: int,
    value_norm: str,
    value_weight: float,
    first_q_block: int = 0,
    num_q_blocks: int | None = None,
    heads: int = 1,
    kv_blocks: range | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Group sums of queries and keys and the weighted value term, in one pass over q, k and v; see `score_blocks`.

    Args:
        q: fp32, fp16 or bf16 [B, Hq, Nq, D], the last Nq positions; any strides.
        k, v: [B, Hkv, Nkv, D], same dtype.
        block_size: Tokens per block, a power of two.
        stride: Tokens between samples; divides block_size.
        value_norm: "log", "zscore" or "zscore_padded", see stem.scores.value_term.
        value_weight: Factor of the value term.
        first_q_block, num_q_blocks: First query block and number of query blocks to sum; default all.
        heads: Consecutive query heads whose sums are added; they count as one in q_sums.
        kv_blocks: Key blocks that are read, with value_norm "log" only; default all. The others' results are arbitrary.
    Returns:
        q_sums, k_sums: As from `block_sums`. value_bonus: fp32 [B, Hkv, nk].
    """
    blocks = first_q_block, num_q_blocks
    read = kv_blocks if value_norm == "log" else None
    *sums, values = raw_inputs(q, k, v, block_size, stride, value_norm, value_weight, *blocks, heads, kv_blocks=read)
    return *sums, standardize(values, stride, value_norm, value_weight, k.shape[2])


def raw_inputs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_size: int,
    stride: int,
    value_norm: str,
    value_weight: float,
    first_q_block: int = 0,
    num_q_blocks: int | None = None,
    heads: int = 1,
    pages: torch.Tensor | None = None,
    num_keys: int | None = None,
    of_keys: tuple[torch.Tensor, torch.Tensor] | None = None,
    kv_blocks: range | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """score_inputs without z-scores: the values are the largest norm of each group, fp32 [B, Hkv, nk, groups].

    pages, num_keys: int32 [>= nk], the block of k and v that holds each key block of a batch of 1, and Nkv. By default
    k and v hold the keys in order, and nothing else.
    of_keys: Memory for k_sums and the values, see `key_shapes`; it may have more blocks, which count as empty.
    """
    batch, num_q_heads, num_queries, head_dim = q.shape
    num_q_heads //= heads
    num_kv_heads, num_keys = k.shape[1], k.shape[2] if num_keys is None else num_keys
    num_kv_blocks = -(-num_keys // block_size)
    offset = num_keys - num_queries
    if num_q_blocks is None:
        num_q_blocks = num_kv_blocks - offset // block_size - first_q_block
    constants = group_constants(head_dim, block_size, stride, q.dtype)
    q_sums = empty_sums(batch, num_q_heads, num_q_blocks, stride * head_dim, q)
    log_term = value_norm == "log"
    if of_keys is None:
        shapes = key_shapes((batch, num_kv_heads, num_kv_blocks), head_dim, block_size, stride, k.dtype, log_term)
        of_keys = [torch.empty(shape, dtype=dtype, device=k.device) for shape, dtype in shapes]
    k_sums, values = of_keys
    num_kv_blocks = k_sums.shape[2]
    kv_blocks = range(num_kv_blocks) if kv_blocks is None else kv_blocks
    num_kv_programs = batch * num_kv_heads * len(kv_blocks)
    grid = (2 * num_kv_programs + batch * num_q_heads * num_q_blocks, stride // constants["GROUPS"])
    strides = *q.stride(), *k.stride(), *v.stride()
    sizes = num_q_heads, num_kv_heads, num_queries, num_keys, num_q_blocks, num_kv_blocks, num_kv_programs
    launch(
        score_inputs_kernel,
        grid,
        (q, k, v, q_sums, k_sums, values, pages),
        (*strides, *sizes, first_q_block, kv_blocks.start, len(kv_blocks), offset, float(value_weight)),
        DIM_TILE=min(DIM_TILE, constants["BLOCK_D"]),
        HEADS=heads,
        LOG_TERM=log_term,
        CAN_OVERLAP=at_least_sm90(q.device),
        num_warps=WARPS,
        **constants,
    )
    return q_sums, k_sums, values


def block_sums(
    x: torch.Tensor, block_size: int, stride: int, *, reverse: bool, offset: int = 0, heads: int = 1
) -> torch.Tensor:
    """Sums of interleaved groups of rows: group g of a block adds its rows g, g + stride, g + 2 * stride, ...

    Args:
        x: [B, H, N, D] queries or keys, any strides.
        block_size: Tokens per block, a power of two.
        stride: Groups per block; divides block_size.
        reverse: Store group g at slot stride - 1 - g (for queries: slots then pair along the antidiagonal).
        offset: Absolute position of row 0 [tokens]; blocks are aligned to position 0.
        heads: Consecutive heads whose sums are added; H counts them as one below.
    Returns:
        fp32 [B, H, nb, stride * D] for fp32 inputs, for others bf16 [B, H, nb, 2, stride * D], whose two parts add up
        to the sums; block 0 holds position `offset`; rows that do not exist count as zeros.
    """
    batch, num_heads, num_tokens, head_dim = x.shape
    num_heads //= heads
    num_blocks = -(-(offset + num_tokens) // block_size) - offset // block_size
    sums = empty_sums(batch, num_heads, num_blocks, stride * head_dim, x)
    constants = group_constants(head_dim, block_size, stride, x.dtype)
    launch(
        block_sums_kernel,
        (num_blocks, stride // constants["GROUPS"], batch * num_heads),
        (x, sums),
        (*x.stride(), num_heads, num_tokens, offset),
        REVERSE=reverse,
        HEADS=heads,
        **constants,
    )
    return sums

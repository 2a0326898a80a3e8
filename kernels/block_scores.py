"""Block scores: group sums of queries and keys, the value term, and the GEMM that pairs the sums.

The antidiagonal score of a block pair is a mean of dot products without a softmax, so it is linear in q and in k. The
sum over sampled pairs becomes one dot product of group sums, `stride * D` wide. `score_inputs` reads q, k and v once
and computes all inputs of the GEMM.

Sums of 16-bit inputs are stored as two bf16 parts, high + low, which together keep 16 bits of the fp32 sum. The GEMM
then is three bf16 products (high * high, high * low, low * high), faster than any product of fp32 operands. Sums of
fp32 inputs stay fp32.

The file exceeds 400 lines because its kernels share the format of the sums.
"""

from functools import cache, partial

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from .common import at_least_sm90, for_all_lengths
from .launch import launch

MAX_GROUPS_PER_TILE = 16  # rows of the [groups, D] tile that one program holds in registers
DIM_TILE = 64  # dimensions of V that are squared and added at a time
PRECISION = "ieee" if torch.version.hip else "tf32x3"  # fp32 products, on NVIDIA by three tf32 products
LOG_EPS = tl.constexpr(1e-6)  # added to value norms before the logarithm; smallest deviation of a z-score
NORM_TILE = 1024  # value norms that standardize_kernel reads at a time


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


@triton.jit
def largest_norms(
    v_ptr,
    first_row,
    num_rows,
    stride_n,
    stride_d,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):
    """Largest L2 norm in each group of GROUP_SIZE consecutive rows of a block, [groups]; 0 where no row exists."""
    rows = first_row + tl.arange(0, BLOCK_SIZE)
    squares = tl.zeros([BLOCK_SIZE], tl.float32)
    for dim_start in tl.static_range(0, HEAD_DIM, DIM_TILE):
        dims = dim_start + tl.arange(0, DIM_TILE)
        exists = (rows < num_rows)[:, None] & (dims < HEAD_DIM)[None, :]
        tile = tl.load(v_ptr + rows[:, None] * stride_n + dims[None, :] * stride_d, mask=exists, other=0.0)
        tile = tile.to(tl.float32)  # [BLOCK_SIZE, DIM_TILE]
        squares += tl.sum(tile * tile, axis=1)
    return tl.max(tl.reshape(tl.sqrt(squares), [BLOCK_SIZE // GROUP_SIZE, GROUP_SIZE]), axis=1)


@triton.jit
def split_pair(index, num_heads):
    """Batch entry and head of a flat index, both int64."""
    index = index.to(tl.int64)
    return index // num_heads, index % num_heads


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

    Grid: (2 * num_kv_programs + B * num_q_heads * nq, STRIDE / GROUPS), num_kv_programs = B * Hkv * nk. LOG_TERM:
    values_ptr takes the weighted value term of the block, [nk]; otherwise the largest norm of each of its groups,
    [nk, groups]. pages_ptr: block of k and v in memory for each key block; None if they are in order.
    """
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
        block, batch_head = kv_program % num_kv_blocks, kv_program // num_kv_blocks
        batch, head = split_pair(batch_head, num_kv_heads)
        first_row = block.to(tl.int64) * BLOCK_SIZE
        end_row = num_keys
        if pages_ptr is not None:
            page_row = tl.load(pages_ptr + block).to(tl.int64) * BLOCK_SIZE
            first_row, end_row = page_row, page_row - first_row + num_keys
        if program >= num_kv_programs:
            add_groups(
                k_ptr + batch * stride_kb + head * stride_kh, k_sums_ptr + kv_program.to(tl.int64) * PARTS * depth,
                first_row, first_group, end_row, stride_kh, stride_kn, stride_kd,
                HEAD_DIM, BLOCK_D, BLOCK_SIZE, STRIDE, GROUPS, False, 1,
            )  # fmt: skip
        elif first_group == 0:
            v_ptr += batch * stride_vb + head * stride_vh
            norms = largest_norms(
                v_ptr, first_row, end_row, stride_vn, stride_vd, HEAD_DIM, DIM_TILE, BLOCK_SIZE, STRIDE
            )
            if LOG_TERM:
                tl.store(values_ptr + kv_program, value_weight * tl.maximum(tl.log(tl.max(norms, axis=0)), 0.0))
            else:
                num_groups: tl.constexpr = BLOCK_SIZE // STRIDE
                tl.store(values_ptr + kv_program.to(tl.int64) * num_groups + tl.arange(0, num_groups), norms)
    if CAN_OVERLAP:  # at the end, so that the next kernel does not take multiprocessors from this one
        gdc_launch_dependents()


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


@for_all_lengths
def value_norms_kernel(
    v_ptr,
    norms_ptr,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_vd,
    num_heads,
    num_tokens,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):
    """One program computes the largest row norm of every group of one block of one head. Grid: (blocks, B * H)."""
    block = tl.program_id(0).to(tl.int64)
    batch, head = split_pair(tl.program_id(1), num_heads)
    v_ptr += batch * stride_vb + head * stride_vh
    norms = largest_norms(
        v_ptr, block * BLOCK_SIZE, num_tokens, stride_vn, stride_vd, HEAD_DIM, DIM_TILE, BLOCK_SIZE, GROUP_SIZE
    )
    num_groups: tl.constexpr = BLOCK_SIZE // GROUP_SIZE
    norms_ptr += (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + block) * num_groups
    tl.store(norms_ptr + tl.arange(0, num_groups), norms)


@triton.jit
def load_log_norms(norms_ptr, groups, num_groups):
    """Load the logarithms of the norms of some groups; groups past the end count as empty."""
    return tl.log(tl.load(norms_ptr + groups, mask=groups < num_groups, other=0.0) + LOG_EPS)


@for_all_lengths
def standardize_kernel(
    norms_ptr,
    value_bonus_ptr,
    num_kv_blocks,
    sample_size,
    value_weight,
    GROUPS_PER_BLOCK: tl.constexpr,
    BLOCKS_PER_TILE: tl.constexpr,
):
    """One program turns the norms of one KV head, [nk, groups], into weighted value terms, [nk]. Grid: (B * Hkv,).

    The logarithms are z-scored by mean and unbiased deviation of the first sample_size groups; a block's term is the
    mean of the positive parts.
    """
    num_groups = num_kv_blocks * GROUPS_PER_BLOCK
    norms_ptr += tl.program_id(0).to(tl.int64) * num_groups
    value_bonus_ptr += tl.program_id(0).to(tl.int64) * num_kv_blocks
    tile_groups: tl.constexpr = BLOCKS_PER_TILE * GROUPS_PER_BLOCK
    lanes = tl.arange(0, tile_groups)
    total = tl.zeros([tile_groups], tl.float32)
    for start in range(0, sample_size, tile_groups):
        log_norms = load_log_norms(norms_ptr, start + lanes, num_groups)
        total += tl.where(start + lanes < sample_size, log_norms, 0.0)
    mean = tl.sum(total, axis=0) / sample_size
    squares = tl.zeros([tile_groups], tl.float32)
    for start in range(0, sample_size, tile_groups):
        deviations = load_log_norms(norms_ptr, start + lanes, num_groups) - mean
        squares += tl.where(start + lanes < sample_size, deviations * deviations, 0.0)
    deviation = tl.sqrt(tl.sum(squares, axis=0) / tl.maximum(sample_size - 1, 1))
    factor = value_weight / tl.maximum(deviation, LOG_EPS)
    for first_block in range(0, num_kv_blocks, BLOCKS_PER_TILE):
        log_norms = load_log_norms(norms_ptr, first_block * GROUPS_PER_BLOCK + lanes, num_groups)
        positive = tl.reshape(tl.maximum((log_norms - mean) * factor, 0.0), [BLOCKS_PER_TILE, GROUPS_PER_BLOCK])
        blocks = first_block + tl.arange(0, BLOCKS_PER_TILE)
        tl.store(value_bonus_ptr + blocks, tl.sum(positive, axis=1) / GROUPS_PER_BLOCK, mask=blocks < num_kv_blocks)


@triton.jit
def load_sums(sums_ptr, blocks, exists, depth, PARTS: tl.constexpr, DEPTH: tl.constexpr, DTYPE: tl.constexpr):
    """Load columns `depth` of some rows of a matrix of group sums, zero outside, as DTYPE."""
    exists = exists[:, None] & (depth < DEPTH)[None, :]
    offsets = blocks[:, None].to(tl.int64) * (PARTS * DEPTH) + depth[None, :]
    return tl.load(sums_ptr + offsets, mask=exists, other=0.0).to(DTYPE)


@triton.jit
def finish_scores(products, value_bonus_ptr, q_blocks, kv_blocks, is_block, scale):
    """Scores [M, N] from products of sums: scaled, plus the value term of the key block, -inf in the future."""
    value_bonus = tl.load(value_bonus_ptr + kv_blocks, mask=is_block, other=0.0)
    scores = products * scale + value_bonus[None, :]
    return tl.where(kv_blocks[None, :] <= q_blocks[:, None], scores, float("-inf"))


@triton.jit
def score_tile(
    q_sums_ptr,
    k_sums_ptr,
    value_bonus_ptr,
    batch_kv_head,
    flat_rows,
    kv_blocks,
    last_visible_block,
    heads_per_kv_head,
    num_q_blocks,
    num_kv_blocks,
    first_q_block,
    scale,
    DEPTH: tl.constexpr,
    PARTS: tl.constexpr,
    DEPTH_TILE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores of some query blocks of one KV head, [M, N], -inf in the future.

    flat_rows [M] are query blocks of all heads that share the KV head, the heads of one query block side by side, so
    that a tile of key sums serves them all. A tile whose first key block is past last_visible_block is not computed.
    """
    rows, members = flat_rows // heads_per_kv_head, flat_rows % heads_per_kv_head
    is_row, is_block = rows < num_q_blocks, kv_blocks < num_kv_blocks
    q_matrix_rows = members * num_q_blocks + rows
    q_sums_ptr += batch_kv_head * heads_per_kv_head * num_q_blocks * (PARTS * DEPTH)
    k_sums_ptr += batch_kv_head * num_kv_blocks * (PARTS * DEPTH)
    scores = tl.zeros([flat_rows.shape[0], kv_blocks.shape[0]], tl.float32)
    depth_end = tl.where(tl.min(kv_blocks, axis=0) <= last_visible_block, DEPTH, 0)
    for depth_start in range(0, depth_end, DEPTH_TILE):
        depth = depth_start + tl.arange(0, DEPTH_TILE)
        q_high = load_sums(q_sums_ptr, q_matrix_rows, is_row, depth, PARTS, DEPTH, DTYPE)  # [M, DEPTH_TILE]
        k_high = load_sums(k_sums_ptr, kv_blocks, is_block, depth, PARTS, DEPTH, DTYPE)  # [N, DEPTH_TILE]
        scores = tl.dot(q_high, k_high.T, scores, input_precision=PRECISION)
        if PARTS == 2:
            k_low = load_sums(k_sums_ptr + DEPTH, kv_blocks, is_block, depth, PARTS, DEPTH, DTYPE)
            q_low = load_sums(q_sums_ptr + DEPTH, q_matrix_rows, is_row, depth, PARTS, DEPTH, DTYPE)
            scores = tl.dot(q_high, k_low.T, scores, input_precision=PRECISION)
            scores = tl.dot(q_low, k_high.T, scores, input_precision=PRECISION)
    value_bonus_ptr += batch_kv_head * num_kv_blocks
    return finish_scores(scores, value_bonus_ptr, first_q_block + rows, kv_blocks, is_block, scale)


@partial(for_all_lengths, aligned="num_kv_blocks")
def score_blocks_kernel(
    q_sums_ptr,
    k_sums_ptr,
    value_bonus_ptr,
    scores_ptr,
    heads_per_kv_head,
    num_q_blocks,
    num_kv_blocks,
    first_q_block,
    scale,
    DEPTH: tl.constexpr,
    PARTS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    DEPTH_TILE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program computes a tile of the scores of one KV head. Grid: (key tiles, query tiles, B * Hkv)."""
    batch_kv_head = tl.program_id(2).to(tl.int64)
    first_flat_row = tl.program_id(1) * TILE_M
    flat_rows = first_flat_row + tl.arange(0, TILE_M)
    kv_blocks = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    last_visible_block = first_q_block + (first_flat_row + TILE_M - 1) // heads_per_kv_head
    scores = score_tile(
        q_sums_ptr, k_sums_ptr, value_bonus_ptr, batch_kv_head, flat_rows, kv_blocks, last_visible_block,
        heads_per_kv_head, num_q_blocks, num_kv_blocks, first_q_block, scale,
        DEPTH, PARTS, DEPTH_TILE, DTYPE, PRECISION,
    )  # fmt: skip
    rows, members = flat_rows // heads_per_kv_head, flat_rows % heads_per_kv_head
    scores_ptr += batch_kv_head * heads_per_kv_head * num_q_blocks * num_kv_blocks
    offsets = (members * num_q_blocks + rows)[:, None].to(tl.int64) * num_kv_blocks + kv_blocks[None, :]
    tl.store(scores_ptr + offsets, scores, mask=(rows < num_q_blocks)[:, None] & (kv_blocks < num_kv_blocks)[None, :])


def num_parts(dtype: torch.dtype) -> int:
    """Number of bf16 parts in which sums of inputs of a dtype are stored; 1 means one fp32 number."""
    return 1 if dtype == torch.float32 else 2


def empty_sums(batch: int, num_heads: int, num_blocks: int, depth: int, x: torch.Tensor) -> torch.Tensor:
    """Memory for the group sums of inputs like `x`."""
    if num_parts(x.dtype) == 1:
        return torch.empty(batch, num_heads, num_blocks, depth, dtype=x.dtype, device=x.device)
    return torch.empty(batch, num_heads, num_blocks, 2, depth, dtype=torch.bfloat16, device=x.device)


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
    Returns:
        q_sums, k_sums: As from `block_sums`. value_bonus: fp32 [B, Hkv, nk].
    """
    blocks = first_q_block, num_q_blocks
    *sums, values = raw_inputs(q, k, v, block_size, stride, value_norm, value_weight, *blocks, heads)
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """score_inputs without z-scores: the values are the largest norm of each group, fp32 [B, Hkv, nk, groups].

    pages, num_keys: int32 [>= nk], the block of k and v that holds each key block of a batch of 1, and Nkv. By default
    k and v hold the keys in order, and nothing else.
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
    k_sums = empty_sums(batch, num_kv_heads, num_kv_blocks, stride * head_dim, k)
    log_term = value_norm == "log"
    value_shape = (batch, num_kv_heads, num_kv_blocks, *(() if log_term else (block_size // stride,)))
    values = torch.empty(value_shape, dtype=torch.float32, device=v.device)  # 1 us faster than v.new_empty
    num_kv_programs = batch * num_kv_heads * num_kv_blocks
    grid = (2 * num_kv_programs + batch * num_q_heads * num_q_blocks, stride // constants["GROUPS"])
    sizes = num_q_heads, num_kv_heads, num_queries, num_keys, num_q_blocks, num_kv_blocks, num_kv_programs
    launch(
        score_inputs_kernel,
        grid,
        (q, k, v, q_sums, k_sums, values, pages),
        (*q.stride(), *k.stride(), *v.stride(), *sizes, first_q_block, offset, float(value_weight)),
        DIM_TILE=min(DIM_TILE, constants["BLOCK_D"]),
        HEADS=heads,
        LOG_TERM=log_term,
        CAN_OVERLAP=at_least_sm90(q.device),
        **constants,
    )
    return q_sums, k_sums, values


def standardize(values: torch.Tensor, stride: int, value_norm: str, value_weight: float, num_keys: int) -> torch.Tensor:
    """Weighted value term fp32 [B, Hkv, nk] from the values of `raw_inputs`; "log" is one already."""
    if value_norm == "log":
        return values
    num_kv_blocks, groups_per_block = values.shape[2:]
    value_bonus = values.new_empty(values.shape[:3])
    sample_size = num_kv_blocks * groups_per_block if value_norm == "zscore_padded" else -(-num_keys // stride)
    launch(
        standardize_kernel,
        (values.shape[0] * values.shape[1],),
        (values, value_bonus),
        (num_kv_blocks, sample_size, float(value_weight)),
        GROUPS_PER_BLOCK=groups_per_block,
        BLOCKS_PER_TILE=NORM_TILE // groups_per_block,
    )
    return value_bonus


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


def value_norms(v: torch.Tensor, block_size: int, group_size: int) -> torch.Tensor:
    """Largest L2 norm among the rows of each group of `group_size` consecutive values.

    Args:
        v: [B, Hkv, Nkv, D], any strides.
        block_size: Tokens per block, a power of two.
        group_size: Tokens per group; divides block_size.
    Returns:
        fp32 [B, Hkv, nk, block_size / group_size], 0 for a group without a row.
    """
    batch, num_heads, num_tokens, head_dim = v.shape
    num_blocks = triton.cdiv(num_tokens, block_size)
    shape = (batch, num_heads, num_blocks, block_size // group_size)
    norms = torch.empty(shape, dtype=torch.float32, device=v.device)
    launch(
        value_norms_kernel,
        (num_blocks, batch * num_heads),
        (v, norms),
        (*v.stride(), num_heads, num_tokens),
        HEAD_DIM=head_dim,
        DIM_TILE=min(DIM_TILE, triton.next_power_of_2(head_dim)),
        BLOCK_SIZE=block_size,
        GROUP_SIZE=group_size,
    )
    return norms


@cache
def operand_dtype(parts: int) -> tl.dtype:
    """Triton dtype in which sums are multiplied; fp32 in Triton's interpreter, which has no bf16 products."""
    return tl.float32 if parts == 1 or triton.knobs.runtime.interpret else tl.bfloat16


def score_tiles(parts: int, num_rows: int) -> dict[str, int]:
    """Tile of the score GEMM and its warps and pipeline stages (our choice, for sm_90)."""
    if parts == 1:
        return dict(TILE_M=64, TILE_N=64, DEPTH_TILE=32, num_warps=4, num_stages=3)
    if num_rows <= 512:  # short prompts: more programs
        return dict(TILE_M=64, TILE_N=32, DEPTH_TILE=128, num_warps=4, num_stages=4)
    return dict(TILE_M=128, TILE_N=128, DEPTH_TILE=64, num_warps=8, num_stages=3)


def score_blocks(
    q_sums: torch.Tensor,
    k_sums: torch.Tensor,
    value_bonus: torch.Tensor,
    scale: float,
    first_q_block: int | None = None,
    num_tile_rows: int | None = None,
) -> torch.Tensor:
    """Block scores: scale * <q_sums, k_sums> + value_bonus, one small GEMM for each KV head.

    Args:
        q_sums: From `block_sums(..., reverse=True)`, consecutive query blocks of Hq heads.
        k_sums: From `block_sums(..., reverse=False)`, all key blocks of Hkv heads; Hq % Hkv == 0.
        value_bonus: fp32 [B, Hkv, nk], added to every score of its key block.
        scale: Factor of the dot products.
        first_q_block: Position of the first query block on the key grid; by default the last ones match.
        num_tile_rows: Query blocks by which the tile is chosen, so that parts of a prompt have the bits of the whole.
    Returns:
        fp32 [B, Hq, nq, nk], -inf where the key block is in the future of the query block.
    """
    batch, num_q_heads, num_q_blocks = q_sums.shape[:3]
    num_kv_heads, num_kv_blocks = k_sums.shape[1:3]
    parts = 2 if q_sums.dtype == torch.bfloat16 else 1
    heads_per_kv_head = num_q_heads // num_kv_heads
    num_rows = num_q_blocks * heads_per_kv_head
    shape = (batch, num_q_heads, num_q_blocks, num_kv_blocks)
    scores = torch.empty(shape, dtype=torch.float32, device=q_sums.device)
    tiles = score_tiles(parts, num_rows if num_tile_rows is None else num_tile_rows * heads_per_kv_head)
    grid = (-(-num_kv_blocks // tiles["TILE_N"]), -(-num_rows // tiles["TILE_M"]), batch * num_kv_heads)
    first_q_block = num_kv_blocks - num_q_blocks if first_q_block is None else first_q_block
    launch(
        score_blocks_kernel,
        grid,
        (q_sums.contiguous(), k_sums.contiguous(), value_bonus.contiguous(), scores),
        (heads_per_kv_head, num_q_blocks, num_kv_blocks, first_q_block, float(scale)),
        DEPTH=q_sums.shape[-1],
        PARTS=parts,
        DTYPE=operand_dtype(parts),
        PRECISION=PRECISION,
        **tiles,
    )
    return scores

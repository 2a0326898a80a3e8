"""Value norms: the largest norm of each group of values, and the value term of each key block from them."""

import torch
import triton
import triton.language as tl

from .common import for_all_lengths, split_pair
from .launch import launch

DIM_TILE = 64  # dimensions of V that are squared and added at a time
LOG_EPS = tl.constexpr(1e-6)  # added to value norms before the logarithm; smallest deviation of a z-score
NORM_TILE = 1024  # value norms that standardize_kernel reads at a time


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

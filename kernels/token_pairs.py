"""Sums of softmax weights of single queries and keys: pair_cells for the last query blocks, exactly."""

import torch
import triton
import triton.language as tl

from .cell_features import Cells
from .cell_pairs import WARPS, launch_twice, split_keys, sums_too_large
from .common import LARGEST_SUM, LOG2_E, for_all_lengths, operand_dtype, padded_dim


@triton.jit
def token_products(
    q_tile, k_ptr, bonus_ptr, positions, q_block, block, in_block, dims, stride_kn, stride_kd, kv_len,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Products of the queries of q_block, at `positions`, and the keys of a block, -inf in the future; its bonus."""
    keys = block * BLOCK + in_block
    exists = (keys < kv_len)[:, None] & (dims < HEAD_DIM)[None, :]
    k_ptr += (tl.zeros([], tl.int64) + block * BLOCK) * stride_kn
    k_tile = tl.load(k_ptr + in_block[:, None] * stride_kn + dims[None, :] * stride_kd, mask=exists, other=0.0)
    products = tl.dot(q_tile, k_tile.to(DTYPE).T, input_precision="ieee")
    if block == q_block:
        products = tl.where(keys[None, :] <= positions[:, None], products, float("-inf"))
    return products, 0.0 if bonus_ptr is None else tl.load(bonus_ptr + block) * LOG2_E


@for_all_lengths
def pair_tokens_kernel(
    q_ptr,
    k_ptr,
    bonus_ptr,
    sums_ptr,
    flags_ptr,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_kd,
    num_q_heads,
    heads_per_kv_head,
    num_kv_blocks,
    first_block,
    q_start,
    kv_len,
    split_blocks,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    REDO: tl.constexpr,
):
    """One program pairs the queries of one block with the keys of those of split_blocks key blocks that they see.

    Grid: (B * Hq, query blocks from first_block on, splits of the keys). sums_ptr: [B * Hq, query blocks * BLOCK, nk]
    as in pair_cells_kernel, like bonus_ptr, flags_ptr and REDO.
    """
    tile = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    flags_ptr += tile * tl.num_programs(2)
    if REDO:
        if not sums_too_large(flags_ptr, tl.num_programs(2)):
            return
    batch_head = tl.program_id(0).to(tl.int64)
    batch, head = batch_head // num_q_heads, batch_head % num_q_heads
    kv_head = head // heads_per_kv_head
    q_block = first_block + tl.program_id(1)
    scale_log2 = scale * LOG2_E
    sums_ptr += tile * BLOCK * num_kv_blocks
    q_ptr += batch * stride_qb + head * stride_qh
    k_ptr += batch * stride_kb + kv_head * stride_kh
    if bonus_ptr is not None:
        bonus_ptr += (batch * (num_q_heads // heads_per_kv_head) + kv_head) * num_kv_blocks

    in_block, dims = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    positions = q_block * BLOCK + in_block
    rows = positions - q_start
    exists = ((rows >= 0) & (positions < kv_len))[:, None] & (dims < HEAD_DIM)[None, :]
    q_pointers = q_ptr + rows.to(tl.int64)[:, None] * stride_qn + dims[None, :] * stride_qd
    q_tile = tl.load(q_pointers, mask=exists, other=0.0).to(DTYPE)
    reference = tl.full([BLOCK], float("-inf"), tl.float32)
    for block in tl.range(0, q_block + 1 if REDO else 1):
        products, bonus = token_products(
            q_tile, k_ptr, bonus_ptr, positions, q_block, block, in_block, dims, stride_kn, stride_kd, kv_len,
            HEAD_DIM, BLOCK, DTYPE,
        )  # fmt: skip
        reference = tl.maximum(reference, tl.max(products, axis=1) * scale_log2 + bonus)
    start = tl.program_id(2) * split_blocks
    total = tl.zeros([BLOCK], tl.float32)
    for block in tl.range(start, tl.minimum(q_block + 1, start + split_blocks)):
        products, bonus = token_products(
            q_tile, k_ptr, bonus_ptr, positions, q_block, block, in_block, dims, stride_kn, stride_kd, kv_len,
            HEAD_DIM, BLOCK, DTYPE,
        )  # fmt: skip
        sums = tl.sum(tl.exp2(products * scale_log2 - (reference - bonus)[:, None]), axis=1)
        tl.store(sums_ptr + in_block * num_kv_blocks + block, sums)
        total += sums
    if not REDO:
        tl.store(flags_ptr + tl.program_id(2), tl.where(tl.sum(total, axis=0) < LARGEST_SUM, 0, 1))


def pair_tokens(
    q: torch.Tensor,
    k: torch.Tensor,
    value_bonus: torch.Tensor | None,
    cells: Cells,
    scale: float,
    exact_last_blocks: int,
) -> tuple[int, torch.Tensor, tuple[int, ...]]:
    """Sums of the weights of single queries and single keys, for the last `exact_last_blocks` query blocks.

    A last block that is less than half full does not count as one of them, and is added.

    Returns:
        The tuple that pair_cells yields, for cells of one token and these query blocks.
    """
    (batch, num_q_heads, _, head_dim), num_kv_heads = q.shape, k.shape[1]
    heads, size, num_kv_blocks = batch * num_q_heads, cells.block_size, cells.num_kv_blocks
    half_full = (cells.kv_len + size // 2) // size
    count = min(exact_last_blocks + num_kv_blocks - half_full, cells.num_q_blocks)
    operand = operand_dtype(torch.float32 if triton.knobs.runtime.interpret else q.dtype)
    sums_dtype = torch.float32 if operand == tl.float32 else torch.bfloat16
    sums = q.new_empty(heads, count * size, num_kv_blocks, dtype=sums_dtype)
    num_splits, blocks_per_split = split_keys(num_kv_blocks, heads * count)
    sizes = num_q_heads, num_q_heads // num_kv_heads, num_kv_blocks, num_kv_blocks - count
    launch_twice(
        pair_tokens_kernel,
        (heads, count, num_splits),
        (q, k, value_bonus, sums),
        (*q.stride(), *k.stride(), *sizes, cells.q_start, cells.kv_len, blocks_per_split, float(scale)),
        HEAD_DIM=head_dim,
        BLOCK_D=padded_dim(head_dim),
        BLOCK=size,
        DTYPE=operand,
        num_warps=WARPS if size == 128 else WARPS // 2,
        num_stages=2,
    )
    first_row = cells.num_q_blocks - count
    numbers = cells.num_q_blocks, num_kv_blocks, first_row, count * size
    return count, sums, (*numbers, cells.first_position, cells.q_start, cells.kv_len)

"""Sums of softmax weights of single queries and keys: pair_cells for the last query blocks, exactly."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from .cell_features import Cells
from .cell_pairs import launch_guess, new_sums, split_keys, sums_too_large
from .common import (
    LARGEST_SUM,
    LOG2_E,
    at_least_sm90,
    for_all_lengths,
    let_next_begin,
    operand_dtype,
    padded_dim,
    wait_for_last,
)
from .launch import Tiles
from .sparse_forward import can_describe, describe_tiles

KEY_TILE = 64  # keys of one product: its logits and weights leave registers for a program of cell_features
STAGES = 3  # key tiles in flight; two programs still share a multiprocessor
QUERIES_PER_WARP = 16  # the fewest of a product


@triton.jit
def token_products(
    q_tile, k_source, bonus_ptr, batch, kv_head, positions, q_block, tile, stride_kn, stride_kd, kv_len,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, DTYPE: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Products of queries at `positions` in q_block and the keys of a tile, -inf in the future; the bonus of its block.

    k_source: descriptor with TMA, else pointer to the keys of the head.
    """
    first_key = tile * KEYS
    in_tile, dims = tl.arange(0, KEYS), tl.arange(0, BLOCK_D)
    if TMA:
        k_tile = k_source.load([batch, kv_head, first_key, 0]).reshape(KEYS, BLOCK_D)
    else:
        exists = (first_key + in_tile < kv_len)[:, None] & (dims < HEAD_DIM)[None, :]
        k_ptr = k_source + first_key.to(tl.int64) * stride_kn
        k_tile = tl.load(k_ptr + in_tile[:, None] * stride_kn + dims[None, :] * stride_kd, mask=exists, other=0.0)
    products = tl.dot(q_tile, k_tile.to(DTYPE).T, input_precision="ieee")
    block = first_key // BLOCK
    if block == q_block:
        products = tl.where((first_key + in_tile)[None, :] <= positions[:, None], products, float("-inf"))
    return products, 0.0 if bonus_ptr is None else tl.load(bonus_ptr + block) * LOG2_E


@for_all_lengths
def pair_tokens_kernel(
    q_ptr,
    k_source,
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
    stride_sn,
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
    KEYS: tl.constexpr,
    DTYPE: tl.constexpr,
    STAGES: tl.constexpr,
    TMA: tl.constexpr,
    CAN_OVERLAP: tl.constexpr,
    REDO: tl.constexpr,
):
    """One program pairs the queries of one block with the keys of split_blocks key blocks, in tiles of KEYS keys.

    Grid: (B * Hq, query blocks from first_block on, splits of the keys). sums_ptr: [B * Hq, query blocks * BLOCK, nk]
    in rows of stride_sn. bonus_ptr as in pair_cells_kernel. flags_ptr: int32 like the grid, as there. The next kernel
    may begin at once. With REDO, the last program ends after the kernel launched before.
    """
    let_next_begin(CAN_OVERLAP)
    row_tile = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    flags_ptr += row_tile * tl.num_programs(2)
    if REDO:
        wait_for_last(CAN_OVERLAP)
        if not sums_too_large(flags_ptr, tl.num_programs(2)):
            return
    batch_head = tl.program_id(0).to(tl.int64)
    batch, head = batch_head // num_q_heads, batch_head % num_q_heads
    kv_head = head // heads_per_kv_head
    q_block = first_block + tl.program_id(1)
    scale_log2 = scale * LOG2_E
    if bonus_ptr is not None:
        bonus_ptr += (batch * (num_q_heads // heads_per_kv_head) + kv_head) * num_kv_blocks
    if not TMA:
        k_source += batch * stride_kb + kv_head * stride_kh
    batch_of_tile, kv_head = batch.to(tl.int32), kv_head.to(tl.int32)

    in_block, dims = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    positions = q_block * BLOCK + in_block
    queries = positions - q_start
    exists = ((queries >= 0) & (positions < kv_len))[:, None] & (dims < HEAD_DIM)[None, :]
    q_ptr += batch * stride_qb + head * stride_qh
    q_pointers = q_ptr + queries.to(tl.int64)[:, None] * stride_qn + dims[None, :] * stride_qd
    q_tile = tl.load(q_pointers, mask=exists, other=0.0).to(DTYPE)
    sums_pointers = sums_ptr + (row_tile * BLOCK + in_block) * stride_sn

    PARTS: tl.constexpr = BLOCK // KEYS  # tiles of a block
    reference = tl.full([BLOCK], float("-inf"), tl.float32)
    for tile in tl.range(0, (q_block + 1) * PARTS if REDO else 1, num_stages=STAGES):
        products, bonus = token_products(
            q_tile, k_source, bonus_ptr, batch_of_tile, kv_head, positions, q_block, tile, stride_kn, stride_kd, kv_len,
            HEAD_DIM, BLOCK_D, BLOCK, KEYS, DTYPE, TMA,
        )  # fmt: skip
        reference = tl.maximum(reference, tl.max(products, axis=1) * scale_log2 + bonus)
    start = tl.program_id(2) * split_blocks
    end = tl.minimum(q_block + 1, start + split_blocks)
    total = tl.zeros([BLOCK], tl.float32)
    of_block = total
    for tile in tl.range(start * PARTS, end * PARTS, num_stages=STAGES):
        products, bonus = token_products(
            q_tile, k_source, bonus_ptr, batch_of_tile, kv_head, positions, q_block, tile, stride_kn, stride_kd, kv_len,
            HEAD_DIM, BLOCK_D, BLOCK, KEYS, DTYPE, TMA,
        )  # fmt: skip
        sums = tl.sum(tl.exp2(products * scale_log2 - (reference - bonus)[:, None]), axis=1)
        of_block = sums if PARTS == 1 else tl.where(tile % PARTS == 0, 0.0, of_block) + sums
        if tile % PARTS == PARTS - 1:
            tl.store(sums_pointers + tile // PARTS, of_block)
            total += of_block
    if not REDO:
        tl.store(flags_ptr + tl.program_id(2), tl.where(tl.sum(total, axis=0) < LARGEST_SUM, 0, 1))


def pair_tokens(
    q: torch.Tensor,
    k: torch.Tensor,
    value_bonus: torch.Tensor | None,
    cells: Cells,
    scale: float,
    exact_last_blocks: int,
) -> tuple[tuple[int, torch.Tensor, tuple[int, ...]], Callable[[], None]]:
    """Sums of the weights of single queries and single keys, for the last `exact_last_blocks` query blocks.

    A last block that is less than half full does not count as one of them, and is added. A kernel launched next with
    overlap=True may begin at once.

    Returns:
        The tuple that pair_cells yields, for cells of one token and these query blocks; and a second launch to make
        before the sums are read.
    """
    (batch, num_q_heads, _, head_dim), num_kv_heads = q.shape, k.shape[1]
    heads, size, num_kv_blocks = batch * num_q_heads, cells.block_size, cells.num_kv_blocks
    half_full = (cells.kv_len + size // 2) // size
    count = min(exact_last_blocks + num_kv_blocks - half_full, cells.num_q_blocks)
    operand = operand_dtype(torch.float32 if triton.knobs.runtime.interpret else q.dtype)
    block_d, keys, tma = padded_dim(head_dim), min(size, KEY_TILE), can_describe(k)
    sums = new_sums(q, operand, heads, count * size, num_kv_blocks)
    num_splits, blocks_per_split = split_keys(num_kv_blocks, heads * count)
    sizes = num_q_heads, num_q_heads // num_kv_heads, num_kv_blocks, num_kv_blocks - count
    lengths = cells.q_start, cells.kv_len, blocks_per_split
    again = launch_guess(
        pair_tokens_kernel,
        (heads, count, num_splits),
        (q, Tiles(k, (1, 1, keys, block_d), describe_tiles) if tma else k, value_bonus, sums),
        (*q.stride(), *k.stride(), sums.stride(1), *sizes, *lengths, float(scale)),
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        BLOCK=size,
        KEYS=keys,
        DTYPE=operand,
        STAGES=STAGES if operand.primitive_bitwidth == 16 else 2,
        TMA=tma,
        CAN_OVERLAP=at_least_sm90(q.device),
        num_warps=max(4, size // QUERIES_PER_WARP),
        num_stages=2,
    )
    first_row = cells.num_q_blocks - count
    numbers = cells.num_q_blocks, num_kv_blocks, first_row, count * size
    return (count, sums, (*numbers, cells.first_position, cells.q_start, cells.kv_len)), again

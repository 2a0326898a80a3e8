"""Scores and selection of short prompts in one kernel: a program holds whole rows of scores, so it can select at once.

This saves a launch, which is what bounds a short prompt. Longer rows are faster by score_blocks and select_topk, whose
device functions these are.
"""

import torch
import triton
import triton.language as tl

from .block_scores import PRECISION, operand_dtype, score_tile
from .block_select import row_size, select_rows
from .launch import launch

MAX_KV_BLOCKS = 32  # of a row; at 64, on an NVIDIA H200, two kernels are faster
ROWS = 16  # query blocks of one program, of all heads that share a KV head
DEPTH_TILE, WARPS, STAGES = 128, 4, 4  # of a product of 16-bit sums, its warps and the tiles in flight


@triton.jit
def score_select_kernel(
    q_sums_ptr,
    k_sums_ptr,
    value_bonus_ptr,
    budget_ptr,
    kv_indices_ptr,
    kv_num_blocks_ptr,
    heads_per_kv_head,
    num_q_blocks,
    num_kv_blocks,
    sink_blocks,
    local_blocks,
    max_blocks,
    scale,
    ON_TOP: tl.constexpr,
    DEPTH: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_SIZE: tl.constexpr,
    DEPTH_TILE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program scores and selects ROWS query blocks of one KV head. Grid: (row tiles, B * Hkv)."""
    batch_kv_head = tl.program_id(1).to(tl.int64)
    flat_rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    kv_blocks = tl.arange(0, ROW_SIZE)
    first_q_block = num_kv_blocks - num_q_blocks
    scores = score_tile(
        q_sums_ptr, k_sums_ptr, value_bonus_ptr, batch_kv_head, flat_rows, kv_blocks, num_kv_blocks,
        heads_per_kv_head, num_q_blocks, num_kv_blocks, first_q_block, scale,
        DEPTH, PARTS, DEPTH_TILE, DTYPE, PRECISION,
    )  # fmt: skip
    rows, members = flat_rows // heads_per_kv_head, flat_rows % heads_per_kv_head
    list_rows = (batch_kv_head * heads_per_kv_head + members) * num_q_blocks + rows
    select_rows(
        scores, first_q_block + rows, kv_blocks, rows < num_q_blocks, list_rows, rows,
        budget_ptr, kv_indices_ptr, kv_num_blocks_ptr, sink_blocks, local_blocks, max_blocks, ON_TOP,
    )  # fmt: skip


def score_select(
    q_sums: torch.Tensor,
    k_sums: torch.Tensor,
    value_bonus: torch.Tensor,
    scale: float,
    budget: torch.Tensor,
    sink_blocks: int,
    local_blocks: int,
    on_top: bool,
    lists: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """select_topk(score_blocks(q_sums, k_sums, value_bonus, scale), budget, ...) for at most MAX_KV_BLOCKS key blocks.

    Args are theirs; the sums are those of all query blocks, and so are the lists, from `empty_lists`.
    """
    batch, num_q_heads, num_q_blocks = q_sums.shape[:3]
    num_kv_heads, num_kv_blocks = k_sums.shape[1:3]
    parts = 2 if q_sums.dtype == torch.bfloat16 else 1
    heads_per_kv_head = num_q_heads // num_kv_heads
    max_blocks = lists[0].shape[-1]
    launch(
        score_select_kernel,
        (-(-num_q_blocks * heads_per_kv_head // ROWS), batch * num_kv_heads),
        (q_sums, k_sums, value_bonus, budget, *lists),
        (heads_per_kv_head, num_q_blocks, num_kv_blocks, sink_blocks, local_blocks, max_blocks, float(scale)),
        ON_TOP=on_top,
        DEPTH=q_sums.shape[-1],
        PARTS=parts,
        ROWS=ROWS,
        ROW_SIZE=row_size(num_kv_blocks),
        DEPTH_TILE=DEPTH_TILE if parts == 2 else DEPTH_TILE // 2,
        DTYPE=operand_dtype(parts),
        PRECISION=PRECISION,
        num_warps=WARPS,
        num_stages=STAGES,
    )
    return lists

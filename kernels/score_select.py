"""Scores and selection of short prompts in one kernel: a program holds whole rows of scores and selects from them.

This saves a launch, and launches bound the time of short prompts. Longer rows are faster with score_blocks and
select_topk, whose device functions this kernel uses.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .block_scores import PRECISION, finish_scores, operand_dtype, score_blocks
from .block_select import select_rows, select_topk
from .common import SHORT_ROWS, at_least_sm90, for_all_lengths, row_size
from .launch import COMPILE, launch

MAX_KV_BLOCKS = SHORT_ROWS[-1]  # of a row; with 64, two kernels are faster on an NVIDIA H200
ROWS = 16  # query blocks of one program, of all heads that share a KV head
WARPS, STAGES = 4, 4  # of a program, and the tiles in flight
DEPTH_TILE = 32  # of a warp's share of a product of 16-bit sums


@triton.jit
def load_shares(sums_ptr, blocks, exists, depth, PARTS: tl.constexpr, DEPTH: tl.constexpr, DTYPE: tl.constexpr):
    """Load columns `depth` [WARPS, DEPTH_TILE] of some rows of a matrix of group sums, [WARPS, rows, DEPTH_TILE]."""
    exists = exists[None, :, None] & (depth < DEPTH)[:, None, :]
    offsets = blocks[None, :, None].to(tl.int64) * (PARTS * DEPTH) + depth[:, None, :]
    return tl.load(sums_ptr + offsets, mask=exists, other=0.0).to(DTYPE)


@triton.jit
def products_by_shares(
    q_sums_ptr,
    k_sums_ptr,
    q_rows,
    is_row,
    kv_blocks,
    is_block,
    depth_end,
    DEPTH: tl.constexpr,
    PARTS: tl.constexpr,
    WARPS: tl.constexpr,
    DEPTH_TILE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Products <q_sums, k_sums> of a few rows of each, [M, N]; each warp computes a share of the depth."""
    products = tl.zeros([WARPS, q_rows.shape[0], kv_blocks.shape[0]], tl.float32)
    shares = tl.arange(0, WARPS)[:, None] * DEPTH_TILE + tl.arange(0, DEPTH_TILE)[None, :]
    for depth_start in range(0, depth_end, WARPS * DEPTH_TILE):
        depth = depth_start + shares
        q_high = load_shares(q_sums_ptr, q_rows, is_row, depth, PARTS, DEPTH, DTYPE)  # [WARPS, M, DEPTH_TILE]
        k_high = load_shares(k_sums_ptr, kv_blocks, is_block, depth, PARTS, DEPTH, DTYPE)  # [WARPS, N, DEPTH_TILE]
        k_high = tl.permute(k_high, [0, 2, 1])
        products = tl.dot(q_high, k_high, products, input_precision=PRECISION)
        if PARTS == 2:
            k_low = load_shares(k_sums_ptr + DEPTH, kv_blocks, is_block, depth, PARTS, DEPTH, DTYPE)
            q_low = load_shares(q_sums_ptr + DEPTH, q_rows, is_row, depth, PARTS, DEPTH, DTYPE)
            products = tl.dot(q_high, tl.permute(k_low, [0, 2, 1]), products, input_precision=PRECISION)
            products = tl.dot(q_low, k_high, products, input_precision=PRECISION)
    return tl.sum(products, axis=0)


@for_all_lengths
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
    first_scored,
    num_scored,
    sink_blocks,
    local_blocks,
    max_blocks,
    scale,
    ON_TOP: tl.constexpr,
    DEPTH: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_SIZE: tl.constexpr,
    WARPS: tl.constexpr,
    DEPTH_TILE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    CAN_OVERLAP: tl.constexpr,
):
    """One program scores and selects ROWS query blocks of one KV head. Grid: (row tiles, B * Hkv).

    Query blocks but the num_scored from first_scored on have score 0; a program with no scored one does not wait.
    """
    first_row = tl.program_id(0) * ROWS // heads_per_kv_head
    last_row = (tl.program_id(0) * ROWS + ROWS - 1) // heads_per_kv_head
    scores = (last_row >= first_scored) & (first_row < first_scored + num_scored)
    if CAN_OVERLAP:
        gdc_launch_dependents()  # at once: what follows finds q, k and v where score_inputs found them
        if scores:
            gdc_wait()
    batch_kv_head = tl.program_id(1).to(tl.int64)
    flat_rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows, members = flat_rows // heads_per_kv_head, flat_rows % heads_per_kv_head
    kv_blocks = tl.arange(0, ROW_SIZE)
    is_row, is_block = rows < num_q_blocks, kv_blocks < num_kv_blocks
    heads = batch_kv_head * heads_per_kv_head + members
    q_rows = heads * num_scored + rows - first_scored
    is_scored = is_row & (rows >= first_scored) & (rows < first_scored + num_scored)
    k_sums_ptr += batch_kv_head * num_kv_blocks * (PARTS * DEPTH)
    products = products_by_shares(
        q_sums_ptr, k_sums_ptr, q_rows, is_scored, kv_blocks, is_block, tl.where(scores, DEPTH, 0),
        DEPTH, PARTS, WARPS, DEPTH_TILE, DTYPE, PRECISION,
    )  # fmt: skip
    q_blocks = num_kv_blocks - num_q_blocks + rows
    value_bonus_ptr += batch_kv_head * num_kv_blocks
    scores = finish_scores(products, value_bonus_ptr, q_blocks, kv_blocks, is_block, scale)
    select_rows(
        scores, q_blocks, kv_blocks, is_row, heads * num_q_blocks + rows, rows,
        budget_ptr, kv_indices_ptr, kv_num_blocks_ptr, sink_blocks, local_blocks, max_blocks, ON_TOP,
    )  # fmt: skip


@cache
def select_constants(num_kv_blocks: int, parts: int, device: torch.device) -> dict[str, object]:
    """Compile-time constants of the kernel that no config changes; cached, since they cost some us of host time."""
    return dict(
        PARTS=parts,
        ROWS=ROWS,
        ROW_SIZE=row_size(min(num_kv_blocks, MAX_KV_BLOCKS), SHORT_ROWS),
        WARPS=WARPS,
        DEPTH_TILE=DEPTH_TILE if parts == 2 else DEPTH_TILE // 2,
        DTYPE=operand_dtype(parts),
        PRECISION=PRECISION,
        CAN_OVERLAP=at_least_sm90(device),
        num_warps=WARPS,
        num_stages=STAGES,
    )


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
    first_scored: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """select_topk(score_blocks(q_sums, k_sums, value_bonus, scale), budget, ...) for at most MAX_KV_BLOCKS key blocks.

    The arguments are those of both functions. The lists, from `empty_lists`, hold all query blocks. q_sums may hold
    only some, by default the last ones, from `first_scored` on: no score decides about the others.
    """
    batch, num_q_heads, num_q_blocks, max_blocks = lists[0].shape
    num_kv_heads, num_kv_blocks = k_sums.shape[1:3]
    constants = select_constants(num_kv_blocks, 2 if q_sums.dtype == torch.bfloat16 else 1, q_sums.device)
    heads_per_kv_head = num_q_heads // num_kv_heads
    first_scored = num_q_blocks - q_sums.shape[2] if first_scored is None else first_scored
    sizes = heads_per_kv_head, num_q_blocks, num_kv_blocks, first_scored, q_sums.shape[2]
    numbers = *sizes, sink_blocks, local_blocks, max_blocks, float(scale)
    constants = constants | dict(ON_TOP=on_top, DEPTH=q_sums.shape[-1])
    if COMPILE.get():  # what longer prompts need
        scores = score_blocks(q_sums, k_sums, value_bonus, scale, first_scored)
        select_topk(scores, budget, sink_blocks, local_blocks, on_top, max_blocks, lists, first_scored)
    launch(
        score_select_kernel,
        (-(-num_q_blocks * heads_per_kv_head // ROWS), batch * num_kv_heads),
        (q_sums, k_sums, value_bonus, budget, *lists),
        numbers,
        overlap=constants["CAN_OVERLAP"],
        also=lambda: [(numbers, constants | dict(ROW_SIZE=lanes)) for lanes in SHORT_ROWS],
        **constants,
    )
    return lists


def compile_for_short_prompts(*args) -> None:
    """Compile score_select with these arguments, if `compiling_together` compiles the kernels of longer prompts."""
    if COMPILE.get():
        score_select(*args)

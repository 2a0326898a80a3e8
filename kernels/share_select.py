"""Selection by share: every block whose share of its row exceeds one threshold, as an ascending index list.

`select_above` reads scores from memory. `pool_select` pools cells and selects at once, without storing the scores.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from .block_select import empty_lists, for_all_heads, is_forced
from .cell_features import Cells, cell_features
from .cell_pairs import pair_cells
from .cell_scores import cell_constants, pool_shares, token_constants
from .common import LOG2_E, ROW_SIZES, for_all_lengths, row_size
from .launch import launch
from .token_pairs import pair_tokens

KEYS_PER_WARP = 256


@triton.jit
def select_row(
    scores,
    kv_blocks,
    row,
    batch_head,
    kv_indices_ptr,
    kv_num_blocks_ptr,
    num_q_blocks,
    num_kv_blocks,
    sink_blocks,
    local_blocks,
    dense_first_blocks,
    dense_last_blocks,
    threshold,
):
    """Select the blocks of one row of scores [N], -inf in the future, and write its list, zeros after the count."""
    list_row = batch_head * num_q_blocks + row
    q_block = num_kv_blocks - num_q_blocks + row
    distance = q_block - kv_blocks
    causal = distance >= 0
    largest = tl.max(scores, axis=0)
    weights = tl.exp2((scores - tl.where(largest == float("-inf"), 0.0, largest)) * LOG2_E)
    selected = (weights > threshold * tl.sum(weights, axis=0)) & causal
    selected = selected | is_forced(distance, kv_blocks, sink_blocks, local_blocks)
    dense = (q_block < dense_first_blocks) | (row >= num_q_blocks - dense_last_blocks)
    selected = selected | (causal & dense)

    slots = tl.cumsum(selected.to(tl.int32)) - 1
    kv_indices_ptr += list_row * num_kv_blocks
    tl.store(kv_indices_ptr + slots, kv_blocks, mask=selected)
    num_selected = tl.sum(selected.to(tl.int32))
    tl.store(kv_indices_ptr + kv_blocks, 0, mask=(kv_blocks >= num_selected) & (kv_blocks < num_kv_blocks))
    tl.store(kv_num_blocks_ptr + list_row, num_selected)


@for_all_lengths
def select_above_kernel(
    scores_ptr,
    kv_indices_ptr,
    kv_num_blocks_ptr,
    num_q_blocks,
    num_kv_blocks,
    sink_blocks,
    local_blocks,
    dense_first_blocks,
    dense_last_blocks,
    threshold,
    ROW_SIZE: tl.constexpr,
):
    """One program selects the blocks of one row of one head; the row lives in registers. Grid: (nq, B * Hq)."""
    row, batch_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    kv_blocks = tl.arange(0, ROW_SIZE)
    visible = kv_blocks <= num_kv_blocks - num_q_blocks + row
    scores_ptr += (batch_head * num_q_blocks + row) * num_kv_blocks
    scores = tl.load(scores_ptr + kv_blocks, mask=visible, other=float("-inf"))
    scores = tl.where(scores == scores, scores, float("-inf"))  # NaN ranks last
    select_row(
        scores, kv_blocks, row, batch_head, kv_indices_ptr, kv_num_blocks_ptr, num_q_blocks, num_kv_blocks,
        sink_blocks, local_blocks, dense_first_blocks, dense_last_blocks, threshold,
    )  # fmt: skip


@triton.jit
def pool_select_row(
    sums_ptr, row, batch_head, numbers, lists, rules,
    CELL: tl.constexpr, CELLS: tl.constexpr, CELL_TILE: tl.constexpr, RMS: tl.constexpr, HEADS: tl.constexpr,
    ROW_SIZE: tl.constexpr,
):  # fmt: skip
    """Pool the cells of one query block of one head and select among the first ROW_SIZE blocks, all that it sees."""
    blocks = tl.arange(0, ROW_SIZE)
    scores = pool_shares(sums_ptr, batch_head, row, blocks, numbers, CELL, CELLS, CELL_TILE, RMS, HEADS)
    select_row(scores, blocks, row, batch_head, *lists, *rules)


@for_all_lengths
def pool_select_kernel(
    sums_ptr,
    kv_indices_ptr,
    kv_num_blocks_ptr,
    num_q_blocks,
    num_kv_blocks,
    first_row,
    chunk_cells,
    first_position,
    q_start,
    kv_len,
    sink_blocks,
    local_blocks,
    dense_first_blocks,
    dense_last_blocks,
    threshold,
    CELL: tl.constexpr,
    CELLS: tl.constexpr,
    CELL_TILE: tl.constexpr,
    RMS: tl.constexpr,
    HEADS: tl.constexpr,
    ROW_SIZE: tl.constexpr,
):
    """One program pools the cells of one query block of one head and selects its blocks. Grid: (rows, B * Hq)."""
    row, batch_head = first_row + tl.program_id(0), tl.program_id(1).to(tl.int64)
    numbers = num_q_blocks, num_kv_blocks, first_row, chunk_cells, first_position, q_start, kv_len
    lists = kv_indices_ptr, kv_num_blocks_ptr, num_q_blocks, num_kv_blocks
    rules = sink_blocks, local_blocks, dense_first_blocks, dense_last_blocks, threshold
    HALF: tl.constexpr = ROW_SIZE // 2
    if num_kv_blocks - num_q_blocks + row < HALF:  # half the work for half of the rows
        pool_select_row(sums_ptr, row, batch_head, numbers, lists, rules, CELL, CELLS, CELL_TILE, RMS, HEADS, HALF)
        unseen = HALF + tl.arange(0, HALF)
        list_row = batch_head * num_q_blocks + row
        tl.store(kv_indices_ptr + list_row * num_kv_blocks + unseen, 0, mask=unseen < num_kv_blocks)
    else:
        pool_select_row(sums_ptr, row, batch_head, numbers, lists, rules, CELL, CELLS, CELL_TILE, RMS, HEADS, ROW_SIZE)


def select_above(
    scores: torch.Tensor,
    threshold: float,
    sink_blocks: int,
    local_blocks: int,
    dense_first_blocks: int,
    dense_last_blocks: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ascending lists of the blocks that hold more than `threshold` of the softmax of their row of scores.

    Args:
        scores: fp32 [B, Hq, nq, nk]; row r is query block nk - nq + r; NaN counts as -inf.
        threshold: Share in (0, 1].
        sink_blocks, local_blocks: Blocks kept by rule at the start and at the end of a row; the diagonal always is.
        dense_first_blocks: Query blocks from the start of the prompt that keep everything.
        dense_last_blocks: Rows at the end that keep everything.
    Returns:
        kv_indices int32 [B, Hq, nq, nk], 0 past the count; kv_num_blocks int32 [B, Hq, nq].
    """
    batch, num_heads, num_q_blocks, num_kv_blocks = scores.shape
    lists = empty_lists(batch, num_heads, num_q_blocks, num_kv_blocks, scores.device)
    lanes = triton.next_power_of_2(num_kv_blocks)
    always = sink_blocks, local_blocks, dense_first_blocks, dense_last_blocks
    launch(
        select_above_kernel,
        (num_q_blocks, batch * num_heads),
        (scores.contiguous(), *lists),
        (num_q_blocks, num_kv_blocks, *always, float(threshold)),
        ROW_SIZE=lanes,
        num_warps=min(32, max(1, lanes // KEYS_PER_WARP)),
    )
    return lists


def pool_select(
    q: torch.Tensor,
    k: torch.Tensor,
    value_bonus: torch.Tensor | None,
    cells: Cells,
    scale: float,
    threshold: float,
    sink_blocks: int,
    local_blocks: int,
    dense_first_blocks: int,
    dense_last_blocks: int,
    exact_last_blocks: int,
    features: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists of select_above for the scores of cell_scores, which are not stored; the arguments are those of both."""
    features = cell_features(q, k, cells, scale) if features is None else features
    batch, num_heads = features[0].shape[:2]
    lists = empty_lists(batch, num_heads, cells.num_q_blocks, cells.num_kv_blocks, q.device)
    rules = sink_blocks, local_blocks, dense_first_blocks, dense_last_blocks, float(threshold)

    def select(rows: int, sums: torch.Tensor, numbers: tuple, constants: Callable[[Cells, int], dict]) -> None:
        grid, numbers = (rows, batch * num_heads), (*numbers, *rules)
        lanes = row_size(cells.num_kv_blocks)
        also = lambda: [(numbers, constants(cells, lanes)) for lanes in ROW_SIZES]  # noqa: E731
        launch(pool_select_kernel, grid, (sums, *lists), numbers, also=also, **constants(cells, lanes))

    for chunk in pair_cells(*features, value_bonus, cells):
        select(*chunk, cell_constants)
    if exact_last_blocks:  # overwrites the lists of these rows
        select(*pair_tokens(q, k, value_bonus, cells, scale, exact_last_blocks), token_constants)
    return for_all_heads(lists, cells.heads)

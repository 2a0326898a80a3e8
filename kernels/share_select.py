"""Selection by share: every block whose share of its row exceeds one threshold, as an ascending index list.

`select_above` reads scores from memory. `pool_select` pools cells and selects at once, without storing the scores.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from .block_select import empty_lists, is_forced
from .cell_features import Cells, cell_features
from .cell_pairs import pair_cells
from .cell_scores import cell_constants, pool_shares, token_constants
from .common import LOG2_E, ROW_SIZES, at_least_sm90, for_all_lengths, let_next_begin, row_size, wait_for_last
from .launch import COMPILE, launch
from .token_pairs import pair_tokens

KEYS_PER_WARP = 256


@triton.jit
def select_row(
    weights,
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
    COPIES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Select the blocks of one row by its weights [N], 0 in the future, and write its list, zeros after the count.

    The list is written for COPIES consecutive heads. WIDTH: N or 2 * N, at least num_kv_blocks.
    """
    q_block = num_kv_blocks - num_q_blocks + row
    distance = q_block - kv_blocks
    causal = distance >= 0
    selected = (weights > threshold * tl.sum(weights, axis=0)) & causal
    selected = selected | is_forced(distance, kv_blocks, sink_blocks, local_blocks)
    dense = (q_block < dense_first_blocks) | (row >= num_q_blocks - dense_last_blocks)
    selected = selected | (causal & dense)

    slots = tl.cumsum(selected.to(tl.int32)) - 1
    num_selected = tl.sum(selected.to(tl.int32))
    for copy in range(COPIES):
        list_row = (batch_head * COPIES + copy) * num_q_blocks + row
        list_ptr = kv_indices_ptr + list_row * num_kv_blocks
        tl.store(list_ptr + slots, kv_blocks, mask=selected)
        tl.store(list_ptr + kv_blocks, 0, mask=(kv_blocks >= num_selected) & (kv_blocks < num_kv_blocks))
        if WIDTH > kv_blocks.shape[0]:
            unseen = kv_blocks + kv_blocks.shape[0]
            tl.store(list_ptr + unseen, 0, mask=unseen < num_kv_blocks)
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
    largest = tl.max(scores, axis=0)
    weights = tl.exp2((scores - tl.where(largest == float("-inf"), 0.0, largest)) * LOG2_E)
    select_row(
        weights, kv_blocks, row, batch_head, kv_indices_ptr, kv_num_blocks_ptr, num_q_blocks, num_kv_blocks,
        sink_blocks, local_blocks, dense_first_blocks, dense_last_blocks, threshold, 1, ROW_SIZE,
    )  # fmt: skip


@triton.jit
def pool_select_row(
    sums_ptr, stride_sn, row, batch_head, numbers, lists, rules,
    CELL: tl.constexpr, CELLS: tl.constexpr, CELL_TILE: tl.constexpr, RMS: tl.constexpr, HEADS: tl.constexpr,
    ROW_SIZE: tl.constexpr, COPIES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Pool the cells of one query block of one head and select among the first ROW_SIZE blocks, all that it sees."""
    blocks = tl.arange(0, ROW_SIZE)
    shares = pool_shares(sums_ptr, stride_sn, batch_head, row, blocks, numbers, CELL, CELLS, CELL_TILE, RMS, HEADS)
    select_row(shares, blocks, row, batch_head, *lists, *rules, COPIES, WIDTH)


@for_all_lengths
def pool_select_kernel(
    sums_ptr,
    kv_indices_ptr,
    kv_num_blocks_ptr,
    stride_sn,
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
    next_begins,
    CELL: tl.constexpr,
    CELLS: tl.constexpr,
    CELL_TILE: tl.constexpr,
    RMS: tl.constexpr,
    HEADS: tl.constexpr,
    ROW_SIZE: tl.constexpr,
    COPIES: tl.constexpr,
    CAN_OVERLAP: tl.constexpr,
):
    """One program pools the cells of one query block of one head and selects its blocks. Grid: (rows, B * Hq).

    Pooled heads count as one; each of the COPIES query heads in it gets the list. The next kernel may begin at once if
    next_begins is not 0. The last program ends after the kernel launched before.
    """
    if next_begins:
        let_next_begin(CAN_OVERLAP)
    row, batch_head = first_row + tl.program_id(0), tl.program_id(1).to(tl.int64)
    numbers = num_q_blocks, num_kv_blocks, first_row, chunk_cells, first_position, q_start, kv_len
    lists = kv_indices_ptr, kv_num_blocks_ptr, num_q_blocks, num_kv_blocks
    rules = sink_blocks, local_blocks, dense_first_blocks, dense_last_blocks, threshold
    HALF: tl.constexpr = ROW_SIZE // 2
    if num_kv_blocks - num_q_blocks + row < HALF:  # half the work for half of the rows
        pool_select_row(
            sums_ptr, stride_sn, row, batch_head, numbers, lists, rules, CELL, CELLS, CELL_TILE, RMS, HEADS, HALF,
            COPIES, ROW_SIZE,
        )  # fmt: skip
    else:
        pool_select_row(
            sums_ptr, stride_sn, row, batch_head, numbers, lists, rules, CELL, CELLS, CELL_TILE, RMS, HEADS, ROW_SIZE,
            COPIES, ROW_SIZE,
        )  # fmt: skip
    wait_for_last(CAN_OVERLAP)


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
    """Lists of select_above for the scores of cell_scores, which are not stored; the arguments are those of both.

    Kernels that need nothing of each other run side by side: pair_tokens and cell_features, the second launches of
    pair_tokens and pair_cells, and the pools of exact rows and of cells. The lists are those of all query heads.
    """
    (num_exact, *tokens), again = (
        pair_tokens(q, k, value_bonus, cells, scale, exact_last_blocks) if exact_last_blocks else ((0,), None)
    )
    if features is None:
        features = cell_features(q, k, cells, scale, overlap=exact_last_blocks > 0)
    batch, num_heads = features[0].shape[:2]
    lists = empty_lists(batch, num_heads * cells.heads, cells.num_q_blocks, cells.num_kv_blocks, q.device)
    rules = sink_blocks, local_blocks, dense_first_blocks, dense_last_blocks, float(threshold)

    def select(
        constants_of: Callable[[Cells, int], dict], rows: int, sums: torch.Tensor, numbers: tuple,
        overlap: bool = False, next_begins: bool = False,
    ) -> None:  # fmt: skip
        grid, numbers = (rows, batch * num_heads), (sums.stride(1), *numbers, *rules, int(next_begins))
        of_lists = dict(COPIES=cells.heads, CAN_OVERLAP=at_least_sm90(q.device))
        constants = lambda lanes: constants_of(cells, lanes) | of_lists  # noqa: E731
        also = lambda: [(numbers, constants(lanes)) for lanes in ROW_SIZES]  # noqa: E731
        of_row = constants(row_size(cells.num_kv_blocks))
        launch(pool_select_kernel, grid, (sums, *lists), numbers, overlap=overlap, also=also, **of_row)

    first_exact = cells.num_q_blocks - num_exact
    for rows, sums, numbers in pair_cells(*features, value_bonus, cells):
        beside = num_exact > 0 and numbers[2] == 0
        rows = min(rows, first_exact - numbers[2])
        if beside:
            again(overlap=True)
            select(token_constants, num_exact, *tokens, next_begins=rows > 0)
        if rows > 0 or COMPILE.get():  # other prompt lengths need it
            select(cell_constants, rows, sums, numbers, overlap=beside)
    return lists

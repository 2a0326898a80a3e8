"""Selection: the budgeted best blocks of every row of scores, as an ascending index list, without sorting.

Floats are mapped to unsigned integer keys in the same order. The key of the last kept block is found bit by bit, from
the top, by counting how many keys reach a candidate. In short rows, the rank of each key is counted instead. Blocks
that are always kept get keys above every float.
"""

import torch
import triton
import triton.language as tl

from .common import ROW_SIZES, at_least_sm90, for_all_lengths, row_size, take_turn
from .launch import launch

SIGN_BIT = tl.constexpr(0x80000000)
LARGEST_KEY = tl.constexpr(0xFFFFFFFF)
FUTURE_KEY = tl.constexpr(0)  # below the key of -inf
SHORT_ROW = tl.constexpr(32)  # keys of a row; up to here, comparing all pairs is faster than the search
KEYS_PER_WARP = 1024


@triton.jit
def order_preserving_keys(scores):
    """uint32 keys in the order of the floats, up to 0xFF800000 for +inf; NaN like -inf, -0.0 like 0.0."""
    scores = tl.where(scores != scores, float("-inf"), scores)
    scores = tl.where(scores == 0.0, 0.0, scores)
    bits = scores.to(tl.uint32, bitcast=True)
    return bits ^ tl.where(bits >= SIGN_BIT, LARGEST_KEY, SIGN_BIT)


@triton.jit
def is_forced(distance, kv_blocks, sink_blocks, local_blocks):
    """True for sink blocks, local blocks and the diagonal; `distance` counts blocks back from the diagonal."""
    return (distance >= 0) & ((distance < tl.maximum(local_blocks, 1)) | (kv_blocks < sink_blocks))


@triton.jit
def forced_keys(distance, kv_blocks, sink_blocks, local_blocks):
    """Keys above every score, best first: diagonal, sink 0, diagonal - 1, sink 1, ..."""
    unused = 2 * (distance + kv_blocks) + 2  # above every priority of the row
    local_priority = tl.where(distance < tl.maximum(local_blocks, 1), 2 * distance, unused)
    sink_priority = tl.where(kv_blocks < sink_blocks, 2 * kv_blocks + 1, unused)
    return LARGEST_KEY - tl.minimum(local_priority, sink_priority).to(tl.uint32)


@triton.jit
def kth_largest_key(keys, counts):
    """Threshold for each row of keys [R, N]: at least counts [R] keys reach it, and at most counts exceed it.

    Bits are set from the top down while enough keys reach the threshold; the search ends where exactly as many do.
    """
    thresholds = tl.zeros([keys.shape[0]], tl.uint32)
    bit = tl.full([], SIGN_BIT, tl.uint32)
    found = tl.zeros([keys.shape[0]], tl.int32)
    while (bit > 0) & (tl.min(found, axis=0) == 0):
        candidates = thresholds | bit
        reached = tl.sum((keys >= candidates[:, None]).to(tl.int32), axis=1)
        thresholds = tl.where(reached >= counts, candidates, thresholds)
        found |= (reached == counts).to(tl.int32)
        bit = bit >> 1
    return thresholds


@triton.jit
def keep_best_ranks(keys, counts):
    """`keep_largest` by the rank of each key in its row: N comparisons per key, in parallel."""
    index = tl.arange(0, keys.shape[1])
    earlier = (index[:, None] < index[None, :])[None, :, :]  # [1, N, N], the other key in axis 1
    others, own = keys[:, :, None], keys[:, None, :]
    ahead = (others > own) | ((others == own) & earlier)  # [R, N, N]
    return tl.sum(ahead.to(tl.int32), axis=1) < counts[:, None]


@triton.jit
def keep_largest(keys, counts):
    """Mask of the counts [R] largest keys of each row [R, N]; equal keys are kept in the order of their index."""
    if keys.shape[1] <= SHORT_ROW:
        return keep_best_ranks(keys, counts)
    thresholds = kth_largest_key(keys, counts)[:, None]
    above, tied = keys > thresholds, keys == thresholds
    tied_rank = tl.cumsum(tied.to(tl.int32), axis=1) - 1
    return above | (tied & (tied_rank < (counts - tl.sum(above.to(tl.int32), axis=1))[:, None]))


@triton.jit
def select_rows(
    scores,
    q_blocks,
    kv_blocks,
    is_row,
    list_rows,
    rows_in_head,
    budget_ptr,
    kv_indices_ptr,
    kv_num_blocks_ptr,
    sink_blocks,
    local_blocks,
    max_blocks,
    ON_TOP: tl.constexpr,
):
    """Select the blocks of whole rows of scores [R, N] and write their lists, zeros after the count.

    q_blocks, list_rows, rows_in_head [R]: position of a row on the key grid, among all lists and in the budget.
    is_row [R]: whether it exists.
    """
    distance = q_blocks[:, None] - kv_blocks[None, :]  # [R, N]
    causal = distance >= 0
    columns = tl.broadcast_to(kv_blocks[None, :], distance.shape)
    keys = order_preserving_keys(scores)
    forced = is_forced(distance, columns, sink_blocks, local_blocks)
    if not ON_TOP:
        keys = tl.where(forced, forced_keys(distance, columns, sink_blocks, local_blocks), keys)
    keys = tl.where(causal, keys, FUTURE_KEY)
    counts = tl.minimum(tl.load(budget_ptr + rows_in_head, mask=is_row, other=1), q_blocks + 1)
    selected = keep_largest(keys, counts)
    if ON_TOP:
        selected = selected | forced

    slots = tl.cumsum(selected.to(tl.int32), axis=1) - 1
    num_selected = tl.minimum(tl.sum(selected.to(tl.int32), axis=1), max_blocks)  # [R]
    list_pointers = kv_indices_ptr + list_rows.to(tl.int64)[:, None] * max_blocks
    tl.store(list_pointers + slots, columns, mask=selected & (slots < max_blocks) & is_row[:, None])
    unused = (columns >= num_selected[:, None]) & (columns < max_blocks) & is_row[:, None]
    tl.store(list_pointers + columns, tl.zeros_like(columns), mask=unused)
    tl.store(kv_num_blocks_ptr + list_rows, num_selected, mask=is_row)


@for_all_lengths
def select_topk_kernel(
    scores_ptr,
    budget_ptr,
    kv_indices_ptr,
    kv_num_blocks_ptr,
    q_blocks_ptr,
    num_score_rows,
    num_list_rows,
    first_score_row,
    first_list_row,
    num_kv_blocks,
    sink_blocks,
    local_blocks,
    max_blocks,
    ON_TOP: tl.constexpr,
    ROW_SIZE: tl.constexpr,
    CAN_OVERLAP: tl.constexpr,
):
    """One program selects the blocks of one row of one head; the row lives in registers. Grid: (rows, B * Hq).

    The scores are rows of the lists from first_score_row on, other rows have none; programs take the rows from
    first_list_row on. q_blocks_ptr: position of each list row on the key grid; if None, the last list row is its last
    block.
    """
    take_turn(CAN_OVERLAP)
    row = tl.arange(0, 1)
    row_in_head = first_list_row + tl.program_id(0) + row  # [1]
    batch_head = tl.program_id(1).to(tl.int64)
    if q_blocks_ptr is None:
        q_block = num_kv_blocks - num_list_rows + row_in_head
    else:
        q_block = tl.load(q_blocks_ptr + row_in_head)
    kv_blocks = tl.arange(0, ROW_SIZE)
    score_row = first_list_row + tl.program_id(0) - first_score_row
    scores_ptr += (batch_head * num_score_rows + score_row) * num_kv_blocks
    visible = (kv_blocks[None, :] <= q_block[:, None]) & (score_row >= 0) & (score_row < num_score_rows)
    scores = tl.load(scores_ptr + row[:, None] + kv_blocks[None, :], mask=visible, other=float("-inf"))
    select_rows(
        scores, q_block, kv_blocks, row == 0, batch_head * num_list_rows + row_in_head, row_in_head,
        budget_ptr, kv_indices_ptr, kv_num_blocks_ptr, sink_blocks, local_blocks, max_blocks, ON_TOP,
    )  # fmt: skip


def empty_lists(
    batch: int, num_heads: int, num_rows: int, max_blocks: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for kv_indices int32 [B, Hq, nq, max_blocks] and kv_num_blocks int32 [B, Hq, nq]."""
    kv_indices = torch.empty(batch, num_heads, num_rows, max_blocks, dtype=torch.int32, device=device)
    return kv_indices, torch.empty(batch, num_heads, num_rows, dtype=torch.int32, device=device)


def for_all_heads(lists: tuple[torch.Tensor, torch.Tensor], heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists of all query heads, from lists that `heads` consecutive ones share."""
    return lists if heads == 1 else tuple(x.repeat_interleave(heads, 1) for x in lists)


def select_topk(
    scores: torch.Tensor,
    budget: torch.Tensor,
    sink_blocks: int,
    local_blocks: int,
    on_top: bool,
    max_blocks: int,
    lists: tuple[torch.Tensor, torch.Tensor] | None = None,
    first_row: int = 0,
    q_blocks: torch.Tensor | None = None,
    written: range | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ascending index lists of the best `budget` causal blocks of every row, ties to the lower index.

    Args:
        scores: fp32 [B, Hq, rows, nk], rows first_row .. first_row + rows - 1 of the nq rows; NaN counts as -inf.
        budget: int32 [nq] on the same device [blocks]; a row never keeps more than its causal blocks.
        sink_blocks, local_blocks: Blocks kept by rule at the start and at the end of a row; the diagonal always is.
        on_top: False charges them to the budget (diagonal first, then sinks and locals in turn, while it lasts);
            True adds them to the best `budget` blocks by score.
        max_blocks: Length of the lists; at least the largest count that the budget (and on_top) can give.
        lists: From `empty_lists`, written in place; by default new ones.
        q_blocks: int32 [nq], position of each row on the key grid; by default that of the last nq blocks.
        written: Rows of the lists to write, by default those of the scores. No score decides about the others.
    Returns:
        kv_indices int32 [B, Hq, nq, max_blocks], 0 past the count; kv_num_blocks int32 [B, Hq, nq]. Row r is query
        block nk - nq + r, or q_blocks[r].
    """
    batch, num_heads, num_score_rows, num_kv_blocks = scores.shape
    num_list_rows = len(budget)
    written = range(first_row, first_row + num_score_rows) if written is None else written
    if lists is None:
        lists = empty_lists(batch, num_heads, num_list_rows, max_blocks, scores.device)
    can_overlap = at_least_sm90(scores.device)
    blocks = num_score_rows, num_list_rows, first_row, written.start, num_kv_blocks
    numbers = *blocks, sink_blocks, local_blocks, max_blocks

    def constants(lanes: int) -> dict:
        num_warps = min(32, max(1, lanes // KEYS_PER_WARP))
        return dict(ON_TOP=on_top, ROW_SIZE=lanes, CAN_OVERLAP=can_overlap, num_warps=num_warps)

    launch(
        select_topk_kernel,
        (len(written), batch * num_heads),
        (scores.contiguous(), budget.contiguous(), *lists, q_blocks),
        numbers,
        overlap=can_overlap,
        also=lambda: [(numbers, constants(lanes)) for lanes in ROW_SIZES],
        **constants(row_size(num_kv_blocks)),
    )
    return lists

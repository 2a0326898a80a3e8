"""Selection by share: every block whose share of its row exceeds one threshold, as an ascending index list."""

import torch
import triton
import triton.language as tl

from .block_select import is_forced

LOG2_E = tl.constexpr(1.4426950408889634)
KEYS_PER_WARP = 256


@triton.jit
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
    row = tl.program_id(0)
    batch_head_row = tl.program_id(1).to(tl.int64) * num_q_blocks + row
    q_block = num_kv_blocks - num_q_blocks + row
    kv_blocks = tl.arange(0, ROW_SIZE)
    distance = q_block - kv_blocks
    causal = distance >= 0

    scores = tl.load(scores_ptr + batch_head_row * num_kv_blocks + kv_blocks, mask=causal, other=float("-inf"))
    scores = tl.where(scores == scores, scores, float("-inf"))  # NaN ranks last
    largest = tl.max(scores, axis=0)
    weights = tl.exp2((scores - tl.where(largest == float("-inf"), 0.0, largest)) * LOG2_E)
    selected = (weights > threshold * tl.sum(weights, axis=0)) & causal
    selected = selected | is_forced(distance, kv_blocks, sink_blocks, local_blocks)
    dense = (q_block < dense_first_blocks) | (row >= num_q_blocks - dense_last_blocks)
    selected = selected | (causal & dense)

    slots = tl.cumsum(selected.to(tl.int32)) - 1
    kv_indices_ptr += batch_head_row * num_kv_blocks
    tl.store(kv_indices_ptr + slots, kv_blocks, mask=selected)
    num_selected = tl.sum(selected.to(tl.int32))
    tl.store(kv_indices_ptr + kv_blocks, 0, mask=(kv_blocks >= num_selected) & (kv_blocks < num_kv_blocks))
    tl.store(kv_num_blocks_ptr + batch_head_row, num_selected)


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
    kv_indices = torch.empty(scores.shape, dtype=torch.int32, device=scores.device)
    kv_num_blocks = torch.empty(scores.shape[:3], dtype=torch.int32, device=scores.device)
    row_size = triton.next_power_of_2(num_kv_blocks)
    with torch.cuda.device_of(scores):
        select_above_kernel[(num_q_blocks, batch * num_heads)](
            scores.contiguous(),
            kv_indices,
            kv_num_blocks,
            num_q_blocks,
            num_kv_blocks,
            sink_blocks,
            local_blocks,
            dense_first_blocks,
            dense_last_blocks,
            threshold,
            ROW_SIZE=row_size,
            num_warps=min(32, max(1, row_size // KEYS_PER_WARP)),
        )
    return kv_indices, kv_num_blocks

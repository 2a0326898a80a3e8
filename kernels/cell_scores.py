"""Share of each key block in its query block's attention, estimated on cells: softmax first, block sums after it.

One product per pair of cells stands for all their tokens. The softmax comes before the sum over a block, so that one
cell with a peak is enough to give its block a large share.

    cell_features.py   q, k -> one row of features per cell
    cell_pairs.py      weights of cell pairs, reduced at once to a sum per query cell and key block
    pool_shares        shares of the key blocks, mean or root mean square over the query cells of a block
"""

import torch
import triton
import triton.language as tl

from .cell_features import Cells, cell_features
from .cell_pairs import pair_cells
from .common import LN_2, for_all_lengths, row_size
from .launch import launch
from .token_pairs import pair_tokens

TINY = tl.constexpr(1e-37)  # stands for a share of 0, whose logarithm would be -inf
VECTOR = tl.constexpr(8)  # sums that a thread reads at once
CELL_TILE, TOKEN_TILE = 2048, 32768  # sums that one step of pool_shares reads, of some cells or queries and all blocks
LANES_PER_WARP = 512  # of cells: few warps add a row with few barriers, and there are many rows
TOKEN_WARPS = 8  # at least, for single queries: their programs are few


@triton.jit
def pool_shares(
    sums_ptr, stride_sn, batch_head, row, blocks, numbers,
    CELL: tl.constexpr, CELLS: tl.constexpr, CELL_TILE: tl.constexpr, RMS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Shares of all key blocks in one query block of one head, at least TINY, but 0 in the future.

    HEADS consecutive heads of the sums count as one, whose shares are the mean of theirs.

    numbers: of the chunk, as pair_cells yields them, see pool_shares_kernel.
    sums_ptr: of a chunk that begins with query block first_row. Query cells without a query (before q_start or from
    kv_len on) do not count. CELL_TILE cells are read at once.
    """
    num_q_blocks, num_kv_blocks, first_row, chunk_cells, first_position, q_start, kv_len = numbers
    last_block = num_kv_blocks - num_q_blocks + row
    causal = blocks <= last_block
    is_read = blocks // VECTOR * VECTOR <= last_block  # one mask for each wide load
    mean = tl.zeros([blocks.shape[0]], tl.float32)  # of the heads
    for head in range(HEADS):
        head_ptr = sums_ptr + ((batch_head * HEADS + head) * chunk_cells + (row - first_row) * CELLS) * stride_sn
        shares = tl.zeros([blocks.shape[0]], tl.float32)
        num_counted = 0
        for first_cell in range(0, CELLS, CELL_TILE):
            cells = first_cell + tl.arange(0, CELL_TILE)
            first_tokens = first_position + (row * CELLS + cells) * CELL
            counted = (first_tokens + CELL > q_start) & (first_tokens < kv_len)  # [CELL_TILE]
            offsets = cells[:, None] * stride_sn + blocks[None, :]
            weights = tl.load(head_ptr + offsets, mask=is_read[None, :], other=0.0).to(tl.float32)
            weights = tl.where(causal[None, :], weights, 0.0)
            weights *= tl.where(counted, 1 / tl.sum(weights, axis=1), 0.0)[:, None]  # [CELL_TILE, N]
            shares += tl.sum(weights * weights if RMS else weights, axis=0)
            num_counted += tl.sum(counted.to(tl.int32), axis=0)
        if RMS:
            shares = tl.sqrt(shares)
            shares /= tl.sum(shares, axis=0)
        else:
            shares /= num_counted
        mean += shares / HEADS
    return tl.where(causal, tl.maximum(mean, TINY), 0.0)


@for_all_lengths
def pool_shares_kernel(
    sums_ptr,
    scores_ptr,
    stride_sn,
    num_q_blocks,
    num_kv_blocks,
    first_row,
    chunk_cells,
    first_position,
    q_start,
    kv_len,
    CELL: tl.constexpr,
    CELLS: tl.constexpr,
    CELL_TILE: tl.constexpr,
    RMS: tl.constexpr,
    HEADS: tl.constexpr,
    ROW_SIZE: tl.constexpr,
):
    """One program computes the scores of one query block of one head, in registers. Grid: (rows, B * Hq)."""
    row, batch_head = first_row + tl.program_id(0), tl.program_id(1).to(tl.int64)
    blocks = tl.arange(0, ROW_SIZE)
    numbers = num_q_blocks, num_kv_blocks, first_row, chunk_cells, first_position, q_start, kv_len
    shares = pool_shares(sums_ptr, stride_sn, batch_head, row, blocks, numbers, CELL, CELLS, CELL_TILE, RMS, HEADS)
    scores = tl.where(shares > 0, tl.log2(shares) * LN_2, float("-inf"))
    scores_ptr += (batch_head * num_q_blocks + row) * num_kv_blocks
    tl.store(scores_ptr + blocks, scores, mask=blocks < num_kv_blocks)


def cell_constants(cells: Cells, lanes: int) -> dict[str, int]:
    """Compile-time constants and warps of the kernels that pool the shares of cells in rows of so many lanes."""
    at_once = min(cells.query_cells, max(1, CELL_TILE // lanes))
    constants = dict(CELL=cells.q_cell, CELLS=cells.query_cells, CELL_TILE=at_once, RMS=cells.rms, HEADS=1)
    return constants | dict(ROW_SIZE=lanes, num_warps=min(16, max(1, lanes // LANES_PER_WARP)))


def token_constants(cells: Cells, lanes: int) -> dict[str, int]:
    """cell_constants for single queries: several are read at once, since there are many for few programs."""
    at_once = min(cells.block_size, max(1, TOKEN_TILE // lanes))
    constants = dict(CELL=1, CELLS=cells.block_size, CELL_TILE=at_once, RMS=cells.rms, HEADS=cells.heads)
    return constants | dict(ROW_SIZE=lanes, num_warps=min(16, max(TOKEN_WARPS, lanes // LANES_PER_WARP)))


def cell_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    value_bonus: torch.Tensor | None,
    cells: Cells,
    scale: float,
    exact_last_blocks: int = 0,
    features: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Log of each key block's estimated share of its query block's attention.

    Args:
        q: [B, Hq, Nq, D], fp16, bf16 or fp32: the last Nq positions.
        k: [B, Hkv, Nkv, D].
        value_bonus: fp32 [B, Hkv, nk], added to the logits of a key block's cells; None is zero.
        cells: Cells for these lengths.
        scale: Softmax scale, >= 0 if peak > 0.
        exact_last_blocks: Query blocks at the end that are read token by token.
        features: From `cell_features`, by default computed; scores of query blocks without any are not written.
    Returns:
        fp32 [B, Hq, nq, nk]; exp of it sums to 1 over a row; -inf in the future. Pooled heads count as one.
    """
    features = cell_features(q, k, cells, scale) if features is None else features
    batch, num_heads = features[0].shape[:2]
    heads = batch * num_heads
    scores = q.new_empty(batch, num_heads, cells.num_q_blocks, cells.num_kv_blocks, dtype=torch.float32)
    lanes = row_size(cells.num_kv_blocks)

    def pool(rows: int, sums: torch.Tensor, numbers: tuple, constants: dict) -> None:
        launch(pool_shares_kernel, (rows, heads), (sums, scores), (sums.stride(1), *numbers), **constants)

    for chunk in pair_cells(*features, value_bonus, cells):
        pool(*chunk, cell_constants(cells, lanes))
    if exact_last_blocks:  # overwrites the scores of these rows
        tokens, again = pair_tokens(q, k, value_bonus, cells, scale, exact_last_blocks)
        again()
        pool(*tokens, token_constants(cells, lanes))
    return scores

"""Share of each key block in its query block's attention, estimated on cells: softmax first, block sums after it.

A cell is a run of consecutive tokens inside a block. One product per pair of cells stands for all its tokens, and
because the softmax comes before the sum over a block, one cell with a peak is enough to be seen.

    cell_features     x [B, H, N, D] -> one row per cell: its mean, or with a peak its two corners
    pair_cells        weights of cell pairs, reduced at once to a sum per query cell and key block
    pool_shares       shares of the key blocks, mean or root mean square over the query cells of a block, logarithm
    pair_tokens       the same as pair_cells for single queries and keys: the last blocks' shares of attention itself

Weights are powers of two relative to a reference of their row, the largest logit of the row's first tile of keys: only
quotients of a row's sums matter, and fp32 and bf16 reach 2^127. Where the sum of a program's weights says that a
reference was too low, the program computes its sums again relative to the largest logit of each row. If programs share
a row, each of them stores by how much it raised the references, and pool_shares brings their sums to a common one.

With a peak, a cell is read through corners, `peak` of the way from its mean to the largest and to the smallest value of
each dimension, and a pair's logit is one dot product, 2 D wide: the positive part of the query's upper corner with the
key's upper corner, and the negative part of its lower corner with the key's lower corner.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import triton
import triton.language as tl

from .launch import launch
from .sparse_forward import operand_dtype

LOG2_E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x * LOG2_E)
LN_2 = tl.constexpr(0.6931471805599453)
TINY = tl.constexpr(1e-37)  # stands for a share of 0, whose logarithm would be -inf
LARGEST_SUM = tl.constexpr(2.0**64)  # of a program's weights; above it they are computed again

WHOLE_DEPTH_BYTES = 512  # of the widest row of cell features that one product reads whole
DEPTH_BYTES = 256  # of the part of a wider row that one product reads
ROW_TILE = 128  # query cells of one program
COLUMN_TILE = 64  # key cells of one product, more only where a block has more
BLOCK_TILE = 32  # most key blocks of one product
FEATURE_TILE, FEATURE_WARPS = 8, 4  # cells of one program of cell_features, and its warps
UNROLL = 16  # rows of each cell that are in flight at once
STAGES = 3  # key tiles in flight, where one product reads whole features of COLUMN_TILE cells
WARPS = 8
REGISTERS = 128  # of a thread, so that two programs fit into a multiprocessor
SMALLEST_DOT = 16  # columns of the smallest product
PROGRAMS = tl.constexpr(256)  # that the keys of few query cells are split into, enough to fill a GPU
TOKEN_TILE = 16384  # sums of some queries and all key blocks that one step of pool_shares reads
BUFFER_BYTES = 512 * 2**20  # of the sums of one chunk of query blocks


@triton.jit
def store_features(
    x_ptr,
    features_ptr,
    first_cell,
    group,
    stride_xn,
    stride_xd,
    num_tokens,
    num_cells,
    front,
    peak,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CELL: tl.constexpr,
    STRIDE: tl.constexpr,
    QUERIES: tl.constexpr,
    PEAK: tl.constexpr,
    CELLS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Features of one stride group of CELLS cells of a head. Row 0 of x stands `front` rows into cell 0.

    Group sums are divided by the rows of the whole cell, so that the product of two rows, times STRIDE, is the mean
    logit of the sampled pairs. With PEAK, STRIDE is 1. The features are multiplied by `scale` before they are rounded.
    """
    cells = first_cell + tl.arange(0, CELLS)
    dims = tl.arange(0, BLOCK_D)
    first_row = cells.to(tl.int64) * CELL - front
    sums = tl.zeros([CELLS, BLOCK_D], tl.float32)
    largest = tl.full([CELLS, BLOCK_D], float("-inf"), tl.float32)
    smallest = tl.full([CELLS, BLOCK_D], float("inf"), tl.float32)
    for sample in tl.range(0, CELL // STRIDE, loop_unroll_factor=UNROLL, num_stages=1):
        rows = first_row + sample * STRIDE + group
        exists = ((rows >= 0) & (rows < num_tokens))[:, None] & (dims < HEAD_DIM)[None, :]
        tile = tl.load(x_ptr + rows[:, None] * stride_xn + dims[None, :] * stride_xd, mask=exists, other=0.0)
        tile = tile.to(tl.float32)  # [CELLS, BLOCK_D]
        sums += tile
        if PEAK:
            largest = tl.maximum(largest, tl.where(exists, tile, float("-inf")))
            smallest = tl.minimum(smallest, tl.where(exists, tile, float("inf")))
    rows_in_cell = tl.minimum(first_row + CELL, num_tokens) - tl.maximum(first_row, 0)
    means = sums / tl.maximum(rows_in_cell, 1).to(tl.float32)[:, None]

    WIDTH: tl.constexpr = HEAD_DIM * (2 if PEAK else STRIDE)
    offsets = cells.to(tl.int64)[:, None] * WIDTH + dims[None, :]
    exists = (cells < num_cells)[:, None] & (dims < HEAD_DIM)[None, :]
    if not PEAK:
        slot = STRIDE - 1 - group if QUERIES else group  # equal slots of queries and keys pair along the antidiagonal
        tl.store(features_ptr + slot * HEAD_DIM + offsets, means * scale, mask=exists)
    else:
        empty = (rows_in_cell <= 0)[:, None]
        upper = means + peak * (tl.where(empty, 0.0, largest) - means)
        lower = means + peak * (tl.where(empty, 0.0, smallest) - means)
        if QUERIES:
            upper, lower = tl.maximum(upper, 0.0), tl.minimum(lower, 0.0)
        tl.store(features_ptr + offsets, upper * scale, mask=exists)
        tl.store(features_ptr + HEAD_DIM + offsets, lower * scale, mask=exists)


@triton.jit
def cell_features_kernel(
    q_ptr,
    k_ptr,
    q_features_ptr,
    k_features_ptr,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_kd,
    num_q_heads,
    num_kv_heads,
    num_queries,
    num_keys,
    num_q_cells,
    num_k_cells,
    num_q_programs,
    front,
    peak,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    Q_CELL: tl.constexpr,
    K_CELL: tl.constexpr,
    STRIDE: tl.constexpr,
    PEAK: tl.constexpr,
    CELLS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """One program reads one stride group of CELLS cells of one head, of queries or of keys.

    Grid: (num_q_programs + B * Hkv * key tiles, STRIDE), with num_q_programs = B * Hq * query tiles. Queries first:
    their row 0 stands `front` rows into cell 0.
    """
    program, group = tl.program_id(0), tl.program_id(1)
    WIDTH: tl.constexpr = HEAD_DIM * (2 if PEAK else STRIDE)
    if program < num_q_programs:
        num_tiles = tl.cdiv(num_q_cells, CELLS)
        batch_head, first_cell = (program // num_tiles).to(tl.int64), program % num_tiles * CELLS
        x_ptr = q_ptr + batch_head // num_q_heads * stride_qb + batch_head % num_q_heads * stride_qh
        store_features(
            x_ptr, q_features_ptr + batch_head * num_q_cells * WIDTH, first_cell, group,
            stride_qn, stride_qd, num_queries, num_q_cells, front, peak, scale * LOG2_E,
            HEAD_DIM, BLOCK_D, Q_CELL, STRIDE, True, PEAK, CELLS, UNROLL,
        )  # fmt: skip
    else:
        num_tiles, program = tl.cdiv(num_k_cells, CELLS), program - num_q_programs
        batch_head, first_cell = (program // num_tiles).to(tl.int64), program % num_tiles * CELLS
        x_ptr = k_ptr + batch_head // num_kv_heads * stride_kb + batch_head % num_kv_heads * stride_kh
        store_features(
            x_ptr, k_features_ptr + batch_head * num_k_cells * WIDTH, first_cell, group,
            stride_kn, stride_kd, num_keys, num_k_cells, 0, peak, 1.0,
            HEAD_DIM, BLOCK_D, K_CELL, STRIDE, False, PEAK, CELLS, UNROLL,
        )  # fmt: skip


@triton.jit
def load_features(features_ptr, cells, num_cells, depth, DEPTH: tl.constexpr, DTYPE: tl.constexpr):
    """Rows `cells` and columns `depth` of a head's cell features, zero outside."""
    exists = (cells < num_cells)[:, None] & (depth < DEPTH)[None, :]
    return tl.load(features_ptr + cells.to(tl.int64)[:, None] * DEPTH + depth[None, :], mask=exists, other=0.0).to(
        DTYPE
    )


@triton.jit
def cell_logits(
    q_tile, q_features_ptr, k_features_ptr, bonus_ptr, rows, first_column, num_q_cells, num_k_cells,
    last_positions, all_see,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, DEPTH_TILE: tl.constexpr, K_CELL: tl.constexpr,
    CELLS_PER_BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Logits of query cells `rows`, whose first features are q_tile, and COLUMNS key cells; -inf where not seen."""
    columns, depth = first_column + tl.arange(0, COLUMNS), tl.arange(0, DEPTH_TILE)
    k_tile = load_features(k_features_ptr, columns, num_k_cells, depth, DEPTH, DTYPE)
    logits = tl.dot(q_tile, k_tile.T, input_precision="ieee")
    for later in range(DEPTH_TILE, DEPTH, DEPTH_TILE):  # features too wide for one product
        q_later = load_features(q_features_ptr, rows, num_q_cells, later + depth, DEPTH, DTYPE)
        k_later = load_features(k_features_ptr, columns, num_k_cells, later + depth, DEPTH, DTYPE)
        logits = tl.dot(q_later, k_later.T, logits, input_precision="ieee")
    if bonus_ptr is not None:
        bonus = tl.load(bonus_ptr + columns // CELLS_PER_BLOCK, mask=columns < num_k_cells, other=0.0)
        logits += (bonus * LOG2_E)[None, :]
    if first_column + COLUMNS > all_see:
        visible = columns[None, :] * K_CELL <= last_positions[:, None]
        logits = tl.where(visible, logits, float("-inf"))
    return logits


@triton.jit
def sum_weights(logits, reference, CELLS_PER_BLOCK: tl.constexpr, SUMS: tl.constexpr, DTYPE: tl.constexpr):
    """Sums of 2^(logits - reference), [ROWS, COLUMNS], over each block's CELLS_PER_BLOCK columns: [ROWS, SUMS].

    A product with the 0-1 matrix of which cell is in which block adds them up, far cheaper than sums along a part of an
    axis.
    """
    WEIGHTS: tl.constexpr = tl.float32 if DTYPE == tl.float32 else tl.bfloat16
    weights = tl.exp2(logits - reference[:, None]).to(WEIGHTS)
    cell_block = tl.arange(0, logits.shape[1]) // CELLS_PER_BLOCK
    member = (cell_block[:, None] == tl.arange(0, SUMS)[None, :]).to(WEIGHTS)  # [COLUMNS, SUMS]
    return tl.dot(weights, member, input_precision="ieee")


@triton.jit
def pair_tiles(
    q_tile, q_features_ptr, k_features_ptr, bonus_ptr, sums_ptr, reference, first_cell, rows, start, stop,
    num_q_cells, num_k_cells, num_kv_blocks, chunk_cells, last_positions, all_see,
    COLUMNS: tl.constexpr, SUMS: tl.constexpr, DEPTH: tl.constexpr, DEPTH_TILE: tl.constexpr, K_CELL: tl.constexpr,
    CELLS_PER_BLOCK: tl.constexpr, DTYPE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Store the sums of key cells start .. stop - 1 relative to a reference [ROWS]; returns the sum of all weights."""
    block_in_tile = tl.arange(0, SUMS)
    BLOCKS: tl.constexpr = COLUMNS // CELLS_PER_BLOCK
    total = tl.zeros([rows.shape[0], SUMS], tl.float32)
    for first_column in tl.range(start, stop, COLUMNS, num_stages=STAGES):
        logits = cell_logits(
            q_tile, q_features_ptr, k_features_ptr, bonus_ptr, first_cell + rows, first_column,
            num_q_cells, num_k_cells, last_positions, all_see,
            COLUMNS, DEPTH, DEPTH_TILE, K_CELL, CELLS_PER_BLOCK, DTYPE,
        )  # fmt: skip
        sums = sum_weights(logits, reference, CELLS_PER_BLOCK, SUMS, DTYPE)
        blocks = first_column // CELLS_PER_BLOCK + block_in_tile
        exists = (rows < chunk_cells)[:, None] & ((block_in_tile < BLOCKS) & (blocks < num_kv_blocks))[None, :]
        tl.store(sums_ptr + rows[:, None].to(tl.int64) * num_kv_blocks + blocks[None, :], sums, mask=exists)
        total += sums
    return tl.sum(tl.sum(total, axis=1), axis=0)


@triton.jit
def largest_logits(
    largest, q_tile, q_features_ptr, k_features_ptr, bonus_ptr, rows, start, stop, num_q_cells, num_k_cells,
    last_positions, all_see,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, DEPTH_TILE: tl.constexpr, K_CELL: tl.constexpr,
    CELLS_PER_BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The largest of `largest` and of the logits of key cells start .. stop - 1, [ROWS]."""
    for first_column in tl.range(start, stop, COLUMNS, num_stages=1):
        logits = cell_logits(
            q_tile, q_features_ptr, k_features_ptr, bonus_ptr, rows, first_column, num_q_cells, num_k_cells,
            last_positions, all_see, COLUMNS, DEPTH, DEPTH_TILE, K_CELL, CELLS_PER_BLOCK, DTYPE,
        )  # fmt: skip
        largest = tl.maximum(largest, tl.max(logits, axis=1))
    return largest


@triton.jit
def pair_cells_kernel(
    q_features_ptr,
    k_features_ptr,
    bonus_ptr,
    sums_ptr,
    shifts_ptr,
    num_q_heads,
    heads_per_kv_head,
    num_q_cells,
    num_k_cells,
    num_kv_blocks,
    first_cell,
    chunk_cells,
    first_position,
    kv_len,
    split_cells,
    DEPTH: tl.constexpr,
    Q_CELL: tl.constexpr,
    K_CELL: tl.constexpr,
    CELLS_PER_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SUMS: tl.constexpr,
    DEPTH_TILE: tl.constexpr,
    DTYPE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program pairs ROWS query cells of one head with those of split_cells key cells that they see.

    Grid: (B * Hq, row tiles, splits of the keys).
    Rows are the query cells first_cell .. first_cell + chunk_cells - 1, of which cell 0 starts at `first_position`.
    The longest rows come first. bonus_ptr: fp32 [B * Hkv, nk] added to the logits of a block's cells, or None.
    sums_ptr: [B * Hq, chunk_cells, nk], the weights of the key cells of a block that the query cell sees; of later
    blocks it is not written. For 16-bit features it is bf16. shifts_ptr: see raise_references; None if there is one
    split.
    """
    batch_head = tl.program_id(0).to(tl.int64)
    batch, head = batch_head // num_q_heads, batch_head % num_q_heads
    batch_kv_head = batch * (num_q_heads // heads_per_kv_head) + head // heads_per_kv_head
    q_features_ptr += batch_head * num_q_cells * DEPTH
    k_features_ptr += batch_kv_head * num_k_cells * DEPTH
    if bonus_ptr is not None:
        bonus_ptr += batch_kv_head * num_kv_blocks
    sums_ptr += batch_head * chunk_cells * num_kv_blocks

    row_tile = tl.num_programs(1) - 1 - tl.program_id(1)
    first_row = row_tile * ROWS
    rows = first_row + tl.arange(0, ROWS)
    # a query cell sees a key cell that starts no later than its own last token
    first_token = first_position + (first_cell + first_row) * Q_CELL
    last_positions = tl.minimum(first_token + (tl.arange(0, ROWS) + 1) * Q_CELL, kv_len) - 1
    end = tl.minimum(first_token + ROWS * Q_CELL, kv_len)
    all_see = (tl.minimum(first_token + Q_CELL, kv_len) - 1) // K_CELL + 1  # key cells that every row sees

    q_cells = first_cell + rows
    q_tile = load_features(q_features_ptr, q_cells, num_q_cells, tl.arange(0, DEPTH_TILE), DEPTH, DTYPE)
    reference = largest_logits(
        tl.full([ROWS], float("-inf"), tl.float32), q_tile, q_features_ptr, k_features_ptr, bonus_ptr, q_cells,
        0, COLUMNS, num_q_cells, num_k_cells, last_positions, all_see,
        COLUMNS, DEPTH, DEPTH_TILE, K_CELL, CELLS_PER_BLOCK, DTYPE,
    )  # fmt: skip
    start = tl.program_id(2) * split_cells
    stop = tl.minimum(tl.cdiv(end, K_CELL), start + split_cells)
    if shifts_ptr is not None:
        program = (batch_head * tl.cdiv(chunk_cells, ROWS) + row_tile) * tl.num_programs(2) + tl.program_id(2)
        shifts_ptr += program * (1 + ROWS)
        tl.store(shifts_ptr, 0.0)
    total = float("inf")
    for attempt in tl.range(0, 2, num_stages=1, disable_licm=True):  # a copy of the pass would take more registers
        if not (total < LARGEST_SUM):
            total = pair_tiles(
                q_tile, q_features_ptr, k_features_ptr, bonus_ptr, sums_ptr, reference, first_cell, rows, start, stop,
                num_q_cells, num_k_cells, num_kv_blocks, chunk_cells, last_positions, all_see,
                COLUMNS, SUMS, DEPTH, DEPTH_TILE, K_CELL, CELLS_PER_BLOCK, DTYPE, STAGES,
            )  # fmt: skip
            if (attempt == 0) & (not (total < LARGEST_SUM)):  # also NaN: an infinite weight met a zero of a product
                largest = largest_logits(
                    reference, q_tile, q_features_ptr, k_features_ptr, bonus_ptr, q_cells,
                    start, stop, num_q_cells, num_k_cells, last_positions, all_see,
                    COLUMNS, DEPTH, DEPTH_TILE, K_CELL, CELLS_PER_BLOCK, DTYPE,
                )  # fmt: skip
                reference = raise_references(reference, largest, shifts_ptr)


@triton.jit
def raise_references(reference, largest, shifts_ptr):
    """References of a program's rows, [ROWS], raised by whole powers of two to at least the largest logits.

    shifts_ptr: where the largest shift and those of the rows are stored, [1 + ROWS]; None if no other program reads
    keys for these rows.
    """
    shifts = tl.ceil(largest - reference)
    if shifts_ptr is not None:
        tl.store(shifts_ptr, tl.max(shifts, axis=0))
        tl.store(shifts_ptr + 1 + tl.arange(0, shifts.shape[0]), shifts)
    return reference + shifts


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


@triton.jit
def pair_blocks(
    q_tile, k_ptr, bonus_ptr, sums_ptr, reference, positions, q_block, start, stop, in_block, dims,
    stride_kn, stride_kd, num_kv_blocks, kv_len, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Store the sums of key blocks start .. stop - 1 relative to a reference [BLOCK]; returns the sum of weights."""
    total = tl.zeros([BLOCK], tl.float32)
    for block in tl.range(start, stop):
        products, bonus = token_products(
            q_tile, k_ptr, bonus_ptr, positions, q_block, block, in_block, dims, stride_kn, stride_kd, kv_len,
            HEAD_DIM, BLOCK, DTYPE,
        )  # fmt: skip
        sums = tl.sum(tl.exp2(products * scale_log2 - (reference - bonus)[:, None]), axis=1)
        tl.store(sums_ptr + in_block * num_kv_blocks + block, sums)
        total += sums
    return tl.sum(total, axis=0)


@triton.jit
def largest_products(
    largest, q_tile, k_ptr, bonus_ptr, positions, q_block, start, stop, in_block, dims, stride_kn, stride_kd, kv_len,
    scale_log2, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The largest of `largest` and of the logits of key blocks start .. stop - 1, [BLOCK]."""
    for block in tl.range(start, stop, num_stages=1):
        products, bonus = token_products(
            q_tile, k_ptr, bonus_ptr, positions, q_block, block, in_block, dims, stride_kn, stride_kd, kv_len,
            HEAD_DIM, BLOCK, DTYPE,
        )  # fmt: skip
        largest = tl.maximum(largest, tl.max(products, axis=1) * scale_log2 + bonus)
    return largest


@triton.jit
def pair_tokens_kernel(
    q_ptr,
    k_ptr,
    bonus_ptr,
    sums_ptr,
    shifts_ptr,
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
):
    """One program pairs the queries of one block with the keys of those of split_blocks key blocks that they see.

    Grid: (B * Hq, query blocks from first_block on, splits of the keys). sums_ptr: [B * Hq, query blocks * BLOCK, nk]
    as in pair_cells_kernel, like bonus_ptr and shifts_ptr.
    """
    batch_head = tl.program_id(0).to(tl.int64)
    batch, head = batch_head // num_q_heads, batch_head % num_q_heads
    kv_head = head // heads_per_kv_head
    q_block = first_block + tl.program_id(1)
    scale_log2 = scale * LOG2_E
    tile = batch_head * tl.num_programs(1) + tl.program_id(1)
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
    reference = largest_products(
        tl.full([BLOCK], float("-inf"), tl.float32), q_tile, k_ptr, bonus_ptr, positions, q_block, 0, 1, in_block, dims,
        stride_kn, stride_kd, kv_len, scale_log2, HEAD_DIM, BLOCK, DTYPE,
    )  # fmt: skip
    start = tl.program_id(2) * split_blocks
    stop = tl.minimum(q_block + 1, start + split_blocks)
    if shifts_ptr is not None:
        shifts_ptr += (tile * tl.num_programs(2) + tl.program_id(2)) * (1 + BLOCK)
        tl.store(shifts_ptr, 0.0)
    total = float("inf")
    for attempt in tl.range(0, 2, num_stages=1, disable_licm=True):  # a copy of the pass would take more registers
        if not (total < LARGEST_SUM):
            total = pair_blocks(
                q_tile, k_ptr, bonus_ptr, sums_ptr, reference, positions, q_block, start, stop, in_block, dims,
                stride_kn, stride_kd, num_kv_blocks, kv_len, scale_log2, HEAD_DIM, BLOCK, DTYPE,
            )  # fmt: skip
            if (attempt == 0) & (not (total < LARGEST_SUM)):  # also NaN: an infinite weight met a zero of a product
                largest = largest_products(
                    reference, q_tile, k_ptr, bonus_ptr, positions, q_block, start, stop, in_block, dims,
                    stride_kn, stride_kd, kv_len, scale_log2, HEAD_DIM, BLOCK, DTYPE,
                )  # fmt: skip
                reference = raise_references(reference, largest, shifts_ptr)


@triton.jit
def align_splits(
    sums_ptr, shifts_ptr, first_cell, blocks, causal, num_kv_blocks, num_splits, blocks_per_split,
    CELLS: tl.constexpr, CELL_TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Bring the sums of CELLS query cells, from first_cell of a chunk on, to one reference a cell, in memory.

    shifts_ptr: of a head, as raise_references stores them for every split of each ROWS cells. Where no reference was
    raised, nothing has to be done.
    """
    STRIDE: tl.constexpr = 1 + ROWS
    shifts_ptr += first_cell // ROWS * num_splits * STRIDE
    splits = tl.arange(0, PROGRAMS)
    if tl.max(tl.load(shifts_ptr + splits * STRIDE, mask=splits < num_splits, other=0.0), axis=0) > 0:
        for offset in range(0, CELLS, CELL_TILE):
            cells = offset + tl.arange(0, CELL_TILE)
            of_cells_ptr = shifts_ptr + 1 + (first_cell + cells) % ROWS
            largest = tl.zeros([CELL_TILE], tl.float32)
            for split in range(num_splits):
                raised = tl.load(shifts_ptr + split * STRIDE) > 0
                largest = tl.maximum(largest, tl.load(of_cells_ptr + split * STRIDE, mask=raised, other=0.0))
            of_blocks = blocks // blocks_per_split * STRIDE
            raised = (tl.load(shifts_ptr + of_blocks, mask=causal, other=0.0) > 0)[None, :]
            shifts = tl.load(of_cells_ptr[:, None] + of_blocks[None, :], mask=raised, other=0.0)
            pointers = sums_ptr + cells[:, None] * num_kv_blocks + blocks[None, :]
            sums = tl.load(pointers, mask=causal[None, :], other=0.0).to(tl.float32)
            sums *= tl.exp2(shifts - largest[:, None])
            tl.store(pointers, sums.to(sums_ptr.dtype.element_ty), mask=causal[None, :])
        tl.debug_barrier()


@triton.jit
def pool_shares(
    sums_ptr,
    shifts_ptr,
    batch_head,
    row,
    blocks,
    num_q_blocks,
    num_kv_blocks,
    first_row,
    chunk_cells,
    num_splits,
    blocks_per_split,
    first_position,
    q_start,
    kv_len,
    CELL: tl.constexpr,
    CELLS: tl.constexpr,
    CELL_TILE: tl.constexpr,
    ROWS: tl.constexpr,
    RMS: tl.constexpr,
):
    """Scores of one query block of one head: the logarithms of the shares of all key blocks, -inf in the future.

    sums_ptr: of a chunk that begins with query block first_row. Query cells without a query (before q_start or from
    kv_len on) do not count. shifts_ptr: see align_splits; None if there is one split. CELL_TILE cells are read at once.
    """
    causal = blocks <= num_kv_blocks - num_q_blocks + row
    first_cell_of_row = (row - first_row) * CELLS
    sums_ptr += (batch_head * chunk_cells + first_cell_of_row) * num_kv_blocks
    if shifts_ptr is not None:
        shifts_ptr += batch_head * tl.cdiv(chunk_cells, ROWS) * num_splits * (1 + ROWS)
        align_splits(
            sums_ptr, shifts_ptr, first_cell_of_row, blocks, causal, num_kv_blocks, num_splits, blocks_per_split,
            CELLS, CELL_TILE, ROWS,
        )  # fmt: skip
    shares = tl.zeros([blocks.shape[0]], tl.float32)
    num_counted = 0
    for first_cell in range(0, CELLS, CELL_TILE):
        cells = first_cell + tl.arange(0, CELL_TILE)
        first_tokens = first_position + (row * CELLS + cells) * CELL
        counted = (first_tokens + CELL > q_start) & (first_tokens < kv_len)  # [CELL_TILE]
        offsets = cells[:, None] * num_kv_blocks + blocks[None, :]
        weights = tl.load(sums_ptr + offsets, mask=causal[None, :], other=0.0).to(tl.float32)
        weights *= (1 / tl.sum(weights, axis=1))[:, None]
        weights = tl.where(counted[:, None], weights, 0.0)  # [CELL_TILE, N]
        shares += tl.sum(weights * weights if RMS else weights, axis=0)
        num_counted += tl.sum(counted.to(tl.int32), axis=0)
    if RMS:
        shares = tl.sqrt(shares)
        shares /= tl.sum(shares, axis=0)
    else:
        shares /= num_counted
    return tl.where(causal, tl.log2(tl.maximum(shares, TINY)) * LN_2, float("-inf"))


@triton.jit
def pool_shares_kernel(
    sums_ptr,
    shifts_ptr,
    scores_ptr,
    num_q_blocks,
    num_kv_blocks,
    first_row,
    chunk_cells,
    num_splits,
    blocks_per_split,
    first_position,
    q_start,
    kv_len,
    CELL: tl.constexpr,
    CELLS: tl.constexpr,
    CELL_TILE: tl.constexpr,
    ROWS: tl.constexpr,
    RMS: tl.constexpr,
    ROW_SIZE: tl.constexpr,
):
    """One program finishes one query block of one head; the row lives in registers. Grid: (rows, B * Hq)."""
    row, batch_head = first_row + tl.program_id(0), tl.program_id(1).to(tl.int64)
    blocks = tl.arange(0, ROW_SIZE)
    scores = pool_shares(
        sums_ptr, shifts_ptr, batch_head, row, blocks, num_q_blocks, num_kv_blocks, first_row, chunk_cells,
        num_splits, blocks_per_split, first_position, q_start, kv_len, CELL, CELLS, CELL_TILE, ROWS, RMS,
    )  # fmt: skip
    scores_ptr += (batch_head * num_q_blocks + row) * num_kv_blocks
    tl.store(scores_ptr + blocks, scores, mask=blocks < num_kv_blocks)


@dataclass(frozen=True)
class Cells:
    """How blocks are read through cells, and what the lengths of a prompt make of that."""

    block_size: int
    """Tokens per block."""

    query_cells: int
    """Cells of a query block, a power of two."""

    key_cells: int
    """Cells of a key block, a power of two."""

    stride: int
    """Groups of a cell, the stride of the antidiagonal samples in a cell pair; 1 takes the plain means."""

    peak: float
    """How far a cell's corners lie from its mean (0) to its extremes (1); above 0, stride is 1."""

    rms: bool
    """Whether a query block takes the root mean square of its cells' shares, not the mean."""

    q_len: int
    """Queries, the last of kv_len positions."""

    kv_len: int
    """Keys."""

    @cached_property
    def num_kv_blocks(self) -> int:
        return -(-self.kv_len // self.block_size)

    @cached_property
    def num_q_blocks(self) -> int:
        return self.num_kv_blocks - self.q_start // self.block_size

    @cached_property
    def q_start(self) -> int:
        """Position of the first query."""
        return self.kv_len - self.q_len

    @cached_property
    def first_position(self) -> int:
        """Where the first query block starts, at or before q_start."""
        return self.q_start // self.block_size * self.block_size

    @cached_property
    def q_cell(self) -> int:
        """Tokens of a query cell."""
        return self.block_size // self.query_cells

    @cached_property
    def k_cell(self) -> int:
        """Tokens of a key cell."""
        return self.block_size // self.key_cells


def cell_features(q: torch.Tensor, k: torch.Tensor, cells: Cells, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows whose products are the logits of cell pairs, in powers of two.

    Args:
        q: [B, Hq, Nq, D], any strides.
        k: [B, Hkv, Nkv, D].
        cells: Group g of a cell averages its rows g, g + stride, ... (all of them if stride is 1).
        scale: Softmax scale, of which the queries' features take care.
    Returns:
        Features of the query cells and of the key cells, [B, H, cells, stride * D] (2 * D wide if peak > 0) like q,
        fp32 under Triton's interpreter. Those of queries have their groups in reverse order, or the positive and
        negative parts of their corners.
    """
    (batch, num_q_heads, num_queries, head_dim), (num_kv_heads, num_keys) = q.shape, k.shape[1:3]
    num_q_cells, num_k_cells = cells.num_q_blocks * cells.query_cells, cells.num_kv_blocks * cells.key_cells
    dtype = torch.float32 if triton.knobs.runtime.interpret else q.dtype
    width = head_dim * (2 if cells.peak else cells.stride)
    q_features = q.new_empty(batch, num_q_heads, num_q_cells, width, dtype=dtype)
    k_features = k.new_empty(batch, num_kv_heads, num_k_cells, width, dtype=dtype)
    num_q_programs = batch * num_q_heads * -(-num_q_cells // FEATURE_TILE)
    front = cells.q_start - cells.first_position
    launch(
        cell_features_kernel,
        (num_q_programs + batch * num_kv_heads * -(-num_k_cells // FEATURE_TILE), cells.stride),
        (q, k, q_features, k_features),
        (
            *q.stride(),
            *k.stride(),
            num_q_heads,
            num_kv_heads,
            num_queries,
            num_keys,
            num_q_cells,
            num_k_cells,
            num_q_programs,
            front,
            float(cells.peak),
            float(scale * cells.stride),
        ),
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        Q_CELL=cells.q_cell,
        K_CELL=cells.k_cell,
        STRIDE=cells.stride,
        PEAK=cells.peak > 0,
        CELLS=FEATURE_TILE,
        UNROLL=UNROLL,
        num_warps=FEATURE_WARPS,
    )
    return q_features, k_features


def pair_cells(
    q: torch.Tensor, k: torch.Tensor, value_bonus: torch.Tensor | None, cells: Cells, scale: float
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor | None, tuple[int, ...]]]:
    """Sums of the weights of all cell pairs, some query blocks at a time.

    Args:
        q, k, value_bonus, scale: As in `cell_scores`.
    Yields:
        How many query blocks the chunk has; sums, [B * Hq, cells, nk] in a buffer that the next chunk overwrites; the
        shifts of its splits, see raise_references, None if there is one; and the numbers that pool_shares takes for it.
    """
    (batch, num_q_heads), num_kv_heads = q.shape[:2], k.shape[1]
    num_q_blocks, num_kv_blocks = cells.num_q_blocks, cells.num_kv_blocks
    q_features, k_features = cell_features(q, k, cells, scale)
    depth = q_features.shape[-1]
    operand = operand_dtype(q_features.dtype)
    depth_tile, item_bytes = triton.next_power_of_2(depth), operand.primitive_bitwidth // 8
    if depth_tile * item_bytes > WHOLE_DEPTH_BYTES:
        depth_tile = DEPTH_BYTES // item_bytes
    heads, heads_per_kv_head = batch * num_q_heads, num_q_heads // num_kv_heads
    columns = max(cells.key_cells, SMALLEST_DOT, min(COLUMN_TILE, BLOCK_TILE * cells.key_cells))
    sums_dtype = torch.float32 if q_features.dtype == torch.float32 else torch.bfloat16
    row_bytes = sums_dtype.itemsize * heads * cells.query_cells * num_kv_blocks
    chunk_rows = max(1, min(num_q_blocks, BUFFER_BYTES // row_bytes))
    chunk_cells = chunk_rows * cells.query_cells
    sums = q.new_empty(heads, chunk_cells, num_kv_blocks, dtype=sums_dtype)
    num_columns = -(-k_features.shape[2] // columns)
    for first_row in range(0, num_q_blocks, chunk_rows):
        rows = min(chunk_rows, num_q_blocks - first_row)
        row_tiles = -(-rows * cells.query_cells // ROW_TILE)
        num_splits, columns_per_split = split_keys(num_columns, heads * row_tiles)
        shifts = empty_shifts(sums, ROW_TILE, num_splits)
        launch(
            pair_cells_kernel,
            (heads, row_tiles, num_splits),
            (q_features, k_features, value_bonus, sums, shifts),
            (
                num_q_heads,
                heads_per_kv_head,
                q_features.shape[2],
                k_features.shape[2],
                num_kv_blocks,
                first_row * cells.query_cells,
                chunk_cells,
                cells.first_position,
                cells.kv_len,
                columns_per_split * columns,
            ),
            DEPTH=depth,
            Q_CELL=cells.q_cell,
            K_CELL=cells.k_cell,
            CELLS_PER_BLOCK=cells.key_cells,
            ROWS=ROW_TILE,
            COLUMNS=columns,
            SUMS=max(SMALLEST_DOT, columns // cells.key_cells),
            DEPTH_TILE=depth_tile,
            DTYPE=operand,
            STAGES=1 if depth > depth_tile else STAGES if columns <= COLUMN_TILE else 2,
            num_warps=WARPS,
            num_stages=2,
            **most_registers(operand, depth),
        )
        blocks_per_split = columns_per_split * columns // cells.key_cells
        numbers = num_q_blocks, num_kv_blocks, first_row, chunk_cells, num_splits, blocks_per_split
        yield rows, sums, shifts, (*numbers, cells.first_position, cells.q_start, cells.kv_len)


def pair_tokens(
    q: torch.Tensor,
    k: torch.Tensor,
    value_bonus: torch.Tensor | None,
    cells: Cells,
    scale: float,
    exact_last_blocks: int,
) -> tuple[int, torch.Tensor, torch.Tensor | None, tuple[int, ...]]:
    """Sums of the weights of single queries, those of the last `exact_last_blocks` query blocks, and single keys.

    A last block that is less than half full is one more.

    Returns:
        What pair_cells yields, for cells of one token and these query blocks.
    """
    (batch, num_q_heads, _, head_dim), num_kv_heads = q.shape, k.shape[1]
    heads, size, num_kv_blocks = batch * num_q_heads, cells.block_size, cells.num_kv_blocks
    half_full = (cells.kv_len + size // 2) // size
    count = min(exact_last_blocks + num_kv_blocks - half_full, cells.num_q_blocks)
    operand = operand_dtype(torch.float32 if triton.knobs.runtime.interpret else q.dtype)
    sums_dtype = torch.float32 if operand == tl.float32 else torch.bfloat16
    sums = q.new_empty(heads, count * size, num_kv_blocks, dtype=sums_dtype)
    num_splits, blocks_per_split = split_keys(num_kv_blocks, heads * count)
    shifts = empty_shifts(sums, size, num_splits)
    first_block = num_kv_blocks - count
    launch(
        pair_tokens_kernel,
        (heads, count, num_splits),
        (q, k, value_bonus, sums, shifts),
        (
            *q.stride(),
            *k.stride(),
            num_q_heads,
            num_q_heads // num_kv_heads,
            num_kv_blocks,
            first_block,
            cells.q_start,
            cells.kv_len,
            blocks_per_split,
            float(scale),
        ),
        HEAD_DIM=head_dim,
        BLOCK_D=max(SMALLEST_DOT, triton.next_power_of_2(head_dim)),
        BLOCK=size,
        DTYPE=operand,
        num_warps=WARPS if size == 128 else WARPS // 2,
        num_stages=2,
        **most_registers(operand, head_dim),
    )
    first_row = cells.num_q_blocks - count
    numbers = cells.num_q_blocks, num_kv_blocks, first_row, count * size, num_splits, blocks_per_split
    return count, sums, shifts, (*numbers, cells.first_position, cells.q_start, cells.kv_len)


def most_registers(operand: tl.dtype, depth: int) -> dict[str, int]:
    """Option that bounds the registers of a program where shared memory has room for a second one."""
    two_fit = operand.primitive_bitwidth == 16 and depth * 2 <= DEPTH_BYTES
    return dict(maxnreg=REGISTERS) if two_fit and not torch.version.hip else {}


def split_keys(tiles: int, programs: int) -> tuple[int, int]:
    """Number of splits of the keys of one program, so that there are PROGRAMS, and the tiles of keys of each split."""
    tiles_per_split = -(-tiles // -(-PROGRAMS.value // programs))
    return -(-tiles // tiles_per_split), tiles_per_split


def empty_shifts(sums: torch.Tensor, row_tile: int, num_splits: int) -> torch.Tensor | None:
    """Memory for raise_references, fp32 [B * Hq, row tiles, splits, 1 + row_tile]; None if there is one split."""
    heads, rows, _ = sums.shape
    if num_splits == 1:
        return None
    return sums.new_empty(heads, -(-rows // row_tile), num_splits, 1 + row_tile, dtype=torch.float32)


def cell_constants(cells: Cells) -> dict[str, int]:
    """What is known when a kernel that pools the shares of cells is compiled, and its warps."""
    row_size = max(2, triton.next_power_of_2(cells.num_kv_blocks))
    constants = dict(CELL=cells.q_cell, CELLS=cells.query_cells, CELL_TILE=1, ROWS=ROW_TILE, RMS=cells.rms)
    constants |= dict(ROW_SIZE=row_size)
    return constants | dict(num_warps=min(16, max(1, row_size // 1024)))


def token_constants(cells: Cells) -> dict[str, int]:
    """The same for single queries, which are many for the few programs that there are: they are read some at a time."""
    constants = cell_constants(cells)
    at_once = min(cells.block_size, max(1, TOKEN_TILE // constants["ROW_SIZE"]))
    constants |= dict(CELL=1, CELLS=cells.block_size, CELL_TILE=at_once, ROWS=cells.block_size)
    return constants | dict(num_warps=min(16, max(8, constants["ROW_SIZE"] // 512)))


def cell_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    value_bonus: torch.Tensor | None,
    cells: Cells,
    scale: float,
    exact_last_blocks: int = 0,
) -> torch.Tensor:
    """Log of each key block's estimated share of its query block's attention.

    Args:
        q: [B, Hq, Nq, D], fp16, bf16 or fp32: the last Nq positions.
        k: [B, Hkv, Nkv, D].
        value_bonus: fp32 [B, Hkv, nk], added to the logits of a key block's cells; None is zero.
        cells: Of these lengths.
        scale: Softmax scale, >= 0 if peak > 0.
        exact_last_blocks: Query blocks at the end that are read token by token.
    Returns:
        fp32 [B, Hq, nq, nk]; exp of it sums to 1 over a row; -inf in the future.
    """
    heads = q.shape[0] * q.shape[1]
    scores = q.new_empty(*q.shape[:2], cells.num_q_blocks, cells.num_kv_blocks, dtype=torch.float32)

    def pool(rows: int, sums: torch.Tensor, shifts: torch.Tensor | None, numbers: tuple, constants: dict) -> None:
        launch(pool_shares_kernel, (rows, heads), (sums, shifts, scores), numbers, **constants)

    for chunk in pair_cells(q, k, value_bonus, cells, scale):
        pool(*chunk, cell_constants(cells))
    if exact_last_blocks:  # overwrites the scores of these rows
        pool(*pair_tokens(q, k, value_bonus, cells, scale, exact_last_blocks), token_constants(cells))
    return scores

"""Sums of softmax weights of pairs of cells, for each query cell and key block.

Weights are powers of two relative to a reference of their row, the largest logit of the row's first tile of keys: only
quotients of a row's sums matter, and fp32 and bf16 reach 2^127. If the sum of its weights says that a reference was too
low, a program computes its sums again, relative to the largest logit of each row. Where several programs share a row,
each stores by how many powers of two it raised the references, and `align_splits` brings their sums to a common one.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .cell_features import Cells, cell_features
from .common import LARGEST_SUM, LOG2_E, SMALLEST_DOT, operand_dtype
from .launch import launch

WHOLE_DEPTH_BYTES = 512  # of the widest row of cell features that one product reads whole
DEPTH_BYTES = 256  # of the part of a wider row that one product reads
ROW_TILE = 128  # query cells of one program
COLUMN_TILE = 64  # key cells of one product, more only where a block has more
BLOCK_TILE = 32  # most key blocks of one product
STAGES = 3  # key tiles in flight, if one product reads whole features of COLUMN_TILE cells
WARPS = 8
REGISTERS = 128  # of a thread, so that two programs fit into a multiprocessor
PROGRAMS = tl.constexpr(256)  # into which the keys of few query cells are split: enough to fill a GPU
BUFFER_BYTES = 512 * 2**20  # of the sums of one chunk of query blocks


@triton.jit
def load_features(features_ptr, cells, num_cells, depth, DEPTH: tl.constexpr, DTYPE: tl.constexpr):
    """Load rows `cells` and columns `depth` of the cell features of a head, zero outside."""
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
    """Logits of query cells and COLUMNS key cells, in base 2, -inf in the future; q_tile: first features of `rows`."""
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

    They are added by a product with a 0-1 matrix (which cell is in which block), far cheaper than sums along a part of
    an axis.
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
    # a second copy of the pass, outside of a loop, would need more registers
    for attempt in tl.range(0, 2, num_stages=1, disable_licm=True):
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


def most_registers(operand: tl.dtype, depth: int) -> dict[str, int]:
    """Launch option that limits registers if the shared memory of a multiprocessor has room for two programs."""
    two_fit = operand.primitive_bitwidth == 16 and depth * 2 <= DEPTH_BYTES
    return dict(maxnreg=REGISTERS) if two_fit and not torch.version.hip else {}


def split_keys(tiles: int, programs: int) -> tuple[int, int]:
    """Number of splits of the keys, so that there are about PROGRAMS programs, and the tiles of keys of each split."""
    tiles_per_split = -(-tiles // -(-PROGRAMS.value // programs))
    return -(-tiles // tiles_per_split), tiles_per_split


def empty_shifts(sums: torch.Tensor, row_tile: int, num_splits: int) -> torch.Tensor | None:
    """Memory for raise_references, fp32 [B * Hq, row tiles, splits, 1 + row_tile]; None if there is one split."""
    heads, rows, _ = sums.shape
    if num_splits == 1:
        return None
    return sums.new_empty(heads, -(-rows // row_tile), num_splits, 1 + row_tile, dtype=torch.float32)

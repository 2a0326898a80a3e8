"""Sums of softmax weights of pairs of cells, for each query cell and key block.

Weights are powers of two relative to a reference of their row. The first launch takes the row maximum of the first tile
of keys as reference. Only quotients of a row's sums matter, and fp32 and bf16 reach 2^127, so this suffices unless a
later logit is far above the first tile. Each program of the first launch stores a flag that says if its sums became too
large. The second launch computes flagged row tiles again, relative to the true row maximum, and skips the others.
On sm_90, the kernel of cell_pairs_sm90.py takes the place of the first launch where it applies.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl

from .cell_features import Cells
from .common import (
    BUFFER_BYTES,
    LARGEST_SUM,
    LOG2_E,
    SMALLEST_DOT,
    at_least_sm90,
    for_all_lengths,
    let_next_begin,
    operand_dtype,
)
from .launch import COMPILE, Tiles, launch
from .sparse_forward import can_describe, describe_tiles
from .tasks import is_sm90

WHOLE_DEPTH_BYTES = 512  # of the widest row of cell features that one product reads whole
DEPTH_BYTES = 256  # of the part of a wider row that one product reads
ROW_TILE = 128  # query cells of one program
COLUMN_TILE = 64  # key cells of one product, more only where a block has more
BLOCK_TILE = 32  # most key blocks of one product
STAGES = 4  # key tiles in flight, if one product reads whole features of COLUMN_TILE cells
WARPS = 8
REDO_TILES = 16  # row tiles that a program of the second launch looks at
ROW_BLOCKS = 32  # rows of sums are padded to multiples of it: 64 bytes at least
PROGRAMS = tl.constexpr(256)  # into which the keys of few query cells are split: enough to fill a GPU


@triton.jit
def load_features(features_ptr, cells, num_cells, depth, DEPTH: tl.constexpr, DTYPE: tl.constexpr):
    """Load rows `cells` and columns `depth` of the cell features of a head, zero outside."""
    exists = (cells < num_cells)[:, None] & (depth < DEPTH)[None, :]
    return tl.load(features_ptr + cells.to(tl.int64)[:, None] * DEPTH + depth[None, :], mask=exists, other=0.0).to(
        DTYPE
    )


@triton.jit
def load_key_cells(
    k_source, batch, kv_head, first_column, depth, num_k_cells,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, DEPTH_TILE: tl.constexpr, DTYPE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Load DEPTH_TILE features of COLUMNS key cells; k_source: descriptor, or pointer to the features of the head."""
    if TMA:
        return k_source.load([batch, kv_head, first_column, depth]).reshape(COLUMNS, DEPTH_TILE)
    else:
        columns = first_column + tl.arange(0, COLUMNS)
        return load_features(k_source, columns, num_k_cells, depth + tl.arange(0, DEPTH_TILE), DEPTH, DTYPE)


@triton.jit
def cell_logits(
    q_tile, q_features_ptr, k_source, batch, kv_head, bonus_ptr, rows, first_column, num_q_cells, num_k_cells,
    last_positions, all_see,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, DEPTH_TILE: tl.constexpr, K_CELL: tl.constexpr,
    CELLS_PER_BLOCK: tl.constexpr, DTYPE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Logits of query cells and COLUMNS key cells, in base 2, -inf in the future; q_tile: first features of `rows`."""
    columns, depth = first_column + tl.arange(0, COLUMNS), tl.arange(0, DEPTH_TILE)
    k_tile = load_key_cells(
        k_source, batch, kv_head, first_column, 0, num_k_cells, COLUMNS, DEPTH, DEPTH_TILE, DTYPE, TMA
    )
    logits = tl.dot(q_tile, k_tile.T, input_precision="ieee")
    for later in range(DEPTH_TILE, DEPTH, DEPTH_TILE):  # features too wide for one product
        q_later = load_features(q_features_ptr, rows, num_q_cells, later + depth, DEPTH, DTYPE)
        k_later = load_key_cells(
            k_source, batch, kv_head, first_column, later, num_k_cells, COLUMNS, DEPTH, DEPTH_TILE, DTYPE, TMA
        )
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
def sums_too_large(flags_ptr, num_splits):
    """True if a split of a row tile has stored a flag that is not 0 in flags_ptr, [num_splits]."""
    splits = tl.arange(0, PROGRAMS)
    return tl.max(tl.load(flags_ptr + splits, mask=splits < num_splits, other=0), axis=0) > 0


@triton.jit
def pair_row_tile(
    q_features_ptr, k_source, bonus_ptr, sums_ptr, flags_ptr, stride_sn, row_tile, sizes,
    DEPTH: tl.constexpr, Q_CELL: tl.constexpr, K_CELL: tl.constexpr, CELLS_PER_BLOCK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, SUMS: tl.constexpr, DEPTH_TILE: tl.constexpr, DTYPE: tl.constexpr, STAGES: tl.constexpr,
    TMA: tl.constexpr, REDO: tl.constexpr,
):  # fmt: skip
    """See pair_cells_kernel: pairs the cells of one row tile. flags_ptr: the tile's flags, one for each split."""
    num_q_heads, heads_per_kv_head, num_q_cells, num_k_cells, num_kv_blocks = sizes[:5]
    first_cell, chunk_cells, first_position, kv_len, split_cells = sizes[5:]
    batch_head = tl.program_id(0).to(tl.int64)
    batch, head = batch_head // num_q_heads, batch_head % num_q_heads
    batch_kv_head = batch * (num_q_heads // heads_per_kv_head) + head // heads_per_kv_head
    q_features_ptr += batch_head * num_q_cells * DEPTH
    if not TMA:
        k_source += batch_kv_head * num_k_cells * DEPTH
    if bonus_ptr is not None:
        bonus_ptr += batch_kv_head * num_kv_blocks
    sums_ptr += batch_head * chunk_cells * stride_sn

    first_row = row_tile * ROWS
    rows = first_row + tl.arange(0, ROWS)
    # a query cell sees a key cell that starts no later than its own last token
    first_token = first_position + (first_cell + first_row) * Q_CELL
    last_positions = tl.minimum(first_token + (tl.arange(0, ROWS) + 1) * Q_CELL, kv_len) - 1
    end = tl.minimum(first_token + ROWS * Q_CELL, kv_len)
    all_see = (tl.minimum(first_token + Q_CELL, kv_len) - 1) // K_CELL + 1  # key cells that every row sees
    num_seen = tl.cdiv(end, K_CELL)  # key cells that some row sees
    block_in_tile = tl.arange(0, SUMS)
    BLOCKS: tl.constexpr = COLUMNS // CELLS_PER_BLOCK
    batch, kv_head = batch.to(tl.int32), (head // heads_per_kv_head).to(tl.int32)

    q_cells = first_cell + rows
    q_tile = load_features(q_features_ptr, q_cells, num_q_cells, tl.arange(0, DEPTH_TILE), DEPTH, DTYPE)
    reference = tl.full([ROWS], float("-inf"), tl.float32)
    for first_column in tl.range(0, num_seen if REDO else COLUMNS, COLUMNS, num_stages=STAGES):
        logits = cell_logits(
            q_tile, q_features_ptr, k_source, batch, kv_head, bonus_ptr, q_cells, first_column, num_q_cells,
            num_k_cells, last_positions, all_see, COLUMNS, DEPTH, DEPTH_TILE, K_CELL, CELLS_PER_BLOCK, DTYPE, TMA,
        )  # fmt: skip
        reference = tl.maximum(reference, tl.max(logits, axis=1))
    start = tl.program_id(2) * split_cells
    total = tl.zeros([ROWS, SUMS], tl.float32)
    for first_column in tl.range(start, tl.minimum(num_seen, start + split_cells), COLUMNS, num_stages=STAGES):
        logits = cell_logits(
            q_tile, q_features_ptr, k_source, batch, kv_head, bonus_ptr, q_cells, first_column, num_q_cells,
            num_k_cells, last_positions, all_see, COLUMNS, DEPTH, DEPTH_TILE, K_CELL, CELLS_PER_BLOCK, DTYPE, TMA,
        )  # fmt: skip
        sums = sum_weights(logits, reference, CELLS_PER_BLOCK, SUMS, DTYPE)
        blocks = first_column // CELLS_PER_BLOCK + block_in_tile
        exists = (rows < chunk_cells)[:, None] & (block_in_tile < BLOCKS)[None, :]  # rows end after the last tile
        tl.store(sums_ptr + rows[:, None].to(tl.int64) * stride_sn + blocks[None, :], sums, mask=exists)
        total += sums
    if not REDO:
        # a NaN counts as too large: an infinite weight met a zero of a product
        tl.store(flags_ptr + tl.program_id(2), tl.where(tl.sum(tl.sum(total, axis=1), axis=0) < LARGEST_SUM, 0, 1))


@for_all_lengths
def pair_cells_kernel(
    q_features_ptr,
    k_source,
    bonus_ptr,
    sums_ptr,
    flags_ptr,
    stride_sn,
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
    num_row_tiles,
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
    TMA: tl.constexpr,
    CAN_OVERLAP: tl.constexpr,
    REDO: tl.constexpr,
):
    """One program pairs ROWS query cells of one head with those of split_cells key cells that they see.

    Grid: (B * Hq, row tiles, splits of the keys), with REDO any number of programs along the row tiles.
    Rows are the query cells first_cell .. first_cell + chunk_cells - 1, of which cell 0 starts at `first_position`.
    The longest rows come first. k_source: descriptor of the key features with TMA, else a pointer. bonus_ptr: fp32
    [B * Hkv, nk] added to the logits of a block's cells, or None.
    sums_ptr: [B * Hq, chunk_cells, nk] in rows of stride_sn, the weights of the key cells of a block that the query
    cell sees; of later blocks it is not written. For 16-bit features it is bf16. flags_ptr: int32 [B * Hq, row tiles,
    splits], 1 where the sum of all weights of a program is not below LARGEST_SUM; written without REDO. With REDO, row
    tiles are skipped if none of their splits has a flag. The next kernel may begin at once.
    """
    let_next_begin(CAN_OVERLAP)
    sizes = (
        num_q_heads, heads_per_kv_head, num_q_cells, num_k_cells, num_kv_blocks,
        first_cell, chunk_cells, first_position, kv_len, split_cells,
    )  # fmt: skip
    num_splits = tl.num_programs(2)
    flags_ptr += tl.program_id(0).to(tl.int64) * num_row_tiles * num_splits
    if REDO:
        for turn in range(tl.program_id(1), num_row_tiles, tl.num_programs(1)):
            flags = flags_ptr + turn * num_splits
            if sums_too_large(flags, num_splits):
                pair_row_tile(
                    q_features_ptr, k_source, bonus_ptr, sums_ptr, flags, stride_sn, num_row_tiles - 1 - turn, sizes,
                    DEPTH, Q_CELL, K_CELL, CELLS_PER_BLOCK, ROWS, COLUMNS, SUMS, DEPTH_TILE, DTYPE, STAGES, TMA, REDO,
                )  # fmt: skip
    else:
        turn = tl.program_id(1)
        pair_row_tile(
            q_features_ptr, k_source, bonus_ptr, sums_ptr, flags_ptr + turn * num_splits, stride_sn,
            num_row_tiles - 1 - turn, sizes,
            DEPTH, Q_CELL, K_CELL, CELLS_PER_BLOCK, ROWS, COLUMNS, SUMS, DEPTH_TILE, DTYPE, STAGES, TMA, REDO,
        )  # fmt: skip


def fits_sm90(q_features: torch.Tensor, k_features: torch.Tensor, cells: Cells) -> bool:
    """Whether cell_pairs_sm90.py covers these features: sm_90, 16 bits, 256 wide, 8, 16 or 32 cells of a key block."""
    if not is_sm90(q_features.device) or q_features.dtype == torch.float32:
        return False
    spare = k_features.untyped_storage().nbytes() // 2 - k_features.storage_offset() - k_features.numel()
    runs_end = -k_features.shape[2] % 32 * 256 <= spare
    return runs_end and q_features.shape[3] == 256 and cells.key_cells in (8, 16, 32)


def pair_cells(
    q_features: torch.Tensor, k_features: torch.Tensor, value_bonus: torch.Tensor | None, cells: Cells
) -> Iterator[tuple[int, torch.Tensor, tuple[int, ...]]]:
    """Sums of the weights of all cell pairs, some query blocks at a time.

    Args:
        q_features, k_features: From `cell_features`; those of queries may end before the last query block.
        value_bonus, cells: As in `cell_scores`.
    Yields:
        How many query blocks the chunk has; sums, [B * Hq, cells, nk] in padded rows of a buffer that the next chunk
        overwrites; and the numbers that pool_shares takes for it.
    """
    (batch, num_q_heads), num_kv_heads = q_features.shape[:2], k_features.shape[1]
    num_rows, num_kv_blocks = q_features.shape[2] // cells.query_cells, cells.num_kv_blocks
    depth = q_features.shape[-1]
    operand = operand_dtype(q_features.dtype)
    depth_tile, item_bytes = triton.next_power_of_2(depth), operand.primitive_bitwidth // 8
    if depth_tile * item_bytes > WHOLE_DEPTH_BYTES:
        depth_tile = DEPTH_BYTES // item_bytes
    heads, heads_per_kv_head = batch * num_q_heads, num_q_heads // num_kv_heads
    columns = max(cells.key_cells, SMALLEST_DOT, min(COLUMN_TILE, BLOCK_TILE * cells.key_cells))
    row_bytes = q_features.element_size() * heads * cells.query_cells * num_kv_blocks
    chunk_rows = max(1, min(num_rows, BUFFER_BYTES // row_bytes))
    chunk_cells = chunk_rows * cells.query_cells
    sums = new_sums(q_features, operand, heads, chunk_cells, num_kv_blocks)
    num_columns = -(-k_features.shape[2] // columns)
    tma = can_describe(k_features)
    k_source = Tiles(k_features, (1, 1, columns, depth_tile), describe_tiles) if tma else k_features
    on_sm90 = value_bonus is None and fits_sm90(q_features, k_features, cells)
    for first_row in range(0, num_rows, chunk_rows):
        rows = min(chunk_rows, num_rows - first_row)
        row_tiles = -(-rows * cells.query_cells // ROW_TILE)
        num_splits, columns_per_split = split_keys(num_columns, heads * row_tiles)
        first, takes_sm90 = None, on_sm90 and num_splits == 1
        if takes_sm90:
            num_splits, columns_per_split = 2, -(-num_columns // 2)  # its two consumers store a flag each
        if takes_sm90 or on_sm90 and COMPILE.get():  # longer prompts need it
            from .cell_pairs_sm90 import pair_cells as pair_cells_sm90  # Gluon has no interpreter

            first = partial(pair_cells_sm90, q_features, k_features, sums, first_row * cells.query_cells, cells)
        sizes = num_q_heads, heads_per_kv_head, q_features.shape[2], k_features.shape[2]
        others = first_row * cells.query_cells, chunk_cells, cells.first_position, cells.kv_len
        launch_guess(
            pair_cells_kernel,
            (heads, row_tiles, num_splits),
            (q_features, k_source, value_bonus, sums),
            (sums.stride(1), *sizes, num_kv_blocks, *others, columns_per_split * columns, row_tiles),
            first,
            REDO_TILES,
            DEPTH=depth,
            Q_CELL=cells.q_cell,
            K_CELL=cells.k_cell,
            CELLS_PER_BLOCK=cells.key_cells,
            ROWS=ROW_TILE,
            COLUMNS=columns,
            SUMS=max(SMALLEST_DOT, columns // cells.key_cells),
            DEPTH_TILE=depth_tile,
            DTYPE=operand,
            TMA=tma,
            CAN_OVERLAP=at_least_sm90(q_features.device),
            STAGES=1 if depth > depth_tile else STAGES if columns <= COLUMN_TILE else 2,
            num_warps=WARPS,
            num_stages=2,
        )()
        numbers = cells.num_q_blocks, num_kv_blocks, first_row, chunk_cells
        yield rows, sums, (*numbers, cells.first_position, cells.q_start, cells.kv_len)


def split_keys(tiles: int, programs: int) -> tuple[int, int]:
    """Number of splits of the keys, so that there are about PROGRAMS programs, and the tiles of keys of each split."""
    tiles_per_split = -(-tiles // -(-PROGRAMS.value // programs))
    return -(-tiles // tiles_per_split), tiles_per_split


def new_sums(x: torch.Tensor, operand: tl.dtype, heads: int, rows: int, num_kv_blocks: int) -> torch.Tensor:
    """Sums of weights [heads, rows, nk] to write, bf16 for products of 16 bits, else fp32; rows are whole tiles."""
    padded = -(-num_kv_blocks // ROW_BLOCKS) * ROW_BLOCKS
    dtype = torch.float32 if operand == tl.float32 else torch.bfloat16
    return x.new_empty(heads, rows, padded, dtype=dtype)[..., :num_kv_blocks]


def launch_guess(
    kernel, grid: tuple[int, int, int], tensors: tuple, numbers: tuple, first=None, redo_tiles: int = 1, **constants
) -> Callable[[], None]:  # fmt: skip
    """Launch pair_cells_kernel or pair_tokens_kernel without REDO; adds the flags. Returns the launch with REDO.

    first: Called with the flags in place of the launch, which other prompt lengths need.
    redo_tiles: Row tiles of which a program with REDO looks at the flags.
    """
    flags = tensors[0].new_empty(grid, dtype=torch.int32)
    tensors = (*tensors, flags)
    if first:
        first(flags)
    if not first or COMPILE.get():
        launch(kernel, grid, tensors, numbers, **constants, REDO=False)
    grid = grid[0], -(-grid[1] // redo_tiles), grid[2]
    return partial(launch, kernel, grid, tensors, numbers, **constants, REDO=True)

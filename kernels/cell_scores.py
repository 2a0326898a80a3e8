"""Share of each key block in its query block's attention, estimated on cells: softmax first, block sums after it.

A cell is a run of consecutive tokens inside a block. Cell means are made once, one product per pair of cells stands for
all its tokens, and because the softmax comes before the sum over a block, one cell with a peak is enough to be seen.

    mean_cells        x [B, H, N, D] -> one row per cell: means of its stride groups, side by side
    pair_cells        logits of cell pairs, reduced at once to a log-sum-exp per query cell and key block
    average_shares    softmax over the key blocks, mean over the query cells of a block, logarithm
"""

import torch
import triton
import triton.language as tl

from .sparse_forward import operand_dtype

LOG2_E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x * LOG2_E)
LN_2 = tl.constexpr(0.6931471805599453)

DEPTH_TILE = 128  # columns of cell means that one product reads
ROW_TILE = 128  # query cells of one program
COLUMN_TILE = 128  # key cells of one program
MEAN_TILE = 32  # cells of one program of mean_cells
BUFFER_BYTES = 128 * 2**20  # of the log-sum-exps of one chunk of query blocks


@triton.jit
def mean_cells_kernel(
    x_ptr,
    means_ptr,
    stride_xb,
    stride_xh,
    stride_xn,
    stride_xd,
    num_heads,
    num_tokens,
    num_cells,
    front,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CELL: tl.constexpr,
    STRIDE: tl.constexpr,
    REVERSE: tl.constexpr,
    CELLS: tl.constexpr,
):
    """One program averages one stride group of CELLS cells of one head. Grid: (cell tiles, STRIDE, B * H).

    Row 0 of x stands `front` rows into cell 0. Group sums are divided by the rows of the whole cell, so that the
    product of two rows, times STRIDE, is the mean logit of the sampled pairs.
    """
    cells = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    group, batch_head = tl.program_id(1), tl.program_id(2).to(tl.int64)
    batch, head = batch_head // num_heads, batch_head % num_heads
    dims = tl.arange(0, BLOCK_D)
    x_ptr += batch * stride_xb + head * stride_xh

    first_row = cells.to(tl.int64) * CELL - front
    sums = tl.zeros([CELLS, BLOCK_D], tl.float32)
    for sample in range(CELL // STRIDE):
        rows = first_row + sample * STRIDE + group
        exists = ((rows >= 0) & (rows < num_tokens))[:, None] & (dims < HEAD_DIM)[None, :]
        tile = tl.load(x_ptr + rows[:, None] * stride_xn + dims[None, :] * stride_xd, mask=exists, other=0.0)
        sums += tile.to(tl.float32)  # [CELLS, BLOCK_D]
    rows_in_cell = tl.minimum(first_row + CELL, num_tokens) - tl.maximum(first_row, 0)
    means = sums / tl.maximum(rows_in_cell, 1).to(tl.float32)[:, None]

    slot = STRIDE - 1 - group if REVERSE else group
    means_ptr += batch_head * num_cells * STRIDE * HEAD_DIM + slot * HEAD_DIM
    exists = (cells < num_cells)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(means_ptr + cells.to(tl.int64)[:, None] * STRIDE * HEAD_DIM + dims[None, :], means, mask=exists)


@triton.jit
def load_means(means_ptr, cells, num_cells, depth, DEPTH: tl.constexpr, DTYPE: tl.constexpr):
    """Rows `cells` and columns `depth` of a head's cell means, zero outside."""
    exists = (cells < num_cells)[:, None] & (depth < DEPTH)[None, :]
    return tl.load(means_ptr + cells.to(tl.int64)[:, None] * DEPTH + depth[None, :], mask=exists, other=0.0).to(DTYPE)


@triton.jit
def pair_cells_kernel(
    q_means_ptr,
    k_means_ptr,
    lse_ptr,
    num_q_heads,
    heads_per_kv_head,
    num_q_cells,
    num_k_cells,
    num_kv_blocks,
    first_cell,
    chunk_cells,
    first_position,
    kv_len,
    scale,
    DEPTH: tl.constexpr,
    Q_CELL: tl.constexpr,
    K_CELL: tl.constexpr,
    CELLS_PER_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH_TILE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """One program pairs ROWS query cells with COLUMNS key cells of one head. Grid: (column tiles, row tiles, B * Hq).

    Rows are the query cells first_cell .. first_cell + chunk_cells - 1, of which cell 0 starts at `first_position`.
    lse_ptr: [B * Hq, chunk_cells, nk], base-2 log-sum-exp over the key cells of a block that the query cell sees.
    """
    batch_head = tl.program_id(2).to(tl.int64)
    batch, head = batch_head // num_q_heads, batch_head % num_q_heads
    num_kv_heads = num_q_heads // heads_per_kv_head
    q_means_ptr += batch_head * num_q_cells * DEPTH
    k_means_ptr += (batch * num_kv_heads + head // heads_per_kv_head) * num_k_cells * DEPTH

    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    # a query cell sees a key cell that starts no later than its own last token
    last_positions = tl.minimum(first_position + (first_cell + rows + 1) * Q_CELL, kv_len) - 1
    tile_end = first_position + (first_cell + tl.program_id(1) * ROWS + ROWS) * Q_CELL
    if tl.program_id(0) * COLUMNS * K_CELL < tile_end:  # else wholly in the future, and never read
        logits = tl.zeros([ROWS, COLUMNS], tl.float32)
        for depth_start in range(0, DEPTH, DEPTH_TILE):
            depth = depth_start + tl.arange(0, DEPTH_TILE)
            q_tile = load_means(q_means_ptr, first_cell + rows, num_q_cells, depth, DEPTH, DTYPE)
            k_tile = load_means(k_means_ptr, columns, num_k_cells, depth, DEPTH, DTYPE)
            logits = tl.dot(q_tile, k_tile.T, logits, input_precision="ieee")
        visible = columns[None, :] * K_CELL <= last_positions[:, None]
        logits = tl.where(visible, logits * (scale * LOG2_E), float("-inf"))

        BLOCKS: tl.constexpr = COLUMNS // CELLS_PER_BLOCK
        logits = tl.reshape(logits, [ROWS, BLOCKS, CELLS_PER_BLOCK])
        largest = tl.max(logits, axis=2)  # [ROWS, BLOCKS]
        floor = tl.where(largest == float("-inf"), 0.0, largest)  # a block that is not seen stays at -inf
        lse = floor + tl.log2(tl.sum(tl.exp2(logits - floor[:, :, None]), axis=2))
        blocks = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
        lse_ptr += batch_head * chunk_cells * num_kv_blocks
        exists = (rows < chunk_cells)[:, None] & (blocks < num_kv_blocks)[None, :]
        tl.store(lse_ptr + rows[:, None].to(tl.int64) * num_kv_blocks + blocks[None, :], lse, mask=exists)


@triton.jit
def average_shares_kernel(
    lse_ptr,
    value_bonus_ptr,
    scores_ptr,
    num_q_heads,
    heads_per_kv_head,
    num_q_blocks,
    num_kv_blocks,
    first_row,
    chunk_cells,
    first_position,
    q_start,
    kv_len,
    Q_CELL: tl.constexpr,
    CELLS_PER_BLOCK: tl.constexpr,
    ROW_SIZE: tl.constexpr,
):
    """One program finishes one query block of one head; the row lives in registers. Grid: (rows of the chunk, B * Hq).

    Query cells without a query (before `q_start` or from `kv_len` on) do not count.
    """
    chunk_row, batch_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = batch_head // num_q_heads, batch_head % num_q_heads
    batch_kv_head = batch * (num_q_heads // heads_per_kv_head) + head // heads_per_kv_head
    row = first_row + chunk_row
    blocks = tl.arange(0, ROW_SIZE)
    causal = blocks <= num_kv_blocks - num_q_blocks + row

    bonus = tl.load(value_bonus_ptr + batch_kv_head * num_kv_blocks + blocks, mask=causal, other=0.0) * LOG2_E
    lse_ptr += (batch_head * chunk_cells + chunk_row * CELLS_PER_BLOCK) * num_kv_blocks
    shares = tl.zeros([ROW_SIZE], tl.float32)
    num_counted = 0
    for cell in range(CELLS_PER_BLOCK):
        first_token = first_position + (row * CELLS_PER_BLOCK + cell) * Q_CELL
        if (first_token + Q_CELL > q_start) & (first_token < kv_len):
            lse = tl.load(lse_ptr + cell * num_kv_blocks + blocks, mask=causal, other=float("-inf")) + bonus
            weights = tl.exp2(lse - tl.max(lse, axis=0))
            shares += weights / tl.sum(weights, axis=0)
            num_counted += 1
    scores = tl.where(causal, tl.log2(shares / num_counted) * LN_2, float("-inf"))
    scores_ptr += (batch_head * num_q_blocks + row) * num_kv_blocks
    tl.store(scores_ptr + blocks, scores, mask=blocks < num_kv_blocks)


def mean_cells(x: torch.Tensor, cell: int, stride: int, num_cells: int, *, front: int, reverse: bool) -> torch.Tensor:
    """Cell means of queries or keys, as the factors of mean logits of cell pairs.

    Args:
        x: [B, H, N, D], any strides.
        cell: Tokens per cell; `stride` divides it.
        stride: Groups of a cell; group g averages rows g, g + stride, ... 1 averages all rows.
        num_cells: Cells from the one that holds row 0 minus `front`, existing or not.
        front: Rows of cell 0 (and of cells after it) that lie before row 0 of x.
        reverse: Store group g at slot stride - 1 - g (for queries: slots then pair along the antidiagonal).
    Returns:
        [B, H, num_cells, stride * D], like x (fp32 under Triton's interpreter); group sums over the rows of the cell.
    """
    batch, num_heads, num_tokens, head_dim = x.shape
    dtype = torch.float32 if triton.knobs.runtime.interpret else x.dtype
    means = torch.empty(batch, num_heads, num_cells, stride * head_dim, dtype=dtype, device=x.device)
    with torch.cuda.device_of(x):
        mean_cells_kernel[(triton.cdiv(num_cells, MEAN_TILE), stride, batch * num_heads)](
            x,
            means,
            *x.stride(),
            num_heads,
            num_tokens,
            num_cells,
            front,
            HEAD_DIM=head_dim,
            BLOCK_D=triton.next_power_of_2(head_dim),
            CELL=cell,
            STRIDE=stride,
            REVERSE=reverse,
            CELLS=MEAN_TILE,
            num_warps=4,
        )
    return means


def cell_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    value_bonus: torch.Tensor,
    *,
    block_size: int,
    q_cells: int,
    k_cells: int,
    stride: int,
    scale: float,
) -> torch.Tensor:
    """Log of each key block's estimated share of its query block's attention.

    Args:
        q: [B, Hq, Nq, D], fp16, bf16 or fp32: the last Nq positions.
        k: [B, Hkv, Nkv, D].
        value_bonus: fp32 [B, Hkv, nk], added to the logits of a key block's cells.
        block_size: Tokens per block.
        q_cells, k_cells: Cells of a query block and of a key block, powers of two.
        stride: Stride of the antidiagonal samples in a cell pair; 1 takes the plain means.
        scale: Softmax scale.
    Returns:
        fp32 [B, Hq, nq, nk]; exp of it sums to 1 over a row; -inf in the future.
    """
    batch, num_q_heads, q_len, head_dim = q.shape
    num_kv_heads, kv_len = k.shape[1:3]
    q_start = kv_len - q_len
    num_kv_blocks = triton.cdiv(kv_len, block_size)
    num_q_blocks = num_kv_blocks - q_start // block_size
    first_position = (num_kv_blocks - num_q_blocks) * block_size
    q_cell, k_cell, depth = block_size // q_cells, block_size // k_cells, stride * head_dim
    num_q_cells, num_k_cells = num_q_blocks * q_cells, num_kv_blocks * k_cells
    q_means = mean_cells(q, q_cell, stride, num_q_cells, front=q_start - first_position, reverse=True)
    k_means = mean_cells(k, k_cell, stride, num_k_cells, front=0, reverse=False)
    scores = torch.empty(batch, num_q_heads, num_q_blocks, num_kv_blocks, dtype=torch.float32, device=q.device)
    heads = batch * num_q_heads
    columns = max(COLUMN_TILE, k_cells)
    chunk_rows = max(1, min(num_q_blocks, BUFFER_BYTES // (4 * heads * q_cells * num_kv_blocks)))
    lse = torch.empty(heads, chunk_rows * q_cells, num_kv_blocks, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        for first_row in range(0, num_q_blocks, chunk_rows):
            rows = min(chunk_rows, num_q_blocks - first_row)
            seen_blocks = num_kv_blocks - num_q_blocks + first_row + rows
            grid = (triton.cdiv(seen_blocks * k_cells, columns), triton.cdiv(rows * q_cells, ROW_TILE), heads)
            pair_cells_kernel[grid](
                q_means,
                k_means,
                lse,
                num_q_heads,
                num_q_heads // num_kv_heads,
                num_q_cells,
                num_k_cells,
                num_kv_blocks,
                first_row * q_cells,
                chunk_rows * q_cells,
                first_position,
                kv_len,
                float(scale * stride),
                DEPTH=depth,
                Q_CELL=q_cell,
                K_CELL=k_cell,
                CELLS_PER_BLOCK=k_cells,
                ROWS=ROW_TILE,
                COLUMNS=columns,
                DEPTH_TILE=min(DEPTH_TILE, triton.next_power_of_2(depth)),
                DTYPE=operand_dtype(q_means.dtype),
                num_warps=8,
                num_stages=2,
            )
            average_shares_kernel[(rows, heads)](
                lse,
                value_bonus,
                scores,
                num_q_heads,
                num_q_heads // num_kv_heads,
                num_q_blocks,
                num_kv_blocks,
                first_row,
                chunk_rows * q_cells,
                first_position,
                q_start,
                kv_len,
                Q_CELL=q_cell,
                CELLS_PER_BLOCK=q_cells,
                ROW_SIZE=triton.next_power_of_2(num_kv_blocks),
                num_warps=min(16, max(1, triton.next_power_of_2(num_kv_blocks) // 256)),
            )
    return scores

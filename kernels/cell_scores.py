"""Share of each key block in its query block's attention, estimated on cells: softmax first, block sums after it.

A cell is a run of consecutive tokens inside a block. One product per pair of cells stands for all its tokens, and
because the softmax comes before the sum over a block, one cell with a peak is enough to be seen.

    cell_features     x [B, H, N, D] -> one row per cell: its mean, or with a peak its two corners
    pair_cells        logits of cell pairs, reduced at once to a log-sum-exp per query cell and key block
    pool_shares       softmax over the key blocks, mean or root mean square over the query cells of a block, logarithm

With a peak, a cell is read through corners, `peak` of the way from its mean to the largest and to the smallest value of
each dimension, and a pair's logit is one dot product, 2 D wide: the positive part of the query's upper corner with the
key's upper corner, and the negative part of its lower corner with the key's lower corner.
"""

import torch
import triton
import triton.language as tl

from .sparse_forward import operand_dtype

LOG2_E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x * LOG2_E)
LN_2 = tl.constexpr(0.6931471805599453)
TINY = tl.constexpr(1e-37)  # stands for a share of 0, whose logarithm would be -inf
LARGEST_HALF = tl.constexpr(65504.0)  # of fp16

WHOLE_DEPTH_BYTES = 512  # of the widest row of cell features that one product reads whole
DEPTH_BYTES = 256  # of the part of a wider row that one product reads
ROW_TILE = 128  # query cells of one program
COLUMN_TILE = 64  # key cells of one product, more only where a block has more
BLOCK_TILE = 32  # most key blocks of one product
FEATURE_TILE = 32  # cells of one program of cell_features
STAGES = 3  # key tiles in flight, where one product reads whole features of COLUMN_TILE cells
WARPS = 8
SMALLEST_DOT = 16  # columns of the smallest product
BUFFER_BYTES = 512 * 2**20  # of the log-sum-exps of one chunk of query blocks


@triton.jit
def cell_features_kernel(
    x_ptr,
    features_ptr,
    stride_xb,
    stride_xh,
    stride_xn,
    stride_xd,
    num_heads,
    num_tokens,
    num_cells,
    front,
    peak,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CELL: tl.constexpr,
    STRIDE: tl.constexpr,
    QUERIES: tl.constexpr,
    PEAK: tl.constexpr,
    CELLS: tl.constexpr,
):
    """One program reads one stride group of CELLS cells of one head. Grid: (cell tiles, STRIDE, B * H).

    Row 0 of x stands `front` rows into cell 0. Group sums are divided by the rows of the whole cell, so that the
    product of two rows, times STRIDE, is the mean logit of the sampled pairs. With PEAK, STRIDE is 1.
    """
    cells = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    group, batch_head = tl.program_id(1), tl.program_id(2).to(tl.int64)
    batch, head = batch_head // num_heads, batch_head % num_heads
    dims = tl.arange(0, BLOCK_D)
    x_ptr += batch * stride_xb + head * stride_xh

    first_row = cells.to(tl.int64) * CELL - front
    sums = tl.zeros([CELLS, BLOCK_D], tl.float32)
    largest = tl.full([CELLS, BLOCK_D], float("-inf"), tl.float32)
    smallest = tl.full([CELLS, BLOCK_D], float("inf"), tl.float32)
    for sample in range(CELL // STRIDE):
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
    features_ptr += batch_head * num_cells * WIDTH
    offsets = cells.to(tl.int64)[:, None] * WIDTH + dims[None, :]
    exists = (cells < num_cells)[:, None] & (dims < HEAD_DIM)[None, :]
    if not PEAK:
        slot = STRIDE - 1 - group if QUERIES else group  # equal slots of queries and keys pair along the antidiagonal
        tl.store(features_ptr + slot * HEAD_DIM + offsets, means, mask=exists)
    else:
        empty = (rows_in_cell <= 0)[:, None]
        upper = means + peak * (tl.where(empty, 0.0, largest) - means)
        lower = means + peak * (tl.where(empty, 0.0, smallest) - means)
        if QUERIES:
            upper, lower = tl.maximum(upper, 0.0), tl.minimum(lower, 0.0)
        tl.store(features_ptr + offsets, upper, mask=exists)
        tl.store(features_ptr + HEAD_DIM + offsets, lower, mask=exists)


@triton.jit
def load_features(features_ptr, cells, num_cells, depth, DEPTH: tl.constexpr, DTYPE: tl.constexpr):
    """Rows `cells` and columns `depth` of a head's cell features, zero outside."""
    exists = (cells < num_cells)[:, None] & (depth < DEPTH)[None, :]
    return tl.load(features_ptr + cells.to(tl.int64)[:, None] * DEPTH + depth[None, :], mask=exists, other=0.0).to(
        DTYPE
    )


@triton.jit
def sum_weights(logits, CELLS_PER_BLOCK: tl.constexpr, SUMS: tl.constexpr, DTYPE: tl.constexpr):
    """Base-2 log-sum-exp of logits [ROWS, COLUMNS] over each block's CELLS_PER_BLOCK columns: [ROWS, SUMS].

    Weights are relative to the row's largest logit; a product with the 0-1 matrix of which cell is in which block adds
    them up, far cheaper than sums along a part of an axis.
    """
    WEIGHTS: tl.constexpr = tl.float32 if DTYPE == tl.float32 else tl.bfloat16
    largest = tl.max(logits, axis=1)  # [ROWS]
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    weights = tl.exp2(logits - largest[:, None]).to(WEIGHTS)
    cell_block = tl.arange(0, logits.shape[1]) // CELLS_PER_BLOCK
    member = (cell_block[:, None] == tl.arange(0, SUMS)[None, :]).to(WEIGHTS)  # [COLUMNS, SUMS]
    sums = tl.dot(weights, member, input_precision="ieee")
    return largest[:, None] + tl.log2(tl.maximum(sums, TINY))


@triton.jit
def pair_cells_kernel(
    q_features_ptr,
    k_features_ptr,
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
    SUMS: tl.constexpr,
    DEPTH_TILE: tl.constexpr,
    DTYPE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program pairs ROWS query cells of one head with all key cells that they see. Grid: (B * Hq, row tiles).

    Rows are the query cells first_cell .. first_cell + chunk_cells - 1, of which cell 0 starts at `first_position`.
    The longest rows come first. lse_ptr: [B * Hq, chunk_cells, nk], base-2 log-sum-exp over the key cells of a block
    that the query cell sees; of later blocks it is not written. For 16-bit features it is fp16, which rounds less than
    bf16 features did and halves the traffic.
    """
    batch_head = tl.program_id(0).to(tl.int64)
    batch, head = batch_head // num_q_heads, batch_head % num_q_heads
    num_kv_heads = num_q_heads // heads_per_kv_head
    q_features_ptr += batch_head * num_q_cells * DEPTH
    k_features_ptr += (batch * num_kv_heads + head // heads_per_kv_head) * num_k_cells * DEPTH
    lse_ptr += batch_head * chunk_cells * num_kv_blocks

    first_row = (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS
    rows = first_row + tl.arange(0, ROWS)
    # a query cell sees a key cell that starts no later than its own last token
    first_token = first_position + (first_cell + first_row) * Q_CELL
    last_positions = tl.minimum(first_token + (tl.arange(0, ROWS) + 1) * Q_CELL, kv_len) - 1
    end = tl.minimum(first_token + ROWS * Q_CELL, kv_len)
    all_see = (tl.minimum(first_token + Q_CELL, kv_len) - 1) // K_CELL + 1  # key cells that every row sees
    depth = tl.arange(0, DEPTH_TILE)
    block_in_tile = tl.arange(0, SUMS)
    BLOCKS: tl.constexpr = COLUMNS // CELLS_PER_BLOCK

    q_tile = load_features(q_features_ptr, first_cell + rows, num_q_cells, depth, DEPTH, DTYPE)
    for first_column in tl.range(0, tl.cdiv(end, K_CELL), COLUMNS, num_stages=STAGES):
        columns = first_column + tl.arange(0, COLUMNS)
        k_tile = load_features(k_features_ptr, columns, num_k_cells, depth, DEPTH, DTYPE)
        logits = tl.dot(q_tile, k_tile.T, input_precision="ieee")
        for later in range(DEPTH_TILE, DEPTH, DEPTH_TILE):  # features too wide for one product
            q_later = load_features(q_features_ptr, first_cell + rows, num_q_cells, later + depth, DEPTH, DTYPE)
            k_later = load_features(k_features_ptr, columns, num_k_cells, later + depth, DEPTH, DTYPE)
            logits = tl.dot(q_later, k_later.T, logits, input_precision="ieee")
        logits *= scale * LOG2_E
        if first_column + COLUMNS > all_see:
            visible = columns[None, :] * K_CELL <= last_positions[:, None]
            logits = tl.where(visible, logits, float("-inf"))
        lse = sum_weights(logits, CELLS_PER_BLOCK, SUMS, DTYPE)
        if lse_ptr.dtype.element_ty == tl.float16:
            lse = tl.clamp(lse, -LARGEST_HALF, LARGEST_HALF)
        blocks = first_column // CELLS_PER_BLOCK + block_in_tile
        exists = (rows < chunk_cells)[:, None] & ((block_in_tile < BLOCKS) & (blocks < num_kv_blocks))[None, :]
        tl.store(lse_ptr + rows[:, None].to(tl.int64) * num_kv_blocks + blocks[None, :], lse, mask=exists)


@triton.jit
def pool_shares_kernel(
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
    CELL: tl.constexpr,
    CELLS: tl.constexpr,
    RMS: tl.constexpr,
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
    lse_ptr += (batch_head * chunk_cells + chunk_row * CELLS) * num_kv_blocks
    shares = tl.zeros([ROW_SIZE], tl.float32)
    num_counted = 0
    for cell in range(CELLS):
        first_token = first_position + (row * CELLS + cell) * CELL
        if (first_token + CELL > q_start) & (first_token < kv_len):
            lse = tl.load(lse_ptr + cell * num_kv_blocks + blocks, mask=causal, other=float("-inf")).to(tl.float32)
            lse += bonus
            weights = tl.exp2(lse - tl.max(lse, axis=0))
            weights /= tl.sum(weights, axis=0)
            shares += weights * weights if RMS else weights
            num_counted += 1
    if RMS:
        shares = tl.sqrt(shares)
        shares /= tl.sum(shares, axis=0)
    else:
        shares /= num_counted
    scores = tl.where(causal, tl.log2(tl.maximum(shares, TINY)) * LN_2, float("-inf"))
    scores_ptr += (batch_head * num_q_blocks + row) * num_kv_blocks
    tl.store(scores_ptr + blocks, scores, mask=blocks < num_kv_blocks)


def cell_features(
    x: torch.Tensor, cell: int, stride: int, num_cells: int, peak: float, *, front: int = 0, queries: bool = False
) -> torch.Tensor:
    """Rows whose products, times `stride`, are the logits of cell pairs.

    Args:
        x: [B, H, N, D] queries or keys, any strides.
        cell: Tokens per cell; `stride` divides it.
        stride: Groups of a cell; group g averages rows g, g + stride, ... 1 averages all rows.
        num_cells: Cells, existing or not.
        peak: How far a corner lies from the mean (0) to the extremes (1); above 0, stride is 1.
        front: Cell rows that lie before row 0 of x.
        queries: Whether x holds queries: groups in reverse order, positive and negative parts of the corners.
    Returns:
        [B, H, num_cells, stride * D] ([B, H, num_cells, 2 * D] if peak > 0) like x, fp32 under Triton's interpreter.
    """
    batch, num_heads, num_tokens, head_dim = x.shape
    dtype = torch.float32 if triton.knobs.runtime.interpret else x.dtype
    width = head_dim * (2 if peak else stride)
    features = torch.empty(batch, num_heads, num_cells, width, dtype=dtype, device=x.device)
    with torch.cuda.device_of(x):
        cell_features_kernel[(triton.cdiv(num_cells, FEATURE_TILE), stride, batch * num_heads)](
            x,
            features,
            *x.stride(),
            num_heads,
            num_tokens,
            num_cells,
            front,
            float(peak),
            HEAD_DIM=head_dim,
            BLOCK_D=triton.next_power_of_2(head_dim),
            CELL=cell,
            STRIDE=stride,
            QUERIES=queries,
            PEAK=peak > 0,
            CELLS=FEATURE_TILE,
            num_warps=4,
        )
    return features


def cell_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    value_bonus: torch.Tensor,
    *,
    block_size: int,
    query_cells: int,
    key_cells: int,
    stride: int,
    peak: float,
    rms: bool,
    scale: float,
) -> torch.Tensor:
    """Log of each key block's estimated share of its query block's attention.

    Args:
        q: [B, Hq, Nq, D], fp16, bf16 or fp32: the last Nq positions.
        k: [B, Hkv, Nkv, D].
        value_bonus: fp32 [B, Hkv, nk], added to the logits of a key block's cells.
        block_size: Tokens per block.
        query_cells, key_cells: Cells of a query block and of a key block, powers of two.
        stride: Stride of the antidiagonal samples in a cell pair; 1 takes the plain means.
        peak: How far a cell's corners lie from its mean (0) to its extremes (1); above 0, stride is 1.
        rms: Whether a query block takes the root mean square of its cells' shares, not the mean.
        scale: Softmax scale, >= 0 if peak > 0.
    Returns:
        fp32 [B, Hq, nq, nk]; exp of it sums to 1 over a row; -inf in the future.
    """
    batch, num_q_heads, q_len, head_dim = q.shape
    num_kv_heads, kv_len = k.shape[1:3]
    q_start = kv_len - q_len
    num_kv_blocks = triton.cdiv(kv_len, block_size)
    num_q_blocks = num_kv_blocks - q_start // block_size
    first_position = (num_kv_blocks - num_q_blocks) * block_size
    q_cell, k_cell = block_size // query_cells, block_size // key_cells  # tokens
    num_q_cells, num_k_cells = num_q_blocks * query_cells, num_kv_blocks * key_cells
    q_features = cell_features(q, q_cell, stride, num_q_cells, peak, front=q_start - first_position, queries=True)
    k_features = cell_features(k, k_cell, stride, num_k_cells, peak)
    depth = q_features.shape[-1]
    operand = operand_dtype(q_features.dtype)
    depth_tile, item_bytes = triton.next_power_of_2(depth), operand.primitive_bitwidth // 8
    if depth_tile * item_bytes > WHOLE_DEPTH_BYTES:
        depth_tile = DEPTH_BYTES // item_bytes
    scores = torch.empty(batch, num_q_heads, num_q_blocks, num_kv_blocks, dtype=torch.float32, device=q.device)
    heads = batch * num_q_heads
    columns = max(key_cells, SMALLEST_DOT, min(COLUMN_TILE, BLOCK_TILE * key_cells))
    lse_dtype = torch.float32 if q_features.dtype == torch.float32 else torch.float16
    row_bytes = lse_dtype.itemsize * heads * query_cells * num_kv_blocks
    chunk_rows = max(1, min(num_q_blocks, BUFFER_BYTES // row_bytes))
    lse = torch.empty(heads, chunk_rows * query_cells, num_kv_blocks, dtype=lse_dtype, device=q.device)
    with torch.cuda.device_of(q):
        for first_row in range(0, num_q_blocks, chunk_rows):
            rows = min(chunk_rows, num_q_blocks - first_row)
            pair_cells_kernel[(heads, triton.cdiv(rows * query_cells, ROW_TILE))](
                q_features,
                k_features,
                lse,
                num_q_heads,
                num_q_heads // num_kv_heads,
                num_q_cells,
                num_k_cells,
                num_kv_blocks,
                first_row * query_cells,
                chunk_rows * query_cells,
                first_position,
                kv_len,
                float(scale * stride),
                DEPTH=depth,
                Q_CELL=q_cell,
                K_CELL=k_cell,
                CELLS_PER_BLOCK=key_cells,
                ROWS=ROW_TILE,
                COLUMNS=columns,
                SUMS=max(SMALLEST_DOT, columns // key_cells),
                DEPTH_TILE=depth_tile,
                DTYPE=operand,
                STAGES=1 if depth > depth_tile else STAGES if columns <= COLUMN_TILE else 2,
                num_warps=WARPS,
                num_stages=2,
            )
            pool_shares_kernel[(rows, heads)](
                lse,
                value_bonus,
                scores,
                num_q_heads,
                num_q_heads // num_kv_heads,
                num_q_blocks,
                num_kv_blocks,
                first_row,
                chunk_rows * query_cells,
                first_position,
                q_start,
                kv_len,
                CELL=q_cell,
                CELLS=query_cells,
                RMS=rms,
                ROW_SIZE=triton.next_power_of_2(num_kv_blocks),
                num_warps=min(16, max(1, triton.next_power_of_2(num_kv_blocks) // 256)),
            )
    return scores

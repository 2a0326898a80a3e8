"""Block-sparse causal attention, backward: dQ over the lists of the forward pass, dK and dV over their transpose.

With P the attention weights, dP = dO V^T and delta = rowsum(out * dO) - dlse, the gradient of the logits is
dS = P * (dP - delta); then dV = P^T dO, dK = scale * dS^T Q and dQ = scale * dS K. P is recomputed from the lse. One
program sums each output tile in a fixed order, so two runs agree bit for bit.

Rows of queries are counted on the key grid here: query block r holds grid rows r * BLOCK_SIZE .. The first `front`
rows, (Nkv - Nq) % BLOCK_SIZE of them, do not exist, nor do rows past the last query.

The file exceeds 400 lines because its three kernels share loads, stores and row statistics, and list their arguments.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .common import (
    LOG2_E,
    TMA_BYTES,
    at_least_sm90,
    for_all_lengths,
    num_multiprocessors,
    operand_dtype,
    padded_dim,
    with_dense_rows,
)

STATISTICS_ROWS = 64  # rows of one program of row_statistics_kernel, fewer if blocks are smaller
MAX_SPLITS = 8  # most fp32 copies of dK and dV for a small problem


@triton.jit
def load_tile(
    x,
    batch,
    head,
    first_row,
    num_rows,
    stride_b,
    stride_h,
    stride_n,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Load rows first_row .. of a head as a [ROWS, BLOCK_D] tile, zero where no data is; x: descriptor or pointer."""
    if DESCRIPTORS:
        tile = x.load([batch.to(tl.int32), head.to(tl.int32), first_row, 0]).reshape(ROWS, BLOCK_D)
    else:
        dims = tl.arange(0, BLOCK_D)
        rows = first_row + tl.arange(0, ROWS)
        pointers = x + batch * stride_b + head * stride_h + rows.to(tl.int64)[:, None] * stride_n + dims[None, :]
        exists = ((rows >= 0) & (rows < num_rows))[:, None] & (dims < HEAD_DIM)[None, :]
        tile = tl.load(pointers, mask=exists, other=0.0).to(DTYPE)
    return tile


@triton.jit
def load_statistic(x, batch_head, num_grid_rows, first_row, ROWS: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """Load a row statistic of a head from grid row first_row on, fp32 [ROWS]; x: descriptor or pointer."""
    if DESCRIPTORS:
        values = x.load([batch_head.to(tl.int32), first_row]).reshape(ROWS)
    else:
        values = tl.load(x + batch_head * num_grid_rows + first_row + tl.arange(0, ROWS))
    return values


@triton.jit
def store_tile(
    x_ptr,
    batch,
    head,
    first_row,
    num_rows,
    stride_b,
    stride_h,
    stride_n,
    tile,
    HEAD_DIM: tl.constexpr,
):
    """Store a tile [ROWS, BLOCK_D] in the dtype of x; rows and dimensions that do not exist are skipped."""
    rows = first_row + tl.arange(0, tile.shape[0])
    dims = tl.arange(0, tile.shape[1])
    pointers = x_ptr + batch * stride_b + head * stride_h + rows.to(tl.int64)[:, None] * stride_n + dims[None, :]
    exists = ((rows >= 0) & (rows < num_rows))[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(pointers, tile.to(x_ptr.dtype.element_ty), mask=exists)


@for_all_lengths
def row_statistics_kernel(
    out_ptr,
    dout_ptr,
    lse_ptr,
    dlse_ptr,
    lse_log2_ptr,
    delta_ptr,
    stride_ob,
    stride_oh,
    stride_on,
    stride_gb,
    stride_gh,
    stride_gn,
    num_q_heads,
    num_queries,
    num_grid_rows,
    front,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program computes lse * LOG2_E and delta = rowsum(out * dout) - dlse for ROWS grid rows of one head.

    Rows that do not exist or have no keys get an lse of +inf, so that their recomputed weights are 0.
    Grid: (num_grid_rows / ROWS, B * Hq).
    """
    first_row = tl.program_id(0) * ROWS
    batch_head = tl.program_id(1).to(tl.int64)
    batch, head = batch_head // num_q_heads, batch_head % num_q_heads
    queries = first_row - front + tl.arange(0, ROWS)
    exists = (queries >= 0) & (queries < num_queries)
    out_tile = load_tile(
        out_ptr, batch, head, first_row - front, num_queries, stride_ob, stride_oh, stride_on,
        ROWS, HEAD_DIM, BLOCK_D, tl.float32, DESCRIPTORS=False,
    )  # fmt: skip
    dout_tile = load_tile(
        dout_ptr, batch, head, first_row - front, num_queries, stride_gb, stride_gh, stride_gn,
        ROWS, HEAD_DIM, BLOCK_D, tl.float32, DESCRIPTORS=False,
    )  # fmt: skip
    delta = tl.sum(out_tile * dout_tile, axis=1)  # [ROWS]
    lse = tl.load(lse_ptr + batch_head * num_queries + queries, mask=exists, other=float("-inf"))
    lse_log2 = tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + batch_head * num_queries + queries, mask=exists, other=0.0)
    grid_rows = batch_head * num_grid_rows + first_row + tl.arange(0, ROWS)
    tl.store(lse_log2_ptr + grid_rows, lse_log2)
    tl.store(delta_ptr + grid_rows, tl.where(lse_log2 == float("inf"), 0.0, delta))


@triton.jit
def add_to_dq(
    q_tile,
    dout_tile,
    lse_log2,
    delta,
    q_positions,
    k,
    v,
    batch,
    kv_head,
    first_key,
    num_keys,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    scale_log2,
    dq_tile,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    DIAGONAL: tl.constexpr,
):
    """Return dq_tile [M, D] plus dS K of BLOCK_N keys from first_key on, not yet scaled."""
    k_tile = load_tile(
        k, batch, kv_head, first_key, num_keys, stride_kb, stride_kh, stride_kn,
        BLOCK_N, HEAD_DIM, BLOCK_D, DTYPE, DESCRIPTORS,
    )  # fmt: skip
    v_tile = load_tile(
        v, batch, kv_head, first_key, num_keys, stride_vb, stride_vh, stride_vn,
        BLOCK_N, HEAD_DIM, BLOCK_D, DTYPE, DESCRIPTORS,
    )  # fmt: skip
    logits_log2 = tl.dot(q_tile, k_tile.T, input_precision="ieee") * scale_log2  # [M, BLOCK_N]
    dweights = tl.dot(dout_tile, v_tile.T, input_precision="ieee")
    weights = tl.exp2(logits_log2 - lse_log2[:, None])
    if DIAGONAL:
        key_positions = first_key + tl.arange(0, BLOCK_N)
        weights = tl.where(key_positions[None, :] <= q_positions[:, None], weights, 0.0)
    dlogits = weights * (dweights - delta[:, None])
    return tl.dot(dlogits.to(DTYPE), k_tile, dq_tile, input_precision="ieee")


@for_all_lengths
def dq_kernel(
    q,
    k,
    v,
    dout,
    dq_ptr,
    lse_log2_ptr,
    delta_ptr,
    kv_indices_ptr,
    kv_num_blocks_ptr,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_gb,
    stride_gh,
    stride_gn,
    stride_ob,
    stride_oh,
    stride_on,
    num_q_heads,
    heads_per_kv_head,
    num_queries,
    num_keys,
    num_q_blocks,
    max_blocks,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """One program computes BLOCK_M rows of dQ of one query block of one head.

    k, v: descriptors of [1, 1, BLOCK_N, BLOCK_D] tiles, or pointers; q, dout: pointers. Grid: (nq * BLOCK_SIZE /
    BLOCK_M, B * Hq), the last tiles, whose lists are the longest, first. BLOCK_M and BLOCK_N divide BLOCK_SIZE.
    """
    tiles_per_q_block: tl.constexpr = BLOCK_SIZE // BLOCK_M
    tiles_per_kv_block: tl.constexpr = BLOCK_SIZE // BLOCK_N
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    row, tile_in_block = tile // tiles_per_q_block, tile % tiles_per_q_block
    batch_head = tl.program_id(1).to(tl.int64)
    batch, head = batch_head // num_q_heads, batch_head % num_q_heads
    kv_head = head // heads_per_kv_head

    offset = num_keys - num_queries  # absolute position of query 0
    first_query = tile * BLOCK_M - offset % BLOCK_SIZE
    q_positions = offset + first_query + tl.arange(0, BLOCK_M)
    q_tile = load_tile(
        q, batch, head, first_query, num_queries, stride_qb, stride_qh, stride_qn,
        BLOCK_M, HEAD_DIM, BLOCK_D, DTYPE, DESCRIPTORS=False,
    )  # fmt: skip
    dout_tile = load_tile(
        dout, batch, head, first_query, num_queries, stride_gb, stride_gh, stride_gn,
        BLOCK_M, HEAD_DIM, BLOCK_D, DTYPE, DESCRIPTORS=False,
    )  # fmt: skip
    grid_rows = batch_head * num_q_blocks * BLOCK_SIZE + tile * BLOCK_M + tl.arange(0, BLOCK_M)
    lse_log2 = tl.load(lse_log2_ptr + grid_rows)
    delta = tl.load(delta_ptr + grid_rows)

    list_row = batch_head * num_q_blocks + row
    kv_indices_ptr += list_row * max_blocks
    num_blocks = tl.load(kv_num_blocks_ptr + list_row)
    last_block = tl.load(kv_indices_ptr + tl.maximum(num_blocks - 1, 0), mask=num_blocks > 0, other=-1)
    q_block = offset // BLOCK_SIZE + row  # on the key grid
    has_diagonal = (last_block == q_block).to(tl.int32)

    scale_log2 = scale * LOG2_E
    dq_tile = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for step in range((num_blocks - has_diagonal) * tiles_per_kv_block):
        kv_block = tl.load(kv_indices_ptr + step // tiles_per_kv_block)
        first_key = kv_block * BLOCK_SIZE + step % tiles_per_kv_block * BLOCK_N
        dq_tile = add_to_dq(
            q_tile, dout_tile, lse_log2, delta, q_positions, k, v, batch, kv_head, first_key, num_keys,
            stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, scale_log2, dq_tile,
            BLOCK_N, HEAD_DIM, BLOCK_D, DTYPE, DESCRIPTORS, DIAGONAL=False,
        )  # fmt: skip
    visible_tiles = ((tile_in_block + 1) * BLOCK_M + BLOCK_N - 1) // BLOCK_N  # of the diagonal block
    for step in range(has_diagonal * visible_tiles):
        first_key = q_block * BLOCK_SIZE + step * BLOCK_N
        dq_tile = add_to_dq(
            q_tile, dout_tile, lse_log2, delta, q_positions, k, v, batch, kv_head, first_key, num_keys,
            stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, scale_log2, dq_tile,
            BLOCK_N, HEAD_DIM, BLOCK_D, DTYPE, DESCRIPTORS, DIAGONAL=True,
        )  # fmt: skip
    store_tile(
        dq_ptr, batch, head, first_query, num_queries, stride_ob, stride_oh, stride_on, dq_tile * scale, HEAD_DIM
    )


@triton.jit
def add_to_dkv(
    k_tile,
    v_tile,
    first_key,
    q,
    dout,
    batch,
    head,
    batch_head,
    grid_row,
    num_grid_rows,
    num_queries,
    offset,
    front,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_gb,
    stride_gh,
    stride_gn,
    lse_log2,
    delta,
    scale_log2,
    dk_tile,
    dv_tile,
    BLOCK_M: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    DIAGONAL: tl.constexpr,
):
    """Return dk_tile and dv_tile [N, D] plus dS^T Q, not yet scaled, and P^T dO of BLOCK_M queries from grid_row on."""
    q_tile = load_tile(
        q, batch, head, grid_row - front, num_queries, stride_qb, stride_qh, stride_qn,
        BLOCK_M, HEAD_DIM, BLOCK_D, DTYPE, DESCRIPTORS,
    )  # fmt: skip
    dout_tile = load_tile(
        dout, batch, head, grid_row - front, num_queries, stride_gb, stride_gh, stride_gn,
        BLOCK_M, HEAD_DIM, BLOCK_D, DTYPE, DESCRIPTORS,
    )  # fmt: skip
    lse_log2 = load_statistic(lse_log2, batch_head, num_grid_rows, grid_row, BLOCK_M, DESCRIPTORS)
    delta = load_statistic(delta, batch_head, num_grid_rows, grid_row, BLOCK_M, DESCRIPTORS)
    logits_log2 = tl.dot(k_tile, q_tile.T, input_precision="ieee") * scale_log2  # [N, BLOCK_M], transposed
    weights = tl.exp2(logits_log2 - lse_log2[None, :])
    if DIAGONAL:
        key_positions = first_key + tl.arange(0, k_tile.shape[0])
        q_positions = offset - front + grid_row + tl.arange(0, BLOCK_M)
        weights = tl.where(key_positions[:, None] <= q_positions[None, :], weights, 0.0)
    dv_tile = tl.dot(weights.to(DTYPE), dout_tile, dv_tile, input_precision="ieee")
    dweights = tl.dot(v_tile, dout_tile.T, input_precision="ieee")
    dlogits = weights * (dweights - delta[None, :])
    dk_tile = tl.dot(dlogits.to(DTYPE), q_tile, dk_tile, input_precision="ieee")
    return dk_tile, dv_tile


@for_all_lengths
def dkv_kernel(
    q,
    k,
    v,
    dout,
    dk_ptr,
    dv_ptr,
    lse_log2,
    delta,
    q_indices_ptr,
    list_starts_ptr,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_gb,
    stride_gh,
    stride_gn,
    stride_ob,
    stride_oh,
    stride_on,
    num_q_heads,
    num_kv_heads,
    batch_kv_heads,
    num_queries,
    num_keys,
    num_q_blocks,
    num_kv_blocks,
    num_splits,
    stride_os,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """One program computes BLOCK_N rows of dK and dV of one key block, summed over the query heads of its group.

    With num_splits > 1, a program sums over one part of each list; the parts are stride_os apart, and the caller adds
    them.

    q, dout: descriptors of [1, 1, BLOCK_M, BLOCK_D] tiles, or pointers; lse_log2, delta: descriptors of [1, BLOCK_M]
    rows, or pointers; k, v: pointers; q_indices and list_starts: see transpose_lists. dK and dV have the same strides.
    Grid: nk * BLOCK_SIZE / BLOCK_N * num_splits * B * Hkv, the first key blocks, which the most queries list, first.
    BLOCK_M and BLOCK_N divide BLOCK_SIZE.
    """
    tiles_per_q_block: tl.constexpr = BLOCK_SIZE // BLOCK_M
    tiles_per_kv_block: tl.constexpr = BLOCK_SIZE // BLOCK_N
    tile = tl.program_id(0) // (batch_kv_heads * num_splits)
    split = tl.program_id(0) // batch_kv_heads % num_splits
    kv_block, tile_in_block = tile // tiles_per_kv_block, tile % tiles_per_kv_block
    dk_ptr += split.to(tl.int64) * stride_os
    dv_ptr += split.to(tl.int64) * stride_os
    batch_kv_head = (tl.program_id(0) % batch_kv_heads).to(tl.int64)
    batch, kv_head = batch_kv_head // num_kv_heads, batch_kv_head % num_kv_heads
    heads_per_kv_head = num_q_heads // num_kv_heads

    first_key = tile * BLOCK_N
    k_tile = load_tile(
        k, batch, kv_head, first_key, num_keys, stride_kb, stride_kh, stride_kn,
        BLOCK_N, HEAD_DIM, BLOCK_D, DTYPE, DESCRIPTORS=False,
    )  # fmt: skip
    v_tile = load_tile(
        v, batch, kv_head, first_key, num_keys, stride_vb, stride_vh, stride_vn,
        BLOCK_N, HEAD_DIM, BLOCK_D, DTYPE, DESCRIPTORS=False,
    )  # fmt: skip

    offset = num_keys - num_queries  # absolute position of query 0
    front = offset % BLOCK_SIZE
    num_grid_rows = num_q_blocks * BLOCK_SIZE
    scale_log2 = scale * LOG2_E
    dk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for member in range(heads_per_kv_head):
        head = kv_head * heads_per_kv_head + member
        batch_head = batch * num_q_heads + head
        list_start = tl.load(list_starts_ptr + batch_head * num_kv_blocks + kv_block)
        num_blocks = (tl.load(list_starts_ptr + batch_head * num_kv_blocks + kv_block + 1) - list_start).to(tl.int32)
        first_entry, last_entry = num_blocks * split // num_splits, num_blocks * (split + 1) // num_splits
        head_indices_ptr = q_indices_ptr + list_start + first_entry
        num_blocks = last_entry - first_entry
        diagonal_row = kv_block - offset // BLOCK_SIZE
        first_row = tl.load(head_indices_ptr, mask=num_blocks > 0, other=-1)
        has_diagonal = ((num_blocks > 0) & (first_row == diagonal_row)).to(tl.int32)

        hidden_tiles = tile_in_block * BLOCK_N // BLOCK_M  # of the diagonal block, before these keys
        for step in range(hidden_tiles, has_diagonal * tiles_per_q_block):
            grid_row = diagonal_row * BLOCK_SIZE + step * BLOCK_M
            dk_tile, dv_tile = add_to_dkv(
                k_tile, v_tile, first_key, q, dout, batch, head, batch_head, grid_row, num_grid_rows, num_queries,
                offset, front, stride_qb, stride_qh, stride_qn, stride_gb, stride_gh, stride_gn,
                lse_log2, delta, scale_log2, dk_tile, dv_tile,
                BLOCK_M, HEAD_DIM, BLOCK_D, DTYPE, DESCRIPTORS, DIAGONAL=True,
            )  # fmt: skip
        for step in range(has_diagonal * tiles_per_q_block, num_blocks * tiles_per_q_block):
            row = tl.load(head_indices_ptr + step // tiles_per_q_block)
            grid_row = row * BLOCK_SIZE + step % tiles_per_q_block * BLOCK_M
            dk_tile, dv_tile = add_to_dkv(
                k_tile, v_tile, first_key, q, dout, batch, head, batch_head, grid_row, num_grid_rows, num_queries,
                offset, front, stride_qb, stride_qh, stride_qn, stride_gb, stride_gh, stride_gn,
                lse_log2, delta, scale_log2, dk_tile, dv_tile,
                BLOCK_M, HEAD_DIM, BLOCK_D, DTYPE, DESCRIPTORS, DIAGONAL=False,
            )  # fmt: skip
    store_tile(dk_ptr, batch, kv_head, first_key, num_keys, stride_ob, stride_oh, stride_on, dk_tile * scale, HEAD_DIM)
    store_tile(dv_ptr, batch, kv_head, first_key, num_keys, stride_ob, stride_oh, stride_on, dv_tile, HEAD_DIM)


def transpose_lists(
    kv_indices: torch.Tensor, kv_num_blocks: torch.Tensor, num_kv_blocks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists of the query blocks that list each key block, ascending; computed on the GPU without synchronisation.

    Args:
        kv_indices: int32 [B, Hq, nq, max]; kv_num_blocks: int32 [B, Hq, nq], entries of each list.
        num_kv_blocks: Key blocks nk.
    Returns:
        q_indices int32 [B * Hq * nq * max], one list after the other, unused entries last; list_starts int64
        [B * Hq * nk + 1]: the list of key block j of head h is q_indices[starts[h * nk + j] : starts[h * nk + j + 1]].
    """
    batch, num_q_heads, num_q_blocks, max_blocks = kv_indices.shape
    device, num_lists = kv_indices.device, batch * num_q_heads * num_kv_blocks
    dtype = torch.int32 if num_lists * num_q_blocks < 2**31 else torch.int64
    # a number for each listed pair that sorts by head, then key block, then query block; unused entries come last
    head = torch.arange(batch * num_q_heads, dtype=dtype, device=device).view(batch, num_q_heads, 1, 1)
    row = torch.arange(num_q_blocks, dtype=dtype, device=device)[:, None]
    pairs = (head * num_kv_blocks + kv_indices.to(dtype)) * num_q_blocks + row
    unused = torch.arange(max_blocks, device=device) >= kv_num_blocks[..., None]
    pairs = pairs.masked_fill(unused, num_lists * num_q_blocks).flatten().sort().values
    first_pairs = torch.arange(num_lists + 1, dtype=dtype, device=device) * num_q_blocks
    return (pairs % num_q_blocks).int(), torch.searchsorted(pairs, first_pairs)


def tile_sizes(
    head_dim: int, block_size: int, dtype: torch.dtype, descriptors: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """Rows, keys, warps and pipeline stages of one program of dq_kernel and of dkv_kernel (our choice, measured).

    fp16 and bf16 run on tensor cores; fp32 has no exact tensor-core product, so registers bound its tiles. Tiles that
    arrive by descriptor take no registers for addresses.
    """
    if dtype == torch.float32 and not triton.knobs.runtime.interpret:
        rows = min(block_size, 32 if head_dim <= 128 else 16)
        tiles = dict(BLOCK_M=rows, BLOCK_N=rows, num_warps=8, num_stages=1)
        return tiles, tiles
    if head_dim > 128:
        dq, dkv, stages = (64, 32), (32, 64), 1
    elif descriptors:
        dq, dkv, stages = (128, 128), (64, 64), 2
    else:
        dq, dkv, stages = (128, 64), (64, 128), 2
    return _tiles(*dq, block_size, head_dim, stages), _tiles(*dkv, block_size, head_dim, stages)


def _tiles(block_m: int, block_n: int, block_size: int, head_dim: int, stages: int) -> dict[str, int]:
    block_m, block_n = min(block_size, block_m), min(block_size, block_n)
    num_warps = 8 if max(block_m, block_n) > 64 or head_dim > 128 else 4  # four for each 64 rows of the output
    return dict(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps, num_stages=stages)


def num_splits(k: torch.Tensor, max_blocks: int) -> int:
    """Number of parts of each key block's lists, so that a block that every row lists does not take longest.

    A program of such a key block reads nq query blocks for each query head. All programs of a multiprocessor read
    nq * (list length) * B * Hkv / multiprocessors of them together. The lists are cut until the former number is at
    most the latter, into at most MAX_SPLITS parts.
    """
    if not k.is_cuda:
        return 1
    return min(MAX_SPLITS, -(-num_multiprocessors(k.device) // (k.shape[0] * k.shape[1] * max_blocks)))


def use_descriptors(q: torch.Tensor) -> bool:
    """Whether tiles are loaded by TMA: 16-bit types on sm_90 and newer, rows of whole multiples of 16 bytes."""
    return at_least_sm90(q.device) and q.element_size() == 2 and q.shape[-1] * 2 % TMA_BYTES == 0


def tiles_of(x: torch.Tensor, rows: int, block_d: int, by_descriptor: bool):
    """Source of tiles of `rows` rows of x [B, H, N, D]: a descriptor, or x itself."""
    return TensorDescriptor.from_tensor(x, [1, 1, rows, block_d]) if by_descriptor else x


def rows_of(x: torch.Tensor, rows: int, by_descriptor: bool):
    """Source of `rows` entries of a statistic x [B, Hq, rows of the grid]: a descriptor, or x itself."""
    return TensorDescriptor.from_tensor(x.flatten(0, 1), [1, rows]) if by_descriptor else x


def row_statistics(
    out: torch.Tensor, dout: torch.Tensor, lse: torch.Tensor, dlse: torch.Tensor | None, front: int, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """lse in base 2, and delta = rowsum(out * dout) - dlse: fp32 [B, Hq, nq * block_size] on the key grid."""
    batch, num_q_heads, num_queries, head_dim = out.shape
    num_grid_rows = -(-(front + num_queries) // block_size) * block_size
    lse_log2, delta = (lse.new_empty(batch, num_q_heads, num_grid_rows) for _ in range(2))
    rows = min(block_size, STATISTICS_ROWS)
    contiguous_dlse = None if dlse is None else dlse.contiguous()
    row_statistics_kernel[(num_grid_rows // rows, batch * num_q_heads)](
        *(out, dout, lse.contiguous(), contiguous_dlse, lse_log2, delta),
        *(*out.stride()[:3], *dout.stride()[:3]),
        *(num_q_heads, num_queries, num_grid_rows, front),
        HEAD_DIM=head_dim,
        BLOCK_D=padded_dim(head_dim),
        ROWS=rows,
    )
    return lse_log2, delta


class Problem(NamedTuple):
    """Inputs of the two kernels that compute gradients, as `sparse_backward` prepares them."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    lse_log2: torch.Tensor
    delta: torch.Tensor
    kv_indices: torch.Tensor
    kv_num_blocks: torch.Tensor
    block_size: int
    scale: float
    descriptors: bool
    """Whether tiles are loaded by TMA."""

    def constants(self) -> dict[str, object]:
        """Compile-time constants that both kernels take beside their tiles."""
        head_dim = self.q.shape[-1]
        return dict(
            HEAD_DIM=head_dim,
            BLOCK_D=padded_dim(head_dim),
            BLOCK_SIZE=self.block_size,
            DTYPE=operand_dtype(self.q.dtype),
            DESCRIPTORS=self.descriptors,
        )


def query_gradient(problem: Problem) -> torch.Tensor:
    """dQ like q."""
    q, k, v, dout, lse_log2, delta, kv_indices, kv_num_blocks, block_size, scale, descriptors = problem
    (batch, num_q_heads, num_queries, head_dim), (num_kv_heads, num_keys) = q.shape, k.shape[1:3]
    num_q_blocks, max_blocks = kv_indices.shape[2:]
    dq = torch.empty_like(q)
    tiles, _ = tile_sizes(head_dim, block_size, q.dtype, descriptors)
    k_source, v_source = (tiles_of(x, tiles["BLOCK_N"], padded_dim(head_dim), descriptors) for x in (k, v))
    dq_kernel[(num_q_blocks * (block_size // tiles["BLOCK_M"]), batch * num_q_heads)](
        *(q, k_source, v_source, dout, dq, lse_log2, delta, kv_indices.contiguous(), kv_num_blocks.contiguous()),
        *[stride for x in (q, k, v, dout, dq) for stride in x.stride()[:3]],
        *(num_q_heads, num_q_heads // num_kv_heads, num_queries, num_keys, num_q_blocks, max_blocks, float(scale)),
        **problem.constants(),
        **tiles,
    )
    return dq


def key_value_gradients(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """dK and dV like k."""
    q, k, v, dout, lse_log2, delta, kv_indices, kv_num_blocks, block_size, scale, descriptors = problem
    (batch, num_q_heads, num_queries, head_dim), (num_kv_heads, num_keys) = q.shape, k.shape[1:3]
    num_q_blocks, num_kv_blocks = kv_indices.shape[2], -(-num_keys // block_size)
    lists = transpose_lists(kv_indices, kv_num_blocks, num_kv_blocks)
    splits = num_splits(k, kv_indices.shape[3])
    if splits == 1:
        dk, dv = torch.empty_like(k), torch.empty_like(k)
    else:
        dk, dv = k.new_empty(2, splits, *k.shape, dtype=torch.float32)
    _, tiles = tile_sizes(head_dim, block_size, q.dtype, descriptors)
    q_source, dout_source = (tiles_of(x, tiles["BLOCK_M"], padded_dim(head_dim), descriptors) for x in (q, dout))
    statistics = [rows_of(x, tiles["BLOCK_M"], descriptors) for x in (lse_log2, delta)]
    dkv_kernel[(num_kv_blocks * (block_size // tiles["BLOCK_N"]) * splits * batch * num_kv_heads,)](
        *(q_source, k, v, dout_source, dk, dv, *statistics, *lists),
        *[stride for x in (q, k, v, dout) for stride in x.stride()[:3]],
        *dk.stride()[-4:-1],
        *(num_q_heads, num_kv_heads, batch * num_kv_heads, num_queries, num_keys, num_q_blocks, num_kv_blocks),
        *(splits, dk.stride(0) if splits > 1 else 0, float(scale)),
        **problem.constants(),
        **tiles,
    )
    if splits > 1:
        dk, dv = (torch.empty_like(k).copy_(parts.sum(0)) for parts in (dk, dv))
    return dk, dv


def sparse_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    kv_indices: torch.Tensor,
    kv_num_blocks: torch.Tensor,
    block_size: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradient of sparse_forward with respect to q, k and v; deterministic, memory O(N) and O(lists).

    Args:
        q, k, v, kv_indices, kv_num_blocks, block_size, scale: As in sparse_forward.
        out, lse: Results of sparse_forward.
        dout: Gradient of out, its shape and dtype; any strides.
        dlse: Gradient of lse, fp32 [B, Hq, Nq]; None is zero.
    Returns:
        dq, dk, dv like q, k, v (dv with the strides of dk), accumulated in fp32.
    """
    descriptors = use_descriptors(q)
    q, k, v, dout = (with_dense_rows(x, tma=descriptors) for x in (q, k, v, dout))
    with torch.cuda.device_of(q):
        front = (k.shape[2] - q.shape[2]) % block_size
        statistics = row_statistics(with_dense_rows(out), dout, lse, dlse, front, block_size)
        problem = Problem(q, k, v, dout, *statistics, kv_indices, kv_num_blocks, block_size, scale, descriptors)
        return query_gradient(problem), *key_value_gradients(problem)

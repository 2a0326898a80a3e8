"""Features of cells: rows whose products are the logits of cell pairs. A cell is a run of tokens inside a block.

Without a peak, a cell's features are the means of its stride groups. The mean of the antidiagonal samples of a pair is
then one dot product, stride * D wide. With a peak, a cell has two corners, its mean moved by a fraction `peak` towards
its per-dimension maximum and minimum. The logit of a pair is then one dot product, 2 * D wide: the positive part of the
query's upper corner with the key's upper corner, and the negative part of its lower corner with the key's lower corner.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import triton
import triton.language as tl

from .common import LOG2_E, at_least_sm90, for_all_lengths, wait_for_last
from .launch import launch

FEATURE_TILE, POOLED_TILE = 8, 4  # cells of one program of cell_features, and of pooled heads
FEATURE_WARPS = 4
UNROLL = 16  # rows of each cell that are in flight at once
SPARE_CELLS = 31  # behind the last key cell, unwritten: cell_pairs_sm90.py reads runs of 32


@triton.jit
def store_features(
    x_ptr,
    features_ptr,
    first_cell,
    group,
    stride_xh,
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
    HEADS: tl.constexpr,
):
    """Store the features of one stride group of CELLS cells of HEADS heads. Row 0 of x is row `front` of cell 0.

    Group sums are divided by the rows of the whole cell, so that the product of two rows, times STRIDE, is the mean
    logit of the sampled pairs. With PEAK, STRIDE is 1. The features are multiplied by `scale` before they are rounded.
    """
    cells = first_cell + tl.arange(0, CELLS)
    dims = tl.arange(0, BLOCK_D)
    first_row = cells.to(tl.int64) * CELL - front
    sums = tl.zeros([CELLS, BLOCK_D], tl.float32)
    largest = tl.full([CELLS, BLOCK_D], float("-inf"), tl.float32)
    smallest = tl.full([CELLS, BLOCK_D], float("inf"), tl.float32)
    for _ in range(HEADS):
        for sample in tl.range(0, CELL // STRIDE, loop_unroll_factor=UNROLL, num_stages=1):
            rows = first_row + sample * STRIDE + group
            exists = ((rows >= 0) & (rows < num_tokens))[:, None] & (dims < HEAD_DIM)[None, :]
            tile = tl.load(x_ptr + rows[:, None] * stride_xn + dims[None, :] * stride_xd, mask=exists, other=0.0)
            tile = tile.to(tl.float32)  # [CELLS, BLOCK_D]
            sums += tile
            if PEAK:
                largest = tl.maximum(largest, tl.where(exists, tile, float("-inf")))
                smallest = tl.minimum(smallest, tl.where(exists, tile, float("inf")))
        x_ptr += stride_xh
    rows_in_cell = tl.minimum(first_row + CELL, num_tokens) - tl.maximum(first_row, 0)
    means = sums / (HEADS * tl.maximum(rows_in_cell, 1)).to(tl.float32)[:, None]

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


@for_all_lengths
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
    HEADS: tl.constexpr,
    CAN_OVERLAP: tl.constexpr,
):
    """One program reads one stride group of CELLS cells of HEADS query heads, pooled as one, or of a key-value head.

    Grid: (num_q_programs + B * Hkv * key tiles, STRIDE), num_q_programs = B * num_q_heads * query tiles, where HEADS
    query heads count as one. The programs of queries come first. Row 0 of the queries is row `front` of cell 0.
    The last program ends after the kernel launched before, so that the next kernel waits for both.
    """
    program, group = tl.program_id(0), tl.program_id(1)
    WIDTH: tl.constexpr = HEAD_DIM * (2 if PEAK else STRIDE)
    if program < num_q_programs:
        num_tiles = tl.cdiv(num_q_cells, CELLS)
        batch_head, first_cell = (program // num_tiles).to(tl.int64), program % num_tiles * CELLS
        x_ptr = q_ptr + batch_head // num_q_heads * stride_qb + batch_head % num_q_heads * HEADS * stride_qh
        store_features(
            x_ptr, q_features_ptr + batch_head * num_q_cells * WIDTH, first_cell, group,
            stride_qh, stride_qn, stride_qd, num_queries, num_q_cells, front, peak, scale * LOG2_E,
            HEAD_DIM, BLOCK_D, Q_CELL, STRIDE, True, PEAK, CELLS, UNROLL, HEADS,
        )  # fmt: skip
    else:
        num_tiles, program = tl.cdiv(num_k_cells, CELLS), program - num_q_programs
        batch_head, first_cell = (program // num_tiles).to(tl.int64), program % num_tiles * CELLS
        x_ptr = k_ptr + batch_head // num_kv_heads * stride_kb + batch_head % num_kv_heads * stride_kh
        store_features(
            x_ptr, k_features_ptr + batch_head * num_k_cells * WIDTH, first_cell, group,
            stride_kh, stride_kn, stride_kd, num_keys, num_k_cells, 0, peak, 1.0,
            HEAD_DIM, BLOCK_D, K_CELL, STRIDE, False, PEAK, CELLS, UNROLL, 1,
        )  # fmt: skip
    wait_for_last(CAN_OVERLAP)


@dataclass(frozen=True)
class Cells:
    """Cells of the blocks of a prompt: their sizes and number."""

    block_size: int
    """Tokens per block."""

    query_cells: int
    """Cells of a query block, a power of two."""

    key_cells: int
    """Cells of a key block, a power of two."""

    stride: int
    """Groups of a cell, the stride of the antidiagonal samples in a cell pair; 1 takes the plain means."""

    peak: float
    """Distance of a cell's corners from its mean (0) towards its extremes (1); above 0, stride is 1."""

    rms: bool
    """Whether a query block takes the root mean square of its cells' shares, not the mean."""

    q_len: int
    """Queries, the last of kv_len positions."""

    kv_len: int
    """Keys."""

    heads: int = 1
    """Consecutive query heads whose queries are pooled as those of one head; shares of single queries are averaged."""

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
        """Position of the first token of the first query block, at or before q_start."""
        return self.q_start // self.block_size * self.block_size

    @cached_property
    def q_cell(self) -> int:
        """Tokens of a query cell."""
        return self.block_size // self.query_cells

    @cached_property
    def k_cell(self) -> int:
        """Tokens of a key cell."""
        return self.block_size // self.key_cells


def cell_features(
    q: torch.Tensor, k: torch.Tensor, cells: Cells, scale: float, overlap: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of cells: products of their rows are the logits of cell pairs, in base 2.

    Args:
        q: [B, Hq, Nq, D], any strides.
        k: [B, Hkv, Nkv, D].
        cells: Group g of a cell averages its rows g, g + stride, ... (all of them if stride is 1).
        scale: Softmax scale; the queries' features are multiplied by it.
        overlap: Whether the kernel may begin while the one launched before still runs, see launch.launch. It needs
            nothing of that kernel and ends after it.
    Returns:
        Features of the query cells and of the key cells, [B, H, cells, stride * D] (2 * D wide if peak > 0) like q,
        where pooled heads count as one,
        fp32 in Triton's interpreter. Queries have their groups in reverse order, or the positive and negative parts of
        their corners. fp16 overflows if |q| * scale * stride * log2(e) exceeds 65504.
    """
    (batch, num_q_heads, num_queries, head_dim), (num_kv_heads, num_keys) = q.shape, k.shape[1:3]
    num_q_heads //= cells.heads
    num_q_cells, num_k_cells = cells.num_q_blocks * cells.query_cells, cells.num_kv_blocks * cells.key_cells
    dtype = torch.float32 if triton.knobs.runtime.interpret else q.dtype
    width = head_dim * (2 if cells.peak else cells.stride)
    q_features = q.new_empty(batch, num_q_heads, num_q_cells, width, dtype=dtype)
    k_shape = batch, num_kv_heads, num_k_cells, width
    k_features = k.new_empty(math.prod(k_shape) + SPARE_CELLS * width, dtype=dtype)[: math.prod(k_shape)].view(k_shape)
    tile = FEATURE_TILE if cells.heads == 1 else POOLED_TILE
    num_q_programs = batch * num_q_heads * -(-num_q_cells // tile)
    front = cells.q_start - cells.first_position
    launch(
        cell_features_kernel,
        (num_q_programs + batch * num_kv_heads * -(-num_k_cells // tile), cells.stride),
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
        CELLS=tile,
        UNROLL=UNROLL,
        HEADS=cells.heads,
        CAN_OVERLAP=at_least_sm90(q.device),
        overlap=overlap,
        num_warps=FEATURE_WARPS,
    )
    return q_features, k_features

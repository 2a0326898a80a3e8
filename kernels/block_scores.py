"""Block scores: the GEMM that pairs group sums of queries and keys, plus the value term; see score_inputs.py.

The antidiagonal score of a block pair is a mean of dot products without a softmax, so it is linear in q and in k. The
sum over sampled pairs becomes one dot product of group sums, `stride * D` wide. Where sums are stored as two bf16
parts, the GEMM is three bf16 products (high * high, high * low, low * high), faster than any product of fp32 operands.
"""

from functools import cache, partial

import torch
import triton
import triton.language as tl

from .common import ALIGNED_OR_NOT, at_least_sm90, for_all_lengths, num_multiprocessors, take_turn
from .launch import launch

PRECISION = "ieee" if torch.version.hip else "tf32x3"  # fp32 products, on NVIDIA by three tf32 products


@triton.jit
def load_sums(sums_ptr, blocks, exists, depth, PARTS: tl.constexpr, DEPTH: tl.constexpr, DTYPE: tl.constexpr):
    """Load columns `depth` of some rows of a matrix of group sums, zero outside, as DTYPE."""
    exists = exists[:, None] & (depth < DEPTH)[None, :]
    offsets = blocks[:, None].to(tl.int64) * (PARTS * DEPTH) + depth[None, :]
    return tl.load(sums_ptr + offsets, mask=exists, other=0.0).to(DTYPE)


@triton.jit
def finish_scores(products, value_bonus_ptr, q_blocks, kv_blocks, is_block, scale):
    """Scores [M, N] from products of sums: scaled, plus the value term of the key block, -inf in the future."""
    value_bonus = tl.load(value_bonus_ptr + kv_blocks, mask=is_block, other=0.0)
    scores = products * scale + value_bonus[None, :]
    return tl.where(kv_blocks[None, :] <= q_blocks[:, None], scores, float("-inf"))


@triton.jit
def score_tile(
    q_sums_ptr,
    k_sums_ptr,
    value_bonus_ptr,
    batch_kv_head,
    flat_rows,
    q_blocks,
    kv_blocks,
    last_visible_block,
    heads_per_kv_head,
    num_q_blocks,
    num_kv_blocks,
    scale,
    DEPTH: tl.constexpr,
    PARTS: tl.constexpr,
    DEPTH_TILE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores of some query blocks of one KV head, [M, N], -inf in the future.

    flat_rows [M] are query blocks of all heads that share the KV head, the heads of one query block side by side, so
    that a tile of key sums serves them all; q_blocks [M] are their positions on the key grid. A tile whose first key
    block is past last_visible_block is not computed.
    """
    rows, members = flat_rows // heads_per_kv_head, flat_rows % heads_per_kv_head
    is_row, is_block = rows < num_q_blocks, kv_blocks < num_kv_blocks
    q_matrix_rows = members * num_q_blocks + rows
    q_sums_ptr += batch_kv_head * heads_per_kv_head * num_q_blocks * (PARTS * DEPTH)
    k_sums_ptr += batch_kv_head * num_kv_blocks * (PARTS * DEPTH)
    scores = tl.zeros([flat_rows.shape[0], kv_blocks.shape[0]], tl.float32)
    depth_end = tl.where(tl.min(kv_blocks, axis=0) <= last_visible_block, DEPTH, 0)
    for depth_start in range(0, depth_end, DEPTH_TILE):
        depth = depth_start + tl.arange(0, DEPTH_TILE)
        q_high = load_sums(q_sums_ptr, q_matrix_rows, is_row, depth, PARTS, DEPTH, DTYPE)  # [M, DEPTH_TILE]
        k_high = load_sums(k_sums_ptr, kv_blocks, is_block, depth, PARTS, DEPTH, DTYPE)  # [N, DEPTH_TILE]
        scores = tl.dot(q_high, k_high.T, scores, input_precision=PRECISION)
        if PARTS == 2:
            k_low = load_sums(k_sums_ptr + DEPTH, kv_blocks, is_block, depth, PARTS, DEPTH, DTYPE)
            q_low = load_sums(q_sums_ptr + DEPTH, q_matrix_rows, is_row, depth, PARTS, DEPTH, DTYPE)
            scores = tl.dot(q_high, k_low.T, scores, input_precision=PRECISION)
            scores = tl.dot(q_low, k_high.T, scores, input_precision=PRECISION)
    value_bonus_ptr += batch_kv_head * num_kv_blocks
    return finish_scores(scores, value_bonus_ptr, q_blocks, kv_blocks, is_block, scale)


@partial(for_all_lengths, aligned="num_kv_blocks")
def score_blocks_kernel(
    q_sums_ptr,
    k_sums_ptr,
    value_bonus_ptr,
    scores_ptr,
    q_blocks_ptr,
    heads_per_kv_head,
    num_q_blocks,
    num_kv_blocks,
    first_q_block,
    scale,
    DEPTH: tl.constexpr,
    PARTS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    DEPTH_TILE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    CAN_OVERLAP: tl.constexpr,
):
    """One program computes a tile of the scores of one KV head. Grid: (key tiles, query tiles, B * Hkv).

    q_blocks_ptr: positions of the query blocks on the key grid, ascending; None if they follow first_q_block.
    """
    take_turn(CAN_OVERLAP)
    batch_kv_head = tl.program_id(2).to(tl.int64)
    first_flat_row = tl.program_id(1) * TILE_M
    flat_rows = first_flat_row + tl.arange(0, TILE_M)
    kv_blocks = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    rows, members = flat_rows // heads_per_kv_head, flat_rows % heads_per_kv_head
    last_row = (first_flat_row + TILE_M - 1) // heads_per_kv_head
    if q_blocks_ptr is None:
        q_blocks, last_visible_block = first_q_block + rows, first_q_block + last_row
    else:
        q_blocks = tl.load(q_blocks_ptr + rows, mask=rows < num_q_blocks, other=0)
        last_visible_block = tl.load(q_blocks_ptr + tl.minimum(last_row, num_q_blocks - 1))
    scores = score_tile(
        q_sums_ptr, k_sums_ptr, value_bonus_ptr, batch_kv_head, flat_rows, q_blocks, kv_blocks, last_visible_block,
        heads_per_kv_head, num_q_blocks, num_kv_blocks, scale,
        DEPTH, PARTS, DEPTH_TILE, DTYPE, PRECISION,
    )  # fmt: skip
    scores_ptr += batch_kv_head * heads_per_kv_head * num_q_blocks * num_kv_blocks
    offsets = (members * num_q_blocks + rows)[:, None].to(tl.int64) * num_kv_blocks + kv_blocks[None, :]
    tl.store(scores_ptr + offsets, scores, mask=(rows < num_q_blocks)[:, None] & (kv_blocks < num_kv_blocks)[None, :])


@cache
def operand_dtype(parts: int) -> tl.dtype:
    """Triton dtype in which sums are multiplied; fp32 in Triton's interpreter, which has no bf16 products."""
    return tl.float32 if parts == 1 or triton.knobs.runtime.interpret else tl.bfloat16


SHORT = 448  # rows of scores of a KV head; with 512, the next tiles are faster on an NVIDIA H200 (32 heads, 16K)
LARGE = 128  # rows and columns of the tile for long prompts


def score_tiles(parts: int, num_rows: int, is_small: bool) -> dict[str, int]:
    """Tile of the score GEMM and its warps and pipeline stages (our choice, for sm_90).

    num_rows decides DEPTH_TILE, by which products are added up, hence the bits. is_small changes no bit.
    """
    if parts == 1:
        return dict(TILE_M=64, TILE_N=64, DEPTH_TILE=32, num_warps=4, num_stages=3)
    if num_rows <= SHORT:  # short prompts: more programs
        return dict(TILE_M=64, TILE_N=16, DEPTH_TILE=128, num_warps=4, num_stages=4)
    if is_small:
        return dict(TILE_M=64, TILE_N=32, DEPTH_TILE=64, num_warps=4, num_stages=4)
    return dict(TILE_M=LARGE, TILE_N=LARGE, DEPTH_TILE=64, num_warps=8, num_stages=3)


def needs_small_tiles(num_rows: int, num_kv_blocks: int, num_kv_heads: int, device: torch.device) -> bool:
    """Whether large tiles of so many rows and key blocks of each KV head would leave a third of a CUDA device idle.

    Measured on an NVIDIA H200 (132 multiprocessors): small tiles take 0.4 to 0.7 times as long where there are 12 to 56
    large ones (9, 12, 14 and 32 heads at 16K and 32K tokens), 1.2 times and more from 128 large ones on.
    """
    programs = -(-num_rows // LARGE) * -(-num_kv_blocks // LARGE) * num_kv_heads
    return 3 * programs < 2 * num_multiprocessors(device)


def score_blocks(
    q_sums: torch.Tensor,
    k_sums: torch.Tensor,
    value_bonus: torch.Tensor,
    scale: float,
    first_q_block: int | None = None,
    num_tile_rows: int | None = None,
    q_blocks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Block scores: scale * <q_sums, k_sums> + value_bonus, one small GEMM for each KV head.

    Args:
        q_sums: From `score_inputs.block_sums(..., reverse=True)`, consecutive query blocks of Hq heads.
        k_sums: From `score_inputs.block_sums(..., reverse=False)`, all key blocks of Hkv heads; Hq % Hkv == 0.
        value_bonus: fp32 [B, Hkv, nk], added to every score of its key block.
        scale: Factor of the dot products.
        first_q_block: Position of the first query block on the key grid; by default the last ones match.
        num_tile_rows: Query blocks by which DEPTH_TILE is chosen, so that parts of a prompt have the bits of the whole.
        q_blocks: int32 [nq], positions of the query blocks on the key grid, ascending.
    Returns:
        fp32 [B, Hq, nq, nk], -inf where the key block is in the future of the query block.
    """
    batch, num_q_heads, num_q_blocks = q_sums.shape[:3]
    num_kv_heads, num_kv_blocks = k_sums.shape[1:3]
    parts = 2 if q_sums.dtype == torch.bfloat16 else 1
    heads_per_kv_head = num_q_heads // num_kv_heads
    num_rows = num_q_blocks * heads_per_kv_head
    shape = (batch, num_q_heads, num_q_blocks, num_kv_blocks)
    scores = torch.empty(shape, dtype=torch.float32, device=q_sums.device)
    can_overlap = at_least_sm90(scores.device)
    is_small = can_overlap and needs_small_tiles(num_rows, num_kv_blocks, batch * num_kv_heads, scores.device)
    tiles = score_tiles(parts, num_rows if num_tile_rows is None else num_tile_rows * heads_per_kv_head, is_small)
    grid = (-(-num_kv_blocks // tiles["TILE_N"]), -(-num_rows // tiles["TILE_M"]), batch * num_kv_heads)
    first_q_block = num_kv_blocks - num_q_blocks if first_q_block is None else first_q_block
    constants = dict(DEPTH=q_sums.shape[-1], PARTS=parts, DTYPE=operand_dtype(parts), PRECISION=PRECISION)
    constants |= dict(CAN_OVERLAP=can_overlap)

    def also() -> list[tuple[tuple, dict]]:
        lengths = (SHORT, True), (SHORT + 1, True), (SHORT + 1, False)
        of_lengths = [constants | score_tiles(parts, *length) for length in lengths]
        return [
            ((heads_per_kv_head, num_q_blocks, blocks, first_q_block, float(scale)), others)
            for blocks in ALIGNED_OR_NOT
            for others in of_lengths
        ]

    launch(
        score_blocks_kernel,
        grid,
        (q_sums.contiguous(), k_sums.contiguous(), value_bonus.contiguous(), scores, q_blocks),
        (heads_per_kv_head, num_q_blocks, num_kv_blocks, first_q_block, float(scale)),
        overlap=can_overlap,
        also=also,
        **constants,
        **tiles,
    )
    return scores

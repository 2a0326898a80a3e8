"""Block scores: group sums of queries and keys, value norms, and the GEMM that pairs the sums.

The antidiagonal score of a block pair is a mean of dot products without a softmax, so it is linear in q and in k, and
the sum over sampled pairs becomes one dot product of group sums (`block_sums`), `stride * D` wide.
"""

import torch
import triton
import triton.language as tl

MAX_GROUPS_PER_TILE = 16  # rows of the [groups, D] tile that one program keeps in registers
DIM_TILE = 64  # dimensions of V that are squared and added at a time
SCORE_TILE = 64  # query and key blocks of one tile of scores
DEPTH_TILE = 32  # depth of one step of the score GEMM
PRECISION = "ieee" if torch.version.hip else "tf32x3"  # fp32 products, on NVIDIA by three tf32 products


@triton.jit
def block_sums_kernel(
    x_ptr,
    sums_ptr,
    stride_xb,
    stride_xh,
    stride_xn,
    stride_xd,
    num_heads,
    num_tokens,
    offset,
    first_block,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    GROUPS: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """One program computes the sums of GROUPS groups of one block. Grid: (blocks, STRIDE / GROUPS, B * H)."""
    block, batch_head = tl.program_id(0), tl.program_id(2).to(tl.int64)
    batch, head = batch_head // num_heads, batch_head % num_heads
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    dims = tl.arange(0, BLOCK_D)
    x_ptr += batch * stride_xb + head * stride_xh

    first_row = (first_block + block).to(tl.int64) * BLOCK_SIZE - offset  # negative before a chunk's start
    sums = tl.zeros([GROUPS, BLOCK_D], tl.float32)
    for sample in range(BLOCK_SIZE // STRIDE):
        rows = first_row + sample * STRIDE + groups
        exists = ((rows >= 0) & (rows < num_tokens))[:, None] & (dims < HEAD_DIM)[None, :]
        tile = tl.load(x_ptr + rows[:, None] * stride_xn + dims[None, :] * stride_xd, mask=exists, other=0.0)
        sums += tile.to(tl.float32)  # [GROUPS, BLOCK_D]

    slots = STRIDE - 1 - groups if REVERSE else groups
    sums_ptr += (batch_head * tl.num_programs(0) + block) * STRIDE * HEAD_DIM
    tl.store(sums_ptr + slots[:, None] * HEAD_DIM + dims[None, :], sums, mask=(dims < HEAD_DIM)[None, :])


@triton.jit
def value_norms_kernel(
    v_ptr,
    norms_ptr,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_vd,
    num_heads,
    num_tokens,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):
    """One program computes the largest row norm of every group of one block of one head. Grid: (blocks, B * H)."""
    block, batch_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = batch_head // num_heads, batch_head % num_heads
    rows = block.to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    v_ptr += batch * stride_vb + head * stride_vh

    squares = tl.zeros([BLOCK_SIZE], tl.float32)
    for dim_start in range(0, HEAD_DIM, DIM_TILE):
        dims = dim_start + tl.arange(0, DIM_TILE)
        exists = (rows < num_tokens)[:, None] & (dims < HEAD_DIM)[None, :]
        tile = tl.load(v_ptr + rows[:, None] * stride_vn + dims[None, :] * stride_vd, mask=exists, other=0.0)
        tile = tile.to(tl.float32)  # [BLOCK_SIZE, DIM_TILE]
        squares += tl.sum(tile * tile, axis=1)

    num_groups: tl.constexpr = BLOCK_SIZE // GROUP_SIZE
    largest = tl.max(tl.reshape(tl.sqrt(squares), [num_groups, GROUP_SIZE]), axis=1)  # [num_groups]
    norms_ptr += (batch_head * tl.num_programs(0) + block) * num_groups
    tl.store(norms_ptr + tl.arange(0, num_groups), largest)


@triton.jit
def load_sums(sums_ptr, blocks, num_blocks, depth, DEPTH: tl.constexpr):
    """Rows `blocks` and columns `depth` of a [num_blocks, DEPTH] matrix of group sums, zero outside."""
    exists = (blocks < num_blocks)[:, None] & (depth < DEPTH)[None, :]
    return tl.load(sums_ptr + blocks[:, None] * DEPTH + depth[None, :], mask=exists, other=0.0)


@triton.jit
def score_blocks_kernel(
    q_sums_ptr,
    k_sums_ptr,
    value_bonus_ptr,
    scores_ptr,
    num_q_heads,
    heads_per_kv_head,
    num_q_blocks,
    num_kv_blocks,
    scale,
    DEPTH: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program computes one TILE x TILE tile of one head's scores. Grid: (key tiles, query tiles, B * Hq)."""
    batch_head = tl.program_id(2).to(tl.int64)
    batch, head = batch_head // num_q_heads, batch_head % num_q_heads
    num_kv_heads = num_q_heads // heads_per_kv_head
    batch_kv_head = batch * num_kv_heads + head // heads_per_kv_head
    q_sums_ptr += batch_head * num_q_blocks * DEPTH
    k_sums_ptr += batch_kv_head * num_kv_blocks * DEPTH

    rows = tl.program_id(1) * TILE + tl.arange(0, TILE)
    kv_blocks = tl.program_id(0) * TILE + tl.arange(0, TILE)
    q_blocks = num_kv_blocks - num_q_blocks + rows  # on the key grid
    scores = tl.zeros([TILE, TILE], tl.float32)
    first_kv_block = tl.program_id(0) * TILE
    last_q_block = num_kv_blocks - num_q_blocks + tl.program_id(1) * TILE + TILE - 1
    if first_kv_block <= last_q_block:  # tiles wholly in the future are only filled
        for depth_start in range(0, DEPTH, DEPTH_TILE):
            depth = depth_start + tl.arange(0, DEPTH_TILE)
            q_tile = load_sums(q_sums_ptr, rows, num_q_blocks, depth, DEPTH)  # [TILE, DEPTH_TILE]
            k_tile = load_sums(k_sums_ptr, kv_blocks, num_kv_blocks, depth, DEPTH)
            scores = tl.dot(q_tile, k_tile.T, scores, input_precision=PRECISION)

    value_bonus_ptr += batch_kv_head * num_kv_blocks
    value_bonus = tl.load(value_bonus_ptr + kv_blocks, mask=kv_blocks < num_kv_blocks, other=0.0)
    scores = scores * scale + value_bonus[None, :]
    scores = tl.where(kv_blocks[None, :] <= q_blocks[:, None], scores, float("-inf"))
    scores_ptr += batch_head * num_q_blocks * num_kv_blocks
    exists = (rows < num_q_blocks)[:, None] & (kv_blocks < num_kv_blocks)[None, :]
    tl.store(scores_ptr + rows[:, None].to(tl.int64) * num_kv_blocks + kv_blocks[None, :], scores, mask=exists)


def block_sums(x: torch.Tensor, block_size: int, stride: int, *, reverse: bool, offset: int = 0) -> torch.Tensor:
    """Sums of interleaved groups of rows: group g of a block adds its rows g, g + stride, g + 2 * stride, ...

    Args:
        x: [B, H, N, D] queries or keys, any strides.
        block_size: Tokens per block, a power of two.
        stride: Groups per block; divides block_size.
        reverse: Store group g at slot stride - 1 - g (for queries: slots then pair along the antidiagonal).
        offset: Absolute position of row 0 [tokens]; blocks are aligned to position 0.
    Returns:
        fp32 [B, H, nb, stride * D]; block 0 holds position `offset`; rows that do not exist count as zeros.
    """
    batch, num_heads, num_tokens, head_dim = x.shape
    first_block = offset // block_size
    num_blocks = triton.cdiv(offset + num_tokens, block_size) - first_block
    sums = torch.empty(batch, num_heads, num_blocks, stride * head_dim, dtype=torch.float32, device=x.device)
    groups = min(stride, MAX_GROUPS_PER_TILE)
    with torch.cuda.device_of(x):
        block_sums_kernel[(num_blocks, stride // groups, batch * num_heads)](
            x,
            sums,
            *x.stride(),
            num_heads,
            num_tokens,
            offset,
            first_block,
            HEAD_DIM=head_dim,
            BLOCK_D=triton.next_power_of_2(head_dim),
            BLOCK_SIZE=block_size,
            STRIDE=stride,
            GROUPS=groups,
            REVERSE=reverse,
        )
    return sums


def value_norms(v: torch.Tensor, block_size: int, group_size: int) -> torch.Tensor:
    """Largest L2 norm among the rows of each group of `group_size` consecutive values.

    Args:
        v: [B, Hkv, Nkv, D], any strides.
        block_size: Tokens per block, a power of two.
        group_size: Tokens per group; divides block_size.
    Returns:
        fp32 [B, Hkv, nk, block_size / group_size], 0 for a group without a row.
    """
    batch, num_heads, num_tokens, head_dim = v.shape
    num_blocks = triton.cdiv(num_tokens, block_size)
    shape = (batch, num_heads, num_blocks, block_size // group_size)
    norms = torch.empty(shape, dtype=torch.float32, device=v.device)
    with torch.cuda.device_of(v):
        value_norms_kernel[(num_blocks, batch * num_heads)](
            v,
            norms,
            *v.stride(),
            num_heads,
            num_tokens,
            HEAD_DIM=head_dim,
            DIM_TILE=min(DIM_TILE, triton.next_power_of_2(head_dim)),
            BLOCK_SIZE=block_size,
            GROUP_SIZE=group_size,
        )
    return norms


def score_blocks(q_sums: torch.Tensor, k_sums: torch.Tensor, value_bonus: torch.Tensor, scale: float) -> torch.Tensor:
    """Block scores: scale * <q_sums, k_sums> + value_bonus, one small GEMM for each query head.

    Args:
        q_sums: fp32 [B, Hq, nq, depth] from `block_sums(..., reverse=True)`, the last nq blocks of the key grid.
        k_sums: fp32 [B, Hkv, nk, depth] from `block_sums(..., reverse=False)`; Hq % Hkv == 0.
        value_bonus: fp32 [B, Hkv, nk], added to every score of its key block.
        scale: Factor of the dot products.
    Returns:
        fp32 [B, Hq, nq, nk], -inf where the key block is in the future of the query block.
    """
    batch, num_q_heads, num_q_blocks, depth = q_sums.shape
    num_kv_heads, num_kv_blocks = k_sums.shape[1:3]
    shape = (batch, num_q_heads, num_q_blocks, num_kv_blocks)
    scores = torch.empty(shape, dtype=torch.float32, device=q_sums.device)
    grid = (triton.cdiv(num_kv_blocks, SCORE_TILE), triton.cdiv(num_q_blocks, SCORE_TILE), batch * num_q_heads)
    with torch.cuda.device_of(q_sums):
        score_blocks_kernel[grid](
            q_sums.contiguous(),
            k_sums.contiguous(),
            value_bonus.contiguous(),
            scores,
            num_q_heads,
            num_q_heads // num_kv_heads,
            num_q_blocks,
            num_kv_blocks,
            float(scale),
            DEPTH=depth,
            TILE=SCORE_TILE,
            DEPTH_TILE=DEPTH_TILE,
            PRECISION=PRECISION,
        )
    return scores

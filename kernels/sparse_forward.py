"""Block-sparse causal attention, forward: softmax over the key blocks of each query block's list.

A list is ascending, so the diagonal block, the only one that needs a mask, is the last one when it is listed at all.
"""

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x * LOG2_E)
LN_2 = tl.constexpr(0.6931471805599453)

TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def load_rows(
    base_ptr,
    first_row,
    num_rows,
    stride_n,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
):
    """Rows first_row .. first_row + ROWS - 1 of a head as a [ROWS, BLOCK_D] tile; zero where there is no data."""
    rows, dims = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    pointers = base_ptr + tl.cast(first_row, tl.int64) * stride_n + rows[:, None] * stride_n + dims[None, :]
    exists = (dims < HEAD_DIM)[None, :]
    if CHECK_ROWS:
        position = first_row + rows
        exists = exists & ((position >= 0) & (position < num_rows))[:, None]
        tile = tl.load(pointers, mask=exists, other=0.0)
    elif HEAD_DIM < BLOCK_D:
        tile = tl.load(pointers, mask=exists, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile.to(DTYPE)


@triton.jit
def online_softmax_update(logits_log2, v_tile, accumulator, running_max, running_sum):
    """Fold one tile of base-2 logits [M, N] and its values [N, D] into the running softmax."""
    new_max = tl.maximum(running_max, tl.max(logits_log2, axis=1))  # [M]
    weights = tl.exp2(logits_log2 - new_max[:, None])  # [M, N]
    rescale = tl.exp2(running_max - new_max)
    running_sum = running_sum * rescale + tl.sum(weights, axis=1)
    accumulator = accumulator * rescale[:, None]
    accumulator = tl.dot(weights.to(v_tile.dtype), v_tile, accumulator, input_precision="ieee")  # [M, D]
    return accumulator, new_max, running_sum


@triton.jit
def attend_tile(
    q_tile,
    q_positions,
    k_ptr,
    v_ptr,
    first_key,
    num_keys,
    stride_kn,
    stride_vn,
    scale_log2,
    accumulator,
    running_max,
    running_sum,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr,
    DIAGONAL: tl.constexpr,
):
    """Attend to BLOCK_N keys from first_key on; only in the diagonal block can a key be in the future or missing."""
    k_tile = load_rows(k_ptr, first_key, num_keys, stride_kn, BLOCK_N, HEAD_DIM, BLOCK_D, DTYPE, CHECK_ROWS=DIAGONAL)
    v_tile = load_rows(v_ptr, first_key, num_keys, stride_vn, BLOCK_N, HEAD_DIM, BLOCK_D, DTYPE, CHECK_ROWS=DIAGONAL)
    logits_log2 = tl.dot(q_tile, k_tile.T, input_precision="ieee") * scale_log2  # [M, BLOCK_N]
    if DIAGONAL:
        key_positions = first_key + tl.arange(0, BLOCK_N)
        logits_log2 = tl.where(key_positions[None, :] <= q_positions[:, None], logits_log2, float("-inf"))
    return online_softmax_update(logits_log2, v_tile, accumulator, running_max, running_sum)


@triton.jit
def sparse_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
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
):
    """One program computes BLOCK_M rows of one query block of one head.

    Grid: (nq * BLOCK_SIZE / BLOCK_M, B * Hq): the query tiles of a head are neighbours, so that its keys and values
    stay in the L2 cache, and the last tiles start first. BLOCK_M and BLOCK_N divide BLOCK_SIZE.
    """
    tiles_per_q_block: tl.constexpr = BLOCK_SIZE // BLOCK_M
    tiles_per_kv_block: tl.constexpr = BLOCK_SIZE // BLOCK_N
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    row, tile_in_block = tile // tiles_per_q_block, tile % tiles_per_q_block
    batch_head = tl.program_id(1).to(tl.int64)
    batch, head = batch_head // num_q_heads, batch_head % num_q_heads
    kv_head = head // heads_per_kv_head
    q_ptr += batch * stride_qb + head * stride_qh
    k_ptr += batch * stride_kb + kv_head * stride_kh
    v_ptr += batch * stride_vb + kv_head * stride_vh
    out_ptr += batch * stride_ob + head * stride_oh

    offset = num_keys - num_queries  # absolute position of query 0
    q_block = offset // BLOCK_SIZE + row  # on the key grid
    first_query = q_block * BLOCK_SIZE + tile_in_block * BLOCK_M - offset
    queries = first_query + tl.arange(0, BLOCK_M)
    q_tile = load_rows(q_ptr, first_query, num_queries, stride_qn, BLOCK_M, HEAD_DIM, BLOCK_D, DTYPE, CHECK_ROWS=True)

    list_row = batch_head * num_q_blocks + row
    kv_indices_ptr += list_row * max_blocks
    num_blocks = tl.load(kv_num_blocks_ptr + list_row)
    last_block = tl.load(kv_indices_ptr + tl.maximum(num_blocks - 1, 0), mask=num_blocks > 0, other=-1)
    has_diagonal = (last_block == q_block).to(tl.int32)

    scale_log2 = scale * LOG2_E
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    for step in range((num_blocks - has_diagonal) * tiles_per_kv_block):
        kv_block = tl.load(kv_indices_ptr + step // tiles_per_kv_block)
        first_key = kv_block * BLOCK_SIZE + step % tiles_per_kv_block * BLOCK_N
        accumulator, running_max, running_sum = attend_tile(
            q_tile, offset + queries, k_ptr, v_ptr, first_key, num_keys, stride_kn, stride_vn, scale_log2,
            accumulator, running_max, running_sum, BLOCK_N, HEAD_DIM, BLOCK_D, DTYPE, DIAGONAL=False,
        )  # fmt: skip
    visible_tiles = ((tile_in_block + 1) * BLOCK_M + BLOCK_N - 1) // BLOCK_N  # of the diagonal block
    for step in range(has_diagonal * visible_tiles):
        first_key = q_block * BLOCK_SIZE + step * BLOCK_N
        accumulator, running_max, running_sum = attend_tile(
            q_tile, offset + queries, k_ptr, v_ptr, first_key, num_keys, stride_kn, stride_vn, scale_log2,
            accumulator, running_max, running_sum, BLOCK_N, HEAD_DIM, BLOCK_D, DTYPE, DIAGONAL=True,
        )  # fmt: skip

    running_sum = tl.where(running_sum == 0.0, 1.0, running_sum)  # an empty list gives out 0 and lse -inf
    out_tile = accumulator / running_sum[:, None]
    lse = running_max * LN_2 + tl.log(running_sum)
    exists = (queries >= 0) & (queries < num_queries)
    dims = tl.arange(0, BLOCK_D)
    out_pointers = out_ptr + first_query.to(tl.int64) * stride_on
    out_pointers += tl.arange(0, BLOCK_M)[:, None] * stride_on + dims[None, :]
    out_tile = out_tile.to(out_ptr.dtype.element_ty)
    tl.store(out_pointers, out_tile, mask=exists[:, None] & (dims < HEAD_DIM)[None, :])
    tl.store(lse_ptr + batch_head * num_queries + queries, lse, mask=exists)


def tile_sizes(head_dim: int, block_size: int, dtype: torch.dtype) -> dict[str, int]:
    """Rows, keys, warps and pipeline stages of one program (our choice, for the 227 KiB of shared memory of sm_90).

    fp16 and bf16 run on tensor cores, 16 rows and 128 dimensions a warp; fp32 has no exact tensor-core product, so
    registers bound its tiles when it is compiled.
    """
    if dtype == torch.float32 and not triton.knobs.runtime.interpret:
        block_m, block_n = (64, 32) if head_dim <= 64 else (32, 32) if head_dim <= 128 else (16, 16)
        return dict(BLOCK_M=min(block_size, block_m), BLOCK_N=min(block_size, block_n), num_warps=8, num_stages=1)
    block_m, block_n = min(block_size, 128), min(block_size, 64)
    num_warps = min(8, block_m // 16 * max(1, head_dim // 128))
    return dict(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps, num_stages=3 if head_dim <= 128 else 2)


def operand_dtype(dtype: torch.dtype) -> tl.dtype:
    """The type in which tiles are multiplied: the inputs' own, but fp32 under Triton's interpreter (no bf16 there)."""
    return tl.float32 if triton.knobs.runtime.interpret else TRITON_DTYPES[dtype]


def dense_rows(x: torch.Tensor) -> torch.Tensor:
    """`x` itself if its last dimension is contiguous, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def sparse_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_num_blocks: torch.Tensor,
    block_size: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of every query block over the key blocks of its list.

    Args:
        q: fp32, fp16 or bf16 [B, Hq, Nq, D], the last Nq positions; any strides.
        k, v: [B, Hkv, Nkv, D], same dtype; Hq % Hkv == 0 and Nq <= Nkv.
        kv_indices: int32 [B, Hq, nq, max] ascending, never past the query block (which is on the key grid).
        kv_num_blocks: int32 [B, Hq, nq], entries of each list.
        block_size: Tokens per block, a power of two, at least 16.
        scale: Softmax scale.
    Returns:
        out like q (accumulated in fp32), and the natural log-sum-exp fp32 [B, Hq, Nq]; 0 and -inf for an empty list.
    """
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    batch, num_q_heads, num_queries, head_dim = q.shape
    num_kv_heads, num_keys = k.shape[1:3]
    num_q_blocks, max_blocks = kv_indices.shape[2:]
    out = torch.empty_like(q)
    lse = torch.empty(batch, num_q_heads, num_queries, dtype=torch.float32, device=q.device)
    tiles = tile_sizes(head_dim, block_size, q.dtype)
    grid = (num_q_blocks * (block_size // tiles["BLOCK_M"]), batch * num_q_heads)
    with torch.cuda.device_of(q):
        sparse_forward_kernel[grid](
            q,
            k,
            v,
            out,
            lse,
            kv_indices.contiguous(),
            kv_num_blocks.contiguous(),
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *out.stride()[:3],
            num_q_heads,
            num_q_heads // num_kv_heads,
            num_queries,
            num_keys,
            num_q_blocks,
            max_blocks,
            float(scale),
            HEAD_DIM=head_dim,
            BLOCK_D=triton.next_power_of_2(head_dim),
            BLOCK_SIZE=block_size,
            DTYPE=operand_dtype(q.dtype),
            **tiles,
        )
    return out, lse

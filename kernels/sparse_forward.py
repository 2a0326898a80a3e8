"""Block-sparse causal attention, forward: softmax over the key blocks of each query block's list.

A list is ascending, so the diagonal block, the only one that needs a mask, is the last one when it is listed at all.
Keys and values are copied by tensor descriptors where the hardware has them (TMA), else loaded through pointers.

The weights of a softmax may be relative to any reference of their row, as long as nothing overflows. The online softmax
takes the running maximum, which costs a maximum and a rescaled accumulator per tile. fp32 and bf16 reach 2^127, so here
the reference is the maximum of the first tile. If a sum says that this was too low, the program recomputes its rows
with the online softmax. fp16 overflows at 2^16 and always takes the online softmax.

The file exceeds 400 lines because every function of its one kernel lists the arguments that it hands on.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .common import (
    LARGEST_SUM,
    LOG2_E,
    SMALLEST_SCALE,
    SUMS,
    at_least_sm90,
    for_all_lengths,
    is_aligned,
    operand_dtype,
    padded_dim,
    with_dense_rows,
)
from .launch import COMPILE, Tiles, launch

# The problem on which tile sizes are compared, large enough to take the GPU longer than its launch takes the host.
TUNING_TOKENS, TUNING_HEADS, TUNING_WINDOW = 8192, 16, 2048
FASTEST: dict[tuple, dict[str, int]] = {}  # kind of problem -> tiles that were the fastest


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
    """Load rows first_row .. first_row + ROWS - 1 of a head as a [ROWS, BLOCK_D] tile; zero where there is no data."""
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
def load_keys(
    source,
    batch,
    kv_head,
    first_key,
    num_keys,
    stride_n,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
    TMA: tl.constexpr,
):
    """Load BLOCK_N keys or values from first_key on, [BLOCK_N, BLOCK_D]; source: descriptor, or pointer to the head."""
    if TMA:
        return source.load([batch, kv_head, first_key, 0]).reshape(BLOCK_N, BLOCK_D)
    else:
        return load_rows(source, first_key, num_keys, stride_n, BLOCK_N, HEAD_DIM, BLOCK_D, DTYPE, CHECK_ROWS)


@triton.jit
def online_softmax_update(logits, v_tile, accumulator, running_max, running_sum, scale_log2=1.0):
    """Fold one tile of logits [M, N] and its values [N, D] into the running softmax; scale_log2 > 0 makes them base 2.

    The maximum is that of the logits before scaling, so that scale and difference are one multiply-add per weight.
    """
    new_max = tl.maximum(running_max, tl.max(logits, axis=1))  # [M]
    weights = tl.exp2(logits * scale_log2 - (new_max * scale_log2)[:, None])  # [M, N]
    rescale = tl.exp2((running_max - new_max) * scale_log2)
    running_sum = running_sum * rescale + tl.sum(weights, axis=1)
    accumulator = accumulator * rescale[:, None]
    accumulator = tl.dot(weights.to(v_tile.dtype), v_tile, accumulator, input_precision="ieee")  # [M, D]
    return accumulator, new_max, running_sum


@triton.jit
def softmax_update(logits, v_tile, accumulator, reference, sums, scale_log2):
    """Fold one tile into a softmax relative to a given reference [M], with partial row sums [M, SUMS]."""
    weights = tl.exp2(logits * scale_log2 - (reference * scale_log2)[:, None])  # [M, N]
    sums += tl.sum(weights.reshape(weights.shape[0], weights.shape[1] // SUMS, SUMS), axis=1)
    return tl.dot(weights.to(v_tile.dtype), v_tile, accumulator, input_precision="ieee"), sums


@triton.jit
def nothing_attended(BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """Initial state of a softmax: accumulator, running_max, running_sum and sums."""
    row = tl.zeros([BLOCK_M], tl.float32)
    return tl.zeros([BLOCK_M, BLOCK_D], tl.float32), row - float("inf"), row, tl.zeros([BLOCK_M, SUMS], tl.float32)


@triton.jit
def attend_tile(
    q_tile,
    q_positions,
    k_source,
    v_source,
    batch,
    kv_head,
    first_key,
    num_keys,
    stride_kn,
    stride_vn,
    scale_log2,
    accumulator,
    running_max,
    running_sum,
    sums,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr,
    DIAGONAL: tl.constexpr,
    ONLINE: tl.constexpr,
    TMA: tl.constexpr,
):
    """Attend to BLOCK_N keys from first_key on; only in the diagonal block can a key be in the future or missing.

    ONLINE updates running_max and running_sum; otherwise running_max is the reference, and weights are added to `sums`.
    """
    k_tile = load_keys(
        k_source, batch, kv_head, first_key, num_keys, stride_kn, BLOCK_N, HEAD_DIM, BLOCK_D, DTYPE, DIAGONAL, TMA
    )
    v_tile = load_keys(
        v_source, batch, kv_head, first_key, num_keys, stride_vn, BLOCK_N, HEAD_DIM, BLOCK_D, DTYPE, DIAGONAL, TMA
    )
    logits = tl.dot(q_tile, k_tile.T, input_precision="ieee")  # [M, BLOCK_N]
    if DIAGONAL:
        key_positions = first_key + tl.arange(0, BLOCK_N)
        logits = tl.where(key_positions[None, :] <= q_positions[:, None], logits, float("-inf"))
    if ONLINE:
        accumulator, running_max, running_sum = online_softmax_update(
            logits, v_tile, accumulator, running_max, running_sum, scale_log2
        )
    else:
        accumulator, sums = softmax_update(logits, v_tile, accumulator, running_max, sums, scale_log2)
    return accumulator, running_max, running_sum, sums


@triton.jit
def first_key_of(tile, kv_indices_ptr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """First key of a tile of the listed blocks."""
    TILES: tl.constexpr = BLOCK_SIZE // BLOCK_N  # of a block
    return tl.load(kv_indices_ptr + tile // TILES) * BLOCK_SIZE + tile % TILES * BLOCK_N


@triton.jit
def attend_tiles(
    first,
    last,
    kv_indices_ptr,
    q_tile,
    q_positions,
    k_source,
    v_source,
    batch,
    kv_head,
    num_keys,
    stride_kn,
    stride_vn,
    scale_log2,
    accumulator,
    running_max,
    running_sum,
    sums,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr,
    ONLINE: tl.constexpr,
    TMA: tl.constexpr,
):
    """Attend to tiles first .. last - 1 of the listed blocks, none of them the diagonal one; see attend_tile."""
    for tile in range(first, last):
        first_key = first_key_of(tile, kv_indices_ptr, BLOCK_SIZE, BLOCK_N)
        accumulator, running_max, running_sum, sums = attend_tile(
            q_tile, q_positions, k_source, v_source, batch, kv_head, first_key, num_keys,
            stride_kn, stride_vn, scale_log2, accumulator, running_max, running_sum, sums,
            BLOCK_N, HEAD_DIM, BLOCK_D, DTYPE, DIAGONAL=False, ONLINE=ONLINE, TMA=TMA,
        )  # fmt: skip
    return accumulator, running_max, running_sum, sums


@triton.jit
def attend_tiles_ahead(
    first,
    last,
    kv_indices_ptr,
    q_tile,
    k_source,
    v_source,
    batch,
    kv_head,
    num_keys,
    stride_kn,
    stride_vn,
    scale_log2,
    accumulator,
    reference,
    sums,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr,
    TMA: tl.constexpr,
):
    """attend_tiles relative to a reference; the logits of the next tile are computed during the softmax of a tile."""
    if first < last:
        first_key = first_key_of(first, kv_indices_ptr, BLOCK_SIZE, BLOCK_N)
        k_tile = load_keys(
            k_source, batch, kv_head, first_key, num_keys, stride_kn, BLOCK_N, HEAD_DIM, BLOCK_D, DTYPE, False, TMA
        )
        logits = tl.dot(q_tile, k_tile.T, input_precision="ieee")  # [M, BLOCK_N]
        for tile in range(first + 1, last):
            next_key = first_key_of(tile, kv_indices_ptr, BLOCK_SIZE, BLOCK_N)
            k_tile = load_keys(
                k_source, batch, kv_head, next_key, num_keys, stride_kn, BLOCK_N, HEAD_DIM, BLOCK_D, DTYPE, False, TMA
            )
            v_tile = load_keys(
                v_source, batch, kv_head, first_key, num_keys, stride_vn, BLOCK_N, HEAD_DIM, BLOCK_D, DTYPE, False, TMA
            )
            next_logits = tl.dot(q_tile, k_tile.T, input_precision="ieee")
            accumulator, sums = softmax_update(logits, v_tile, accumulator, reference, sums, scale_log2)
            logits, first_key = next_logits, next_key
        v_tile = load_keys(
            v_source, batch, kv_head, first_key, num_keys, stride_vn, BLOCK_N, HEAD_DIM, BLOCK_D, DTYPE, False, TMA
        )
        accumulator, sums = softmax_update(logits, v_tile, accumulator, reference, sums, scale_log2)
    return accumulator, sums


@for_all_lengths
def sparse_forward_kernel(
    q_ptr,
    k_source,
    v_source,
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
    TMA: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """One program computes BLOCK_M rows of one query block of one head.

    Grid: (nq * BLOCK_SIZE / BLOCK_M, B * Hq): the query tiles of a head are neighbours, so that its keys and values
    stay in the L2 cache, and the last tiles start first. BLOCK_M and BLOCK_N divide BLOCK_SIZE. TMA: k_source and
    v_source are descriptors of [B, Hkv, Nkv, D] with tiles of BLOCK_N rows, else pointers. AHEAD: see
    attend_tiles_ahead; without it, the tensor cores idle during a softmax unless another program runs beside this one.
    """
    tiles_per_q_block: tl.constexpr = BLOCK_SIZE // BLOCK_M
    tiles_per_kv_block: tl.constexpr = BLOCK_SIZE // BLOCK_N
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    row, tile_in_block = tile // tiles_per_q_block, tile % tiles_per_q_block
    batch_head = tl.program_id(1).to(tl.int64)
    batch, head = batch_head // num_q_heads, batch_head % num_q_heads
    kv_head = head // heads_per_kv_head
    q_ptr += batch * stride_qb + head * stride_qh
    if not TMA:
        k_source += batch * stride_kb + kv_head * stride_kh
        v_source += batch * stride_vb + kv_head * stride_vh
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
    num_tiles = (num_blocks - has_diagonal) * tiles_per_kv_block
    online_tiles = num_tiles if DTYPE == tl.float16 else tl.minimum(num_tiles, 1)
    positions, batch, kv_head = offset + queries, batch.to(tl.int32), kv_head.to(tl.int32)
    accumulator, running_max, running_sum, sums = nothing_attended(BLOCK_M, BLOCK_D)
    accumulator, running_max, running_sum, sums = attend_tiles(
        0, online_tiles, kv_indices_ptr, q_tile, positions, k_source, v_source, batch, kv_head, num_keys,
        stride_kn, stride_vn, scale_log2, accumulator, running_max, running_sum, sums,
        BLOCK_SIZE, BLOCK_N, HEAD_DIM, BLOCK_D, DTYPE, ONLINE=True, TMA=TMA,
    )  # fmt: skip
    if AHEAD:
        accumulator, sums = attend_tiles_ahead(
            online_tiles, num_tiles, kv_indices_ptr, q_tile, k_source, v_source, batch, kv_head, num_keys,
            stride_kn, stride_vn, scale_log2, accumulator, running_max, sums,
            BLOCK_SIZE, BLOCK_N, HEAD_DIM, BLOCK_D, DTYPE, TMA=TMA,
        )  # fmt: skip
    else:
        accumulator, running_max, running_sum, sums = attend_tiles(
            online_tiles, num_tiles, kv_indices_ptr, q_tile, positions, k_source, v_source, batch, kv_head, num_keys,
            stride_kn, stride_vn, scale_log2, accumulator, running_max, running_sum, sums,
            BLOCK_SIZE, BLOCK_N, HEAD_DIM, BLOCK_D, DTYPE, ONLINE=False, TMA=TMA,
        )  # fmt: skip
    running_sum += tl.sum(sums, axis=1)
    if tl.max((running_sum >= LARGEST_SUM).to(tl.int32), axis=0) > 0:
        accumulator, running_max, running_sum, sums = nothing_attended(BLOCK_M, BLOCK_D)
        accumulator, running_max, running_sum, sums = attend_tiles(
            0, num_tiles, kv_indices_ptr, q_tile, positions, k_source, v_source, batch, kv_head, num_keys,
            stride_kn, stride_vn, scale_log2, accumulator, running_max, running_sum, sums,
            BLOCK_SIZE, BLOCK_N, HEAD_DIM, BLOCK_D, DTYPE, ONLINE=True, TMA=TMA,
        )  # fmt: skip
    visible_tiles = ((tile_in_block + 1) * BLOCK_M + BLOCK_N - 1) // BLOCK_N  # of the diagonal block
    for step in range(has_diagonal * visible_tiles):
        first_key = q_block * BLOCK_SIZE + step * BLOCK_N
        accumulator, running_max, running_sum, sums = attend_tile(
            q_tile, positions, k_source, v_source, batch, kv_head, first_key, num_keys,
            stride_kn, stride_vn, scale_log2, accumulator, running_max, running_sum, sums,
            BLOCK_N, HEAD_DIM, BLOCK_D, DTYPE, DIAGONAL=True, ONLINE=True, TMA=TMA,
        )  # fmt: skip

    running_sum = tl.where(running_sum == 0.0, 1.0, running_sum)  # an empty list returns out 0 and lse -inf
    out_tile = accumulator / running_sum[:, None]
    lse = running_max * scale + tl.log(running_sum)
    exists = (queries >= 0) & (queries < num_queries)
    dims = tl.arange(0, BLOCK_D)
    out_pointers = out_ptr + first_query.to(tl.int64) * stride_on
    out_pointers += tl.arange(0, BLOCK_M)[:, None] * stride_on + dims[None, :]
    out_tile = out_tile.to(out_ptr.dtype.element_ty)
    tl.store(out_pointers, out_tile, mask=exists[:, None] & (dims < HEAD_DIM)[None, :])
    tl.store(lse_ptr + batch_head * num_queries + queries, lse, mask=exists)


@cache
def tile_choices(head_dim: int, block_size: int, dtype: torch.dtype) -> tuple[dict[str, int], ...]:
    """Candidates for rows, keys, order, warps and pipeline stages of a program, the default first (ours, for sm_90).

    fp16 and bf16 run on tensor cores, 16 rows and 128 dimensions a warp; fp32 has no exact tensor-core product, so
    registers bound its tiles when it is compiled.
    """
    if dtype == torch.float32 and not triton.knobs.runtime.interpret:
        block_m, block_n = (64, 32) if head_dim <= 64 else (32, 32) if head_dim <= 128 else (16, 16)
        block_m, block_n = min(block_size, block_m), min(block_size, block_n)
        return (dict(BLOCK_M=block_m, BLOCK_N=block_n, AHEAD=False, num_warps=8, num_stages=1),)
    if head_dim <= 64:
        shapes = [(64, 64, False, 4, 3), (64, 128, False, 4, 2)]
    elif head_dim <= 128:
        shapes = [(64, 64, True, 4, 2), (128, 128, False, 8, 3), (128, 128, False, 8, 2), (128, 64, False, 8, 3)]
    else:
        shapes = [(128, 64, False, 8, 2)]
    cut = [(min(block_size, rows), min(block_size, keys), *other) for rows, keys, *other in shapes]
    per_warp = 16 if head_dim <= 128 else 8  # rows
    return tuple(
        dict(BLOCK_M=rows, BLOCK_N=keys, AHEAD=ahead, num_warps=min(warps, rows // per_warp), num_stages=stages)
        for rows, keys, ahead, warps, stages in dict.fromkeys(cut)
    )


def tile_sizes(head_dim: int, block_size: int, dtype: torch.dtype, device: torch.device) -> dict[str, int]:
    """The fastest of `tile_choices` on this device, timed at the first call for each kind of problem.

    The default where nothing can be timed: in the interpreter, and for a kind of problem that is first met while a CUDA
    graph is captured or while launches only compile.
    """
    choices, kind = tile_choices(head_dim, block_size, dtype), (head_dim, block_size, dtype, device)
    if kind not in FASTEST:
        if len(choices) == 1 or device.type != "cuda" or COMPILE.get() or torch.cuda.is_current_stream_capturing():
            return choices[0]
        FASTEST[kind] = choices[fastest_choice(*kind)]
    return FASTEST[kind]


def fastest_choice(head_dim: int, block_size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Index in `tile_choices` of the fastest one, on a prompt of TUNING_TOKENS with a window of TUNING_WINDOW."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    rows = torch.arange(TUNING_TOKENS // block_size, dtype=torch.int32, device=device)
    blocks = max(1, TUNING_WINDOW // block_size)
    counts = (rows + 1).clamp_max(blocks).expand(1, TUNING_HEADS, -1)
    window = torch.arange(blocks, dtype=torch.int32, device=device)
    lists = ((rows + 1 - blocks).clamp_min(0)[:, None] + window).expand(1, TUNING_HEADS, -1, -1)
    generator = torch.Generator(device).manual_seed(0)  # zeros would draw too little power to slow the clocks down
    x = torch.randn(1, TUNING_HEADS, TUNING_TOKENS, head_dim, generator=generator, dtype=dtype, device=device)

    def time_of(tiles: dict[str, int]) -> float:
        try:
            return do_bench(lambda: sparse_forward(x, x, x, lists, counts, block_size, 0.1, tiles), warmup=20, rep=80)
        except OutOfResources:  # the list is for sm_90, other cards have less shared memory
            return float("inf")

    times = [time_of(tiles) for tiles in tile_choices(head_dim, block_size, dtype)]
    return times.index(min(times))


def can_describe(x: torch.Tensor) -> bool:
    """Whether a tensor descriptor of x [B, H, N, D] can be made: sm_90, 16 bits, aligned, D a power of two >= 16."""
    return (
        at_least_sm90(x.device) and x.element_size() == 2 and x.shape[-1] == padded_dim(x.shape[-1]) and is_aligned(x)
    )


def describe_tiles(x: torch.Tensor, shape: tuple[int, ...]) -> TensorDescriptor:
    """Triton's descriptor of x [B, H, N, D], for which `can_describe` holds, in tiles of a shape."""
    return TensorDescriptor.from_tensor(x, list(shape))


def sparse_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_num_blocks: torch.Tensor,
    block_size: int,
    scale: float,
    tiles: dict[str, int] | None = None,
    tma: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of every query block over the key blocks of its list.

    Args:
        q: fp32, fp16 or bf16 [B, Hq, Nq, D], the last Nq positions; any strides.
        k, v: [B, Hkv, Nkv, D], same dtype; Hq % Hkv == 0 and Nq <= Nkv.
        kv_indices: int32 [B, Hq, nq, max] ascending, never past the query block (which is on the key grid).
        kv_num_blocks: int32 [B, Hq, nq], entries of each list.
        block_size: Tokens per block, a power of two, at least 16.
        scale: Softmax scale.
        tiles: One of `tile_choices`; None takes that of `tile_sizes`.
        tma: Whether to use tensor descriptors; None uses them where possible.
    Returns:
        out like q (accumulated in fp32), and the natural log-sum-exp fp32 [B, Hq, Nq]; 0 and -inf for an empty list.
    """
    tiles = tile_sizes(q.shape[-1], block_size, q.dtype, q.device) if tiles is None else tiles
    q, k, v = with_dense_rows(q), with_dense_rows(k), with_dense_rows(v)
    batch, num_q_heads, num_queries, head_dim = q.shape
    num_kv_heads, num_keys = k.shape[1:3]
    num_q_blocks, max_blocks = kv_indices.shape[2:]
    if scale < 0:  # the kernel takes row maxima before it scales
        q, scale = -q, -scale
    tma = can_describe(k) and can_describe(v) if tma is None else tma
    tile = 1, 1, tiles["BLOCK_N"], head_dim
    out = torch.empty_like(q)
    lse = torch.empty(batch, num_q_heads, num_queries, dtype=torch.float32, device=q.device)
    grid = (num_q_blocks * (block_size // tiles["BLOCK_M"]), batch * num_q_heads)
    k_source, v_source = (Tiles(x, tile, describe_tiles) if tma else x for x in (k, v))
    strides = [stride for x in (q, k, v, out) for stride in x.stride()[:3]]
    sizes = num_q_heads, num_q_heads // num_kv_heads, num_queries, num_keys, num_q_blocks, max_blocks
    launch(
        sparse_forward_kernel,
        grid,
        (q, k_source, v_source, out, lse, kv_indices.contiguous(), kv_num_blocks.contiguous()),
        (*strides, *sizes, max(float(scale), SMALLEST_SCALE)),
        HEAD_DIM=head_dim,
        BLOCK_D=padded_dim(head_dim),
        BLOCK_SIZE=block_size,
        DTYPE=operand_dtype(q.dtype),
        TMA=tma,
        **tiles,
    )
    return out, lse

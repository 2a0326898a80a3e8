"""Block-sparse causal attention, forward, for sm_90 in Gluon: the result of sparse_forward.py, about 1.5 times as fast.

One program attends from one query block of one head. Its warps have three roles, one partition each:

    producer, 1 warp: copies the K and V tiles of the listed blocks, last block first, into two rings (TMA)
    consumer 0 and 1, 4 warps each: half of the query block's rows; QK^T, online softmax and PV (warpgroup MMA)

The producer runs ahead until a ring is full. `full` barriers tell the consumers that a tile has landed, `empty`
barriers tell the producer that both consumers have read it. A consumer issues QK^T of a block and PV of the block
before it back to back, both asynchronous, and looks for the row maxima of the one while the other still runs; while it
computes exponentials, the tensor cores work for the other consumer. Weights stay in registers from the softmax to PV.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

LOG2_E = gl.constexpr(1.4426950408889634)  # exp(x) = exp2(x * LOG2_E)
LN_2 = gl.constexpr(0.6931471805599453)

BLOCK_SIZE = 128
HEAD_DIMS = (64, 128)
DTYPES = (torch.float16, torch.bfloat16)

NUM_CONSUMERS = gl.constexpr(2)
CONSUMER_WARPS = gl.constexpr(4)  # a warpgroup, which is what issues an sm_90 MMA
PRODUCER_WARPS = gl.constexpr(1)
NUM_STAGES = gl.constexpr(2)  # tiles in each ring; three are no faster
# Registers of a thread: the 65,536 of a multiprocessor are dealt to 12 warps at launch (the third warpgroup is the
# producer's, mostly idle), and then the producer hands nearly all of its own to the consumers.
LAUNCH_REGISTERS = 168
CONSUMER_REGISTERS = gl.constexpr(240)
PRODUCER_REGISTERS = gl.constexpr(24)

TMA_BYTES = 16  # alignment of addresses and strides
TMA_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)


@gluon.jit
def make_barriers(NUM: gl.constexpr, COUNT: gl.constexpr):
    """NUM barriers in shared memory; a phase of each ends after COUNT arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [NUM, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUM):
        mbarrier.init(barriers.index(i), count=COUNT)
    return barriers


@gluon.jit
def make_ring(desc):
    """A ring of NUM_STAGES tiles: the tiles, and the barriers that say when one is full and when it is empty."""
    tiles = gl.allocate_shared_memory(desc.dtype, [NUM_STAGES] + desc.block_type.shape, desc.layout)
    return tiles, make_barriers(NUM_STAGES, 1), make_barriers(NUM_STAGES, NUM_CONSUMERS)


@gluon.jit
def ring_slot(step):
    """Where the ring holds the tile of a step, and the parity of the slot's barriers in that round."""
    return step % NUM_STAGES, (step // NUM_STAGES) & 1


@gluon.jit
def as_matrix(tile):
    """[1, 1, rows, D] -> [rows, D]."""
    return tile.reshape([tile.shape[2], tile.shape[3]])


@gluon.jit
def copy_tile(desc, batch, head, first_row, full, tile):
    """Start copying rows first_row .. of a head; rows that do not exist become zeros; `full` hears of the end."""
    mbarrier.expect(full, desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [batch, head, first_row, 0], full, tile)


@gluon.jit
def fill_slot(desc, ring, step, batch, head, first_row):
    """Producer: wait until the slot of this step is empty, and start filling it."""
    tiles, full, empty = ring
    slot, parity = ring_slot(step)
    mbarrier.wait(empty.index(slot), parity ^ 1)  # of the round before; passes in the first round
    copy_tile(desc, batch, head, first_row, full.index(slot), tiles.index(slot))


@gluon.jit
def wait_for_tile(ring, step):
    """Consumer: the tile of this step [BLOCK_SIZE, D], once it has landed."""
    tiles, full, _ = ring
    slot, parity = ring_slot(step)
    mbarrier.wait(full.index(slot), parity)
    return as_matrix(tiles.index(slot))


@gluon.jit
def release_tile(ring, step):
    """Consumer: this half of the rows needs the tile of this step no more."""
    _, _, empty = ring
    slot, _ = ring_slot(step)
    mbarrier.arrive(empty.index(slot))


@gluon.jit
def start_logits(q_tile, k_tile, LAYOUT: gl.constexpr):
    """Start QK^T of a tile."""
    zeros = gl.full([q_tile.shape[0], k_tile.shape[0]], 0.0, gl.float32, LAYOUT)
    return hopper.warpgroup_mma(q_tile, k_tile.permute([1, 0]), zeros, use_acc=False, is_async=True)


@gluon.jit
def mask_future(logits, first_position, first_key):
    """-inf where the key comes after the query; the tile's rows and columns start at the given positions."""
    LAYOUT: gl.constexpr = logits.type.layout
    positions = first_position + gl.arange(0, logits.shape[0], gl.SliceLayout(1, LAYOUT))
    keys = first_key + gl.arange(0, logits.shape[1], gl.SliceLayout(0, LAYOUT))
    return gl.where(keys[None, :] <= positions[:, None], logits, float("-inf"))


@gluon.jit
def online_softmax(logits, running_max, running_sum, scale_log2, WEIGHTS: gl.constexpr, DTYPE: gl.constexpr):
    """Weights of a tile as the first operand of PV, the new row maxima and sums, and what rescales the old ones."""
    new_max = gl.maximum(running_max, gl.max(logits, axis=1))  # [M]
    rescale = gl.exp2((running_max - new_max) * scale_log2)
    weights = gl.exp2(logits * scale_log2 - (new_max * scale_log2)[:, None])  # [M, BLOCK_SIZE]
    running_sum = running_sum * rescale + gl.sum(weights, axis=1)
    return gl.convert_layout(weights.to(DTYPE), WEIGHTS), new_max, running_sum, rescale


@gluon.jit
def store_rows(out_ptr, out_tile, first_row, num_rows, stride_n):
    """Store a tile [M, D], through a layout in which a warp writes whole lines; rows that do not exist are skipped."""
    HEAD_DIM: gl.constexpr = out_tile.shape[1]
    THREADS: gl.constexpr = HEAD_DIM // 8  # along a row, 16 bytes each
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // THREADS, THREADS], [CONSUMER_WARPS, 1], [1, 0])
    rows = first_row + gl.arange(0, out_tile.shape[0], gl.SliceLayout(1, LAYOUT))
    dims = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, LAYOUT))
    pointers = out_ptr + rows.to(gl.int64)[:, None] * stride_n + dims[None, :]
    gl.store(pointers, gl.convert_layout(out_tile, LAYOUT), mask=((rows >= 0) & (rows < num_rows))[:, None])


@gluon.jit
def produce(
    q_desc, k_desc, v_desc, q_tiles, q_full, k_ring, v_ring, list_ptr, num_blocks, batch, head, kv_head, first_query
):  # fmt: skip
    """Copy the query block's two halves, and then K and V of every listed block, from the last one to the first."""
    ROWS: gl.constexpr = q_desc.block_type.shape[2]
    for consumer in gl.static_range(NUM_CONSUMERS):
        first_row = first_query + consumer * ROWS
        copy_tile(q_desc, batch, head, first_row, q_full.index(consumer), q_tiles.index(consumer))
    kv_block = gl.load(list_ptr + gl.maximum(num_blocks - 1, 0))
    for step in range(num_blocks):
        first_key = kv_block * k_desc.block_type.shape[2]
        kv_block = gl.load(list_ptr + gl.maximum(num_blocks - 2 - step, 0))  # early: arrives while the rings are full
        fill_slot(k_desc, k_ring, step, batch, kv_head, first_key)
        fill_slot(v_desc, v_ring, step, batch, kv_head, first_key)


@gluon.jit
def consume(
    CONSUMER: gl.constexpr, q_tiles, q_full, k_ring, v_ring, list_ptr, num_blocks,
    out_ptr, stride_on, lse_ptr, first_query, num_queries, offset, scale_log2,
):  # fmt: skip
    """Attend from half of a query block to every listed block, and store its output and log-sum-exp."""
    DTYPE: gl.constexpr = q_tiles.dtype
    ROWS: gl.constexpr = q_tiles.shape[3]
    HEAD_DIM: gl.constexpr = q_tiles.shape[4]
    BLOCK: gl.constexpr = ROWS * NUM_CONSUMERS
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [CONSUMER_WARPS, 1], [16, BLOCK, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [CONSUMER_WARPS, 1], [16, HEAD_DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, k_width=2)
    LOGITS_ROW: gl.constexpr = gl.SliceLayout(1, LOGITS)
    OUT_ROW: gl.constexpr = gl.SliceLayout(1, OUT)

    first_row = first_query + CONSUMER * ROWS
    accumulator = gl.full([ROWS, HEAD_DIM], 0.0, gl.float32, OUT)
    running_max = gl.full([ROWS], float("-inf"), gl.float32, LOGITS_ROW)
    running_sum = gl.full([ROWS], 0.0, gl.float32, LOGITS_ROW)
    mbarrier.wait(q_full.index(CONSUMER), 0)
    if num_blocks > 0:
        # The last block of the list: the diagonal one if that is listed, and then the only one that needs a mask.
        q_tile = as_matrix(q_tiles.index(CONSUMER))
        logits = start_logits(q_tile, wait_for_tile(k_ring, 0), LOGITS)
        logits = hopper.warpgroup_mma_wait(0, [logits])
        release_tile(k_ring, 0)
        logits = mask_future(logits, offset + first_row, gl.load(list_ptr + num_blocks - 1) * BLOCK)
        weights, running_max, running_sum, _ = online_softmax(
            logits, running_max, running_sum, scale_log2, WEIGHTS, DTYPE
        )
        for step in range(1, num_blocks):
            logits = start_logits(q_tile, wait_for_tile(k_ring, step), LOGITS)
            v_tile = wait_for_tile(v_ring, step - 1)
            accumulator = hopper.warpgroup_mma(weights, v_tile, accumulator, is_async=True)
            logits = hopper.warpgroup_mma_wait(1, [logits])  # the older of the two products in flight
            release_tile(k_ring, step)
            weights, running_max, running_sum, rescale = online_softmax(
                logits, running_max, running_sum, scale_log2, WEIGHTS, DTYPE
            )
            accumulator = hopper.warpgroup_mma_wait(0, [accumulator])
            release_tile(v_ring, step - 1)
            accumulator = accumulator * gl.convert_layout(rescale, OUT_ROW)[:, None]
        v_tile = wait_for_tile(v_ring, num_blocks - 1)
        accumulator = hopper.warpgroup_mma(weights, v_tile, accumulator, is_async=True)
        accumulator = hopper.warpgroup_mma_wait(0, [accumulator])

    running_sum = gl.where(running_sum == 0.0, 1.0, running_sum)  # an empty list gives out 0 and lse -inf
    rows = first_row + gl.arange(0, ROWS, LOGITS_ROW)
    lse = running_max * (scale_log2 * LN_2) + gl.log(running_sum)
    gl.store(lse_ptr + rows, lse, mask=(rows >= 0) & (rows < num_queries))
    out_tile = accumulator / gl.convert_layout(running_sum, OUT_ROW)[:, None]
    store_rows(out_ptr, out_tile.to(DTYPE), first_row, num_queries, stride_on)


@gluon.jit(
    do_not_specialize=["num_q_heads", "heads_per_kv_head", "num_queries", "num_keys", "num_q_blocks", "max_blocks"]
)
def hopper_forward_kernel(
    q_desc,
    k_desc,
    v_desc,
    out_ptr,
    lse_ptr,
    kv_indices_ptr,
    kv_num_blocks_ptr,
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
):
    """One program computes one query block of one head. Tiles: q_desc's is half a query block, k_desc's a key block.

    Grid: (nq, B * Hq), as in sparse_forward.py: the query blocks of a head are neighbours, so that its keys and values
    stay in the L2 cache, and the last query blocks start first.
    """
    row = gl.num_programs(0) - 1 - gl.program_id(0)
    batch_head = gl.program_id(1)
    batch, head = batch_head // num_q_heads, batch_head % num_q_heads
    kv_head = head // heads_per_kv_head
    offset = num_keys - num_queries  # absolute position of query 0
    BLOCK: gl.constexpr = k_desc.block_type.shape[2]
    first_query = (offset // BLOCK + row) * BLOCK - offset  # negative if the first query block is partial

    list_row = batch_head.to(gl.int64) * num_q_blocks + row
    list_ptr = kv_indices_ptr + list_row * max_blocks
    num_blocks = gl.load(kv_num_blocks_ptr + list_row)
    out_ptr += batch.to(gl.int64) * stride_ob + head.to(gl.int64) * stride_oh
    lse_ptr += batch_head.to(gl.int64) * num_queries

    q_tiles = gl.allocate_shared_memory(q_desc.dtype, [NUM_CONSUMERS] + q_desc.block_type.shape, q_desc.layout)
    q_full = make_barriers(NUM_CONSUMERS, 1)
    shared = (q_tiles, q_full, make_ring(k_desc), make_ring(v_desc), list_ptr, num_blocks)
    consumer_arguments = shared + (out_ptr, stride_on, lse_ptr, first_query, num_queries, offset, scale * LOG2_E)
    producer_arguments = (q_desc, k_desc, v_desc) + shared + (batch, head, kv_head, first_query)
    gl.warp_specialize(
        [(consume, (0,) + consumer_arguments), (consume, (1,) + consumer_arguments), (produce, producer_arguments)],
        [CONSUMER_WARPS, PRODUCER_WARPS],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


def unsupported(q: torch.Tensor, block_size: int) -> str:
    """What of this problem the kernel does not cover, in words; empty if it covers all of it."""
    if not q.is_cuda or torch.cuda.get_device_capability(q.device) != (9, 0):
        return f"device {torch.cuda.get_device_name(q.device) if q.is_cuda else q.device}, accepted: CUDA of sm_90"
    if q.dtype not in DTYPES:
        return f"dtype {q.dtype}, accepted: {', '.join(map(str, DTYPES))}"
    if q.shape[-1] not in HEAD_DIMS:
        return f"head_dim {q.shape[-1]}, accepted: {', '.join(map(str, HEAD_DIMS))}"
    if block_size != BLOCK_SIZE:
        return f"block_size {block_size}, accepted: {BLOCK_SIZE}"
    return ""


def supports(q: torch.Tensor, block_size: int) -> bool:
    """Whether the kernel covers queries like q and blocks of this size: sm_90, fp16 or bf16, D 64 or 128, block 128."""
    return not unsupported(q, block_size)


def tma_rows(x: torch.Tensor) -> torch.Tensor:
    """`x` itself if TMA can read it: unit stride of D, address and other strides multiples of 16 bytes; else a copy."""
    aligned = all(stride > 0 and stride * x.element_size() % TMA_BYTES == 0 for stride in x.stride()[:-1])
    if aligned and x.stride(-1) == 1 and x.data_ptr() % TMA_BYTES == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def tile_descriptor(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """Describes x [B, H, N, D] to TMA as tiles of `rows` rows of one head."""
    return TensorDescriptor.from_tensor(x, [1, 1, rows, x.shape[-1]], TMA_LAYOUT)


def sparse_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_num_blocks: torch.Tensor,
    block_size: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See sparse_forward.py, whose arguments and results these are, for what `supports` accepts."""
    if scale < 0:  # the kernel takes row maxima before it scales
        q, scale = -q, -scale
    q, k, v = tma_rows(q), tma_rows(k), tma_rows(v)
    batch, num_q_heads, num_queries, _ = q.shape
    num_kv_heads, num_keys = k.shape[1:3]
    num_q_blocks, max_blocks = kv_indices.shape[2:]
    out = torch.empty_like(q)
    lse = torch.empty(batch, num_q_heads, num_queries, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        hopper_forward_kernel[num_q_blocks, batch * num_q_heads](
            tile_descriptor(q, block_size // NUM_CONSUMERS.value),
            tile_descriptor(k, block_size),
            tile_descriptor(v, block_size),
            out,
            lse,
            kv_indices.contiguous(),
            kv_num_blocks.contiguous(),
            *out.stride()[:3],
            num_q_heads,
            num_q_heads // num_kv_heads,
            num_queries,
            num_keys,
            num_q_blocks,
            max_blocks,
            max(float(scale), torch.finfo(torch.float32).tiny),
            num_warps=CONSUMER_WARPS.value,
            maxnreg=LAUNCH_REGISTERS,
        )
    return out, lse

"""Block-sparse causal attention in FP8 (e4m3), forward, for sm_90 in Gluon: the roles of hopper_forward.py.

Q, K and V come from fp8_quantize.py with their scales. The kernel differs from the bf16 one in four places:

    logits: QK^T times the scales of its two tiles
    weights: e4m3 ends at 448, so the reference of a row follows its running maximum (online softmax), and weights lie
        between 0 and 2^HEADROOM
    PV: V lies transposed in shared memory, since FP8 products take both operands along the contracted dimension. Its
        tokens are in the order in which a thread holds the weights of a row, so weights never leave their registers
    accumulation: the tensor cores add FP8 products with about 14 bits, so each tile's PV starts from 0 and is added to
        the accumulator in fp32

The consumers take turns to issue products, so that one computes exponentials while the tensor cores work for the other.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .common import LN_2, SUMS, with_dense_rows
from .fp8_quantize import quantize
from .hopper_forward import (
    BLOCK_SIZE,
    CONSUMER_REGISTERS,
    CONSUMER_WARPS,
    LAUNCH_OPTIONS,
    NUM_CONSUMERS,
    PRODUCER_REGISTERS,
    PRODUCER_WARPS,
    VARYING,
    as_matrix,
    find_task,
    load_block,
    make_barriers,
    make_ring,
    mask_future,
    produce,
    release_tile,
    row_maxima,
    scale_rows,
    start_logits,
    store_rows,
    wait_for_task,
    wait_for_tile,
    write_number,
)
from .launch import Tiles
from .tasks import Tasks, launch_scratch

NUM_STAGES = gl.constexpr(4)  # tiles in each ring
HEADROOM = gl.constexpr(8.0)  # log2 of the largest weight; e4m3 ends at 448
LAYOUTS = {
    width: gl.NVMMASharedLayout(swizzle_byte_width=width, element_bitwidth=8, rank=4) for width in (64, 128)
}  # bytes of a tile's row -> layout in shared memory


@gluon.jit
def pack_fp8(x):
    """x in e4m3, four neighbours of a thread at a time into one register; a cast would move them byte by byte."""
    packed = gl.inline_asm_elementwise(
        """{
        .reg .b16 low, high;
        cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
        cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
        mov.b32 $0, {low, high};
        }""",
        "=r,f,f,f,f",
        [x],
        dtype=gl.int8,
        is_pure=True,
        pack=4,
    )
    return packed.to(gl.float8e4nv, bitcast=True)


@gluon.jit
def fp8_weights(logits, sums, before, factor, WEIGHTS: gl.constexpr):
    """Weights 2^(logit - reference) of a tile, as the first operand of PV, and the state of the rows after it.

    The state: partial sums of all weights [M, SUMS], references [M], and factors that rescale earlier outputs [M].
    """
    ROWS: gl.constexpr = logits.shape[0]
    COLUMNS: gl.constexpr = logits.shape[1]
    reference = gl.maximum(before, row_maxima(logits, factor) - HEADROOM)
    weights = gl.exp2(logits * factor - reference[:, None])  # [M, BLOCK_SIZE]
    rescale = gl.exp2(before - reference)
    sums = scale_rows(sums, rescale) + gl.sum(weights.reshape([ROWS, COLUMNS // SUMS, SUMS]), axis=1)
    # A thread holds columns 2t, 2t+1, 8+2t and 8+2t+1 of 16; the product takes them as 4t .. 4t+3.
    grouped = weights.reshape([ROWS, COLUMNS // 16, 2, 4, 2]).permute([0, 1, 3, 2, 4]).reshape([ROWS, COLUMNS])
    return pack_fp8(gl.convert_layout(grouped, WEIGHTS)), sums, reference, rescale


@gluon.jit
def start_output(weights, v_tile, OUT: gl.constexpr):
    """Start PV of a tile; v_tile is [D, BLOCK_SIZE]."""
    zeros = gl.full([weights.shape[0], v_tile.shape[0]], 0.0, gl.float32, OUT)
    return hopper.warpgroup_mma(weights, v_tile.permute([1, 0]), zeros, use_acc=False, is_async=True)


@gluon.jit
def attend(q_tile, q_read, k_ring, v_ring, turn, next_turn, first_step, kv_list, first_position, q_scale, k_scales_ptr):
    """Attend from the queries of one task to its blocks: accumulator [M, D], reference [M] and sum [M] of its weights.

    Arrives at `q_read` after the last use of the queries. Each step waits for its turn, issues products, and gives the
    turn to the other consumer.
    """
    ROWS: gl.constexpr = q_tile.shape[0]
    HEAD_DIM: gl.constexpr = q_tile.shape[1]
    BLOCK: gl.constexpr = ROWS * NUM_CONSUMERS
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [CONSUMER_WARPS, 1], [16, BLOCK, 32])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [CONSUMER_WARPS, 1], [16, HEAD_DIM, 32])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, k_width=4)
    num_blocks = kv_list[1]
    accumulator = gl.full([ROWS, HEAD_DIM], 0.0, gl.float32, OUT)
    no_weights = gl.full([ROWS, BLOCK], 0.0, gl.float32, LOGITS)
    sums = gl.sum(no_weights.reshape([ROWS, BLOCK // SUMS, SUMS]), axis=1)
    reference = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, LOGITS))
    if num_blocks > 0:
        last_step = first_step + num_blocks - 1
        kv_block = load_block(kv_list, num_blocks - 1)
        factor = q_scale * gl.load(k_scales_ptr + kv_block)
        next_scale = gl.load(k_scales_ptr + load_block(kv_list, num_blocks - 2))
        logits = start_logits(q_tile, wait_for_tile(k_ring, first_step), LOGITS)
        logits = hopper.warpgroup_mma_wait(0, [logits])
        release_tile(k_ring, first_step)
        logits = mask_future(logits, first_position, kv_block * BLOCK)
        for step in range(first_step, last_step):
            weights, sums, reference, rescale = fp8_weights(logits, sums, reference, factor, WEIGHTS)
            factor = q_scale * next_scale
            next_scale = gl.load(k_scales_ptr + load_block(kv_list, num_blocks - 3 - (step - first_step)))
            v_tile = wait_for_tile(v_ring, step)
            k_tile = wait_for_tile(k_ring, step + 1)
            mbarrier.wait(turn, step & 1)
            part = start_output(weights, v_tile, OUT)
            logits = start_logits(q_tile, k_tile, LOGITS)
            mbarrier.arrive(next_turn)
            part = hopper.warpgroup_mma_wait(1, [part])  # the older of the two products in flight
            release_tile(v_ring, step)
            accumulator = scale_rows(accumulator, rescale) + part
            logits = hopper.warpgroup_mma_wait(0, [logits])
            release_tile(k_ring, step + 1)
        mbarrier.arrive(q_read)  # the queries of the next task may be copied from here on
        weights, sums, reference, rescale = fp8_weights(logits, sums, reference, factor, WEIGHTS)
        v_tile = wait_for_tile(v_ring, last_step)
        mbarrier.wait(turn, last_step & 1)
        part = start_output(weights, v_tile, OUT)
        mbarrier.arrive(next_turn)
        part = hopper.warpgroup_mma_wait(0, [part])
        release_tile(v_ring, last_step)
        accumulator = scale_rows(accumulator, rescale) + part
    else:
        mbarrier.arrive(q_read)
    return accumulator, reference, gl.convert_layout(gl.sum(sums, axis=1), reference.type.layout)


@gluon.jit
def consume(
    CONSUMER: gl.constexpr, turns, q_inbox, k_ring, v_ring, redo, num_tasks, problem, scales,
    out_ptr, lse_ptr, stride_ob, stride_oh, stride_on, num_queries,
):  # fmt: skip
    """Task by task until the end is announced: attend from half of a query block, store output and log-sum-exp."""
    _q_full, q_empty, q_tiles, _tasks = q_inbox
    last_noted, _redo_ptr = redo
    num_q_blocks, num_q_heads, heads_per_kv_head, _heads, offset = problem[:5]
    q_scales_ptr, k_scales_ptr, v_scales_ptr, num_kv_blocks = scales
    ROWS: gl.constexpr = q_tiles.shape[3]
    HEAD_DIM: gl.constexpr = q_tiles.shape[4]
    BLOCK: gl.constexpr = ROWS * NUM_CONSUMERS
    q_tile, q_read = as_matrix(q_tiles.index(CONSUMER)), q_empty.index(CONSUMER)
    turn, next_turn = turns.index(CONSUMER), turns.index(1 - CONSUMER)
    if CONSUMER > 0:
        mbarrier.arrive(next_turn)  # the first turn is that of consumer 0
    parity, first_step = gl.to_tensor(0), gl.to_tensor(0)
    task = wait_for_task(q_inbox, parity, CONSUMER)
    while task < num_tasks:
        batch_head, batch, head, _kv_head, first_query, kv_list = find_task(task, problem, BLOCK)
        kv_row = batch_head // heads_per_kv_head  # of the batch entries' key-value heads
        first_row = first_query + CONSUMER * ROWS
        q_block = (first_query + offset) // BLOCK - offset // BLOCK
        q_scale = gl.load(q_scales_ptr + batch_head * num_q_blocks + q_block)
        accumulator, reference, row_sums = attend(
            q_tile, q_read, k_ring, v_ring, turn, next_turn, first_step, kv_list, offset + first_row, q_scale,
            k_scales_ptr + kv_row * num_kv_blocks,
        )  # fmt: skip
        row_sums = gl.where(row_sums == 0.0, 1.0, row_sums)  # an empty list gives out 0 and lse -inf
        rows = first_row + gl.arange(0, ROWS, row_sums.type.layout)
        exists = (rows >= 0) & (rows < num_queries)
        lse_pointers = lse_ptr + batch_head.to(gl.int64) * num_queries + rows
        means = gl.load(lse_pointers, mask=exists, other=0.0)  # logits of the mean key, which K lacks
        gl.store(lse_pointers, means + reference * LN_2 + gl.log(row_sums), mask=exists)
        dims = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, accumulator.type.layout))
        v_scales = gl.load(v_scales_ptr + kv_row * HEAD_DIM + dims)
        out_tile = scale_rows(accumulator, 1 / row_sums) * v_scales[None, :]
        head_ptr = out_ptr + batch.to(gl.int64) * stride_ob + head.to(gl.int64) * stride_oh
        store_rows(head_ptr, out_tile.to(out_ptr.dtype.element_ty), first_row, num_queries, stride_on)
        parity ^= 1
        first_step += kv_list[1]
        task = wait_for_task(q_inbox, parity, CONSUMER)
    write_number(-1, last_noted.index(CONSUMER), CONSUMER_WARPS)  # nothing to compute again
    mbarrier.arrive(q_read)
    wait_for_task(q_inbox, parity ^ 1, CONSUMER)
    mbarrier.arrive(q_read)


@gluon.jit(do_not_specialize=[*VARYING, "num_kv_blocks"])
def fp8_forward_kernel(
    q_desc, k_desc, v_desc, out_ptr, lse_ptr, q_scales_ptr, k_scales_ptr, v_scales_ptr, kv_indices_ptr,
    kv_num_blocks_ptr, scratch_ptr, stride_ob, stride_oh, stride_on, num_q_heads, heads_per_kv_head, heads_at_once,
    num_queries, num_keys, num_q_blocks, max_blocks, full_rows, rows_ahead, num_tasks, num_kv_blocks,
):  # fmt: skip
    """See hopper_forward_kernel. Tiles of v_desc are [D, BLOCK_SIZE], one key block transposed.

    lse_ptr holds scale * q . mean key of each query, to which the kernel adds the log-sum-exp.
    """
    offset = num_keys - num_queries  # absolute position of query 0
    heads = (num_q_heads, heads_per_kv_head, heads_at_once)
    lists = (kv_indices_ptr, kv_num_blocks_ptr, max_blocks, full_rows, rows_ahead)
    problem = (num_q_blocks,) + heads + (offset,) + lists
    q_tiles = gl.allocate_shared_memory(q_desc.dtype, [NUM_CONSUMERS] + q_desc.block_type.shape, q_desc.layout)
    NUMBER: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    tasks = gl.allocate_shared_memory(gl.int32, [NUM_CONSUMERS, 1], NUMBER)
    redo = (gl.allocate_shared_memory(gl.int32, [NUM_CONSUMERS, 1], NUMBER), scratch_ptr + 2)
    q_inbox = (make_barriers(NUM_CONSUMERS, 1), make_barriers(NUM_CONSUMERS, 1), q_tiles, tasks)
    shared = (q_inbox, make_ring(k_desc, NUM_STAGES), make_ring(v_desc, NUM_STAGES), redo, num_tasks, problem)
    turns = make_barriers(NUM_CONSUMERS, 1)
    scales = (q_scales_ptr, k_scales_ptr, v_scales_ptr, num_kv_blocks)
    outputs = (scales, out_ptr, lse_ptr, stride_ob, stride_oh, stride_on, num_queries)
    gl.warp_specialize(
        [
            (consume, (0, turns) + shared + outputs),
            (consume, (1, turns) + shared + outputs),
            (produce, (False, kv_indices_ptr, 0, (k_desc, v_desc), q_desc, k_desc, v_desc, scratch_ptr) + shared),
        ],
        [CONSUMER_WARPS, PRODUCER_WARPS],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


def describe_tiles(x: torch.Tensor, shape: tuple[int, ...]) -> TensorDescriptor:
    """Gluon's descriptor of a contiguous FP8 tensor of four dimensions in tiles of a shape."""
    return TensorDescriptor.from_tensor(x, list(shape), LAYOUTS[shape[-1]])


def sparse_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_num_blocks: torch.Tensor,
    block_size: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the lists in FP8, for problems that hopper_forward.supports; see sparse_forward.sparse_forward."""
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    (q8, *q_scales), (k8, *k_scales), (v8, *v_scales) = quantize(q, k, v, BLOCK_SIZE, scale, lse)
    out = torch.empty_like(with_dense_rows(q))
    scales, lists = (*q_scales, *k_scales, *v_scales), (kv_indices, kv_num_blocks)
    attend_quantized(q8, k8, v8, scales, lists, k.shape[2], out, lse)
    return out, lse


def attend_quantized(
    q8: torch.Tensor,
    k8: torch.Tensor,
    v8: torch.Tensor,
    scales: tuple[torch.Tensor, ...],
    lists: tuple[torch.Tensor, torch.Tensor],
    num_keys: int,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Store attention over lists of blocks in `out` and `lse`, which holds the logits of the mean key before.

    Tensors and scales are those of fp8_quantize.quantize; k8 and v8 may have room behind the first num_keys tokens.
    """
    head_dim = q8.shape[3]
    tasks = Tasks.of(q8.device, q8.shape, k8.shape[1], num_keys, out.stride(), k8.element_size(), BLOCK_SIZE)
    scratch = launch_scratch(q8.device, tasks.number)
    q_tiles = Tiles(q8, (1, 1, BLOCK_SIZE // NUM_CONSUMERS.value, head_dim), describe_tiles)
    k_tiles = Tiles(k8, (1, 1, BLOCK_SIZE, head_dim), describe_tiles)
    v_tiles = Tiles(v8, (1, 1, head_dim, BLOCK_SIZE), describe_tiles)
    tensors = q_tiles, k_tiles, v_tiles, out, lse, *scales, *(x.contiguous() for x in lists), scratch
    _, k_scales, _ = scales
    tasks.launch(fp8_forward_kernel, tensors, lists[0].shape[3], (k_scales.shape[2],), **LAUNCH_OPTIONS)

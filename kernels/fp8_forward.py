"""Block-sparse causal attention in FP8 (e4m3), forward, for sm_90 in Gluon: the roles of hopper_forward.py.

Q, K and V come from fp8_quantize.py with their scales. The kernel differs from the bf16 one in four places:

    logits: QK^T times the scales of its two tiles
    weights: e4m3 ends at 448, so the reference of a row follows its running maximum (online softmax), and weights lie
        between 0 and 2^HEADROOM
    PV: V lies transposed in shared memory, since FP8 products take both operands along the contracted dimension. Its
        tokens are in the order in which a thread holds the weights of a row, so weights never leave their registers
    accumulation: the tensor cores add FP8 products with about 14 bits, so each tile's PV starts from 0 and is added to
        the accumulator in fp32

The exponentials of a tile take as long as its products, so both products run beside the softmax: QK^T of the next tile
starts before the exponentials of this one, and PV of this one before the maxima of the next. Registers have room for
the accumulator and two tiles, but logits of two tiles and PV of one would be three. So a product goes into registers
whose content has been read: PV into those of its own logits, and the next QK^T into those of PV. After two tiles each
tensor is back in its first registers, so one iteration of the loop attends to two tiles and copies none.
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
def partial_sums(weights):
    """Sums of the weights of each row that a thread holds: [M, SUMS]."""
    return gl.sum(weights.reshape([weights.shape[0], weights.shape[1] // SUMS, SUMS]), axis=1)


@gluon.jit
def raise_reference(logits, reference, factor):
    """References of the rows [M] after a tile, and factors that rescale earlier sums and outputs to them [M]."""
    partial = gl.max(logits.reshape([logits.shape[0], logits.shape[1] // SUMS, SUMS]), axis=1)
    largest = gl.convert_layout(gl.max(partial, axis=1), reference.type.layout) * factor
    raised = gl.maximum(reference, largest - HEADROOM)
    return raised, gl.exp2(reference - raised)


@gluon.jit
def fp8_weights(logits, reference, factor, WEIGHTS: gl.constexpr):
    """Weights 2^(logit - reference) of a tile, as the first operand of PV, and their partial row sums [M, SUMS]."""
    ROWS: gl.constexpr = logits.shape[0]
    COLUMNS: gl.constexpr = logits.shape[1]
    weights = gl.exp2(logits * factor - reference[:, None])  # [M, BLOCK_SIZE]
    # A thread holds columns 2t, 2t+1, 8+2t and 8+2t+1 of 16; the product takes them as 4t .. 4t+3.
    grouped = weights.reshape([ROWS, COLUMNS // 16, 2, 4, 2]).permute([0, 1, 3, 2, 4]).reshape([ROWS, COLUMNS])
    return pack_fp8(gl.convert_layout(grouped, WEIGHTS)), partial_sums(weights)


@gluon.jit
def start_product(x, tile, room):
    """Start x times a transposed tile, into the registers of `room`, a tensor that has been read."""
    return hopper.warpgroup_mma(x, tile.permute([1, 0]), room, use_acc=False, is_async=True)


@gluon.jit
def attend_tile(q_tile, k_ring, v_ring, step, state, factor, next_factor, WEIGHTS: gl.constexpr):
    """Attend to the tile of a step, and compute logits and references of the next tile.

    The state: logits of the tile [M, BLOCK_SIZE]; logits and PV of the tile before, of which only the registers are
    used; accumulator [M, D]; references [M]; factors that rescale earlier outputs and sums to them [M]; partial sums.
    """
    logits, used, part, accumulator, reference, rescale, sums = state
    FITS: gl.constexpr = logits.type == part.type  # at D = 128
    next_logits = start_product(q_tile, wait_for_tile(k_ring, step + 1), part if FITS else used)
    weights, tile_sums = fp8_weights(logits, reference, factor, WEIGHTS)
    sums = scale_rows(sums, rescale) + tile_sums
    part = start_product(weights, wait_for_tile(v_ring, step), logits if FITS else part)
    next_logits = hopper.warpgroup_mma_wait(1, [next_logits])  # the older of the two products in flight
    release_tile(k_ring, step + 1)
    reference, next_rescale = raise_reference(next_logits, reference, next_factor)
    wait_for_tile(v_ring, step)  # landed before; keeps the assembler from moving the wait for PV ahead of the maxima
    part = hopper.warpgroup_mma_wait(0, [part])
    release_tile(v_ring, step)
    accumulator = scale_rows(accumulator, rescale) + part
    return next_logits, logits, part, accumulator, reference, next_rescale, sums


@gluon.jit
def load_factor(q_scale, k_scales_ptr, kv_list, place):
    """The factor that turns QK^T of the block at a place of a list into logits, in powers of two."""
    return q_scale * gl.load(k_scales_ptr + load_block(kv_list, place))


@gluon.jit
def attend(q_tile, q_read, k_ring, v_ring, first_step, kv_list, first_position, q_scale, k_scales_ptr):
    """Attend from the queries of one task to its blocks: accumulator [M, D], reference [M] and sum [M] of its weights.

    Arrives at `q_read` after the last use of the queries.
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
    sums = partial_sums(no_weights)
    reference = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, LOGITS))
    if num_blocks > 0:
        last_step = first_step + num_blocks - 1
        factor = load_factor(q_scale, k_scales_ptr, kv_list, num_blocks - 1)
        next_factor = load_factor(q_scale, k_scales_ptr, kv_list, num_blocks - 2)
        logits = start_logits(q_tile, wait_for_tile(k_ring, first_step), LOGITS)
        logits = hopper.warpgroup_mma_wait(0, [logits])
        release_tile(k_ring, first_step)
        logits = mask_future(logits, first_position, load_block(kv_list, num_blocks - 1) * BLOCK)
        reference, rescale = raise_reference(logits, reference, factor)
        no_output = gl.full([ROWS, HEAD_DIM], 0.0, gl.float32, OUT)
        state = (logits, no_weights, no_output, accumulator, reference, rescale, sums)
        for step in range(first_step, last_step - 1, 2):
            third_factor = load_factor(q_scale, k_scales_ptr, kv_list, last_step - step - 2)
            state = attend_tile(q_tile, k_ring, v_ring, step, state, factor, next_factor, WEIGHTS)
            fourth_factor = load_factor(q_scale, k_scales_ptr, kv_list, last_step - step - 3)
            state = attend_tile(q_tile, k_ring, v_ring, step + 1, state, next_factor, third_factor, WEIGHTS)
            factor, next_factor = third_factor, fourth_factor
        if num_blocks % 2 == 0:
            state = attend_tile(q_tile, k_ring, v_ring, last_step - 1, state, factor, next_factor, WEIGHTS)
            factor = next_factor
        mbarrier.arrive(q_read)  # the queries of the next task may be copied from here on
        logits, _, part, accumulator, reference, rescale, sums = state
        weights, tile_sums = fp8_weights(logits, reference, factor, WEIGHTS)
        sums = scale_rows(sums, rescale) + tile_sums
        part = start_product(weights, wait_for_tile(v_ring, last_step), part)
        part = hopper.warpgroup_mma_wait(0, [part])
        release_tile(v_ring, last_step)
        accumulator = scale_rows(accumulator, rescale) + part
    else:
        mbarrier.arrive(q_read)
    return accumulator, reference, gl.convert_layout(gl.sum(sums, axis=1), reference.type.layout)


@gluon.jit
def consume(
    CONSUMER: gl.constexpr, q_inbox, k_ring, v_ring, redo, num_tasks, problem, scales,
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
    parity, first_step = gl.to_tensor(0), gl.to_tensor(0)
    task = wait_for_task(q_inbox, parity, CONSUMER)
    while task < num_tasks:
        batch_head, batch, head, _kv_head, first_query, kv_list = find_task(task, problem, BLOCK)
        kv_row = batch_head // heads_per_kv_head  # of the batch entries' key-value heads
        first_row = first_query + CONSUMER * ROWS
        q_block = (first_query + offset) // BLOCK - offset // BLOCK
        q_scale = gl.load(q_scales_ptr + batch_head * num_q_blocks + q_block)
        accumulator, reference, row_sums = attend(
            q_tile, q_read, k_ring, v_ring, first_step, kv_list, offset + first_row, q_scale,
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
    scales = (q_scales_ptr, k_scales_ptr, v_scales_ptr, num_kv_blocks)
    outputs = (scales, out_ptr, lse_ptr, stride_ob, stride_oh, stride_on, num_queries)
    gl.warp_specialize(
        [
            (consume, (0,) + shared + outputs),
            (consume, (1,) + shared + outputs),
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

"""Block-sparse causal attention to blocks of 64 for sm_90 in Gluon, where heads of a group share their lists.

The roles are those of hopper_forward.py. A task there is 128 queries of one head. A task here is 64 queries of two
heads with the same list: each consumer takes one head, and both read the same tiles of keys, so a tile is read as often
as there. It holds two listed blocks. If their number is odd, the first tile holds the last block twice,
and its first half is masked. The softmax is the online one.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .common import LN_2, LOG2_E, SMALLEST_SCALE, with_dense_rows
from .hopper_forward import (
    CONSUMER_REGISTERS,
    CONSUMER_WARPS,
    LAUNCH_OPTIONS,
    NUM_CONSUMERS,
    NUM_STAGES,
    PRODUCER_REGISTERS,
    PRODUCER_WARPS,
    VARYING,
    announce_end,
    announce_task,
    as_matrix,
    attend,
    copy_tile,
    describe_tiles,
    find_task,
    load_block,
    make_barriers,
    ring_slot,
    scale_rows,
    store_rows,
    wait_for_task,
)
from .launch import Tiles
from .stand_ins import add_stand_ins
from .tasks import Tasks, launch_scratch

BLOCK_SIZE = 64
HALF = gl.constexpr(BLOCK_SIZE)  # of a tile of keys


@gluon.jit
def make_ring(desc):
    """A ring of tiles of two blocks; see hopper_forward.make_ring."""
    shape: gl.constexpr = [NUM_STAGES, 1, 1, 2 * HALF, desc.block_type.shape[3]]
    tiles = gl.allocate_shared_memory(desc.dtype, shape, desc.layout)
    return tiles, make_barriers(NUM_STAGES, 1), make_barriers(NUM_STAGES, NUM_CONSUMERS)


@gluon.jit
def fill_halves(desc, ring, step, batch, head, blocks):
    """Producer: wait until the slot of this step is empty, and start filling it with two blocks."""
    tiles, full, empty = ring
    slot, parity = ring_slot(tiles, step)
    mbarrier.wait(empty.index(slot), parity ^ 1)
    landed, tile = full.index(slot), tiles.index(slot)
    mbarrier.expect(landed, 2 * desc.block_type.nbytes)
    for half in gl.static_range(2):
        row = blocks[half] * HALF
        tma.async_copy_global_to_shared(desc, [batch, head, row, 0], landed, tile.slice(half * HALF, HALF, dim=2))


@gluon.jit
def load_blocks(kv_list, tile):
    """The two blocks of a tile of a list; tile 0 holds the last ones, or the last one twice."""
    num_blocks = kv_list[1]
    odd = num_blocks % 2
    second = num_blocks - 1 - 2 * tile + gl.where(tile > 0, odd, 0)
    first = second - gl.where(tile > 0, 1, 1 - odd)
    return load_block(kv_list, first), load_block(kv_list, second)


@gluon.jit
def produce(q_desc, k_desc, v_desc, counters_ptr, q_inbox, k_ring, v_ring, num_tasks, problem):
    """Feed task after task to the consumers: the queries of a head for each, then tiles of keys and values."""
    q_full, _, q_tiles, _ = q_inbox
    parity = 0
    steps_before = 0  # of all tasks so far
    task = gl.program_id(0)
    while task < num_tasks:
        _batch_pair, batch, pair, kv_head, first_query, kv_list = find_task(task, problem, HALF)
        blocks = load_blocks(kv_list, 0)
        for consumer in gl.static_range(NUM_CONSUMERS):
            announce_task(q_inbox, parity, task, consumer)
            head = pair * NUM_CONSUMERS + consumer
            copy_tile(q_desc, batch, head, first_query, q_full.index(consumer), q_tiles.index(consumer))
        num_tiles = (kv_list[1] + 1) // 2
        for tile in range(num_tiles):
            now = blocks
            blocks = load_blocks(kv_list, tile + 1)  # arrive while the rings are full
            fill_halves(k_desc, k_ring, steps_before + tile, batch, kv_head, now)
            fill_halves(v_desc, v_ring, steps_before + tile, batch, kv_head, now)
        steps_before += num_tiles
        parity ^= 1
        task = gl.num_programs(0) + gl.atomic_add(counters_ptr, 1)
    announce_end(q_inbox, parity, num_tasks)
    if gl.atomic_add(counters_ptr + 1, 1) == gl.num_programs(0) - 1:  # the last program
        gl.store(counters_ptr, 0)
        gl.store(counters_ptr + 1, 0)


@gluon.jit
def consume(
    CONSUMER: gl.constexpr, q_inbox, k_ring, v_ring, num_tasks, problem,
    out_ptr, lse_ptr, stride_ob, stride_oh, stride_on, num_queries, scale_log2,
):  # fmt: skip
    """Task by task until the end is announced: attend from 64 queries of a head, store output and log-sum-exp."""
    _q_full, q_empty, q_tiles, _tasks = q_inbox
    offset = problem[4]
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [CONSUMER_WARPS, 1], [16, 2 * HALF, 16])
    columns = gl.arange(0, 2 * HALF, gl.SliceLayout(0, LOGITS))
    q_tile, q_read = as_matrix(q_tiles.index(CONSUMER)), q_empty.index(CONSUMER)
    parity, first_step = gl.to_tensor(0), gl.to_tensor(0)
    task = wait_for_task(q_inbox, parity, CONSUMER)
    while task < num_tasks:
        batch_pair, batch, pair, _kv_head, first_query, kv_list = find_task(task, problem, HALF)
        num_blocks = kv_list[1]
        num_tiles = (num_blocks + 1) // 2
        first, second = load_blocks(kv_list, 0)
        first = gl.where(num_blocks % 2 > 0, 1 << 23, first)  # in the future
        first_keys = gl.where(columns < HALF, first * HALF, (second - 1) * HALF)  # less the columns
        accumulator, reference, row_sums = attend(
            q_tile, q_read, k_ring, v_ring, q_tiles, first_step, num_tiles, num_tiles, offset + first_query,
            first_keys, scale_log2, True, 0,
        )  # fmt: skip
        row_sums = gl.where(row_sums == 0.0, 1.0, row_sums)  # an empty list gives out 0 and lse -inf
        rows = first_query + gl.arange(0, HALF, row_sums.type.layout)
        batch_head = batch_pair * NUM_CONSUMERS + CONSUMER
        lse_pointers = lse_ptr + batch_head.to(gl.int64) * num_queries + rows
        gl.store(lse_pointers, reference * LN_2 + gl.log(row_sums), mask=(rows >= 0) & (rows < num_queries))
        head_ptr = out_ptr + batch.to(gl.int64) * stride_ob
        head_ptr += (pair * NUM_CONSUMERS + CONSUMER).to(gl.int64) * stride_oh
        out_tile = scale_rows(accumulator, 1 / row_sums)
        store_rows(head_ptr, out_tile.to(q_tile.dtype), first_query, num_queries, stride_on)
        parity ^= 1
        first_step += num_tiles
        task = wait_for_task(q_inbox, parity, CONSUMER)
    mbarrier.arrive(q_read)


@gluon.jit(do_not_specialize=VARYING)
def pairs_forward_kernel(
    q_desc, k_desc, v_desc, out_ptr, lse_ptr, kv_indices_ptr, kv_num_blocks_ptr, scratch_ptr,
    stride_ob, stride_oh, stride_on, num_q_heads, heads_per_kv_head, heads_at_once, num_queries, num_keys,
    num_q_blocks, max_blocks, full_rows, rows_ahead, num_tasks, scale,
):  # fmt: skip
    """See hopper_forward_kernel; heads are pairs of query heads here. All tiles in memory are one block of 64 rows."""
    heads = (num_q_heads, heads_per_kv_head, heads_at_once)
    lists = (kv_indices_ptr, kv_num_blocks_ptr, max_blocks, full_rows, rows_ahead)
    problem = (num_q_blocks,) + heads + (num_keys - num_queries,) + lists
    q_tiles = gl.allocate_shared_memory(q_desc.dtype, [NUM_CONSUMERS] + q_desc.block_type.shape, q_desc.layout)
    tasks = gl.allocate_shared_memory(gl.int32, [NUM_CONSUMERS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_inbox = (make_barriers(NUM_CONSUMERS, 1), make_barriers(NUM_CONSUMERS, 1), q_tiles, tasks)
    shared = (q_inbox, make_ring(k_desc), make_ring(v_desc), num_tasks, problem)
    outputs = (out_ptr, lse_ptr, stride_ob, stride_oh, stride_on, num_queries, scale * LOG2_E)
    gl.warp_specialize(
        [
            (consume, (0,) + shared + outputs),
            (consume, (1,) + shared + outputs),
            (produce, (q_desc, k_desc, v_desc, scratch_ptr) + shared),
        ],
        [CONSUMER_WARPS, PRODUCER_WARPS],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


def sparse_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_num_blocks: torch.Tensor,
    block_size: int,
    scale: float,
    tokens: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over lists that both heads of each pair 2i, 2i + 1 share; see sparse_forward.sparse_forward.

    Heads of a pair have one key-value head, and block_size is 64. `tokens`: see hopper_forward.prepare.
    """
    if scale < 0:  # the kernel takes row maxima before it scales
        q, scale = -q, -scale
    q, k, v = (with_dense_rows(x, tma=True) for x in (q, k, v))
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    tiles = (Tiles(x, (1, 1, block_size, q.shape[3]), describe_tiles) for x in (q, k, v))
    lists = kv_indices[:, ::2].contiguous(), kv_num_blocks[:, ::2].contiguous()
    problem = q.device, q.shape, *k.shape[1:3], out.stride(), q.element_size(), block_size
    tasks = Tasks.of(*problem, heads=NUM_CONSUMERS.value)
    tensors = *tiles, out, lse, *lists, launch_scratch(q.device, tasks.number)
    numbers = (max(float(scale), SMALLEST_SCALE),)
    tasks.launch(pairs_forward_kernel, tensors, kv_indices.shape[3], numbers, **LAUNCH_OPTIONS)
    if tokens:
        return add_stand_ins(out, lse, q, k, v, kv_indices, kv_num_blocks, block_size, tokens, scale)
    return out, lse

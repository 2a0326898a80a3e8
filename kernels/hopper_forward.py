"""Block-sparse causal attention, forward, for sm_90 in Gluon: results of sparse_forward.py, about 1.4 times as fast.

A task is one query block of one head. One persistent program runs on each multiprocessor and takes tasks from a common
counter. Its warps have three roles, one partition each:

    producer, 1 warp: takes the task; copies Q, and K and V of the listed blocks, last block first, into rings (TMA)
    consumer 0 and 1, 4 warps each: half of the query block's rows; QK^T, softmax and PV (warpgroup MMA)

The producer runs ahead, into the next task too, until the rings are full. `full` barriers tell the consumers that a
tile has landed, `empty` barriers tell the producer that it has been read. A consumer issues QK^T of a block and PV of
the block before it back to back, both asynchronous; while it computes exponentials, the tensor cores work for the other
consumer. Weights stay in registers up to PV, two in one: a loop that carries them unpacked moves all of them.

The wait for a tile of V stands between the exponentials and the wait for PV: between the two products it would
separate them, and without it the assembler moves the wait for PV ahead of the exponentials. At D = 64, where these take
as long as the products, both made the kernel 1.15 times as slow. The online softmax at D = 128 is an exception, see
waits_early.

Stand-ins of dropped blocks (stand_ins.py) follow the listed blocks in tiles of 128. Stand-ins of kept blocks need a
mask. Their weights are 0 if their logits are -inf, so a product adds the mask: the tile's accumulator starts as a
[M, 16] matrix with ones in its first column times a matrix whose first row is the mask, 0 or -inf, and QK^T is added.
The tensor cores read the mask from shared memory, and no thread loads or selects anything. A stand-in of T tokens
counts T times: the reference is lower by log2 T where its weights are computed.

Weights are powers of two relative to a reference of their row. The online softmax takes the running maximum, which
costs a maximum and a rescaled accumulator per tile. Any other reference gives the same quotient as long as nothing
overflows, and fp32 and bf16 reach 2^127. So here the reference is the maximum of the row's first tile. If a row's sum
says that this was too low, the task is noted, and recomputed with the online softmax after all other tasks. fp16
overflows at 2^16 and always takes the online softmax.

The file exceeds 400 lines because it holds one kernel: its partitions share barriers, rings and layouts, and notebook
08 derives it by taking lines out of this text.
"""

import math
from collections.abc import Callable

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_wait

from .common import BUFFER_BYTES, LARGEST_SUM, LN_2, LOG2_E, SMALLEST_SCALE, SUMS, with_dense_rows
from .launch import Tiles
from .stand_ins import LOWEST, block_means, masks_of_kept_blocks
from .tasks import Tasks, is_sm90, launch_scratch

BLOCK_SIZE = 128
HEAD_DIMS = (64, 128)
DTYPES = (torch.float16, torch.bfloat16)

NUM_CONSUMERS = gl.constexpr(2)
CONSUMER_WARPS = gl.constexpr(4)  # a warpgroup, which is what issues an sm_90 MMA
PRODUCER_WARPS = gl.constexpr(1)
NUM_STAGES = gl.constexpr(2)  # tiles in each ring; three are not faster
# Registers of a thread: the 65,536 of a multiprocessor are dealt to 12 warps at launch (the third warpgroup is the
# producer's, mostly idle), and then the producer hands nearly all of its own to the consumers.
LAUNCH_REGISTERS = 168
CONSUMER_REGISTERS = gl.constexpr(240)
PRODUCER_REGISTERS = gl.constexpr(24)

LAUNCH_OPTIONS = dict(num_warps=CONSUMER_WARPS.value, maxnreg=LAUNCH_REGISTERS)
TMA_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
DEPTH = gl.constexpr(16)  # of the smallest product


@gluon.jit
def make_barriers(NUM: gl.constexpr, COUNT: gl.constexpr):
    """NUM barriers in shared memory; a phase of each ends after COUNT arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [NUM, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUM):
        mbarrier.init(barriers.index(i), count=COUNT)
    return barriers


@gluon.jit
def make_ring(desc, STAGES: gl.constexpr):
    """A ring of tiles: the tiles, the barriers that say when one is full, and those for when it is empty."""
    tiles = gl.allocate_shared_memory(desc.dtype, [STAGES] + desc.block_type.shape, desc.layout)
    return tiles, make_barriers(STAGES, 1), make_barriers(STAGES, NUM_CONSUMERS)


@gluon.jit
def ring_slot(tiles, step):
    """Slot of the ring that holds the tile of a step, and the parity of the slot's barriers in that round."""
    STAGES: gl.constexpr = tiles.shape[0]
    return step % STAGES, (step // STAGES) & 1


@gluon.jit
def as_matrix(tile):
    """[1, 1, rows, D] -> [rows, D]."""
    return tile.reshape([tile.shape[2], tile.shape[3]])


@gluon.jit
def copy_tile(desc, batch, head, first_row, full, tile):
    """Start copying rows first_row .. of a head; missing rows become zeros. The copy arrives at `full` when it ends."""
    mbarrier.expect(full, desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [batch, head, first_row, 0], full, tile)


@gluon.jit
def fill_slot(desc, ring, step, batch, head, first_row):
    """Producer: wait until the slot of this step is empty, and start filling it."""
    tiles, full, empty = ring
    slot, parity = ring_slot(tiles, step)
    mbarrier.wait(empty.index(slot), parity ^ 1)  # of the round before; passes in the first round
    copy_tile(desc, batch, head, first_row, full.index(slot), tiles.index(slot))


@gluon.jit
def wait_for_tile(ring, step, WAIT: gl.constexpr = True):
    """Consumer: the tile of this step [BLOCK_SIZE, D], once it has landed; without WAIT it is known to have landed."""
    tiles, full, _ = ring
    slot, parity = ring_slot(tiles, step)
    if WAIT:
        mbarrier.wait(full.index(slot), parity)
    return as_matrix(tiles.index(slot))


@gluon.jit
def release_tile(ring, step):
    """Consumer: tell the producer that this half of the rows has read the tile of this step."""
    tiles, _, empty = ring
    slot, _ = ring_slot(tiles, step)
    mbarrier.arrive(empty.index(slot))


@gluon.jit
def start_logits(q_tile, k_tile, LAYOUT: gl.constexpr):
    """Start QK^T of a tile."""
    zeros = gl.full([q_tile.shape[0], k_tile.shape[0]], 0.0, gl.float32, LAYOUT)
    return hopper.warpgroup_mma(q_tile, k_tile.permute([1, 0]), zeros, use_acc=False, is_async=True)


@gluon.constexpr_function
def waits_early(online, head_dim):
    """True if the wait for V stands between the two products. Elsewhere it made blocks of 64 1.1 times as slow."""
    return online and head_dim == 128


@gluon.jit
def start_values(weights, v_ring, step, accumulator, WAIT: gl.constexpr):
    """Start PV of the tile of a step, from packed weights."""
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, accumulator.type.layout, k_width=2)
    v_tile = wait_for_tile(v_ring, step, WAIT)
    weights = unpack(weights, WEIGHTS, v_tile.dtype)
    return hopper.warpgroup_mma(weights, v_tile, accumulator, is_async=True)


@gluon.constexpr_function
def log2_tokens(per_block):
    """Logarithm of the tokens of a stand-in, of which a block has so many."""
    return math.log2(BLOCK_SIZE / per_block)


@gluon.jit
def start_masked_logits(q_tile, k_tile, mask_tile, LAYOUT: gl.constexpr):
    """Start QK^T of a tile plus a row, which is the first one of mask_tile [DEPTH, BLOCK_SIZE]; the others are 0.

    A product adds the row: the tensor cores take it from shared memory, and no thread reads or selects anything.
    """
    ROWS: gl.constexpr = q_tile.shape[0]
    FIRST: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, k_width=2)
    is_first = gl.arange(0, DEPTH, gl.SliceLayout(0, FIRST)) == 0
    first = gl.full([ROWS, DEPTH], 0.0, q_tile.dtype, FIRST) + is_first.to(q_tile.dtype)[None, :]
    zeros = gl.full([ROWS, k_tile.shape[0]], 0.0, gl.float32, LAYOUT)
    mask = hopper.warpgroup_mma(first, mask_tile, zeros, use_acc=False, is_async=True)
    return hopper.warpgroup_mma(q_tile, k_tile.permute([1, 0]), mask, is_async=True)


@gluon.jit
def mask_future(logits, first_position, first_key):
    """-inf where the key comes after the query; the tile's rows and columns start at the given positions."""
    LAYOUT: gl.constexpr = logits.type.layout
    positions = first_position + gl.arange(0, logits.shape[0], gl.SliceLayout(1, LAYOUT))
    keys = first_key + gl.arange(0, logits.shape[1], gl.SliceLayout(0, LAYOUT))
    return gl.where(keys[None, :] <= positions[:, None], logits, float("-inf"))


@gluon.jit
def row_maxima(logits, scale_log2):
    """The largest logit of each row, in powers of two: [M]."""
    return gl.max(logits, axis=1) * scale_log2


@gluon.jit
def pack(weights):
    """Pairs of neighbours in one register: [M, N] of 16 bits -> int32 [M, N / 2]."""
    low, high = gl.split(weights.reshape([weights.shape[0], weights.shape[1] // 2, 2]))
    return gl.inline_asm_elementwise(
        "mov.b32 $0, {$1, $2};", "=r,h,h", [low, high], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def unpack(packed, WEIGHTS: gl.constexpr, DTYPE: gl.constexpr):
    """The inverse of `pack`, as the first operand of PV."""
    low, high = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [packed], dtype=(gl.int16, gl.int16), is_pure=True, pack=1
    )
    pairs = gl.join(low, high)
    weights = pairs.reshape([packed.shape[0], 2 * packed.shape[1]])
    return gl.convert_layout(weights.to(DTYPE, bitcast=True), WEIGHTS)


@gluon.jit
def exponentials(logits, reference, scale_log2, DTYPE: gl.constexpr):
    """Weights 2^(logit - reference) of a tile, packed, and their partial row sums [M, SUMS]."""
    weights = gl.exp2(logits * scale_log2 - reference[:, None])  # [M, BLOCK_SIZE]
    sums = gl.sum(weights.reshape([weights.shape[0], weights.shape[1] // SUMS, SUMS]), axis=1)
    return pack(weights.to(DTYPE)), sums


@gluon.jit
def scale_rows(x, factors):
    """x [M, N] times factors [M]."""
    return x * gl.convert_layout(factors, gl.SliceLayout(1, x.type.layout))[:, None]


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
def row_in_turn(turn, num_q_blocks, full_rows, rows_ahead):
    """Query block of a head at a turn: the last one first, but `rows_ahead` of the full ones before it."""
    others = num_q_blocks - full_rows
    row = num_q_blocks - 1 - turn
    row = gl.where(turn < rows_ahead + others, row + rows_ahead, row)
    return gl.where(turn < rows_ahead, full_rows - 1 - turn, row)


@gluon.jit
def find_task(task, problem, BLOCK: gl.constexpr):
    """Query block and head of a task: (batch_head, batch, head, kv_head, first_query, kv_list).

    `heads_at_once` heads take turns, each with its last query block, then the one before. Keys and values that are read
    at the same time stay in the L2 cache, and the last tasks of the run are short. kv_list: (its pointer, its number of
    blocks, whether it is read; a list that is not read holds 0, 1, ...). Waits for the kernel that writes it.
    """
    num_q_blocks, num_q_heads, heads_per_kv_head, heads_at_once = problem[:4]
    offset, kv_indices_ptr, kv_num_blocks_ptr, max_blocks, full_rows, rows_ahead = problem[4:]
    member, group_row = task % heads_at_once, task // heads_at_once
    batch_head = group_row // num_q_blocks * heads_at_once + member
    rows_ahead = gl.where(group_row < num_q_blocks, rows_ahead, 0)
    row = row_in_turn(group_row % num_q_blocks, num_q_blocks, full_rows, rows_ahead)
    batch, head = batch_head // num_q_heads, batch_head % num_q_heads
    kv_head = head // heads_per_kv_head
    first_query = (offset // BLOCK + row) * BLOCK - offset  # negative if the first query block is partial
    list_row = batch_head.to(gl.int64) * num_q_blocks + row
    is_read = row >= full_rows
    if is_read:
        gdc_wait()
    num_blocks = gl.load(kv_num_blocks_ptr + list_row, mask=is_read, other=offset // BLOCK + row + 1)
    kv_list = (kv_indices_ptr + list_row * max_blocks, num_blocks, is_read)
    return batch_head, batch, head, kv_head, first_query, kv_list


@gluon.jit
def load_block(kv_list, place):
    """The key block at a place of a list, at its first place where there is none, and 0 for an empty list."""
    list_ptr, num_blocks, is_read = kv_list
    place = gl.maximum(place, 0)
    return gl.load(list_ptr + place, mask=is_read & (num_blocks > 0), other=place)


@gluon.jit
def write_number(number, place, WARPS: gl.constexpr):
    """Store an int32 in shared memory."""
    place.store(gl.full([1], number, gl.int32, gl.BlockedLayout([1], [32], [WARPS], [0])))


@gluon.jit
def read_number(place, WARPS: gl.constexpr):
    """Load an int32 from shared memory."""
    return gl.max(place.load(gl.BlockedLayout([1], [32], [WARPS], [0])), axis=0)


@gluon.jit
def announce_task(q_inbox, parity, task, CONSUMER: gl.constexpr):
    """Producer: once the consumer has read its queries, write down the task of the next ones."""
    _, q_empty, _, tasks = q_inbox
    mbarrier.wait(q_empty.index(CONSUMER), parity ^ 1)
    write_number(task, tasks.index(CONSUMER), PRODUCER_WARPS)


@gluon.jit
def wait_for_task(q_inbox, parity, CONSUMER: gl.constexpr):
    """Consumer: the next task, once its queries have landed."""
    q_full, _, _, tasks = q_inbox
    mbarrier.wait(q_full.index(CONSUMER), parity)
    return read_number(tasks.index(CONSUMER), CONSUMER_WARPS)


@gluon.jit
def feed(
    PAGED: gl.constexpr, pages_ptr, PER_BLOCK: gl.constexpr, means, q_desc, k_desc, v_desc,
    q_inbox, k_ring, v_ring, task, parity, steps_before, problem,
):  # fmt: skip
    """Copy the halves of a query block, then K and V of its listed blocks, last one first, then those of stand-ins.

    Returns the number of tiles of K.
    """
    q_full, _, q_tiles, _ = q_inbox
    ROWS: gl.constexpr = q_desc.block_type.shape[2]
    BLOCK: gl.constexpr = k_desc.block_type.shape[2]
    batch_head, batch, head, kv_head, first_query, kv_list = find_task(task, problem, BLOCK)
    num_blocks = num_block_tiles(kv_list, PER_BLOCK)
    kv_block = load_block(kv_list, num_blocks - 1)
    next_block = kv_block
    if PAGED:
        next_block = load_block(kv_list, num_blocks - 2)
        kv_block = gl.load(pages_ptr + kv_block)
    for consumer in gl.static_range(NUM_CONSUMERS):
        announce_task(q_inbox, parity, task, consumer)
        first_row = first_query + consumer * ROWS
        copy_tile(q_desc, batch, head, first_row, q_full.index(consumer), q_tiles.index(consumer))
    for step in range(num_blocks):
        k_row, v_row = kv_block * BLOCK, kv_block * v_desc.block_type.shape[2]
        if PAGED:  # both loads arrive while the rings are full
            kv_block = gl.load(pages_ptr + next_block)
            next_block = load_block(kv_list, num_blocks - 3 - step)
        else:
            kv_block = load_block(kv_list, num_blocks - 2 - step)
        fill_slot(k_desc, k_ring, steps_before + step, batch, kv_head, k_row)
        fill_slot(v_desc, v_ring, steps_before + step, batch, kv_head, v_row)
    num_tiles = num_blocks
    if PER_BLOCK > 0:
        k_means_desc, v_means_desc, masks_desc, masks = means
        num_tiles += num_stand_in_tiles(first_query, kv_list, problem, PER_BLOCK, BLOCK)
        list_row = batch_head * problem[0] + (first_query + problem[4]) // BLOCK - problem[4] // BLOCK
        for tile in range(num_blocks, num_tiles):
            step, first_mean = steps_before + tile, (tile - num_blocks) * BLOCK
            k_tiles, k_full, k_empty = k_ring
            slot, parity_of_slot = ring_slot(k_tiles, step)
            mbarrier.wait(k_empty.index(slot), parity_of_slot ^ 1)
            landed = k_full.index(slot)
            mbarrier.expect(landed, k_means_desc.block_type.nbytes + masks_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(masks_desc, [0, list_row, 0, first_mean], landed, masks.index(slot))
            tma.async_copy_global_to_shared(k_means_desc, [batch, kv_head, first_mean, 0], landed, k_tiles.index(slot))
            fill_slot(v_means_desc, v_ring, step, batch, kv_head, first_mean)
    return num_tiles


@gluon.jit
def num_block_tiles(kv_list, PER_BLOCK: gl.constexpr):
    """Tiles of blocks of a list. With stand-ins at least one, which is masked if the list is empty."""
    return gl.maximum(kv_list[1], 1) if PER_BLOCK > 0 else kv_list[1]


@gluon.jit
def num_stand_in_tiles(first_query, kv_list, problem, PER_BLOCK: gl.constexpr, BLOCK: gl.constexpr):
    """Tiles of the stand-ins of all blocks before a query block; 0 if the query block keeps all of them."""
    num_before = (first_query + problem[4]) // BLOCK
    return gl.where(kv_list[1] <= num_before, (num_before * PER_BLOCK + BLOCK - 1) // BLOCK, 0)


@gluon.jit
def announce_end(q_inbox, parity, num_tasks):
    """Tell the consumers that there are no more tasks."""
    q_full, _, _, _ = q_inbox
    for consumer in gl.static_range(NUM_CONSUMERS):
        announce_task(q_inbox, parity, num_tasks, consumer)
        mbarrier.arrive(q_full.index(consumer))


@gluon.jit
def produce(
    PAGED: gl.constexpr, pages_ptr, PER_BLOCK: gl.constexpr, means, q_desc, k_desc, v_desc, counters_ptr,
    q_inbox, k_ring, v_ring, redo, num_tasks, problem,
):  # fmt: skip
    """Feed task after task to the consumers, then again every task that they have noted."""
    _, q_empty, _, _ = q_inbox
    last_noted, redo_ptr = redo
    parity = 0
    steps_before = 0  # of all tasks so far
    task = gl.program_id(0)
    while task < num_tasks:
        steps_before += feed(
            PAGED, pages_ptr, PER_BLOCK, means, q_desc, k_desc, v_desc,
            q_inbox, k_ring, v_ring, task, parity, steps_before, problem,
        )  # fmt: skip
        parity ^= 1
        task = gl.num_programs(0) + gl.atomic_add(counters_ptr, 1)
    if gl.atomic_add(counters_ptr + 1, 1) == gl.num_programs(0) - 1:  # the last program that takes a task
        gl.store(counters_ptr, 0)
        gl.store(counters_ptr + 1, 0)
    announce_end(q_inbox, parity, num_tasks)
    parity ^= 1
    for consumer in gl.static_range(NUM_CONSUMERS):
        mbarrier.wait(q_empty.index(consumer), parity ^ 1)  # it has heard of the end
    for consumer in gl.static_range(NUM_CONSUMERS):
        task = read_number(last_noted.index(consumer), PRODUCER_WARPS)
        while task >= 0:
            steps_before += feed(
                PAGED, pages_ptr, PER_BLOCK, means, q_desc, k_desc, v_desc,
                q_inbox, k_ring, v_ring, task, parity, steps_before, problem,
            )  # fmt: skip
            parity ^= 1
            task = gl.load(redo_ptr + consumer * num_tasks + task)
    announce_end(q_inbox, parity, num_tasks)


@gluon.jit
def attend_tile(
    q_tile, k_ring, v_ring, masks, step, weights, accumulator, reference, sums, scale_log2,
    ONLINE: gl.constexpr, PER_BLOCK: gl.constexpr,
):  # fmt: skip
    """Attend to the tile of a step: QK^T, beside PV of the tile before and its `weights`.

    PER_BLOCK: stand-ins of a block, whose `masks` exclude those of kept blocks; 0 if the tile is a block. Returns the
    tile's weights, and accumulator, reference and partial sums to go on from.
    """
    LOGITS: gl.constexpr = reference.type.layout.parent
    raise_by = 0.0
    if PER_BLOCK > 0:
        raise_by = log2_tokens(PER_BLOCK)
        slot, _ = ring_slot(masks, step)
        logits = start_masked_logits(q_tile, wait_for_tile(k_ring, step), as_matrix(masks.index(slot)), LOGITS)
    else:
        logits = start_logits(q_tile, wait_for_tile(k_ring, step), LOGITS)
    EARLY: gl.constexpr = waits_early(ONLINE, q_tile.shape[1])
    accumulator = start_values(weights, v_ring, step - 1, accumulator, EARLY)
    logits = hopper.warpgroup_mma_wait(1, [logits])  # the older products in flight
    release_tile(k_ring, step)
    before = reference
    if ONLINE:
        reference = gl.maximum(reference, row_maxima(logits, scale_log2) + raise_by)
    weights, tile_sums = exponentials(logits, reference - raise_by, scale_log2, q_tile.dtype)
    if not EARLY:
        wait_for_tile(v_ring, step)  # see the top of this file
    accumulator = hopper.warpgroup_mma_wait(0, [accumulator])
    release_tile(v_ring, step - 1)
    if ONLINE:
        rescale = gl.exp2(before - reference)
        accumulator = scale_rows(accumulator, rescale)
        sums = scale_rows(sums, rescale)
    return weights, accumulator, reference, sums + tile_sums


@gluon.jit
def attend(
    q_tile, q_read, k_ring, v_ring, masks, first_step, num_blocks, num_tiles, first_position, last_key, scale_log2,
    ONLINE: gl.constexpr, PER_BLOCK: gl.constexpr,
):  # fmt: skip
    """Attend from the queries of one task to its blocks: accumulator [M, D], reference [M] and sum [M] of its weights.

    After the tiles of `num_blocks` blocks come those of stand-ins, PER_BLOCK for each block; all are `num_tiles`. Only
    the first tile needs a mask: the diagonal block is the last one of a list, and the first one here; last_key is its
    first key. Arrives at `q_read` after the last use of the queries. ONLINE: the reference follows the running maximum;
    otherwise it is that of the first tile.
    """
    ROWS: gl.constexpr = q_tile.shape[0]
    HEAD_DIM: gl.constexpr = q_tile.shape[1]
    BLOCK: gl.constexpr = ROWS * NUM_CONSUMERS
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [CONSUMER_WARPS, 1], [16, BLOCK, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [CONSUMER_WARPS, 1], [16, HEAD_DIM, 16])
    accumulator = gl.full([ROWS, HEAD_DIM], 0.0, gl.float32, OUT)
    reference = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, LOGITS))
    no_weights = gl.full([ROWS, BLOCK], 0.0, gl.float32, LOGITS)
    sums = gl.sum(no_weights.reshape([ROWS, BLOCK // SUMS, SUMS]), axis=1)
    if num_blocks > 0:
        logits = start_logits(q_tile, wait_for_tile(k_ring, first_step), LOGITS)
        logits = hopper.warpgroup_mma_wait(0, [logits])
        release_tile(k_ring, first_step)
        logits = mask_future(logits, first_position, last_key)
        reference = row_maxima(logits, scale_log2)
        if PER_BLOCK > 0:
            reference = gl.maximum(reference, LOWEST)  # the list was empty
        weights, sums = exponentials(logits, reference, scale_log2, q_tile.dtype)
        EARLY: gl.constexpr = waits_early(ONLINE, HEAD_DIM)
        if not EARLY:
            wait_for_tile(v_ring, first_step)
        for step in range(first_step + 1, first_step + num_blocks):
            weights, accumulator, reference, sums = attend_tile(
                q_tile, k_ring, v_ring, masks, step, weights, accumulator, reference, sums, scale_log2, ONLINE, 0
            )
        if PER_BLOCK > 0:
            for step in range(first_step + num_blocks, first_step + num_tiles):
                weights, accumulator, reference, sums = attend_tile(
                    q_tile, k_ring, v_ring, masks, step, weights, accumulator, reference, sums, scale_log2,
                    ONLINE, PER_BLOCK,
                )  # fmt: skip
        mbarrier.arrive(q_read)  # the queries of the next task may be copied from here on
        last_step = first_step + num_tiles - 1
        accumulator = start_values(weights, v_ring, last_step, accumulator, EARLY)
        accumulator = hopper.warpgroup_mma_wait(0, [accumulator])
        release_tile(v_ring, last_step)
    else:
        mbarrier.arrive(q_read)
    return accumulator, reference, gl.convert_layout(gl.sum(sums, axis=1), gl.SliceLayout(1, LOGITS))


@gluon.jit
def consume_round(
    parity, first_step, CONSUMER: gl.constexpr, masks, q_inbox, k_ring, v_ring, redo, num_tasks, problem,
    out_ptr, lse_ptr, stride_ob, stride_oh, stride_on, num_queries, scale_log2, ONLINE: gl.constexpr,
    PER_BLOCK: gl.constexpr,
):  # fmt: skip
    """Task by task until the end is announced: attend, store output and log-sum-exp; without ONLINE, note overflows.

    Returns the parity and the first step of the next round.
    """
    _q_full, q_empty, q_tiles, _tasks = q_inbox
    last_noted, redo_ptr = redo
    offset = problem[4]
    ROWS: gl.constexpr = q_tiles.shape[3]
    BLOCK: gl.constexpr = ROWS * NUM_CONSUMERS
    q_tile, q_read = as_matrix(q_tiles.index(CONSUMER)), q_empty.index(CONSUMER)
    noted = -1  # the task noted last; redo_ptr holds for each noted task the one before it
    task = wait_for_task(q_inbox, parity, CONSUMER)
    while task < num_tasks:
        batch_head, batch, head, _kv_head, first_query, kv_list = find_task(task, problem, BLOCK)
        num_blocks = num_block_tiles(kv_list, PER_BLOCK)
        first_row = first_query + CONSUMER * ROWS
        last_key = gl.minimum(load_block(kv_list, num_blocks - 1) * BLOCK, offset + first_query)
        num_tiles = num_blocks
        if PER_BLOCK > 0:
            last_key = gl.where(kv_list[1] > 0, last_key, offset + first_query + BLOCK)
            num_tiles += num_stand_in_tiles(first_query, kv_list, problem, PER_BLOCK, BLOCK)
        accumulator, reference, row_sums = attend(
            q_tile, q_read, k_ring, v_ring, masks, first_step, num_blocks, num_tiles, offset + first_row, last_key,
            scale_log2, ONLINE, PER_BLOCK,
        )  # fmt: skip
        if not ONLINE:
            if gl.max((row_sums >= LARGEST_SUM).to(gl.int32), axis=0) > 0:
                gl.store(redo_ptr + CONSUMER * num_tasks + task, noted)
                noted = task
        if PER_BLOCK > 0:
            reference = gl.where(row_sums == 0.0, float("-inf"), reference)
        row_sums = gl.where(row_sums == 0.0, 1.0, row_sums)  # an empty list gives out 0 and lse -inf
        rows = first_row + gl.arange(0, ROWS, row_sums.type.layout)
        lse_pointers = lse_ptr + batch_head.to(gl.int64) * num_queries + rows
        gl.store(lse_pointers, reference * LN_2 + gl.log(row_sums), mask=(rows >= 0) & (rows < num_queries))
        out_tile = scale_rows(accumulator, 1 / row_sums)
        head_ptr = out_ptr + batch.to(gl.int64) * stride_ob + head.to(gl.int64) * stride_oh
        store_rows(head_ptr, out_tile.to(q_tile.dtype), first_row, num_queries, stride_on)
        parity ^= 1
        first_step += num_tiles
        task = wait_for_task(q_inbox, parity, CONSUMER)
    write_number(noted, last_noted.index(CONSUMER), CONSUMER_WARPS)
    mbarrier.arrive(q_read)  # the producer may read it and announce a task
    return parity ^ 1, first_step


@gluon.jit
def consume(
    CONSUMER: gl.constexpr, PER_BLOCK: gl.constexpr, masks, q_inbox, k_ring, v_ring, redo, num_tasks, problem,
    out_ptr, lse_ptr, stride_ob, stride_oh, stride_on, num_queries, scale_log2,
):  # fmt: skip
    """Attend from half of a query block to its listed blocks: all tasks, then again those that were noted."""
    NO_ROOM: gl.constexpr = q_inbox[2].dtype == gl.float16
    parity, first_step = consume_round(
        gl.to_tensor(0), gl.to_tensor(0), CONSUMER, masks, q_inbox, k_ring, v_ring, redo, num_tasks, problem,
        out_ptr, lse_ptr, stride_ob, stride_oh, stride_on, num_queries, scale_log2, NO_ROOM, PER_BLOCK,
    )  # fmt: skip
    consume_round(
        parity, first_step, CONSUMER, masks, q_inbox, k_ring, v_ring, redo, num_tasks, problem,
        out_ptr, lse_ptr, stride_ob, stride_oh, stride_on, num_queries, scale_log2, True, PER_BLOCK,
    )  # fmt: skip


VARYING = ["num_q_heads", "heads_per_kv_head", "heads_at_once", "num_queries", "num_keys", "num_q_blocks"]
VARYING += ["max_blocks", "full_rows", "rows_ahead", "num_tasks"]


@gluon.jit(do_not_specialize=VARYING)
def hopper_forward_kernel(
    q_desc, k_desc, v_desc, out_ptr, lse_ptr, kv_indices_ptr, kv_num_blocks_ptr, scratch_ptr, pages_ptr,
    k_means_desc, v_means_desc, masks_desc,
    stride_ob, stride_oh, stride_on, num_q_heads, heads_per_kv_head, heads_at_once, num_queries, num_keys,
    num_q_blocks, max_blocks, full_rows, rows_ahead, num_tasks, scale, PER_BLOCK: gl.constexpr,
):  # fmt: skip
    """One persistent program computes one task after another. Grid: any number of programs, one for a multiprocessor.

    Tiles of q_desc are half a query block, those of k_desc and v_desc a key block of BLOCK_SIZE tokens. The lists of
    the first `full_rows` query blocks are not read, those of others only after gdc_wait. scratch_ptr: two int32
    counters, 0 before and after the launch: tasks taken after the first of each program, which is its own number, and
    programs that take no more; then an int32 for every task and consumer. pages_ptr: place in memory of each key
    block, in blocks; None if they are in order.

    PER_BLOCK: stand-ins of a dropped block, see stand_ins.py; with 0, dropped blocks are skipped. masks_desc: 0 or -inf
    for every stand-in, [1, query blocks, 1, stand-ins] in tiles of DEPTH rows, of which all but the first are missing.
    """
    offset = num_keys - num_queries  # absolute position of query 0
    heads = (num_q_heads, heads_per_kv_head, heads_at_once)
    lists = (kv_indices_ptr, kv_num_blocks_ptr, max_blocks, full_rows, rows_ahead)
    problem = (num_q_blocks,) + heads + (offset,) + lists
    q_tiles = gl.allocate_shared_memory(q_desc.dtype, [NUM_CONSUMERS] + q_desc.block_type.shape, q_desc.layout)
    NUMBER: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    tasks = gl.allocate_shared_memory(gl.int32, [NUM_CONSUMERS, 1], NUMBER)
    redo = (gl.allocate_shared_memory(gl.int32, [NUM_CONSUMERS, 1], NUMBER), scratch_ptr + 2)
    # A ring for Q with one slot for each consumer: full, empty, tiles, and the task of each tile.
    q_inbox = (make_barriers(NUM_CONSUMERS, 1), make_barriers(NUM_CONSUMERS, 1), q_tiles, tasks)
    shared = (q_inbox, make_ring(k_desc, NUM_STAGES), make_ring(v_desc, NUM_STAGES), redo, num_tasks, problem)
    means, masks = (k_desc, v_desc), q_tiles  # not read
    if PER_BLOCK > 0:  # masks land together with the means of keys
        shape: gl.constexpr = [NUM_STAGES] + masks_desc.block_type.shape
        masks = gl.allocate_shared_memory(masks_desc.dtype, shape, masks_desc.layout)
        means = (k_means_desc, v_means_desc, masks_desc, masks)
    outputs = (out_ptr, lse_ptr, stride_ob, stride_oh, stride_on, num_queries, scale * LOG2_E)
    PAGED: gl.constexpr = pages_ptr is not None
    places_ptr = pages_ptr if PAGED else kv_indices_ptr  # a partition takes no None
    gl.warp_specialize(
        [
            (consume, (0, PER_BLOCK, masks) + shared + outputs),
            (consume, (1, PER_BLOCK, masks) + shared + outputs),
            (produce, (PAGED, places_ptr, PER_BLOCK, means, q_desc, k_desc, v_desc, scratch_ptr) + shared),
        ],
        [CONSUMER_WARPS, PRODUCER_WARPS],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


def unsupported(device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int) -> str:
    """Reason why the kernel does not cover a problem, in words; empty if it does."""
    if not is_sm90(device):
        return f"device {device}, accepted: CUDA of sm_90"
    if dtype not in DTYPES:
        return f"dtype {dtype}, accepted: {', '.join(map(str, DTYPES))}"
    if head_dim not in HEAD_DIMS:
        return f"head_dim {head_dim}, accepted: {', '.join(map(str, HEAD_DIMS))}"
    if block_size != BLOCK_SIZE:
        return f"block_size {block_size}, accepted: {BLOCK_SIZE}"
    return ""


def supports(q: torch.Tensor, block_size: int) -> bool:
    """Whether the kernel covers queries like q and blocks of this size: sm_90, fp16 or bf16, D 64 or 128, block 128."""
    return not unsupported(q.device, q.dtype, q.shape[-1], block_size)


def describe_tiles(x: torch.Tensor, shape: tuple[int, ...]) -> TensorDescriptor:
    """Gluon's descriptor of x [B, H, N, D], that TMA can read, in tiles of a shape."""
    return TensorDescriptor.from_tensor(x, list(shape), TMA_LAYOUT)


def prepare(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    *,
    pages: torch.Tensor | None = None,
    num_keys: int | None = None,
    out: torch.Tensor | None = None,
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Do everything in sparse_forward but its launch, so that the launch can overlap with the kernel before it.

    Args:
        pages, num_keys: See score_inputs.raw_inputs. The last page may hold anything finite behind the last key. With
            pages, dropped blocks have no stand-ins.
        out: Where to store the output, [B, Hq, Nq, D] with dense rows; by default memory like q.
    Returns:
        attend(kv_indices, kv_num_blocks, full_rows=0, tokens=0) -> out, lse. The first `full_rows` query blocks keep
        all their causal blocks, whatever the lists say. If these are some but not all, the kernel that was launched
        last may still run when attention to them begins (programmatic dependent launch). The kernels that wrote q, k
        and v must have ended before that kernel began. `tokens`: of a stand-in of the dropped blocks, see stand_ins.py;
        0 skips them. Masks take 2 bytes for each query block and stand-in; where those of all heads would exceed
        BUFFER_BYTES, the KV heads are attended to in halves. Lists may be those of later rows of a longer prompt, whose
        last block is the diagonal one; then num_keys says where the queries would stand in a prompt without the rows
        left out.
    """
    if scale < 0:  # the kernel takes row maxima before it scales
        q, scale = -q, -scale
    scale = max(float(scale), SMALLEST_SCALE)
    q, k, v = with_dense_rows(q, True), with_dense_rows(k, True), with_dense_rows(v, True)
    shape, head_dim, device = q.shape, q.shape[3], q.device
    out = torch.empty_like(q) if out is None else out
    lse = torch.empty(shape[:3], dtype=torch.float32, device=device)
    tasks = Tasks.of(device, shape, k.shape[1], num_keys or k.shape[2], out.stride(), q.element_size(), BLOCK_SIZE)
    scratch = launch_scratch(device, tasks.number)
    q_tiles = Tiles(q, (1, 1, BLOCK_SIZE // NUM_CONSUMERS.value, head_dim), describe_tiles)
    key_tile = 1, 1, BLOCK_SIZE, head_dim
    k_tiles, v_tiles = Tiles(k, key_tile, describe_tiles), Tiles(v, key_tile, describe_tiles)

    def attend(
        kv_indices: torch.Tensor, kv_num_blocks: torch.Tensor, full_rows: int = 0, tokens: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_kv_heads, num_kv_blocks = k.shape[1], -(-k.shape[2] // BLOCK_SIZE)
        per_block, stand_ins = BLOCK_SIZE // tokens if tokens and num_kv_blocks > 1 else 0, (None, None, None)
        mask_bytes = k.element_size() * per_block * num_kv_blocks * kv_num_blocks.numel()
        if mask_bytes > BUFFER_BYTES and num_kv_heads > 1:
            group, half = shape[1] // num_kv_heads, num_kv_heads // 2
            for first, last in ((0, half), (half, num_kv_heads)):
                of_kv, of_q = slice(first, last), slice(first * group, last * group)
                part = prepare(q[:, of_q], k[:, of_kv], v[:, of_kv], scale, num_keys=num_keys, out=out[:, of_q])
                lse[:, of_q] = part(kv_indices[:, of_q], kv_num_blocks[:, of_q], full_rows, tokens)[1]
            return out, lse
        if per_block:
            masks = masks_of_kept_blocks(kv_indices, kv_num_blocks, num_kv_blocks, per_block, k.dtype)
            means = (Tiles(x, key_tile, describe_tiles) for x in block_means(k, v, BLOCK_SIZE, tokens))
            stand_ins = *means, Tiles(masks, (1, 1, DEPTH.value, BLOCK_SIZE), describe_tiles)
        tensors = q_tiles, k_tiles, v_tiles, out, lse, kv_indices.contiguous(), kv_num_blocks.contiguous()
        tasks.launch(
            hopper_forward_kernel,
            (*tensors, scratch, pages, *stand_ins),
            kv_indices.shape[3],
            (scale,),
            full_rows,
            PER_BLOCK=per_block,
            **LAUNCH_OPTIONS,
        )
        return out, lse

    return attend


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
    """Attention over the lists, for problems that `supports` accepts; see sparse_forward.sparse_forward and prepare."""
    return prepare(q, k, v, scale)(kv_indices, kv_num_blocks, tokens=tokens)

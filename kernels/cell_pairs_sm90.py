"""Sums of softmax weights of pairs of cells for sm_90 in Gluon: the first launch of cell_pairs.py, where it applies.

The roles are those of hopper_forward.py: one warp copies tiles, two warpgroups compute. A task is 128 query cells of
one head, and each warpgroup takes 64 of them. A tile is 128 key cells in an order in which each thread's part of a
product holds all cells of its key blocks: column 8 j + 2 t + e, which thread t of a row holds, is cell 32 t + 2 j + e.
So a thread adds the weights of a key block in its registers, in fp32, and only the sum is rounded to bf16.

Shares of a row computed from these sums differ from shares in fp64 by 1.7e-3 (relative, in norm), as do those of
pair_cells_kernel, which rounds every weight to bf16 as well: the rounding of the sums is the larger error of both.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .cell_features import Cells
from .common import LARGEST_SUM, num_multiprocessors
from .hopper_forward import (
    CONSUMER_REGISTERS,
    CONSUMER_WARPS,
    LAUNCH_OPTIONS,
    NUM_CONSUMERS,
    PRODUCER_REGISTERS,
    PRODUCER_WARPS,
    as_matrix,
    copy_tile,
    describe_tiles,
    make_barriers,
    make_ring,
    ring_slot,
    start_logits,
)
from .launch import Tiles, launch

ROWS = gl.constexpr(64)  # query cells of a consumer
COLUMNS = gl.constexpr(128)  # key cells of a tile
THREADS = gl.constexpr(4)  # that share a row of an accumulator
OF_THREAD = gl.constexpr(32)  # columns of each
STAGES = gl.constexpr(2)
KEY_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=5)


@gluon.jit
def find_task(task, problem, Q_CELL: gl.constexpr, K_CELL: gl.constexpr):
    """Row tile and head of a task, the longest ones first: (head, first row, first token, tiles of keys)."""
    num_heads, num_row_tiles, first_position, kv_len = problem[:4]
    head, row_tile = task % num_heads, num_row_tiles - 1 - task // num_heads
    first_row = row_tile * (ROWS * NUM_CONSUMERS)
    first_token = first_position + first_row * Q_CELL
    end = gl.minimum(first_token + ROWS * NUM_CONSUMERS * Q_CELL, kv_len)
    return head, first_row, first_token, gl.cdiv(gl.cdiv(end, K_CELL), COLUMNS)


@gluon.constexpr_function
def sums_layout(blocks):
    """Layout of the sums: each thread has `blocks` neighbours of a row, which one store takes."""
    registers = [[0, 1 << i] for i in range(blocks.bit_length() - 1)] + [[8, 0]]
    lanes = [[0, blocks], [0, 2 * blocks], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [64, 4 * blocks])


@gluon.jit
def block_sums(weights, CELLS: gl.constexpr):
    """Sums over each key block of weights [ROWS, COLUMNS], inside threads: [ROWS, COLUMNS / CELLS]."""
    BLOCKS: gl.constexpr = OF_THREAD // CELLS  # of a thread
    cells = weights.reshape([ROWS, BLOCKS, CELLS // 2, THREADS, 2])
    sums = gl.sum(gl.sum(cells, axis=4), axis=2)
    return gl.convert_layout(sums.permute([0, 2, 1]).reshape([ROWS, THREADS * BLOCKS]), sums_layout(BLOCKS))


@gluon.jit
def store_sums(sums_ptr, sums, first_row, rows, chunk_cells, first_block, stride_sn):
    """Store the sums of a tile; rows of a multiple of 16 blocks let each thread store all of its neighbours at once."""
    blocks = first_block + gl.arange(0, sums.shape[1], gl.SliceLayout(0, sums.type.layout))
    offsets = ((first_row + rows) * stride_sn)[:, None] + blocks[None, :]
    gl.store(sums_ptr + offsets, sums.to(sums_ptr.dtype.element_ty), mask=(rows < chunk_cells)[:, None])


@gluon.jit
def produce(
    Q_CELL: gl.constexpr, K_CELL: gl.constexpr, q_desc, k_desc, q_inbox, k_ring, num_tasks, problem, sizes,
):  # fmt: skip
    """Copy the query cells of task after task, and the key cells that they see."""
    q_full, q_empty, q_tiles = q_inbox
    k_tiles, k_full, k_empty = k_ring
    num_q_heads, heads_per_kv_head, first_cell = sizes
    parity = 0
    step = 0
    for task in range(gl.program_id(0), num_tasks, gl.num_programs(0)):
        head, first_row, _first_token, num_tiles = find_task(task, problem, Q_CELL, K_CELL)
        for consumer in gl.static_range(NUM_CONSUMERS):
            mbarrier.wait(q_empty.index(consumer), parity ^ 1)
            row = first_cell + first_row + consumer * ROWS
            copy_tile(
                q_desc, head // num_q_heads, head % num_q_heads, row, q_full.index(consumer), q_tiles.index(consumer)
            )
        for tile in range(num_tiles):
            slot, parity_of_slot = ring_slot(k_tiles, step)
            mbarrier.wait(k_empty.index(slot), parity_of_slot ^ 1)
            mbarrier.expect(k_full.index(slot), k_desc.block_type.nbytes)
            place = [head // heads_per_kv_head, 0, tile * THREADS, 0, 0]
            tma.async_copy_global_to_shared(k_desc, place, k_full.index(slot), k_tiles.index(slot))
            step += 1
        parity ^= 1


@gluon.jit
def consume(
    CONSUMER: gl.constexpr, Q_CELL: gl.constexpr, K_CELL: gl.constexpr, CELLS: gl.constexpr, sums_ptr, flags_ptr,
    stride_sn, chunk_cells, q_inbox, k_ring, num_tasks, problem,
):  # fmt: skip
    """Pair half of the query cells of task after task."""
    q_full, q_empty, q_tiles = q_inbox
    k_tiles, k_full, k_empty = k_ring
    kv_len = problem[3]
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [CONSUMER_WARPS, 1], [16, COLUMNS, 16])
    q_tile = as_matrix(q_tiles.index(CONSUMER))
    columns = gl.arange(0, COLUMNS, gl.SliceLayout(0, LOGITS))
    cells = columns % 8 // 2 * OF_THREAD + columns // 8 * 2 + columns % 2
    own_rows = CONSUMER * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LOGITS))
    parity = 0
    step = 0
    for task in range(gl.program_id(0), num_tasks, gl.num_programs(0)):
        head, first_row, first_token, num_tiles = find_task(task, problem, Q_CELL, K_CELL)
        # a query cell sees a key cell that starts no later than its own last token
        last_positions = gl.minimum(first_token + (own_rows + 1) * Q_CELL, kv_len) - 1
        first_last = gl.minimum(first_token + (CONSUMER * ROWS + 1) * Q_CELL, kv_len) - 1
        all_see = first_last // K_CELL + 1  # key cells that every row sees
        reference = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, LOGITS))
        total = block_sums(gl.full([ROWS, COLUMNS], 0.0, gl.float32, LOGITS), CELLS)
        SUMS: gl.constexpr = total.type.layout
        rows = first_row + CONSUMER * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, SUMS))
        row_of_head = head.to(gl.int64) * chunk_cells
        mbarrier.wait(q_full.index(CONSUMER), parity)
        for tile in range(num_tiles):
            slot, parity_of_slot = ring_slot(k_tiles, step)
            mbarrier.wait(k_full.index(slot), parity_of_slot)
            logits = start_logits(q_tile, k_tiles.index(slot).reshape([COLUMNS, q_tile.shape[1]]), LOGITS)
            logits = hopper.warpgroup_mma_wait(0, [logits])
            mbarrier.arrive(k_empty.index(slot))
            if tile == num_tiles - 1:
                mbarrier.arrive(q_empty.index(CONSUMER))
            if (tile + 1) * COLUMNS > all_see:
                visible = ((tile * COLUMNS + cells) * K_CELL)[None, :] <= last_positions[:, None]
                logits = gl.where(visible, logits, float("-inf"))
            if tile == 0:
                reference = gl.max(logits, axis=1)
            sums = block_sums(gl.exp2(logits - reference[:, None]), CELLS)
            first_block = tile * (COLUMNS // CELLS)
            store_sums(sums_ptr, sums, row_of_head, rows, chunk_cells, first_block, stride_sn)
            total += sums
            step += 1
        fits = gl.sum(gl.sum(total, axis=1), axis=0) < LARGEST_SUM  # not if it is NaN: infinite features
        row_tile = first_row // (ROWS * NUM_CONSUMERS)
        gl.store(
            flags_ptr + (head * problem[1] + problem[1] - 1 - row_tile) * NUM_CONSUMERS + CONSUMER, gl.where(fits, 0, 1)
        )
        parity ^= 1


VARYING = ["num_q_heads", "heads_per_kv_head", "first_cell", "chunk_cells", "num_heads"]
VARYING += ["num_row_tiles", "first_position", "kv_len", "num_tasks"]


@gluon.jit(do_not_specialize=VARYING)
def pair_cells_sm90_kernel(
    q_desc, k_desc, sums_ptr, flags_ptr, stride_sn, num_q_heads, heads_per_kv_head, first_cell, chunk_cells,
    num_heads, num_row_tiles, first_position, kv_len, num_tasks,
    Q_CELL: gl.constexpr, K_CELL: gl.constexpr, CELLS: gl.constexpr,
):  # fmt: skip
    """See pair_cells_kernel, without bonus. Grid: any number of programs, one for a multiprocessor.

    k_desc: [B * Hkv, 16, runs of 32 key cells, 2, depth]; cell 32 c + 2 j + e is row [j, c, e]. first_position: of
    query cell first_cell. flags_ptr: int32 [B * Hq, row tiles, 2], one for each consumer.
    """
    problem = num_heads, num_row_tiles, first_position, kv_len
    q_tiles = gl.allocate_shared_memory(q_desc.dtype, [NUM_CONSUMERS] + q_desc.block_type.shape, q_desc.layout)
    q_inbox = make_barriers(NUM_CONSUMERS, 1), make_barriers(NUM_CONSUMERS, 1), q_tiles
    shared = (q_inbox, make_ring(k_desc, STAGES), num_tasks, problem)
    outputs = (sums_ptr, flags_ptr, stride_sn, chunk_cells)
    gl.warp_specialize(
        [
            (consume, (0, Q_CELL, K_CELL, CELLS) + outputs + shared),
            (consume, (1, Q_CELL, K_CELL, CELLS) + outputs + shared),
            (produce, (Q_CELL, K_CELL, q_desc, k_desc) + shared + ((num_q_heads, heads_per_kv_head, first_cell),)),
        ],
        [CONSUMER_WARPS, PRODUCER_WARPS],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


def describe_keys(x: torch.Tensor, shape: tuple[int, ...]) -> TensorDescriptor:
    """Gluon's descriptor of key features in tiles of a shape."""
    return TensorDescriptor.from_tensor(x, list(shape), KEY_LAYOUT)


def in_tile_order(k_features: torch.Tensor) -> torch.Tensor:
    """View [B * Hkv, 16, ceil(key cells / 32), 2, depth] of [B, Hkv, key cells, depth]; its end may be of later cells.

    Cells behind the last one start in the future of all queries, so their logits are not used.
    """
    batch, heads, num_cells, depth = k_features.shape
    shape = batch * heads, 16, -(-num_cells // 32), 2, depth
    return k_features.as_strided(shape, (num_cells * depth, 2 * depth, 32 * depth, depth, 1))


def pair_cells(
    q_features: torch.Tensor, k_features: torch.Tensor, sums: torch.Tensor, first_cell: int, cells: Cells,
    flags: torch.Tensor,
) -> None:  # fmt: skip
    """Write the sums [B * Hq, cells, nk] of the query cells from first_cell on; flags int32 [B * Hq, row tiles, 2]."""
    num_q_heads, depth = q_features.shape[1], q_features.shape[3]
    num_heads, num_row_tiles, _ = flags.shape
    num_tasks = num_heads * num_row_tiles
    q_tiles = Tiles(q_features, (1, 1, ROWS.value, depth), describe_tiles)
    k_tiles = Tiles(in_tile_order(k_features), (1, 16, THREADS.value, 2, depth), describe_keys)
    heads = num_q_heads, num_q_heads // k_features.shape[1]
    first_position = cells.first_position + first_cell * cells.q_cell
    others = first_cell, sums.shape[1], num_heads, num_row_tiles, first_position, cells.kv_len, num_tasks
    launch(
        pair_cells_sm90_kernel,
        (min(num_tasks, num_multiprocessors(q_features.device)),),
        (q_tiles, k_tiles, sums, flags),
        (sums.stride(1), *heads, *others),
        Q_CELL=cells.q_cell,
        K_CELL=cells.k_cell,
        CELLS=cells.key_cells,
        **LAUNCH_OPTIONS,
    )

"""Solutions of notebook 02: three kernels. Each replaces the kernel of its name; the launchers stay in the notebook."""

import triton
import triton.language as tl


@triton.jit
def load_block(ptr, block, num_tokens, D: tl.constexpr, BLOCK: tl.constexpr):
    rows, dims = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, D)
    return tl.load(ptr + rows[:, None] * D + dims[None, :], mask=(rows < num_tokens)[:, None], other=0.0)


@triton.jit
def store_block(ptr, block, tile, num_tokens, D: tl.constexpr, BLOCK: tl.constexpr):
    rows, dims = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, D)
    tl.store(ptr + rows[:, None] * D + dims[None, :], tile, mask=(rows < num_tokens)[:, None])


@triton.jit
def my_max_kernel(x_ptr, out_ptr, num_tokens, D: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tile = load_block(x_ptr, tl.program_id(0), num_tokens, D, BLOCK)
    tl.store(out_ptr + rows, tl.max(tile, axis=1), mask=rows < num_tokens)


@triton.jit
def my_window_kernel(q_ptr, k_ptr, v_ptr, out_ptr, num_tokens, window, scale_log2,
                     D: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Entry 0 is block 0; the others are the window, which starts behind block 0, so no block is visited twice."""
    q_block, rows = tl.program_id(0), tl.arange(0, BLOCK)
    q_tile = load_block(q_ptr, q_block, num_tokens, D, BLOCK)
    accumulator, running_sum = tl.zeros([BLOCK, D], tl.float32), tl.zeros([BLOCK], tl.float32)
    running_max = tl.full([BLOCK], float("-inf"), tl.float32)
    first = tl.maximum(q_block - window + 1, 1)
    for entry in range(q_block - first + 2):
        kv_block = tl.where(entry == 0, 0, first + entry - 1)
        k_tile = load_block(k_ptr, kv_block, num_tokens, D, BLOCK)
        v_tile = load_block(v_ptr, kv_block, num_tokens, D, BLOCK)
        logits_log2 = tl.dot(q_tile, k_tile.T, input_precision="ieee") * scale_log2
        visible = kv_block * BLOCK + rows[None, :] <= q_block * BLOCK + rows[:, None]
        logits_log2 = tl.where(visible, logits_log2, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(logits_log2, axis=1))
        weights, rescale = tl.exp2(logits_log2 - new_max[:, None]), tl.exp2(running_max - new_max)
        running_sum = running_sum * rescale + tl.sum(weights, axis=1)
        accumulator = tl.dot(weights, v_tile, accumulator * rescale[:, None], input_precision="ieee")
        running_max = new_max
    store_block(out_ptr, q_block, accumulator / running_sum[:, None], num_tokens, D, BLOCK)


@triton.jit
def my_dq_kernel(q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr, indices_ptr, counts_ptr,
                 num_tokens, num_blocks, scale, D: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    q_block, rows = tl.program_id(0), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    q_tile = load_block(q_ptr, q_block, num_tokens, D, BLOCK)
    grad = load_block(grad_ptr, q_block, num_tokens, D, BLOCK)
    lse = tl.load(lse_ptr + rows, mask=rows < num_tokens, other=float("inf"))
    delta = tl.load(delta_ptr + rows, mask=rows < num_tokens, other=0.0)
    dq = tl.zeros([BLOCK, D], tl.float32)
    for entry in range(tl.load(counts_ptr + q_block)):
        kv_block = tl.load(indices_ptr + q_block * num_blocks + entry)
        k_tile = load_block(k_ptr, kv_block, num_tokens, D, BLOCK)
        v_tile = load_block(v_ptr, kv_block, num_tokens, D, BLOCK)
        keys = kv_block * BLOCK + tl.arange(0, BLOCK)
        weights = tl.exp(tl.dot(q_tile, k_tile.T, input_precision="ieee") * scale - lse[:, None])
        weights = tl.where(keys[None, :] <= rows[:, None], weights, 0.0)
        grad_logits = weights * (tl.dot(grad, v_tile.T, input_precision="ieee") - delta[:, None])
        dq = tl.dot(grad_logits, k_tile, dq, input_precision="ieee")
    store_block(dq_ptr, q_block, scale * dq, num_tokens, D, BLOCK)

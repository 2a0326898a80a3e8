"""Solutions of notebook 09: the scheduler's rule, the budget of a chunk, and a kernel that reads a page table."""

import torch
import triton
import triton.language as tl


def my_ends(starts, budgets, page, prompt):
    ends = starts + budgets
    return torch.where(ends >= prompt, prompt, torch.maximum(ends // page * page, starts))


def my_budget(first, stop, length, size, k_start, decay):
    rows, blocks = torch.arange(first, stop) + 1, -(-length // size)
    return torch.minimum(rows, torch.floor(k_start - k_start * (1 - decay) / blocks * rows)).int()


@triton.jit
def my_copy_kernel(pool_ptr, table_ptr, out_ptr, num_tokens, D: tl.constexpr, PAGE: tl.constexpr):
    page, rows, dims = tl.program_id(0), tl.arange(0, PAGE), tl.arange(0, D)
    place = tl.load(table_ptr + page)
    tile = tl.load(pool_ptr + (place * PAGE + rows)[:, None] * D + dims[None, :])
    rows += page * PAGE
    tl.store(out_ptr + rows[:, None] * D + dims[None, :], tile, mask=(rows < num_tokens)[:, None])

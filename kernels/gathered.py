"""Summaries of blocks that several ranks have gathered, put into the order of the prompt."""

import torch
import triton.language as tl

from .common import for_all_lengths
from .launch import launch

TILE = 1024  # words that a program copies at a time


@for_all_lengths
def rows_in_order_kernel(
    gathered_ptr, slots_ptr, out_ptr, num_blocks, blocks_of_rank, words_of_rank, words, TILE: tl.constexpr
):
    """One program copies the row of one block of one head, 32-bit words. Grid: (num_blocks, B * H)."""
    block, batch_head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot = tl.load(slots_ptr + block).to(tl.int64)
    gathered_ptr, out_ptr = gathered_ptr.to(tl.pointer_type(tl.int32)), out_ptr.to(tl.pointer_type(tl.int32))
    row = batch_head * blocks_of_rank + slot % blocks_of_rank
    gathered_ptr += slot // blocks_of_rank * words_of_rank + row * words
    out_ptr += (batch_head * num_blocks + block) * words
    for start in range(0, words, TILE):
        word = start + tl.arange(0, TILE)
        tl.store(out_ptr + word, tl.load(gathered_ptr + word, mask=word < words), mask=word < words)


def rows_in_order(gathered: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Rows of all blocks in order, [B, H, n, ...], from those of each rank.

    Args:
        gathered: [ranks, B, H, blocks_of_rank, ...], dense but for the first dimension; its rows are 32-bit words.
        slots: int64 [n], the place of each block among the ranks * blocks_of_rank ones.
    """
    _ranks, batch, heads, blocks_of_rank, *row = gathered.shape
    out = torch.empty((batch, heads, len(slots), *row), dtype=gathered.dtype, device=gathered.device)
    words_of_rank, words = (gathered.stride(dim) * gathered.itemsize // 4 for dim in (0, 3))
    launch(
        rows_in_order_kernel,
        (len(slots), batch * heads),
        (gathered, slots, out),
        (len(slots), blocks_of_rank, words_of_rank, words),
        TILE=TILE,
    )
    return out

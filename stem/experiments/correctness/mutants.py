"""Wrong attentions that the checks of notebook 03 must refuse: a kernel's loop with one mistake in it.

`streamed_attention` is the loop of the kernels in plain torch, in fp32 with rounded inputs and weights: key blocks one
after the other, a running maximum and a running sum. Each mistake of `MISTAKES` is one that a kernel can have.
"""

import torch
from torch import Tensor

from stem.experiments.correctness import claims
from stem.selection import BlockSelection

MISTAKES = (
    "scale off by 1 %",
    "diagonal off by one",  # a query sees the key after it
    "rescale skipped",  # a larger maximum does not scale the output so far
    "last key dropped",  # the prompt's last key is never read, so one query misses one key
    "one block too few",  # one row of one head misses one block of its list
)


def streamed_attention(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, mistake: str | None = None
) -> Tensor:
    """Attention over kept blocks by an online softmax, with one mistake or none.

    Args:
        q, k, v: [B, Hq, Nq, D], the last Nq positions, and [B, Hkv, Nkv, D].
        mistake: One of `MISTAKES`.
    """
    size, offset, group = selection.block_size, k.shape[2] - q.shape[2], q.shape[1] // k.shape[1]
    first, scale = offset // size, q.shape[-1] ** -0.5 * (1.01 if mistake == "scale off by 1 %" else 1)
    end = k.shape[2] - (mistake == "last key dropped")
    kept, out = selection.to_mask().tolist(), torch.empty_like(q)
    for batch, head, row in torch.cartesian_prod(
        *map(torch.arange, (q.shape[0], q.shape[1], len(kept[0][0])))
    ).tolist():
        blocks = [block for block, is_kept in enumerate(kept[batch][head][row]) if is_kept]
        if mistake == "one block too few" and (batch, head, row) == (0, 0, len(kept[0][0]) - 1):
            blocks = blocks[1:]
        start, stop = max((first + row) * size, offset), min((first + row + 1) * size, k.shape[2])
        position = torch.arange(start, stop, device=q.device)[:, None]
        last_seen = position + (mistake == "diagonal off by one")
        tile = q[batch, head, start - offset : stop - offset].float()
        running_max = torch.full_like(tile[:, :1], -torch.inf)
        running_sum, accumulator = torch.zeros_like(running_max), torch.zeros_like(tile)
        for block in blocks:
            keys = slice(block * size, min((block + 1) * size, end))
            seen = torch.arange(keys.start, keys.stop, device=q.device) <= last_seen
            logits = tile @ k[batch, head // group, keys].float().mT * scale
            logits = logits.masked_fill(~seen, -torch.inf)
            largest = torch.cat([running_max, logits], 1).amax(1, keepdim=True)
            weights = (logits - largest).exp().nan_to_num()
            rescale = (running_max - largest).exp().nan_to_num()
            running_sum = running_sum * rescale + weights.sum(1, keepdim=True)
            if mistake != "rescale skipped":
                accumulator = accumulator * rescale
            accumulator = accumulator + weights.to(v.dtype).float() @ v[batch, head // group, keys].float()
            running_max = largest
        out[batch, head, start - offset : stop - offset] = (accumulator / running_sum).to(q.dtype)
    return out


def mutant_rows(shape: claims.Shape, dtypes, device, seed: int = 0) -> list[dict]:
    """Rows of the loop without and with each mistake, as `attention_errors` gives them; "case" is the mistake."""
    rows = []
    for dtype in dtypes:
        q, k, v = claims.qkv(shape, dtype, device, seed)
        selection = claims.random_blocks(q, k, v, shape.block_size)
        oracle, allowed = claims.oracle_and_bounds(q, k, v, selection, shape)
        for mistake in (None, *MISTAKES):
            found = {"streamed": streamed_attention(q, k, v, selection, mistake)}
            rows += claims.rows_of("mistakes are refused", mistake or "no mistake", found, oracle, allowed, seed)
    return rows

"""BLASST, or skip-softmax (arXiv 2512.12087): blocks far below the running maximum of all their queries are skipped."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from stem.patterns.common import Prompt, check_share, select_levels, select_mask
from stem.patterns.window import select_dense
from stem.selection import BlockSelection, fit_selection
from stem.validation import check_number, check_qkv, check_scale, compute_dtype


def select(prompt: Prompt, *, skip_threshold: float | None = None) -> BlockSelection:
    """Keep the blocks that a dense kernel does not skip: exp(block maximum - running maximum) >= skip_threshold.

    The blocks of a row come in ascending order. A block is skipped if the inequality fails for all queries of the row;
    the diagonal is kept in any case. Serving engines save the exponentials, V and PV of skipped blocks, not QK^T. The
    blocks that raise the running maximum of a query are the least density.

    Args:
        skip_threshold: In [0, 1]; the paper takes c / N, with N the prompt length and c calibrated for a model. None
            solves one value for all heads, so that they have the config's density together in the rows of q.
    """
    check_share(skip_threshold=skip_threshold)
    levels = _levels(prompt.q, prompt.k, select_dense(prompt), prompt.q.shape[-1] ** -0.5)
    if skip_threshold is None:
        return select_levels(prompt, levels.masked_fill(levels >= 0, torch.inf))  # no threshold exceeds 1
    return select_mask(prompt, levels >= (math.log(skip_threshold) if skip_threshold else -math.inf))


def skip_negligible(
    selection: BlockSelection,
    q: Tensor,
    k: Tensor,
    skip_threshold: float,
    *,
    scale: float | None = None,
    priority: Tensor | None = None,
) -> BlockSelection:
    """Return a selection without the blocks that BLASST skips in its lists; see `select`.

    Args:
        selection, q, k, scale: As in stem.block_sparse_attention.
        skip_threshold: Lambda, in [0, 1].
        priority: [B, Hq, nq, nk], for example CoSA's (`cosa_priority`): a row visits its blocks from the largest to the
            smallest, so that its running maximum is high from the start. None is the order of the lists, ascending.
    """
    check_qkv(q, k, k)
    check_number("skip_threshold", skip_threshold, 0.0, 1.0)
    selection = fit_selection(selection, q, k)
    levels = _levels(q, k, selection, check_scale(scale, q.shape[-1]), priority)
    kept = (levels >= (math.log(skip_threshold) if skip_threshold else -math.inf)) & selection.to_mask()
    narrower = BlockSelection.from_mask(kept, selection.block_size, q_len=q.shape[2], kv_len=k.shape[2])
    return replace(narrower, dropped=selection.dropped)


def _levels(q: Tensor, k: Tensor, selection: BlockSelection, scale: float, priority: Tensor | None = None) -> Tensor:
    """Return the largest difference of block maximum and running maximum over a row's queries: [B, Hq, nq, nk].

    Blocks that are not listed have -inf, the diagonal +inf.
    """
    size, (q_len, kv_len), mask = selection.block_size, (q.shape[2], k.shape[2]), selection.to_mask()
    priority = torch.zeros_like(mask, dtype=torch.float32) if priority is None else priority
    if priority.shape != mask.shape:
        raise ValueError(f"priority must be [B, Hq, nq, nk] = {list(mask.shape)}, got {list(priority.shape)}")
    order = priority.argsort(dim=-1, descending=True, stable=True)  # equal blocks stay ascending
    nq, nk = mask.shape[2:]
    queries = q.to(compute_dtype(q.dtype)).unflatten(1, (k.shape[1], -1)) * scale
    keys = k.to(queries.dtype)[:, :, None].mT
    rows = []
    for row in range(nq):  # one query block at a time
        block = nk - nq + row
        start, stop = max(block * size, kv_len - q_len), min((block + 1) * size, kv_len)
        logits = (queries[:, :, :, start - kv_len + q_len : stop - kv_len + q_len] @ keys).flatten(1, 2)
        future = torch.arange(start, stop, device=q.device)[:, None] < torch.arange(kv_len, device=q.device)
        logits = logits.masked_fill_(future, -torch.inf)
        logits = torch.nn.functional.pad(logits, (0, nk * size - kv_len), value=-torch.inf)
        maxima = logits.unflatten(3, (nk, size)).amax(-1).masked_fill_(~mask[:, :, row, None], -torch.inf)
        maxima = maxima.gather(-1, order[:, :, row, None].expand_as(maxima))  # in the order of the visits
        level = (maxima - maxima.cummax(-1)[0]).nan_to_num(nan=-torch.inf, neginf=-torch.inf).amax(2)  # [B, Hq, nk]
        level = torch.zeros_like(level).scatter(-1, order[:, :, row], level)
        level[..., block] = torch.inf
        rows.append(level)
    return torch.stack(rows, 2)

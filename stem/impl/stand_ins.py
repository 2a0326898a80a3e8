"""Dropped blocks that stand in by the means of their keys and values (FlashPrefill V2, arXiv 2608.19758).

Each query attends to the kept blocks and, for every dropped block before the query's own, to one token of mean key and
value whose logit is raised by ln(block_size): `dropped="mean"`. With "cells" it is one token for every CELL tokens.
"""

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stem.selection import BlockSelection
from stem.transforms import is_transformed
from stem.validation import compute_dtype

CHUNK_LOGITS = 1 << 22  # of one chunk of query blocks, so that memory stays O(N)


def explicit_columns(k: Tensor, v: Tensor, selection: BlockSelection) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values with a copy in which each token is its stand-in, and the token mask [B, Hq, Nq, 2 Nkv] of both.

    Equal tokens, as many as a stand-in stands for, raise its logit by the logarithm of their number.
    """
    mask, size = selection.to_token_mask(), selection.block_size
    if not selection.stand_in_tokens or selection.num_kv_blocks == 1:
        return k, v, mask
    query_blocks = torch.arange(selection.kv_len - selection.q_len, selection.kv_len, device=k.device) // size
    before = query_blocks[:, None] > torch.arange(selection.kv_len, device=k.device) // size
    copies = (stand_ins(x, selection).repeat_interleave(selection.stand_in_tokens, 2) for x in (k, v))
    k, v = (torch.cat([x.to(y.dtype), y, x[:, :, y.shape[2] :]], 2) for x, y in zip((k, v), copies, strict=True))
    return k, v, torch.cat([mask, before & ~mask], 3)


def stand_ins(x: Tensor, selection: BlockSelection) -> Tensor:
    """Means of the keys or values of all blocks but the last: fp32 (fp64 for fp64) [B, Hkv, means, D]."""
    tokens = (selection.num_kv_blocks - 1) * selection.block_size
    return x[:, :, :tokens].to(compute_dtype(x.dtype)).unflatten(2, (-1, selection.stand_in_tokens)).mean(3)


def with_stand_ins(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp with the stand-ins, from those of the kept blocks; differentiable, a few blocks a time."""
    size, nq, offset = selection.block_size, selection.num_q_blocks, selection.kv_len - selection.q_len
    first = selection.num_kv_blocks - nq
    if not selection.stand_in_tokens or selection.num_kv_blocks == 1:
        return out, lse
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (out, lse, q, k, v))
    recompute = needs_grad and not (torch.compiler.is_compiling() or is_transformed(q, k, v))
    means = stand_ins(k, selection), stand_ins(v, selection)
    dropped = (~selection.to_mask()).tril(first - 1)[..., :-1]
    dropped = dropped.repeat_interleave(size // selection.stand_in_tokens, 3)  # [B, Hq, nq, means]
    step = max(1, CHUNK_LOGITS // max(1, dropped[:, :, 0].numel() * size))
    parts = []
    for row in range(0, nq, step):
        start, stop = (min(max((first + x) * size - offset, 0), selection.q_len) for x in (row, row + step))
        mask = dropped[:, :, (torch.arange(start, stop, device=q.device) + offset) // size - first]
        args = (*(x[:, :, start:stop] for x in (out, lse, q)), *means, mask, scale, math.log(selection.stand_in_tokens))
        parts.append(checkpoint(_merge, *args, use_reentrant=False) if recompute else _merge(*args))
    return tuple(torch.cat(x, 2) for x in zip(*parts, strict=True))


def kernel_stand_ins(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, scale: float, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    """with_stand_ins by Triton: in place, or with gradients as an operator that is differentiable once."""
    if not selection.stand_in_tokens:
        return out, lse
    from stem.kernels.stand_ins import add_stand_ins, stand_ins_op

    lists = selection.kv_indices, selection.kv_num_blocks, selection.block_size
    add = stand_ins_op if needs_grad else add_stand_ins
    return add(out, lse, q, k, v, *lists, selection.stand_in_tokens, scale)


def _merge(
    out: Tensor, lse: Tensor, q: Tensor, k_means: Tensor, v_means: Tensor, dropped: Tensor, scale: float, extra: float
) -> tuple[Tensor, Tensor]:
    """One softmax over the kept blocks, as a single column, and the stand-ins of `dropped` [B, Hq, rows, means]."""
    grouped = k_means.shape[1], -1
    logits = (q.to(k_means.dtype).unflatten(1, grouped) @ k_means[:, :, None].mT).flatten(1, 2) * scale + extra
    is_empty = lse.isneginf() & ~dropped.any(-1)
    columns = torch.cat([lse.masked_fill(is_empty, 0)[..., None], logits.masked_fill(~dropped, -torch.inf)], -1)
    weights = columns.softmax(-1)
    merged = weights[..., :1] * out + (weights[..., 1:].unflatten(1, grouped) @ v_means[:, :, None]).flatten(1, 2)
    return merged.to(out.dtype), columns.logsumexp(-1).masked_fill(is_empty, -torch.inf)

"""Attention sinks in dense calls: SDPA has no argument for them, and transformers' SDPA function ignores them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from stem.validation import compute_dtype

ROOM = 8  # further dimensions of q and k, two of them used: fused kernels take multiples of 8


def with_sink_key(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, sinks: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float]:
    """The problem as one that SDPA can solve: a first key with the sinks as logits and 0 as its value.

    Further dimensions of q hold the sinks, in two parts so that 16 bits lose nothing; the first key has a 1 in both.
    Without a mask, several queries also get one in front, so that causality still allows each its own key.

    Args:
        q, k, v: [B, Hq, Nq, D], [B, Hkv, Nk, D] and [B, Hkv, Nk, value dim <= D + ROOM].
        mask: Bool or additive, [.., Nk], or None.
        sinks: [Hq].
    Returns:
        q, k and v with D + ROOM dimensions, mask and scale: the last Nq rows and first `value dim` columns of SDPA's
        output are the attention.
    """
    dim = q.shape[3]
    scale = dim**-0.5 if scale is None else scale
    logits = sinks.to(compute_dtype(q.dtype)) / scale
    high = logits.to(q.dtype)
    parts = pad(torch.stack([high, (logits - high).to(q.dtype)], -1), (0, ROOM - 2))
    q = torch.cat([q, parts[None, :, None].expand(*q.shape[:3], ROOM)], -1)
    k = pad(k, (0, ROOM, 1, 0))
    k[:, :, 0, dim : dim + 2] = 1
    v = pad(v, (0, dim + ROOM - v.shape[3], 1, 0))
    if mask is not None:
        return q, k, v, pad(mask, (1, 0), value=float(mask.dtype == torch.bool)), scale
    return pad(q, (0, 0, 1, 0)) if q.shape[2] > 1 else q, k, v, None, scale

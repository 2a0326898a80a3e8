"""Oracles: attention written as its definition, in fp32 or fp64. Memory O(N^2)."""

import torch
from torch import Tensor

from stem.autocast import autocast_once
from stem.validation import compute_dtype


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, *, sinks: Tensor | None = None
) -> Tensor:
    """Causal attention by its definition; queries are the last Nq positions. Shapes, dtypes as in masked_attention."""
    q_len, kv_len = q.shape[2], k.shape[2]
    causal = torch.ones(q_len, kv_len, dtype=torch.bool, device=q.device).tril(kv_len - q_len)
    return masked_attention(q, k, v, causal, scale, sinks=sinks)


@autocast_once
def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_mask: Tensor,
    scale: float | None = None,
    *,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over the tokens that a mask allows.

    Args:
        q: [B, Hq, Nq, D]; k, v: [B, Hkv, Nkv, D], Hq % Hkv == 0.
        token_mask: bool, broadcastable to [B, Hq, Nq, Nkv], True = attend. A row without any gives 0 and lse -inf.
        scale: Softmax scale, default D**-0.5.
        sinks: [Hq], for each head the logit of one more key that every query may attend to, with the value 0.
    Returns:
        [B, Hq, Nq, D] in q's dtype, computed in fp64 for fp64 inputs and in fp32 otherwise; with return_lse also the
        natural log-sum-exp [B, Hq, Nq] in that precision.
    """
    probabilities, lse = attention_probabilities(q, k, token_mask, scale, sinks=sinks)
    out = probabilities.unflatten(1, (k.shape[1], -1)) @ v.to(probabilities.dtype)[:, :, None]
    out = out.flatten(1, 2).to(q.dtype)
    return (out, lse) if return_lse else out


@autocast_once
def attention_probabilities(
    q: Tensor, k: Tensor, token_mask: Tensor, scale: float | None = None, *, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Probabilities [B, Hq, Nq, Nkv] and log-sum-exp [B, Hq, Nq], fp64 for fp64 inputs and fp32 otherwise.

    With sinks [Hq] a row's probabilities sum to less than 1: the rest is the sink's.
    """
    compute = compute_dtype(q.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = q.to(compute).unflatten(1, (k.shape[1], -1)) @ k.to(compute)[:, :, None].mT * scale
    logits = logits.flatten(1, 2).masked_fill(~token_mask, -torch.inf)
    with_sinks = logits
    if sinks is not None:
        with_sinks = torch.cat([logits, sinks.to(compute)[:, None, None].expand(*logits.shape[:-1], 1)], -1)
    lse = with_sinks.logsumexp(-1)
    return (logits - lse.nan_to_num(neginf=0.0)[..., None]).exp(), lse

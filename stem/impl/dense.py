"""Dense causal attention by torch's fused kernels: what a selection that keeps every block amounts to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None] | None:
    """Dense causal attention of a whole prompt by the fastest fused kernel that torch has for it: cuDNN's, then FA2.

    The operators behind SDPA are called by name, because SDPA neither returns the log-sum-exp nor prefers cuDNN; and as
    functions of torch rather than of torch.ops, whose calls take the host about 3 us longer.

    Args:
        q, k, v, scale: As in stem.stem_attention.
        return_lse: Whether the log-sum-exp is wanted; its gradient would be lost, so it comes without gradients only.
    Returns:
        out like q and lse [B, Hq, N], or None for lse if it was not wanted; None if no kernel covers the problem.
    """
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if q.shape[2] != k.shape[2] or (needs_grad and return_lse):
        return None
    if q.is_cuda:
        params = SDPAParams(q, k, v, None, 0.0, True, q.shape[1] != k.shape[1])
        if can_use_cudnn_attention(params):
            with_lse = needs_grad or return_lse  # the backward pass needs it
            out, lse, *_ = torch._scaled_dot_product_cudnn_attention(
                q, k, v, None, with_lse, is_causal=True, scale=scale
            )
        elif can_use_flash_attention(params) and q.shape[3] % 8 == 0:
            out, lse, *_ = torch._scaled_dot_product_flash_attention(q, k, v, is_causal=True, scale=scale)
        else:
            return None
    elif q.device.type == "cpu" and not needs_grad:
        out, lse = torch._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=True, scale=scale)
    elif q.device.type == "cpu":
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    else:
        return None
    return out, lse.view(q.shape[:3]) if return_lse else None

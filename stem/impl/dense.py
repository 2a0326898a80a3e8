"""Dense causal attention by torch's fused kernels, for selections that keep every block."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention


def dense_kernel(q: Tensor, k: Tensor, v: Tensor, needs_grad: bool, return_lse: bool) -> str | None:
    """Fastest fused kernel of torch for dense causal attention of a whole prompt; None if none covers the problem.

    Returns "cudnn" or "flash" on CUDA, "cpu" or (with gradients) "sdpa" on the CPU, whatever the values of q, k and v.
    The kernels lose the gradient of the log-sum-exp, so needs_grad with return_lse gives None.
    """
    if q.shape[2] != k.shape[2] or (needs_grad and return_lse):
        return None
    if q.device.type == "cpu":
        readable = q.stride(-1) == k.stride(-1) == v.stride(-1) == 1  # the kernel assumes it without a check
        return "sdpa" if needs_grad else "cpu" if readable else None
    if not q.is_cuda:
        return None
    params = SDPAParams(q, k, v, None, 0.0, True, q.shape[1] != k.shape[1])
    if can_use_cudnn_attention(params):
        return "cudnn"
    return "flash" if can_use_flash_attention(params) and q.shape[3] % 8 == 0 else None


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, kernel: str, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Output like q and log-sum-exp [B, Hq, N] (None unless `with_lse`) by a kernel that `dense_kernel` named.

    SDPA neither returns the log-sum-exp nor prefers cuDNN. Functions of torch cost the host ~3 us less than torch.ops.
    """
    if kernel == "cudnn":
        keep = with_lse or (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))
        out, lse, *_ = torch._scaled_dot_product_cudnn_attention(q, k, v, None, keep, is_causal=True, scale=scale)
    elif kernel == "flash":
        out, lse, *_ = torch._scaled_dot_product_flash_attention(q, k, v, is_causal=True, scale=scale)
    elif kernel == "cpu":
        out, lse = torch._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=True, scale=scale)
    else:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return out, lse.view(q.shape[:3]) if with_lse else None

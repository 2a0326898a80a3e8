"""Attention over the kept blocks by a named implementation."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from stem.impl.coverage import sparse_kernel
from stem.impl.flex import flex_attention
from stem.impl.gather import gather_attention, gather_gradients
from stem.impl.stand_ins import explicit_columns, kernel_stand_ins, with_stand_ins
from stem.reference import masked_attention
from stem.selection import BlockSelection
from stem.transforms import is_transformed, refuse_transforms
from stem.validation import check_sinks, compute_dtype


def empty_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of no queries, empty themselves, through which empty gradients flow."""
    nothing = 0 * (k.sum() + v.sum())
    return q + nothing, (q.sum(-1) + nothing).to(compute_dtype(q.dtype))


def apply_sinks(out: Tensor, lse: Tensor | None, sinks: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Output [B, Hq, Nq, D] and log-sum-exp [B, Hq, Nq] with one more key of value 0, whose logits are sinks [Hq].

    Without gradients the output is overwritten.
    """
    if sinks is None:
        return out, lse
    check_sinks(sinks, out)
    sinks = sinks.to(lse.dtype)[:, None]
    share = torch.sigmoid(lse - sinks)[..., None]  # of the softmax that the other keys keep
    keeps = torch.is_grad_enabled() or torch.compiler.is_compiling() or is_transformed(out, lse, sinks)
    return (out * share).to(out.dtype) if keeps else out.mul_(share), torch.logaddexp(lse, sinks)


def attend(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, scale: float, impl: str, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over the kept blocks by a resolved implementation."""
    if not q.numel():
        return empty_attention(q, k, v)
    if impl in WITHOUT_KERNELS:
        has_backward = impl == "flex" and q.is_cuda and selection.block_size >= 128
        recomputed = needs_grad and not torch.compiler.is_compiling() and not has_backward
        if recomputed and (impl == "flex" or not is_transformed(q, k, v)):
            return _Recomputed.apply(q, k, v, selection, scale, impl)
        return WITHOUT_KERNELS[impl](q, k, v, selection, scale)
    if needs_grad and impl == "hopper_fp8":
        raise NotImplementedError("impl='hopper_fp8' has no backward pass; train with compute='input'")
    if needs_grad:  # the operators hold the backward pass and cost the host some tens of us
        from stem.impl import operators

        refuse_transforms(None, f"impl={impl!r}", q, k, v)  # operators would drop the tangent of forward-mode AD
        out, lse = operators.attend(q, k, v, selection, scale, impl)
    else:
        lists = selection.kv_indices, selection.kv_num_blocks, selection.block_size
        if impl == "hopper":  # one kernel attends to blocks and stand-ins
            return sparse_kernel(impl, selection.block_size)(q, k, v, *lists, scale, selection.stand_in_tokens)
        out, lse = sparse_kernel(impl)(q, k, v, *lists, scale)
    return kernel_stand_ins(out, lse, q, k, v, selection, scale, needs_grad)


def _reference(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, scale: float) -> tuple[Tensor, Tensor]:
    return masked_attention(q, *explicit_columns(k, v, selection), scale, return_lse=True)


def _torch(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, scale: float, by=gather_attention):
    return with_stand_ins(*by(q, k, v, selection, scale), q, k, v, selection, scale)


WITHOUT_KERNELS = {"reference": _reference, "torch": _torch, "flex": partial(_torch, by=flex_attention)}


class _Recomputed(torch.autograd.Function):
    """Attention that keeps only its inputs for the backward pass, which recomputes it, always without autocast.

    FlexAttention has no backward pass on the CPU, nor for small blocks: its gradients are those of impl="torch".
    """

    @staticmethod
    def forward(ctx, q, k, v, selection, scale, impl):
        ctx.save_for_backward(q, k, v)
        ctx.selection, ctx.scale, ctx.impl = selection, scale, impl
        return WITHOUT_KERNELS[impl](q, k, v, selection, scale)

    @staticmethod
    def backward(ctx, dout, dlse):
        again = torch.is_grad_enabled()  # for a second derivative
        selection, scale, is_reference = ctx.selection, ctx.scale, ctx.impl == "reference"
        with torch.autocast(dout.device.type, enabled=False):
            if not (again or is_reference or selection.stand_in_tokens):
                return *gather_gradients(*ctx.saved_tensors, selection, scale, dout, dlse), None, None, None
            with torch.enable_grad():
                saved = ctx.saved_tensors
                inputs = [x.view_as(x) if again and x.requires_grad else x.detach().requires_grad_() for x in saved]
                if again or is_reference:
                    outputs = (_reference if is_reference else _torch)(*inputs, selection, scale)
                else:
                    kept = _Recomputed.apply(*inputs, replace(selection, dropped="skip"), scale, "torch")
                    outputs = with_stand_ins(*kept, *inputs, selection, scale)
            return *torch.autograd.grad(outputs, inputs, (dout, dlse), create_graph=again), None, None, None

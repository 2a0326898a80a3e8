"""The pipeline: check, plan (stem.planning), choose the blocks (stem.choose), attend to them (stem.impl)."""

from dataclasses import replace

import torch
from torch import Tensor

from stem.autocast import autocast_once
from stem.config import CHOICES, StemConfig
from stem.impl.attend import apply_sinks, attend
from stem.impl.coverage import resolve_impl
from stem.planning import plan_for
from stem.selection import BlockSelection, fit_selection
from stem.transforms import is_transformed, refused_by_name
from stem.validation import check_choice, check_qkv, check_scale

DEFAULT = StemConfig()  # made once: torch.compile cannot make one


@refused_by_name("stem_attention")
@autocast_once
def stem_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: StemConfig | None = None,
    *,
    scale: float | None = None,
    sinks: Tensor | None = None,
    impl: str | None = None,
    return_selection: bool = False,
    return_lse: bool = False,
    prompt_length: int | None = None,
) -> Tensor | tuple:
    """Causal attention over the key blocks that Stem selects (Algorithm 1); the drop-in for SDPA's causal prefill.

    Args:
        q: [B, Hq, Nq, D], fp16, bf16, fp32 or fp64 (not with "triton"), D <= 256: the last Nq positions. B = 0 and
            Nq = 0 give empty tensors. Under autocast q, k and v are cast once, as SDPA casts them.
        k, v: [B, Hkv, Nkv, D], Hq % Hkv == 0, Nq <= Nkv, same dtype and device as q.
        config: Default StemConfig(), a quarter of the causal block pairs.
        scale: Softmax scale, default D**-0.5.
        sinks: Attention sinks, finite [Hq] of any float dtype on q's device: the logit of one more key of each query
            head, with the value 0 (gpt-oss). They change output and log-sum-exp, not the selection.
        impl: See block_sparse_attention. None uses torch's dense kernel where every block is kept and it is faster.
        return_selection, return_lse: Also return the BlockSelection / the log-sum-exp, in this order.
        prompt_length: Tokens of the whole prompt if these are a chunk of it, >= Nkv, default Nkv. Whole-block chunks
            give the output of the whole prompt, unless the value term is z-scored (over the values so far).
    Returns:
        [B, Hq, Nq, D] like q, or a tuple. Gradients flow through the attention, not through the selection.
    Raises:
        ValueError, TypeError: For bad shapes, dtypes, devices or names, and for non-finite input on the CPU.
    """
    options = DEFAULT if config is None else config, scale, impl, prompt_length
    if torch.compiler.is_compiling() or getattr(q, "is_meta", False):
        from stem.compiled import traced_attention  # imports torch's compiler

        out, lse, selection = traced_attention(q, k, v, *options)
    else:
        plan = plan_for(q, k, v, *options, return_selection, return_lse or sinks is not None)
        out, lse, _, selection = plan.run(q, k, v)
    out, lse = apply_sinks(out, lse, sinks)
    if not (return_selection or return_lse):
        return out
    return out, *((selection,) if return_selection else ()), *((lse,) if return_lse else ())


@refused_by_name("block_sparse_attention")
@autocast_once
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    scale: float | None = None,
    impl: str | None = None,
    return_lse: bool = False,
    *,
    sinks: Tensor | None = None,
    dropped: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact causal softmax attention over the kept blocks, and over means of the dropped ones if asked to.

    Args:
        q, k, v, scale, sinks: As in stem_attention.
        selection: Lists for Hq heads and these lengths, on q's device.
        impl: None chooses "hopper" if it covers the problem, else "triton" on CUDA and "torch" elsewhere (also for
            fp64); an explicit choice never falls back.
            "reference": token mask, softmax in fp32 or fp64, memory O(N^2). "torch": gathers the kept blocks. "triton":
            stem.kernels. "hopper": a forward pass for sm_90, fp16 or bf16, D 64 or 128, block_size 128; "triton"'s
            backward. "hopper_fp8": products in e4m3 with scales per block, no backward; never chosen by None.
            "flex": torch's FlexAttention, unfused on the CPU.
        return_lse: Also return the natural log-sum-exp, fp32 (fp64 for fp64 inputs) [B, Hq, Nq].
        dropped: "skip", "mean" or "cells", see StemConfig; None takes selection.dropped.
    Returns:
        [B, Hq, Nq, D] like q. A row without blocks gives 0. Differentiable; twice with "torch", "reference" and, on the
        CPU, "flex". torch.func.grad, torch.func.jvp and forward-mode AD need "torch" (then the default) or "reference".
    Raises:
        ValueError, TypeError: For bad shapes, dtypes, devices or names, or a selection that does not fit.
        NotImplementedError: For a transform of torch.func or a derivative that the implementation does not support.
    """
    check_qkv(q, k, v)
    selection = fit_selection(selection, q, k)
    if dropped is not None:
        check_choice("dropped", dropped, CHOICES["dropped"])
        selection = replace(selection, dropped=dropped)
    scale = check_scale(scale, q.shape[-1])
    if torch.compiler.is_compiling() or q.is_meta:
        from stem.compiled import traced_block_attention

        out, lse = traced_block_attention(q, k, v, selection, scale, impl)
    else:
        needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        if is_transformed(q, k, v):
            impl, needs_grad = impl or "torch", True
        impl = resolve_impl(impl, q.device, q.dtype, q.shape[3], selection.block_size)
        out, lse = attend(q, k, v, selection, scale, impl, needs_grad)
    out, lse = apply_sinks(out, lse, sinks)
    return (out, lse) if return_lse else out

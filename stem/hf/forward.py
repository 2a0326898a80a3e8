"""The attention function that transformers calls: which calls are sparse, and sparse prefill of padded batches."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._C._dynamo.guards import TensorGuards
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from stem.attention import block_sparse_attention, stem_attention
from stem.autocast import autocast_once
from stem.config import StemConfig
from stem.hf.padding import as_bool, once, packed_mask, rows_by_span, stem_mask, token_mask
from stem.hf.report import LAYERS, NAME, Layer, causal_blocks
from stem.hf.sinks import with_sink_key
from stem.impl.attend import apply_sinks
from stem.planning import Plan, plan_for
from stem.selection import BlockSelection
from stem.transforms import refused_by_name

UNSUPPORTED = {  # arguments of an attention call: what a value other than None or False asks for
    "output_attentions": "attention weights, which are never materialised",
    "sinks": "attention sinks other than one for each head (s_aux)",
    "softcap": "soft-capped scores",
    "position_bias": "an additive position bias",
    "cache": "a paged cache, as generate_batch (continuous batching) uses it",
    "indices": "the model's own sparse indices",
    "block_indices": "the model's own sparse indices",
}

SPECIAL = frozenset(UNSUPPORTED) | {"s_aux", "cu_seq_lens_q"}  # arguments of calls that take no known plan
MOST_PLANS = 64  # that layers with one config remember; more clear them
NOTHING = nullcontext()


def stem_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention function of transformers: sparse prefill on enabled modules, SDPA for decode and all other modules.

    Args:
        query, key, value: [B, Hq, Nq, D] and [B, Hkv, Nk, D]; values may have fewer dimensions (latent attention).
        attention_mask: From stem_mask, or a causal token mask [B or 1, 1, Nq, Nk], bool or additive.
        scaling: Softmax scale, default D**-0.5.
        kwargs: `cu_seq_lens_q` and `cu_seq_lens_k` separate packed sequences; `s_aux` [Hq] are attention sinks.
    Returns:
        [B, Nq, Hq, value dim], zeros for padding queries, and None in the place of attention weights.
    Raises:
        ValueError: For arguments in UNSUPPORTED, and for dropout or is_causal=False in a sparse prefill.
    """
    layer: Layer | None = getattr(module, "stem_layer", None)
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    is_plain = attention_mask is None and is_causal and not dropout and SPECIAL.isdisjoint(kwargs)
    if is_plain and layer is not None:
        out = _attend_as_before(layer, query, key, value, scaling)
        if out is not None:
            return out, None
    for name in UNSUPPORTED.keys() & kwargs.keys():
        if kwargs[name] is not None and kwargs[name] is not False:
            meaning = UNSUPPORTED[name]
            raise ValueError(f"{name}: Stem attention does not implement {meaning}; call stem.hf.disable(model)")
    sinks = kwargs.pop("s_aux", None)
    if is_causal and query.shape[2] > 1 and kwargs.get("cu_seq_lens_q") is not None:
        ends = kwargs["cu_seq_lens_q"], kwargs.get("cu_seq_lens_k")
        attention_mask = _packed(layer, attention_mask, query, key, *ends)
    if layer is not None and layer.shared is not None:
        return layer.shared.attend(layer, query, key, value, scaling, sinks), None
    if not query.numel():  # an empty batch
        return _attend_densely(query, key, value, scaling).transpose(1, 2), None
    q_len, value_dim = query.shape[2], value.shape[3]
    if layer is None or layer.own or layer.config is None or query.shape[2] == 1:
        problem = query, key, value, token_mask(attention_mask, query, key), scaling
        *tensors, scaling = problem if sinks is None else with_sink_key(*problem, sinks)
        options = dict(dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs)
        out, _ = sdpa_attention_forward(module, *tensors, **options)
        return out if sinks is None else out[:, -q_len:, :, :value_dim], None
    if not is_causal:
        raise ValueError("is_causal=False: Stem attention is causal; give this layer the config None (dense)")
    if dropout > 0:
        raise ValueError(f"dropout={dropout}: Stem attention has none; set the model's attention dropout to 0")
    return _prefill(layer, query, key, value, attention_mask, scaling, sinks=sinks), None


class Known(NamedTuple):
    """A plan of whole prompts, and the tensors that it is for."""

    fits: Callable[[Tensor, Tensor, Tensor], bool]
    """Whether q, k and v have the plan's types, dtypes, devices, shapes, strides and gradients, and its autocast and
    transforms (none): the check of torch.compile's guards, one call. One by one, the checks cost the host a launch."""

    plan: Plan
    causal: int
    """Causal block pairs of one head."""


def _attend_as_before(layer: Layer, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor | None:
    """Stem attention of a whole prompt by the plan that its layers remember, [B, N, Hq, D]; None for other calls.

    Small models on short prompts wait for the host, so such a call reaches its kernels as directly as SDPA does.
    """
    if torch.compiler.is_compiling() or not layer.own is layer.shared is None:
        return None
    known: Known | None = layer.plans.get((scale, q.shape))
    with on_device_of(q):
        if known is None or forward_ad._current_level >= 0 or not known.fits(q, k, v):
            if not _is_whole_prompt(layer, q, k, v):
                return None
            known = _remember(layer, q, k, v, scale)
        return _run(layer, known.plan, known.causal, q, k, v, scale, None).transpose(1, 2).contiguous()


def _is_whole_prompt(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether a layer with a StemConfig gets a whole prompt in ordinary tensors."""
    return (
        type(layer.config) is StemConfig
        and type(q) is type(k) is type(v) is Tensor
        and 1 < q.shape[2] == k.shape[2]
        and q.shape[3] == v.shape[3]
        and not (q.is_meta or torch._C._is_any_autocast_enabled())
        and torch._C._get_tracing_state() is peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


def _remember(layer: Layer, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Known:
    """Plan of a whole prompt, noted for later calls of all layers with this config."""
    prompt_length = None if layer.prompt_length is None else max(layer.prompt_length, q.shape[2])
    plan = _plan(layer, q, k, v, scale, prompt_length, False)
    sizes, strides = [list(x.shape) for x in (q, k, v)], [list(x.stride()) for x in (q, k, v)]
    guards = TensorGuards(q, k, v, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
    known = Known(guards.check, plan, causal_blocks(plan.rows))
    if len(layer.plans) >= MOST_PLANS:
        layer.plans.clear()
    layer.plans[scale, q.shape] = known
    return known


def _attend_whole(layer: Layer, q: Tensor, k: Tensor, v: Tensor, scale: float | None, sinks: Tensor | None) -> Tensor:
    """Stem attention of whole prompts, [B, N, Hq, D]."""
    prompt_length = None if layer.prompt_length is None else max(layer.prompt_length, q.shape[2])
    with on_device_of(q):
        return _attend(layer, q, k, v, scale, prompt_length, sinks).transpose(1, 2).contiguous()


@refused_by_name("Stem attention")
@autocast_once  # q and k may be fp32, v in autocast's dtype
def _prefill(
    layer: Layer, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, *, sinks: Tensor | None
) -> Tensor:
    inputs = (q, k, v) if sinks is None else (q, k, v, sinks)
    if (
        q.is_meta
        or torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in inputs))
    ):
        return torch.ops.stem.sparse_prefill(q, k, v, mask, scale, sinks, layer.handle)
    return _sparse_prefill(layer, q, k, v, mask, scale, sinks)


AttentionInterface.register(NAME, stem_attention_forward)
AttentionMaskInterface.register(NAME, stem_mask)


def _sparse_prefill(
    layer: Layer, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, sinks: Tensor | None
) -> Tensor:
    """Stem attention of each sequence by itself, [B, Nq, Hq, value dim]; padding queries give zeros."""
    if mask is None and q.shape[2] == k.shape[2] and v.shape[3] == q.shape[3]:  # whole prompts, without what follows
        return _attend_whole(layer, q, k, v, scale, sinks)
    value_dim = v.shape[3]  # smaller than D in latent attention; zeros change neither norms nor sums
    v = pad(v, (0, q.shape[3] - value_dim)) if value_dim < q.shape[3] else v
    out = None
    for (start, stop, offset, *gaps), rows in _rows(layer, mask, q).items():
        first, last = max(start, offset), min(stop, offset + q.shape[2])
        if first >= last:
            continue
        index = None if len(rows) == q.shape[0] else rows
        queries, keys = (first - offset, last - offset), (start, last)
        tensors = _part(q, index, *queries), _part(k, index, *keys), _part(v, index, *keys)
        with on_device_of(q):  # layers of one model can be on several GPUs
            if gaps:
                row_masks = as_bool(mask).expand(q.shape[0], -1, -1, -1)
                row_masks = _part(row_masks, index, *queries)[..., start:last]
                attended = _attend_densely(*tensors, scale, row_masks, sinks)
                layer.count_gaps(*tensors[:2], rows, offset)
            else:
                if not offset:
                    layer.begin(rows)
                ended = layer.prompt_length is None or last < offset + q.shape[2]  # by padding on the right
                prompt_length = None if ended else max(layer.prompt_length, last) - start
                attended = _attend(layer, *tensors, scale, prompt_length, sinks)
        if attended.shape == q.shape:
            out = attended
            break
        out = torch.zeros_like(q) if out is None else out
        out[slice(None) if index is None else index, :, slice(*queries)] = attended
    out = torch.zeros_like(q) if out is None else out
    return (out if value_dim == q.shape[3] else out[..., :value_dim]).transpose(1, 2).contiguous()


def _rows(layer: Layer, mask: Tensor | None, q: Tensor) -> dict[tuple, list[int]]:
    return once(layer.handle, mask, q.shape[0], lambda: rows_by_span(mask, q))


def _packed(
    layer: Layer | None, mask: Tensor | None, q: Tensor, k: Tensor, ends_q: Tensor, ends_k: Tensor | None
) -> Tensor | None:
    def look() -> Tensor | None:
        return packed_mask(mask, ends_q, ends_k, q, k)

    if layer is None or mask is not None:
        return look()
    return once(layer.handle, ends_q, (q.shape[0], q.shape[2], k.shape[2], id(ends_k)), look)


def _part(x: Tensor, rows: list[int] | None, start: int, stop: int) -> Tensor:
    """Tokens start .. stop - 1 of some rows of x [B, H, N, D], or of all; x itself where that is everything."""
    x = x if rows is None else x[rows]
    return x if (start, stop) == (0, x.shape[2]) else x[:, :, start:stop]


@torch.library.custom_op("stem::sparse_prefill", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _sparse_prefill_op(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, sinks: Tensor | None, handle: int
) -> Tensor:
    return _sparse_prefill(LAYERS[handle], q, k, v, mask, scale, sinks)


@_sparse_prefill_op.register_fake
def _(q, k, v, mask, scale, sinks, handle):
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


def _attend(
    layer: Layer,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    prompt_length: int | None,
    sinks: Tensor | None,
) -> Tensor:
    if q.shape[2] == 1:
        return _attend_densely(q, k, v, scale, sinks=sinks)
    config, impl = layer.config, layer.impl
    if isinstance(config, StemConfig) and not torch.compiler.is_compiling():
        plan = _plan(layer, q, k, v, scale, prompt_length, sinks is not None)
        return _run(layer, plan, causal_blocks(plan.rows), q, k, v, scale, sinks)
    if isinstance(config, StemConfig):  # in a compiled graph with gradients
        options = dict(scale=scale, sinks=sinks, impl=impl, prompt_length=prompt_length)
        out, selection = stem_attention(q, k, v, config, return_selection=True, **options)
    else:
        selection = config(q if scale is None else q * (scale * q.shape[-1] ** 0.5), k, v)
        if not isinstance(selection, BlockSelection):
            got = type(selection).__name__
            raise TypeError(f"config of layer {layer.index}: a Selector must return a BlockSelection, got {got}")
        out = block_sparse_attention(q, k, v, selection, scale=scale, impl=impl, sinks=sinks)
    counts = selection.kv_num_blocks.sum((0, 2), keepdim=True, dtype=torch.int64)  # the lists may change later
    layer.count(q, selection.causal_pairs, counts)
    return out


def _plan(
    layer: Layer, q: Tensor, k: Tensor, v: Tensor, scale: float | None, prompt_length: int | None, with_lse: bool
) -> Plan:
    options = dict(return_lse=with_lse, return_counts=True)
    plan = plan_for(q, k, v, layer.config, scale, layer.impl, prompt_length, **options)
    if plan.path == "dense" and plan.impl == "hopper" and not plan.problem.needs_grad:
        # launches that are replayed cost the host less than torch's dense kernels, and the GPU 3 us more at most
        return plan_for(q, k, v, layer.config, scale, "hopper", prompt_length, **options)
    return plan


def _run(
    layer: Layer, plan: Plan, causal: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, sinks: Tensor | None
) -> Tensor:
    """Output of a plan, whose kept blocks the layer counts."""
    if plan.path == "dense" and sinks is None:
        out, counts = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True), None
    else:
        out, lse, counts, _ = plan.run(q, k, v)
    layer.count(q, causal, plan.kept_blocks if counts is None else counts)
    return out if sinks is None else apply_sinks(out, lse, sinks)[0]


def on_device_of(x: Tensor) -> AbstractContextManager:
    """Context in which the device of x is the current CUDA device; an empty one if it is, or on the CPU."""
    return torch.cuda.device(x.device) if x.is_cuda and x.get_device() != torch._C._cuda_getDevice() else NOTHING


def _attend_densely(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    q_len, value_dim = q.shape[2], v.shape[3]
    if sinks is not None:
        q, k, v, mask, scale = with_sink_key(q, k, v, mask, scale, sinks)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))  # masks and enable_gqa: no fused kernel
    return scaled_dot_product_attention(q, k, v, mask, scale=scale)[:, :, -q_len:, :value_dim]

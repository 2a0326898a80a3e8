"""Stem attention in Hugging Face models: sparse prefill, dense decode, the model's own code untouched.

    from transformers import AutoModelForCausalLM
    import stem

    model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-8B", dtype="bfloat16", device_map="cuda")
    stem.hf.enable(model, stem.StemConfig(density=0.25))
    model.generate(**inputs)                 # prefill is sparse from here on
    stem.hf.density(model)                   # one row per layer: what was really computed

A call with one query is decode and stays dense (SDPA), as do sliding-window layers and layers whose config is None. A
call with several queries is prefill, also the one in which assisted decoding verifies its candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from stem.attention import IMPLS, block_sparse_attention, stem_attention
from stem.config import StemConfig
from stem.hf.padding import rows_by_span, stem_mask, token_mask
from stem.selection import BlockSelection
from stem.validation import check_prompt_length

NAME = "stem"  # the attention implementation under which both functions below are registered

Selector = Callable[[Tensor, Tensor, Tensor], BlockSelection]

UNSUPPORTED = {
    "output_attentions": "attention weights are never materialised",
    "s_aux": "attention sinks in the softmax",
    "sinks": "attention sinks in the softmax",
    "softcap": "soft-capped scores",
    "position_bias": "an additive position bias",
    "cache": "a paged cache",
    "cu_seq_lens_q": "packed sequences",
    "cu_seq_lens_k": "packed sequences",
    "indices": "the model's own sparse indices",
    "block_indices": "the model's own sparse indices",
}


_HANDLES = count(1)
_LAYERS: WeakValueDictionary[int, _Layer] = WeakValueDictionary()


@dataclass(eq=False)
class _Layer:
    """What `enable` attaches to one attention module, as its attribute `stem_layer`."""

    index: int
    config: StemConfig | Selector | None
    impl: str | None
    prompt_length: int | None  # tokens of the whole prompt, of which a call may give a chunk
    own: str | None  # why the layer keeps its own attention whatever its config: "sliding_attention", ...
    previous: str  # attention implementation that `disable` restores
    kept: Tensor | int = 0  # int64 [Hq], kept block pairs of each head since `enable`
    causal: int = 0  # causal block pairs of one head since `enable`
    handle: int = 0  # its key in _LAYERS, by which a compiled graph names it

    def __post_init__(self) -> None:
        self.handle = next(_HANDLES)
        _LAYERS[self.handle] = self

    def __setstate__(self, state: dict) -> None:  # a copied or unpickled layer is another layer
        self.__dict__.update(state)
        self.__post_init__()

    @property
    def attention(self) -> str:
        if self.own or self.config is None:
            return self.own or "dense"
        return "stem" if isinstance(self.config, StemConfig) else "selector"

    def count(self, selection: BlockSelection) -> None:
        self.kept = self.kept + selection.kv_num_blocks.detach().sum((0, 2), dtype=torch.int64)
        self.causal += selection.kv_num_blocks.shape[0] * selection.causal_pairs


class Report(Sequence):
    """Realised density, one row (a dict) per layer; it follows what the model computes."""

    def __init__(self, layers: Sequence[_Layer]) -> None:
        self._layers = layers

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, position):
        """Row with layer, attention, density (kept over causal block pairs) and head_density.

        attention is "stem", "selector", "dense" (config None), or the model's own type such as "sliding_attention",
        whose density is None as that of a layer that has computed no prefill yet.
        """
        if isinstance(position, slice):
            return [self[i] for i in range(*position.indices(len(self)))]
        layer = self._layers[position]
        heads = (layer.kept.double() / layer.causal).tolist() if layer.causal else None
        density = sum(heads) / len(heads) if heads else 1.0 if layer.attention == "dense" else None
        return {"layer": layer.index, "attention": layer.attention, "density": density, "head_density": heads}

    def density(self) -> float:
        """Mean over the layers that have one; NaN before the first prefill."""
        known = [row["density"] for row in self if row["density"] is not None]
        return sum(known) / len(known) if known else float("nan")


def enable(
    model: nn.Module,
    config: StemConfig | Selector | Mapping[int, StemConfig | Selector | None] | Sequence | None = None,
    impl: str | None = None,
    *,
    prompt_length: int | None = None,
) -> None:
    """Make a model's prefill sparse; a second call replaces the config and starts the density counts anew.

    Args:
        model: A causal language model of transformers, or a module that holds one.
        config: For every layer (default StemConfig()), or per layer: a sequence with an entry for each, or a mapping
            from layer index, in which None, or a layer missing in the mapping, is dense. In place of a config, a
            Selector (q, k, v) -> BlockSelection chooses the blocks, for example
            functools.partial(stem.patterns.select, "xattention"); its q is scaled so that the softmax scale is D**-0.5.
        impl: See stem.block_sparse_attention.
        prompt_length: Tokens of the whole prompt, left padding included, where it is given in chunks (generate's
            `prefill_chunk_size`, a cached prefix): see stem.stem_attention. What comes after them counts as its end,
            and so does the last token before padding on the right. Default: each call ends its prompt.
    Raises:
        TypeError: If model is no torch module or a config is no StemConfig.
        ValueError: If the model has no attention that can be replaced, config does not fit its layers, or a Selector
            is given a prompt_length.
    """
    if impl is not None and impl not in IMPLS:
        raise ValueError(f"impl must be None or one of {', '.join(map(repr, IMPLS))}, got {impl!r}")
    modules = _attention_modules(model)
    configs = _config_by_layer(StemConfig() if config is None else config, modules)
    check_prompt_length(prompt_length, 1)
    if prompt_length is not None and any(callable(entry) for entry in configs.values()):
        raise ValueError(
            f"prompt_length={prompt_length} is for a StemConfig; a Selector does not know the prompt's end"
        )
    disable(model)
    for index, module in modules.items():
        implementation = module.config._attn_implementation
        previous = "sdpa" if implementation == NAME else implementation  # a config shared with an enabled model
        module.stem_layer = _Layer(index, configs[index], impl, prompt_length, _own_attention(module), previous)
    for module in modules.values():
        module.config._attn_implementation = NAME


def disable(model: nn.Module) -> None:
    """Give a model back the attention that it had before `enable`; does nothing to a model without Stem."""
    for module in _enabled_modules(model):
        module.config._attn_implementation = module.stem_layer.previous
        del module.stem_layer


@contextmanager
def stem_prefill(
    model: nn.Module, config=None, impl: str | None = None, *, prompt_length: int | None = None
) -> Iterator[Report]:
    """`enable` for the length of a with block; yields the Report, which remains readable afterwards."""
    before = {module: module.stem_layer for module in _enabled_modules(model)}
    enable(model, config, impl, prompt_length=prompt_length)
    try:
        yield density(model)
    finally:
        disable(model)
        for module, layer in before.items():
            module.stem_layer = layer
            module.config._attn_implementation = NAME


def density(model: nn.Module) -> Report:
    """What each layer has computed since `enable`: a sequence of rows, see Report.

    Raises:
        ValueError: If Stem is not enabled on the model.
    """
    layers = [module.stem_layer for module in _enabled_modules(model)]
    if not layers:
        raise ValueError(f"model {type(model).__name__} does not use Stem: call stem.hf.enable(model, config) first")
    return Report(layers)


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
    """Attention function of transformers: query [B, Hq, Nq, D], key, value [B, Hkv, Nk, D or less] -> [B, Nq, Hq, D].

    Modules on which Stem is not enabled run SDPA.
    """
    for name, meaning in UNSUPPORTED.items():
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise ValueError(f"{name}: stem attention does not implement it ({meaning}); call stem.hf.disable(model)")
    layer: _Layer | None = getattr(module, "stem_layer", None)
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if layer is None or layer.own or layer.config is None or query.shape[2] == 1:
        mask = token_mask(attention_mask, query, key)
        options = dict(dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs)
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    if not is_causal:
        raise ValueError("is_causal=False: stem attention is causal; give this layer the config None (dense)")
    if dropout > 0:
        raise ValueError(f"dropout={dropout}: stem attention has none; set the model's attention dropout to 0")
    if torch.is_autocast_enabled(query.device.type):  # as SDPA does: rotary positions leave q and k in fp32, v not
        autocast = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(autocast) for x in (query, key, value))
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if torch.compiler.is_compiling() and not differentiable:
        return torch.ops.stem.sparse_prefill(query, key, value, attention_mask, scaling, layer.handle), None
    return _sparse_prefill(layer, query, key, value, attention_mask, scaling), None


AttentionInterface.register(NAME, stem_attention_forward)
AttentionMaskInterface.register(NAME, stem_mask)


def _sparse_prefill(layer: _Layer, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Stem attention of each sequence by itself, [B, Nq, Hq, value dim]; padding queries give zeros."""
    spans = rows_by_span(mask, q)
    value_dim = v.shape[3]  # smaller than D in latent attention; zeros change neither norms nor sums
    v = pad(v, (0, q.shape[3] - value_dim)) if value_dim < q.shape[3] else v
    out = None
    for (start, stop, offset), rows in spans.items():
        first, last = max(start, offset), min(stop, offset + q.shape[2])
        if first >= last:
            continue
        queries = slice(first - offset, last - offset)
        index = slice(None) if len(rows) == q.shape[0] else rows
        ended = layer.prompt_length is None or last < offset + q.shape[2]  # by padding on the right
        length = None if ended else max(layer.prompt_length, last) - start
        tensors = q[index, :, queries], k[index, :, start:last], v[index, :, start:last]
        with torch.cuda.device_of(q):  # layers of one model can be on several GPUs
            attended = _attend(layer, *tensors, scale, length)
        if attended.shape == q.shape:
            out = attended
            break
        out = torch.zeros_like(q) if out is None else out
        out[index, :, queries] = attended
    out = torch.zeros_like(q) if out is None else out
    return out[..., :value_dim].transpose(1, 2).contiguous()


@torch.library.custom_op("stem::sparse_prefill", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _sparse_prefill_op(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, handle: int
) -> Tensor:
    """`_sparse_prefill` as one node of a compiled graph, which need not look inside; without gradients."""
    return _sparse_prefill(_LAYERS[handle], q, k, v, mask, scale)


@_sparse_prefill_op.register_fake
def _(q, k, v, mask, scale, handle):
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


def _attend(layer: _Layer, q: Tensor, k: Tensor, v: Tensor, scale: float | None, prompt_length: int | None) -> Tensor:
    if q.shape[2] == 1:  # the only token of its row here: decode, were it not for the others
        return scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    if isinstance(layer.config, StemConfig):
        options = dict(scale=scale, impl=layer.impl, prompt_length=prompt_length)
        out, selection = stem_attention(q, k, v, layer.config, return_selection=True, **options)
    else:
        selection = layer.config(q if scale is None else q * (scale * q.shape[-1] ** 0.5), k, v)
        out = block_sparse_attention(q, k, v, selection, scale=scale, impl=layer.impl)
    layer.count(selection)
    return out


def _enabled_modules(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "stem_layer")]


def _attention_modules(model: nn.Module) -> dict[int, nn.Module]:
    """Causal attention modules by layer index; raises unless Stem can replace their attention."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
    found = [m for m in model.modules() if isinstance(getattr(m, "layer_idx", None), int) and hasattr(m, "config")]
    found = [module for module in found if getattr(module, "is_causal", False)]
    refusal = None
    configs = {id(module.config): module.config for module in found}
    owners = [m for m in model.modules() if isinstance(m, PreTrainedModel) and id(m.config) in configs]
    if not owners:
        refusal = "it has no causal attention layers of transformers"
    elif not all(owner.is_backend_compatible() or owner._can_set_attn_implementation() for owner in owners):
        refusal = "it does not compute its attention through transformers' AttentionInterface"
    elif any(getattr(config, "is_encoder_decoder", False) for config in configs.values()):
        refusal = "it is an encoder-decoder"
    elif not all(getattr(config, "is_causal", True) for config in configs.values()):
        refusal = "its config says is_causal=False"
    elif any(config.output_attentions for config in configs.values()):
        refusal = "its config says output_attentions=True, and attention weights are never materialised"
    elif any(getattr(config, "attn_logit_softcapping", None) for config in configs.values()):
        refusal = "it soft-caps its attention scores (attn_logit_softcapping), which Stem does not implement"
    elif any(getattr(module, "sinks", None) is not None for module in found):
        refusal = "its attention has sinks in the softmax, which Stem does not implement"
    elif len({module.layer_idx for module in found}) < len(found):
        refusal = "it has several attention modules with the same layer_idx"
    if refusal:
        raise ValueError(f"model {type(model).__name__} cannot use Stem attention: {refusal}")
    return {module.layer_idx: module for module in found}


def _own_attention(module: nn.Module) -> str | None:
    """The layer type of a module that keeps its own attention; None for full causal attention.

    A window that the model's longest context cannot leave is no window.
    """
    config, index = module.config, module.layer_idx
    window = getattr(config, "sliding_window", None) or float("inf")
    types = getattr(config, "layer_types", None)
    kind = types[index] if types else "full_attention" if window == float("inf") else "sliding_attention"
    wide = kind == "sliding_attention" and window >= getattr(config, "max_position_embeddings", float("inf"))
    return None if wide or kind in {"full_attention", "hybrid"} else kind


def _config_by_layer(config, modules: Mapping[int, nn.Module]) -> dict[int, StemConfig | Selector | None]:
    """One entry for each attention layer, checked."""
    if isinstance(config, StemConfig) or callable(config):
        return dict.fromkeys(modules, config)
    if isinstance(config, Mapping):
        if unknown := sorted(set(config) - set(modules)):
            raise ValueError(f"config: layers {unknown} do not exist; attention layers are {sorted(modules)}")
        configs = {index: config.get(index) for index in modules}
    elif isinstance(config, Sequence) and not isinstance(config, str):
        layers = next(iter(modules.values())).config.num_hidden_layers
        if len(config) != layers:
            raise ValueError(f"config must have an entry for each of the {layers} layers, got {len(config)}")
        configs = {index: config[index] for index in modules}
    else:
        raise TypeError(f"config must be a StemConfig, or one per layer (mapping or sequence), got {config!r}")
    for index, entry in configs.items():
        if entry is not None and not isinstance(entry, StemConfig) and not callable(entry):
            raise TypeError(f"config of layer {index} must be a StemConfig, a Selector or None, got {entry!r}")
    return configs

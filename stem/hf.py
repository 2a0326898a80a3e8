"""Stem attention in Hugging Face models: sparse prefill, dense decode, the model's own code untouched.

    from transformers import AutoModelForCausalLM
    import stem

    model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-8B", dtype="bfloat16", device_map="cuda")
    stem.hf.enable(model, stem.StemConfig(density=0.25))
    model.generate(**inputs)                 # prefill is sparse from here on
    stem.hf.density(model)                   # one row per layer: what was really computed

A call with one query is decode and stays dense (SDPA), as do sliding-window layers and layers whose config is None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from stem.attention import IMPLS, block_sparse_attention, stem_attention
from stem.config import StemConfig
from stem.selection import BlockSelection

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


@dataclass
class _Layer:
    """What `enable` attaches to one attention module, as its attribute `stem_layer`."""

    index: int
    config: StemConfig | Selector | None
    impl: str | None
    own: str | None  # why the layer keeps its own attention whatever its config: "sliding_attention", ...
    previous: str  # attention implementation that `disable` restores
    kept: Tensor | int = 0  # int64 [Hq], kept block pairs of each head since `enable`
    causal: int = 0  # causal block pairs of one head since `enable`

    @property
    def attention(self) -> str:
        return self.own or ("dense" if self.config is None else "stem")

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

        attention is "stem", "dense" (config None), or the model's own type such as "sliding_attention", whose density
        is None as that of a layer that has computed no prefill yet.
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
    config: StemConfig | Selector | Mapping[int, StemConfig | Selector | None] | Sequence[StemConfig | Selector | None],
    impl: str | None = None,
) -> None:
    """Make a model's prefill sparse; a second call replaces the config and starts the density counts anew.

    Args:
        model: A causal language model of transformers, or a module that holds one.
        config: For every layer, or per layer: a sequence with an entry for each, or a mapping from layer index.
            None, or a layer missing in the mapping, is dense. In place of a config, a Selector (q, k, v) ->
            BlockSelection chooses the blocks, for example functools.partial(stem.patterns.select, "xattention").
        impl: See stem.block_sparse_attention.
    Raises:
        TypeError: If model is no torch module or a config is no StemConfig.
        ValueError: If the model has no attention that can be replaced, or config does not fit its layers.
    """
    if impl is not None and impl not in IMPLS:
        raise ValueError(f"impl must be None or one of {', '.join(map(repr, IMPLS))}, got {impl!r}")
    modules = _attention_modules(model)
    configs = _config_by_layer(config, modules)
    disable(model)
    for index, module in modules.items():
        implementation = module.config._attn_implementation
        previous = "sdpa" if implementation == NAME else implementation  # a config shared with an enabled model
        module.stem_layer = _Layer(index, configs[index], impl, _own_attention(module), previous)
    for module in modules.values():
        module.config._attn_implementation = NAME


def disable(model: nn.Module) -> None:
    """Give a model back the attention that it had before `enable`; does nothing to a model without Stem."""
    for module in _enabled_modules(model):
        module.config._attn_implementation = module.stem_layer.previous
        del module.stem_layer


@contextmanager
def stem_prefill(model: nn.Module, config, impl: str | None = None) -> Iterator[Report]:
    """`enable` for the length of a with block; yields the Report, which remains readable afterwards."""
    before = {module: module.stem_layer for module in _enabled_modules(model)}
    enable(model, config, impl)
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
    """Attention function of transformers: query [B, Hq, Nq, D], key and value [B, Hkv, Nk, D] -> [B, Nq, Hq, D].

    Modules on which Stem is not enabled run SDPA.
    """
    for name, meaning in UNSUPPORTED.items():
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise ValueError(f"{name}: stem attention does not implement it ({meaning}); call stem.hf.disable(model)")
    layer: _Layer | None = getattr(module, "stem_layer", None)
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if layer is None or layer.attention != "stem" or query.shape[2] == 1:
        mask = _token_mask(attention_mask, query, key)
        options = dict(dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs)
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    if not is_causal:
        raise ValueError("is_causal=False: stem attention is causal; give this layer the config None (dense)")
    if dropout > 0:
        raise ValueError(f"dropout={dropout}: stem attention has none; set the model's attention dropout to 0")
    rows = _rows_by_span(attention_mask, query)
    return _sparse_prefill(layer, query, key, value, rows, scaling).transpose(1, 2).contiguous(), None


def stem_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs,
) -> Tensor | None:
    """Mask function of transformers: None for a causal prompt from key 0, spans for padding and later chunks.

    Spans are int64 [B, 1, 1, 3] on the CPU, in the place of a bool [B, 1, Nq, Nk]: the first key of the row's tokens,
    the last one + 1, and the key of the first query. Decode, and what is not causal-with-padding, gets SDPA's mask.
    """
    within_window = local_size is None or kv_offset + kv_length <= local_size
    if q_length > 1 and allow_is_causal_skip and within_window:
        spans = _padding_spans(attention_mask, batch_size, int(q_offset), q_length)
        if spans is not None:
            return None if (spans == spans.new_tensor([0, q_length, 0])).all() else spans
    sizes = dict(batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset)
    options = dict(local_size=local_size, allow_is_causal_skip=allow_is_causal_skip, attention_mask=attention_mask)
    return sdpa_mask(**sizes, **options, **kwargs)


AttentionInterface.register(NAME, stem_attention_forward)
AttentionMaskInterface.register(NAME, stem_mask)


def _padding_spans(mask: Tensor | None, batch_size: int, q_offset: int, q_length: int) -> Tensor | None:
    """Spans (see stem_mask) of a padding mask bool [B, >= Nk or what is known of it]; None if a row has a gap."""
    written = q_offset + q_length
    if mask is None:
        return torch.tensor([0, written, q_offset]).expand(batch_size, 1, 1, 3)
    mask = mask[:, :written].int()
    start, stop = mask.argmax(-1), mask.shape[1] - mask.flip(-1).argmax(-1)
    start, stop, tokens = torch.stack([start, stop, mask.sum(-1)]).cpu()
    stop = torch.where(tokens > 0, stop, start)
    if (stop - start != tokens).any():
        return None
    return torch.stack([start, stop, torch.full_like(start, q_offset)], -1)[:, None, None]


def _token_mask(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """What SDPA takes: spans become bool [B, 1, Nq, Nk], other masks stay."""
    if mask is None or mask.dtype != torch.int64:
        return mask
    start, stop, offset = mask.to(query.device).unbind(-1)  # [B, 1, 1]
    position = torch.arange(key.shape[2], device=query.device)
    last = torch.arange(query.shape[2], device=query.device)[:, None] + offset[..., None]  # [B, 1, Nq, 1]
    return (position >= start[..., None]) & (position < stop[..., None]) & (position <= last)


def _rows_by_span(mask: Tensor | None, query: Tensor) -> dict[tuple[int, int, int], list[int]]:
    """Batch rows that share a span, so that they can be computed together."""
    if mask is None:
        return {(0, query.shape[2], 0): list(range(query.shape[0]))}
    if mask.dtype != torch.int64:
        raise ValueError(
            f"attention_mask: stem attention takes causal attention with padding at the ends of each row, got a custom "
            f"mask {mask.dtype} {tuple(mask.shape)} (a 4-dimensional mask, packed sequences, or padding between tokens)"
        )
    rows: dict[tuple[int, int, int], list[int]] = {}
    for row, span in enumerate(mask.flatten(1).expand(query.shape[0], -1).tolist()):
        rows.setdefault(tuple(span), []).append(row)
    return rows


def _sparse_prefill(layer: _Layer, q: Tensor, k: Tensor, v: Tensor, rows_by_span: dict, scale: float | None) -> Tensor:
    """Stem attention of each row's tokens by themselves; padding queries give zeros. Shapes as in stem_attention."""
    out = None
    for (start, stop, offset), rows in rows_by_span.items():
        first, last = max(start, offset), min(stop, offset + q.shape[2])
        if first >= last:
            continue
        queries = slice(first - offset, last - offset)
        index = slice(None) if len(rows) == q.shape[0] else rows
        attended = _attend(layer, q[index, :, queries], k[index, :, start:last], v[index, :, start:last], scale)
        if attended.shape == q.shape:
            return attended
        out = torch.zeros_like(q) if out is None else out
        out[index, :, queries] = attended
    return torch.zeros_like(q) if out is None else out


def _attend(layer: _Layer, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    if q.shape[2] == 1:  # the only token of its row here: decode, were it not for the others
        return scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    if isinstance(layer.config, StemConfig):
        out, selection = stem_attention(q, k, v, layer.config, scale=scale, impl=layer.impl, return_selection=True)
    else:
        selection = layer.config(q, k, v)
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
    elif not all(owner.is_backend_compatible() for owner in owners):
        refusal = "it does not compute its attention through transformers' AttentionInterface"
    elif any(getattr(config, "is_encoder_decoder", False) for config in configs.values()):
        refusal = "it is an encoder-decoder"
    elif not all(getattr(config, "is_causal", True) for config in configs.values()):
        refusal = "its config says is_causal=False"
    elif any(config.output_attentions for config in configs.values()):
        refusal = "its config says output_attentions=True, and attention weights are never materialised"
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

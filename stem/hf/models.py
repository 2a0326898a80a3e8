"""Attention layers of a transformers model: which are replaced, which stay dense, and which models are refused."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from stem.autocast import is_autocast
from stem.config import StemConfig
from stem.hf.forward import UNSUPPORTED
from stem.hf.report import Selector
from stem.impl.coverage import resolve_impl
from stem.planning import Plan, Problem

MAX_HEAD_DIM = 256  # of stem.stem_attention
HEAD_DIMS = ("qk_head_dim", "head_dim", "head_size")  # names in modules of the dimensions of their queries and keys


def check_model(model: nn.Module) -> None:
    """Raise TypeError unless model is a torch module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")


def attention_modules(model: nn.Module) -> dict[int, nn.Module]:
    """Causal attention modules by layer index. TypeError: no module; ValueError: why Stem cannot serve it."""
    check_model(model)
    found = [m for m in model.modules() if isinstance(getattr(m, "layer_idx", None), int) and hasattr(m, "config")]
    found = [module for module in found if getattr(module, "is_causal", False)]
    configs = list({id(module.config): module.config for module in found}.values())
    owners = [m for m in model.modules() if isinstance(m, PreTrainedModel) and any(m.config is c for c in configs)]
    interface = all(owner.is_backend_compatible() or owner._can_set_attn_implementation() for owner in owners)
    told = [*configs, *(getattr(m, "generation_config", None) for m in model.modules())]
    weights = any(getattr(config, "output_attentions", False) for config in told)
    refusals = {
        "it has no causal attention layers of transformers": not owners,
        "it does not compute its attention through transformers' AttentionInterface": not interface,
        "it is an encoder-decoder": any(getattr(config, "is_encoder_decoder", False) for config in configs),
        "its config says is_causal=False": not all(getattr(config, "is_causal", True) for config in configs),
        "its config says output_attentions=True, and Stem never materialises attention weights": weights,
        **{refusal: True for module in found if (refusal := _refusal(module))},
        "it has several attention modules with the same layer_idx": len({m.layer_idx for m in found}) < len(found),
    }
    for refusal, holds in refusals.items():
        if holds:
            raise ValueError(f"model {type(model).__name__} cannot use Stem attention: {refusal}")
    return {module.layer_idx: module for module in found}


def own_attention(module: nn.Module) -> str | None:
    """Reason why a module is never sparse, "sliding_attention" or "dense: head_dim 512"; None for full attention.

    A window that the model's longest context cannot leave is full attention.
    """
    config, index = module.config, module.layer_idx
    window = getattr(config, "sliding_window", None) or float("inf")
    types = getattr(config, "layer_types", None)
    kind = types[index] if types else "full_attention" if window == float("inf") else "sliding_attention"
    wide = kind == "sliding_attention" and window >= getattr(config, "max_position_embeddings", float("inf"))
    if not wide and kind not in {"full_attention", "hybrid"}:
        return kind
    if (head_dim := _head_dim(module)) > MAX_HEAD_DIM:
        return f"dense: head_dim {head_dim}"
    value_dim, key_dim = (getattr(module, name, 0) for name in ("v_head_dim", "qk_head_dim"))
    return f"dense: values of {value_dim} dimensions, keys of {key_dim}" if key_dim and value_dim > key_dim else None


def attention_shape(module: nn.Module) -> tuple[int, int, int]:
    """Query heads, key-value heads and head_dim of an attention module."""
    config, heads = module.config, module.config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads, kv_heads, _head_dim(module) or config.hidden_size // heads


def sparse_layers(model: nn.Module, config, impl, dtype, device) -> list[tuple]:
    """Shape, config, impl, dtype and device of the layers that may be sparse, by default their own; equal ones once."""
    found = {}
    for module in attention_modules(model).values():
        if not own_attention(module):
            layer = getattr(module, "stem_layer", None)
            entry, chosen = config or (layer.config if layer else StemConfig()), impl or (layer.impl if layer else None)
            weight = next(x for x in module.parameters() if x.ndim > 1)  # sinks may be fp32 in a model of 16 bits
            kind = dtype or (weight.dtype if weight.is_floating_point() else torch.bfloat16)
            if entry is not None:
                found[attention_shape(module), entry, chosen, kind, torch.device(device or weight.device)] = None
    return list(found)


def _head_dim(module: nn.Module) -> int:
    return next((x for name in HEAD_DIMS if isinstance(x := getattr(module, name, None), int)), 0)


def check_covered(module: nn.Module, config: StemConfig | Selector, impl: str) -> None:
    """Raise ValueError or TypeError if an implementation does not cover a module's prompts, as far as known."""
    weight = next((x for x in module.parameters() if x.is_floating_point()), torch.empty(0, dtype=torch.bfloat16))
    device, dtype = weight.device, weight.dtype
    if device.type == "meta":  # offloaded
        device = torch.device(getattr(getattr(module, "_hf_hook", None), "execution_device", None) or "meta")
    if is_autocast(weight):
        dtype = torch.get_autocast_dtype(device.type)
    head_dim = _head_dim(module) or 128
    if isinstance(config, StemConfig):
        Plan(Problem(1, *attention_shape(module)[:2], 1, 1, head_dim, dtype, device, config, 1.0, impl))
        return
    config = getattr(config, "keywords", {}).get("config")
    resolve_impl(impl, device, dtype, head_dim, getattr(config, "block_size", 128))


def refuse_dense_models(model: nn.Module, own: Mapping[int, str | None]) -> None:
    """Raise ValueError if no layer could be sparse because of a limit of Stem; own is own_attention by layer."""
    if all(own.values()) and any(reason.startswith("dense") for reason in own.values()):
        raise ValueError(
            f"model {type(model).__name__} cannot use Stem attention: every layer would stay dense "
            f"({', '.join(sorted(set(own.values())))}; Stem takes head_dim 1..{MAX_HEAD_DIM})"
        )


def give_own_configs(model: nn.Module) -> None:
    """Replace a model's config objects by copies that no other model shares; its modules still share them."""
    held = [(m, name, x) for m in model.modules() for name, x in vars(m).items() if isinstance(x, PreTrainedConfig)]
    for (module, name, _), own in zip(held, copy.deepcopy([config for *_, config in held]), strict=True):
        setattr(module, name, own)


def config_by_layer(config, modules: Mapping[int, nn.Module]) -> dict[int, StemConfig | Selector | None]:
    """The `config` argument of `enable` as one checked entry for each attention layer."""
    if _is_entry(config):
        return dict.fromkeys(modules, config)
    if isinstance(config, Sequence) and not isinstance(config, str):
        layers = next(iter(modules.values())).config.num_hidden_layers
        if len(config) != layers:
            raise ValueError(f"config must have an entry for each of the {layers} layers, got {len(config)}")
        config = {index: config[index] for index in modules}
    if not isinstance(config, Mapping):
        raise TypeError(f"config must be a StemConfig, or one per layer (mapping or sequence), got {config!r}")
    unknown = [index for index in config if type(index) is not int or index not in modules]  # True is no layer 1
    if unknown:
        raise ValueError(
            f"config: layers {sorted(unknown, key=repr)} do not exist; attention layers are {sorted(modules)}"
        )
    for index, entry in config.items():
        if entry is not None and not _is_entry(entry):
            raise TypeError(f"config of layer {index} must be a StemConfig, a Selector or None, got {entry!r}")
    return {index: config.get(index) for index in modules}


def _is_entry(config) -> bool:
    """Whether a config is a StemConfig or a Selector; a class, StemConfig itself for example, is neither."""
    return isinstance(config, StemConfig) or (callable(config) and not isinstance(config, type))


def _refusal(module: nn.Module) -> str | None:
    for name, expression in _special_arguments(type(module)).items():
        value = getattr(module, expression.removeprefix("self."), None) if expression.startswith("self.") else True
        if value is not None:
            return f"it passes {name}={expression} to its attention, and Stem does not implement {UNSUPPORTED[name]}"
    if getattr(module, "indexer", None) is not None or hasattr(module, "skip_topk"):
        return "its attention selects keys by an indexer of its own"
    if hasattr(module, "compressor"):
        return "its attention reads compressed keys of its own"
    return None


@lru_cache(maxsize=256)
def _special_arguments(attention: type) -> dict[str, str]:
    """Arguments in UNSUPPORTED that an attention class passes to transformers' interface, and their expressions."""
    try:
        calls = re.findall(r"attention_interface\((.*?)\*\*kwargs", inspect.getsource(attention.forward), re.DOTALL)
    except (OSError, TypeError):  # no source: such a call is refused when it comes
        return {}
    names = ("sinks", "softcap", "position_bias")
    return {name: found[1] for name in names for call in calls if (found := re.search(rf"\b{name}=([\w.]+)", call))}

"""Config of each attention layer: from the settings in additional_config, and from what the layers themselves are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from stem.config import StemConfig
from stem.patterns.options import CONFIG_FIELDS, per_layer
from stem.validation import check_integer

PLACES = ("dense_layers", "layers", "min_tokens")
OPTIONS = (*CONFIG_FIELDS, "preset", *PLACES)
MOST_DIMENSIONS = 256  # of a head


class Layer(NamedTuple):
    """One attention layer of a model."""

    index: int
    config: StemConfig | None  # None keeps vLLM's own attention
    reason: str = ""  # why it does


def stem_settings(vllm_config) -> Mapping | None:
    """The dict "stem" of additional_config; None without one. Raises TypeError if it is no dict."""
    additional = vllm_config.additional_config
    options = additional.get("stem") if isinstance(additional, Mapping) else None
    if options is not None and not isinstance(options, Mapping):
        raise TypeError(f'additional_config["stem"] must be a dict of options, got {options!r}')
    return options


def configs_by_layer(options: Mapping, count: int) -> list[StemConfig | None]:
    """Config of each of `count` layers; raises TypeError or ValueError naming the option that is wrong."""
    changes = options.get("layers")
    mappings = [options, *filter(None, changes.values() if isinstance(changes, Mapping) else ())]
    for given in mappings:
        known = OPTIONS if given is options else (*CONFIG_FIELDS, "preset")
        if isinstance(given, Mapping) and (unknown := sorted(set(given) - set(known))):
            raise TypeError(f"unknown option {unknown[0]}={given[unknown[0]]!r}; the options are {', '.join(known)}")
    check_integer("min_tokens", options.get("min_tokens", 0), 0)
    shared = {name: value for name, value in options.items() if name not in PLACES}
    return per_layer(shared, count, options.get("dense_layers", 0), changes)


def check(vllm_config) -> None:
    """Raise TypeError or ValueError for wrong settings, and for the back end of Stem without settings."""
    if stem_settings(vllm_config) is not None:
        model_configs(vllm_config)
    elif getattr(vllm_config.attention_config.backend, "name", None) == "CUSTOM":
        raise ValueError(
            "the attention back end is CUSTOM, but additional_config has no 'stem': add "
            """--additional-config '{"stem": {"density": 0.25}}', or choose another back end"""
        )


def model_configs(vllm_config) -> list[StemConfig | None]:
    """Config of each layer of the model; raises ValueError for an engine that sparse prefill does not cover."""
    parallel = vllm_config.parallel_config
    refused = {
        "speculative decoding": vllm_config.speculative_config is not None,
        "decode context parallelism": parallel.decode_context_parallel_size > 1,
        "prefill context parallelism": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "steps in microbatches (--enable-dbo, --ubatch-size)": getattr(parallel, "use_ubatching", False),
    }
    for name, is_on in refused.items():
        if is_on:
            raise ValueError(f"stem.vllm does not support {name}: turn it off, or remove 'stem' from additional_config")
    return configs_by_layer(stem_settings(vllm_config), vllm_config.model_config.hf_text_config.num_hidden_layers)


def sparse_layers(vllm_config, layers: Mapping[str, object]) -> dict[str, Layer]:
    """Every attention layer by name. Raises ValueError if none would be sparse, or for an option that does not fit."""
    from vllm.model_executor.models.utils import extract_layer_index

    configs, found = model_configs(vllm_config), {}
    for name, layer in layers.items():
        index = extract_layer_index(name)
        config, reason = configs[index], own_attention(layer)
        if config is None:
            reason = "dense in the settings"
        found[name] = Layer(index, None if reason else config, reason)
        if found[name].config and config.compute == "fp8":
            check_fp8(vllm_config, layer.impl.head_size, config.block_size)
    sparse = [layer.config for layer in found.values() if layer.config]
    if not sparse and vllm_config.parallel_config.pipeline_parallel_size == 1:  # else another stage may have one
        reasons = ", ".join(sorted({layer.reason for layer in found.values()})) or "no attention layers"
        raise ValueError(f"stem.vllm would leave every layer to vLLM's own attention: {reasons}")
    page = vllm_config.cache_config.block_size
    for config in sparse:
        if page % config.block_size:
            raise ValueError(
                f"vLLM's pages must hold whole blocks of {config.block_size} tokens, got pages of {page}: add "
                f"--block-size {config.block_size} to vLLM, or choose a block_size of Stem that divides {page}"
            )
    return found


def check_fp8(vllm_config, head_dim: int, block_size: int) -> None:
    """Raise ValueError if the kernel of compute="fp8" does not cover an engine's attention."""
    from stem.kernels.hopper_forward import unsupported

    device = torch.device(vllm_config.device_config.device_type)
    if reason := unsupported(device, vllm_config.model_config.dtype, head_dim, block_size):
        raise ValueError(f'compute="fp8" does not cover {reason}: take compute="input", the default')


def own_attention(layer) -> str:
    """Reason why a layer of vLLM keeps vLLM's own attention whatever the settings say; empty if it need not."""
    from vllm.model_executor.layers.attention import Attention
    from vllm.utils.torch_utils import is_quantized_kv_cache
    from vllm.v1.attention.backend import AttentionType

    impl = layer.impl
    if not hasattr(impl, "stem_config"):
        return f"attention of {type(impl).__name__}"
    reasons = {
        "not causal": layer.attn_type != AttentionType.DECODER,
        "sliding window": layer.sliding_window is not None,
        "attention sinks": getattr(impl, "sinks", None) is not None,
        "ALiBi": impl.alibi_slopes is not None,
        "soft-capped scores": bool(impl.logits_soft_cap),
        f"{impl.kv_cache_dtype} cache": is_quantized_kv_cache(impl.kv_cache_dtype),
        f"head dimension {impl.head_size}": impl.head_size > MOST_DIMENSIONS,
        type(layer).__name__: isinstance(layer, Attention) and type(layer) is not Attention,  # makes batches of its own
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def require_custom_backend(platform) -> None:
    """Let a GPU's choice of attention raise ValueError if there are settings for Stem but another back end runs."""
    choose = platform.get_attn_backend_cls

    def checked(selected_backend, *args, **kwargs):
        from vllm.config import get_current_vllm_config

        name = getattr(selected_backend, "name", None)
        if name != "CUSTOM" and stem_settings(get_current_vllm_config()) is not None:
            raise ValueError(f"additional_config has 'stem', but the attention back end is {name}: choose CUSTOM")
        return choose(selected_backend, *args, **kwargs)

    if not hasattr(choose, "is_checked"):
        checked.is_checked = True
        type(platform).get_attn_backend_cls = staticmethod(checked)

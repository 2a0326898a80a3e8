"""Stem on and off: enable, disable, stem_prefill and density."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from stem.config import StemConfig
from stem.hf.models import (
    attention_modules,
    check_covered,
    check_model,
    config_by_layer,
    give_own_configs,
    own_attention,
    refuse_dense_models,
)
from stem.hf.report import NAME, Layer, Report, Selector
from stem.impl.coverage import IMPLS, impl_for
from stem.validation import check_choice, check_prompt_length

BLOCKS: list[dict] = []  # open blocks of stem_prefill: by attention module, the Layer to restore and whether it ran


def enable(
    model: nn.Module,
    config: StemConfig | Selector | Mapping[int, StemConfig | Selector | None] | Sequence | None = None,
    impl: str | None = None,
    *,
    prompt_length: int | None = None,
    mesh: DeviceMesh | None = None,
) -> None:
    """Make a model's prefill sparse; a second call replaces the config and restarts the density counts.

    Args:
        model: A causal language model of transformers, or a module that holds one. Its config objects are copied.
        config: For every layer (default StemConfig()), or per layer: a sequence, or a mapping from layer index. Layers
            with None, or missing in the mapping, are dense. A Selector (q, k, v) -> BlockSelection, for example
            functools.partial(stem.patterns.select, "xattention"), gets q scaled so that the softmax scale is D**-0.5.
        impl: See stem.block_sparse_attention. It is checked here for the device and dtype of each layer's weights
            (autocast's dtype inside an autocast block), its head_dim and its block_size.
        prompt_length: Tokens of a prompt given in chunks, left padding included, see stem.stem_attention. Tokens after
            it, and the last token before right padding, count as its end. Default: each call ends its prompt.
        mesh: One dimension of ranks that share each prompt. Every rank calls the model with the whole prompt, computes
            its part, keeps its part of the cache, and gets the logits of one process: ask for few by logits_to_keep, as
            `generate` does. Inference only, without padding; see stem.distributed.
    Raises:
        TypeError: If model is no torch module, a config is no StemConfig, or impl does not take the dtype.
        ValueError: If Stem cannot replace the model's attention or would leave every layer dense, config does not fit
            the layers, impl does not cover one, a Selector is given a prompt_length, or a layer cannot share prompts.
    """
    check_choice("impl", impl, (None, *IMPLS))
    modules = attention_modules(model)
    configs = config_by_layer(StemConfig() if config is None else config, modules)
    check_prompt_length(prompt_length, 1)
    if prompt_length is not None and any(map(callable, configs.values())):
        raise ValueError(f"prompt_length={prompt_length} is for a StemConfig, not for a Selector")
    own = {index: own_attention(module) for index, module in modules.items()}
    refuse_dense_models(model, {index: reason for index, reason in own.items() if configs[index] is not None})
    for index, module in modules.items():
        chosen = impl_for(getattr(configs[index], "compute", "input"), impl)
        if chosen is not None and configs[index] is not None and own[index] is None:
            check_covered(module, configs[index], chosen)
    shared, peers = _shared_prompt(mesh, configs, own), _tensor_parallel(model)
    disable(model)
    give_own_configs(model)
    plans = {id(config): {} for config in configs.values()}
    for index, module in modules.items():
        previous = "sdpa" if (old := module.config._attn_implementation) == NAME else old  # config of an enabled model
        module.stem_layer = Layer(index, configs[index], impl, prompt_length, own[index], module.config, previous)
        module.stem_layer.shared, module.stem_layer.peers = shared, peers
        module.stem_layer.plans = plans[id(configs[index])]
    for module in modules.values():
        _choose(module, NAME)
    if shared is not None:
        shared.install(model)


def disable(model: nn.Module) -> None:
    """Give a model back its attention from before `enable`. Models without Stem and later choices stay as they are.

    Raises TypeError if model is no torch module.
    """
    _remove(model, _enabled_layers(model))


@contextmanager
def stem_prefill(
    model: nn.Module,
    config=None,
    impl: str | None = None,
    *,
    prompt_length: int | None = None,
    mesh: DeviceMesh | None = None,
) -> Iterator[Report]:
    """`enable` for the length of a with block; yields the Report, which remains readable afterwards.

    The model then has its earlier attention (or Stem with its earlier config), unless the block chose another one.
    Blocks may end in any order. The one that began last holds until its end.
    """
    modules = attention_modules(model).values()
    before = {module: (getattr(module, "stem_layer", None), _is_chosen(module)) for module in modules}
    enable(model, config, impl, prompt_length=prompt_length, mesh=mesh)
    BLOCKS.append(before)
    try:
        yield density(model)
    finally:
        position = next(i for i, block in enumerate(BLOCKS) if block is before)
        del BLOCKS[position]
        for later in BLOCKS[position:]:  # blocks that began inside this one and have not ended
            for module in later.keys() & before.keys():
                later[module] = before.pop(module)
        chosen = [module for module, (_, was_chosen) in before.items() if was_chosen and _is_chosen(module)]
        _remove(model, {module: module.stem_layer for module in before if hasattr(module, "stem_layer")})
        for module, (layer, _) in before.items():
            if layer is not None:
                module.stem_layer, layer.settings = layer, module.config
        for shared in {layer.shared for layer, _ in before.values() if layer is not None} - {None}:
            shared.install(model)
        for module in chosen:
            _choose(module, NAME)


def density(model: nn.Module) -> Report:
    """Realised density of each layer since `enable`, see Report.

    Raises TypeError if model is no torch module, ValueError if Stem is not enabled.
    """
    layers = list(_enabled_layers(model).values())
    if not layers:
        raise ValueError(f"model {type(model).__name__} does not use Stem: call stem.hf.enable(model, config) first")
    return Report(layers)


def _shared_prompt(mesh: DeviceMesh | None, configs: Mapping, own: Mapping[int, str | None]):
    """SharedPrompt of a mesh, None without one; ValueError if a layer cannot share prompts."""
    if mesh is None:
        return None
    from stem.hf.shared import SharedPrompt

    for index, config in configs.items():
        if own[index] is not None or callable(config):
            reason = own[index] or "a Selector"
            raise ValueError(f"mesh: layer {index} cannot share prompts, because its attention is {reason}")
    return SharedPrompt(mesh, next((config for config in configs.values() if config is not None), StemConfig()))


def _tensor_parallel(model: nn.Module):
    """Peers that hold the other heads of a model with a tensor parallel plan; None without one."""
    mesh = getattr(model, "_device_mesh", None)
    if mesh is None or "tp" not in (mesh.mesh_dim_names or ("tp",)):
        return None
    from stem.distributed.attention import TIMEOUT
    from stem.distributed.exchange import Peers

    return Peers.of(mesh["tp"] if mesh.ndim > 1 else mesh, TIMEOUT)


def _is_chosen(module: nn.Module) -> bool:
    return module.config._attn_implementation == NAME


def _remove(model: nn.Module, layers: dict[nn.Module, Layer]) -> None:
    for layer in layers.values():  # a report says from here on what it says now
        layer.settings = copy.copy(layer.settings)
        if layer.shared is not None:
            layer.shared.remove()
    for module, layer in layers.items():
        if _is_chosen(module):
            _choose(module, layer.previous)
        del module.stem_layer
    if not layers:
        return
    *_, last = layers.values()
    for module in model.modules():  # a copied config that the user gave the model since `enable`
        if getattr(getattr(module, "config", None), "_attn_implementation", None) == NAME:
            _choose(module, last.previous)


def _choose(module: nn.Module, implementation: str) -> None:
    module.config._attn_implementation = {"": implementation}  # a str would also reach nested configs


def _enabled_layers(model: nn.Module) -> dict[nn.Module, Layer]:
    check_model(model)
    return {module: module.stem_layer for module in model.modules() if hasattr(module, "stem_layer")}

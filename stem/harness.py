"""lm-eval's Hugging Face model class with Stem attention, registered under the name `stem`."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from stem import hf, patterns
from stem.config import StemConfig
from stem.pretrained import resolve

CONFIG_FIELDS = tuple(field.name for field in fields(StemConfig))
MODEL_OPTIONS = (*CONFIG_FIELDS, "preset", "pattern", "dense_layers")


@register_model("stem")
class StemLM(HFLM):
    """lm-eval's Hugging Face model with Stem attention in prefill.

    Besides everything `HFLM` takes: the fields of `StemConfig`, `preset` ("paper", "angelslim", "hpc_ops"),
    `pattern` (a name in `stem.patterns`, default "stem") and `dense_layers` (an int n keeps the first n layers dense; a
    list names layers, negative from the end).
    """

    def __init__(self, pretrained: str | torch.nn.Module, tokenizer=None, **options) -> None:
        given = {name: options.pop(name) for name in MODEL_OPTIONS if name in options}
        dense_layers = given.pop("dense_layers", 0)
        method = method_from_options(given)
        for name, value in options.items():
            if near := difflib.get_close_matches(name, MODEL_OPTIONS, n=1, cutoff=0.8):
                raise TypeError(f"unknown model argument {name}={value!r}; did you mean {near[0]}?")
        super().__init__(pretrained=resolved(pretrained), tokenizer=resolved(tokenizer), **options)
        hf.enable(self.model, per_layer(method, self.model.config.get_text_config().num_hidden_layers, dense_layers))

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        """One sequence at a time: lm-eval pads on the right and passes no mask, which would change Stem's budget."""
        batch_size, self.batch_size_per_gpu = self.batch_size_per_gpu, 1
        try:
            return super()._loglikelihood_tokens(requests, disable_tqdm)
        finally:
            self.batch_size_per_gpu = batch_size


def method_from_options(options: Mapping[str, object]) -> StemConfig | hf.Selector:
    """What `stem.hf.enable` takes, from StemConfig fields, "preset" and "pattern" of a command line."""
    fields_given = {name: value for name, value in options.items() if name in CONFIG_FIELDS}
    preset, pattern = options.get("preset"), options.get("pattern", "stem")
    config = StemConfig(**fields_given) if preset is None else StemConfig.preset(preset, **fields_given)
    if pattern not in patterns.names():
        raise ValueError(f"pattern must be one of {', '.join(patterns.names())}, got {pattern!r}")
    return config if pattern == "stem" else partial(patterns.select, pattern, config=config)


def per_layer(method: StemConfig | hf.Selector, layers: int, dense_layers: int | Sequence[int]) -> list:
    """`method` for every layer, None (dense) for the first `dense_layers`, or for those that a sequence names."""
    dense = range(dense_layers) if isinstance(dense_layers, int) else dense_layers
    if isinstance(dense_layers, bool) or isinstance(dense_layers, str) or not all(-layers <= i < layers for i in dense):
        raise ValueError(
            f"dense_layers must be a count 0..{layers} or layers in -{layers}..{layers - 1}, got {dense_layers!r}"
        )
    return [None if layer in dense or layer - layers in dense else method for layer in range(layers)]


def resolved(name):
    """The folder of a model name that only this library knows; whatever is no string passes through."""
    return resolve(name) if isinstance(name, str) else name

"""lm-eval's Hugging Face model class with Stem attention, registered under the name `stem`."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from functools import partial
from math import isnan
from statistics import fmean

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from stem import hf, patterns
from stem.config import StemConfig
from stem.pretrained import resolve

CONFIG_FIELDS = tuple(field.name for field in fields(StemConfig))
BUDGET_FIELDS = {"density", "k_start", "k_start_regimes", "threshold", "allocation"}
NATIVE = sorted({keyword for name in patterns.names() for keyword in patterns.keywords(name)} - set(CONFIG_FIELDS))
METHOD_OPTIONS = (*CONFIG_FIELDS, "preset", "pattern", *NATIVE)
MODEL_OPTIONS = (*METHOD_OPTIONS, "dense_layers", "layers", "impl")


@register_model("stem")
class StemLM(HFLM):
    """lm-eval's Hugging Face model with Stem attention in prefill.

    Besides everything `HFLM` takes: the fields of `StemConfig`, `preset` ("paper", "angelslim", "hpc_ops"),
    `pattern` (a name in `stem.patterns`, default "stem") and that pattern's own parameters, `dense_layers` (an int n
    keeps the first n layers dense; a list names layers, negative from the end), `layers` (a mapping from layer to the
    options that are different there, or to None for dense) and `impl` (see stem.block_sparse_attention).
    """

    def __init__(self, pretrained: str | torch.nn.Module, tokenizer=None, **options) -> None:
        given = {name: options.pop(name) for name in MODEL_OPTIONS if name in options}
        for name, value in options.items():
            if near := difflib.get_close_matches(name, MODEL_OPTIONS, n=1, cutoff=0.8):
                raise TypeError(f"unknown model argument {name}={value!r}; did you mean {near[0]}?")
        method_from_options(given)  # names what is wrong before a model is loaded
        super().__init__(pretrained=resolved(pretrained), tokenizer=resolved(tokenizer), **options)
        if hasattr(self, "accelerator") and self.world_size == 1:  # accelerate launch without GPUs: share the requests
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self._given, self._densities = given, []
        layers = self.model.config.get_text_config().num_hidden_layers
        self._methods = per_layer(given, layers, given.get("dense_layers", 0), given.get("layers", {}))
        hf.enable(self.model, self._methods, given.get("impl"))

    def get_model_info(self) -> dict:
        """What results files record: lm-eval's own, and under "stem" the options and what was computed."""
        report = hf.density(self.model)
        densities = [each for each in self._densities or [report.density()] if not isnan(each)]
        stem = {
            **self._given,
            "config": asdict(_config(self._given)),
            "density": fmean(densities) if densities else None,
            "density_by_layer": [row["density"] for row in report],
        }
        return {**super().get_model_info(), "stem": stem}

    def gather_object(self, obj, dst: int = 0):
        """lm-eval's own; on the way the processes tell their densities."""
        gathered = super().gather_object((obj, hf.density(self.model).density()), dst)
        if gathered is None:
            return None
        objects, self._densities = zip(*gathered, strict=True)
        return list(objects)

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        """One sequence at a time: lm-eval pads on the right and passes no mask, which would change Stem's budget."""
        if all(method is None or getattr(method, "density", None) == 1 for method in self._methods):
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        batch_size, self.batch_size_per_gpu = self.batch_size_per_gpu, 1
        try:
            return super()._loglikelihood_tokens(requests, disable_tqdm)
        finally:
            self.batch_size_per_gpu = batch_size

    def _detect_batch_size(self, requests=None, pos: int = 0):
        """lm-eval's own; what it tries out does not count as computed."""
        with hf.stem_prefill(self.model, self._methods, self._given.get("impl")):
            return super()._detect_batch_size(requests, pos)


def method_from_options(options: Mapping[str, object]) -> StemConfig | hf.Selector | None:
    """What `stem.hf.enable` takes, from StemConfig fields, "preset", "pattern" and its parameters of a command line.

    The pattern "dense" is None, the model's own attention.
    """
    pattern = options.get("pattern", "stem")
    if pattern not in patterns.names():
        raise ValueError(f"pattern must be one of {', '.join(patterns.names())}, got {pattern!r}")
    accepted = patterns.keywords(pattern)
    if foreign := [name for name in NATIVE if name in options and name not in accepted]:
        owners = [name for name in patterns.names() if foreign[0] in patterns.keywords(name)]
        raise TypeError(f"{foreign[0]} is no parameter of pattern={pattern!r} but of {', '.join(owners)}")
    native = {name: options[name] for name in accepted if name in options}
    config = _config({name: value for name, value in options.items() if name not in native})
    if pattern in ("stem", "dense"):
        return config if pattern == "stem" else None
    return partial(patterns.select, pattern, config=config, **native)


def per_layer(
    options: Mapping[str, object],
    count: int,
    dense_layers: int | Sequence[int] = 0,
    layers: Mapping[int, Mapping[str, object] | None] | None = None,
) -> list[StemConfig | hf.Selector | None]:
    """The method of each of `count` layers; see StemLM for the arguments."""
    dense = range(dense_layers) if isinstance(dense_layers, int) else dense_layers
    if isinstance(dense_layers, bool) or isinstance(dense_layers, str) or not all(-count <= i < count for i in dense):
        raise ValueError(
            f"dense_layers must be a count 0..{count} or layers in -{count}..{count - 1}, got {dense_layers!r}"
        )
    method = method_from_options(options)
    methods = [None if layer in dense or layer - count in dense else method for layer in range(count)]
    for layer, changes in (layers or {}).items():
        if not -count <= int(layer) < count or set(changes or {}) - set(METHOD_OPTIONS):
            raise ValueError(
                f"layers must map layers in -{count}..{count - 1} to None or to options out of "
                f"{', '.join(METHOD_OPTIONS)}, got {layer!r}: {changes!r}"
            )
        own_budget = BUDGET_FIELDS & set(changes or {})
        kept = {name: value for name, value in options.items() if not (own_budget and name in BUDGET_FIELDS)}
        methods[int(layer)] = None if changes is None else method_from_options({**kept, **changes})
    return methods


def resolved(name):
    """The folder of a model name that only this library knows; whatever is no string passes through."""
    return resolve(name) if isinstance(name, str) else name


def _config(options: Mapping[str, object]) -> StemConfig:
    fields_given = {name: value for name, value in options.items() if name in CONFIG_FIELDS}
    preset = options.get("preset")
    return StemConfig(**fields_given) if preset is None else StemConfig.preset(preset, **fields_given)

"""lm-eval's Hugging Face model class with Stem attention, named `stem`, and its cache for `--use_cache`."""

import difflib
import hashlib
from collections.abc import Collection, Mapping
from dataclasses import asdict, fields
from functools import partial
from math import isnan
from numbers import Integral
from pathlib import Path
from statistics import fmean

import torch
from lm_eval.api.model import CachingLM, hash_args
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from stem import hf, patterns
from stem.config import StemConfig
from stem.impl.coverage import IMPLS
from stem.pretrained import resolve
from stem.validation import check_choice

CONFIG_FIELDS = tuple(field.name for field in fields(StemConfig))
BUDGET_FIELDS = {"density", "k_start", "k_start_regimes", "threshold", "allocation"}
NATIVE = sorted({keyword for name in patterns.names() for keyword in patterns.keywords(name)} - set(CONFIG_FIELDS))
METHOD_OPTIONS = (*CONFIG_FIELDS, "preset", "pattern", *NATIVE)
MODEL_OPTIONS = (*METHOD_OPTIONS, "dense_layers", "layers", "impl")
NO_PART_IN_ANSWERS = ("batch_size", "max_batch_size", "device")
REQUESTS = ("loglikelihood", "loglikelihood_rolling", "generate_until")


@register_model("stem")
class StemLM(HFLM):
    """lm-eval's Hugging Face model with Stem attention in prefill.

    `from_cache` counts the answers that `--use_cache` gave in place of the model. Arguments are those of `HFLM` and:
        the fields of `StemConfig`, and preset, a name for `StemConfig.preset`.
        pattern: A name in `stem.patterns.names()` (default "stem"), with that pattern's own parameters beside it.
            "dense" is the model's own attention and takes no other option.
        dense_layers: Number of first layers that stay dense, or a list of layers; -1 is the last one.
        layers: Mapping from layer to the options that differ there, or to None for a dense layer.
        impl: See `stem.block_sparse_attention`.
    """

    def __init__(self, pretrained: str | torch.nn.Module, tokenizer=None, **options) -> None:
        given = {name: options.pop(name) for name in MODEL_OPTIONS if name in options}
        for name, value in options.items():
            if near := difflib.get_close_matches(name, MODEL_OPTIONS, n=1, cutoff=0.8):
                raise TypeError(f"unknown model argument {name}={value!r}; did you mean {near[0]}?")
        check_choice("impl", given.get("impl"), (None, *IMPLS))
        method_from_options(given)  # a wrong option raises before the model is loaded
        super().__init__(pretrained=resolved(pretrained), tokenizer=resolved(tokenizer), **options)
        if hasattr(self, "accelerator") and self.world_size == 1:  # accelerate launch without GPUs: share the requests
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self._given, self._options = given, options
        self._described = {**given, "config": asdict(_config(given))}
        self._gathered, self.from_cache = (), 0
        layers = self.model.config.get_text_config().num_hidden_layers
        self._methods = per_layer(given, layers, given.get("dense_layers", 0), given.get("layers"))
        hf.enable(self.model, self._methods, given.get("impl"))

    def get_model_info(self) -> dict:
        """Return lm-eval's own entries and "stem": options, resolved config, computed density and `from_cache`."""
        densities, from_cache = zip(*(self._gathered or [self._counts()]), strict=True)
        computed = [density for density in densities if not isnan(density)]
        stem = {
            **self._described,
            "density": fmean(computed) if computed else None,
            "density_by_layer": [row["density"] for row in hf.density(self.model)],
            "from_cache": sum(from_cache),
        }
        return {**super().get_model_info(), "stem": stem}

    def fingerprint(self) -> str:
        """Hash of options (not batch size and device), tokenizer, config and weight samples: 12 hexadecimal digits."""
        options = {name: value for name, value in self._options.items() if name not in NO_PART_IN_ANSWERS}
        parameters = [x.detach() for x in self.model.parameters() if not x.is_meta]
        weights = [(*x.flatten()[:4].tolist(), float(x.float().sum())) for x in parameters]
        config = self.model.config.to_dict()
        about = [self._described, options, self.tokenizer.name_or_path, config, weights]
        return hashlib.sha256(repr(_in_order(about)).encode()).hexdigest()[:12]

    def _counts(self) -> tuple[float, int]:
        return hf.density(self.model).density(), self.from_cache

    def gather_object(self, obj, dst: int = 0):
        """Gather the objects of all processes as lm-eval does, and with them densities and counts for the results."""
        gathered = super().gather_object((obj, self._counts()), dst)
        if gathered is None:
            return None
        objects, self._gathered = zip(*gathered, strict=True)
        return list(objects)

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        """Compute one sequence at a time: lm-eval pads on the right without a mask, which would change the budget."""
        if all(method is None or getattr(method, "density", None) == 1 for method in self._methods):
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        batch_size, self.batch_size_per_gpu = self.batch_size_per_gpu, 1
        try:
            return super()._loglikelihood_tokens(requests, disable_tqdm)
        finally:
            self.batch_size_per_gpu = batch_size

    def _detect_batch_size(self, requests=None, pos: int = 0):
        """Find lm-eval's batch size without counting the trial batches in the density."""
        with hf.stem_prefill(self.model, self._methods, self._given.get("impl")):
            return super()._detect_batch_size(requests, pos)


class AnswerCache(CachingLM):
    """lm-eval's cache, which looks up the request alone, in one file for each fingerprint of a StemLM."""

    def __init__(self, lm, cache_db: str) -> None:
        if isinstance(lm, StemLM):
            file = Path(cache_db)
            cache_db = str(file.with_name(f"{file.stem}_{lm.fingerprint()}{file.suffix}"))
            lm.from_cache = 0
        super().__init__(lm, cache_db)

    def __getattr__(self, name: str):
        found = super().__getattr__(name)
        if name not in REQUESTS or not isinstance(self.lm, StemLM):
            return found

        def answer(requests):
            self.lm.from_cache += sum(self._holds(name, request.args) for request in requests)
            return found(requests)

        return answer

    def _holds(self, name: str, arguments: tuple) -> bool:
        sampled = name == "generate_until" and arguments[1].get("do_sample", False)  # lm-eval computes these again
        return not sampled and hash_args(name, arguments) in self.dbdict


def method_from_options(
    given: Mapping[str, object], inherited: Mapping[str, object] | None = None
) -> StemConfig | hf.Selector | None:
    """Return a StemConfig for the pattern "stem", None (the model's own attention) for "dense", else a selector.

    Args:
        given: `METHOD_OPTIONS` by name, see StemLM. Other names are ignored.
        inherited: Options of all layers, for the options of one layer. A budget in `given` replaces their budget, and a
            pattern in `given` their pattern and its own parameters.
    Raises:
        ValueError, TypeError: If an option of `given` is unknown, has a wrong value, or has no effect.
    """
    replaced = {*(BUDGET_FIELDS if BUDGET_FIELDS & set(given) else ()), *(NATIVE if "pattern" in given else ())}
    options = {name: value for name, value in (inherited or {}).items() if name not in replaced} | dict(given)
    pattern = options.get("pattern", "stem")
    check_choice("pattern", pattern, patterns.names())
    accepted = patterns.keywords(pattern)
    if foreign := [name for name in NATIVE if name in options and name not in accepted]:
        owners = [name for name in patterns.names() if foreign[0] in patterns.keywords(name)]
        raise TypeError(f"{foreign[0]} is no parameter of pattern={pattern!r} but of {', '.join(owners)}")
    if pattern == "dense":
        for name in METHOD_OPTIONS:
            if name != "pattern" and given.get(name) is not None:
                raise ValueError(f"pattern='dense' takes no other option, got {name}={given[name]!r}")
        return None
    native = {name: options[name] for name in accepted if name in options}
    config = _config({name: value for name, value in options.items() if name not in native})
    if pattern == "stem":
        return config
    select = partial(patterns.select, pattern, config=config, **native)
    budgets = [name for name in ("density", "k_start", "k_start_regimes") if given.get(name) is not None]
    if not _follows_budget(select, config) and native and budgets:
        raise ValueError(
            f"{budgets[0]}={given[budgets[0]]!r} has no effect with pattern={pattern!r} and {native}, "
            "which set the density themselves; leave one of the two out"
        )
    return select


def per_layer(
    options: Mapping[str, object],
    count: int,
    dense_layers: int | Collection[int] = 0,
    layers: Mapping[int, Mapping[str, object] | None] | None = None,
) -> list[StemConfig | hf.Selector | None]:
    """Return the attention of each of `count` layers: `method_from_options` with StemLM's `dense_layers` and `layers`.

    A layer number may be a text, as in JSON. Raises ValueError if a layer does not exist or is named twice.
    """
    dense, method = _dense_layers(dense_layers, count), method_from_options(options)
    methods = [None if layer in dense else method for layer in range(count)]
    accepted = f"map layers in -{count}..{count - 1} to None or to options out of {', '.join(METHOD_OPTIONS)}"
    if layers is not None and not isinstance(layers, Mapping):
        raise ValueError(f"layers must {accepted}, got {layers!r}")
    seen = set()
    for key, changes in (layers or {}).items():
        layer = int(key) if isinstance(key, str) and key.removeprefix("-").isdecimal() else key
        known = changes is None or (isinstance(changes, Mapping) and set(changes) <= set(METHOD_OPTIONS))
        if not known or not _is_layer(layer, count):
            raise ValueError(f"layers must {accepted}, got {key!r}: {changes!r}")
        if layer % count in seen:
            raise ValueError(f"layers must name each layer once, got {key!r} for layer {layer % count} again")
        seen.add(layer % count)
        methods[layer] = None if changes is None else method_from_options(changes, options)
    return methods


def resolved(name):
    """Return the folder of a packaged model or GGUF file; see `stem.pretrained.resolve`. Objects pass through."""
    return resolve(name) if isinstance(name, str) else name


def _dense_layers(dense_layers: int | Collection[int], count: int) -> set[int]:
    if getattr(dense_layers, "ndim", None) == 0:  # a NumPy or torch scalar
        dense_layers = dense_layers.item()
    if isinstance(dense_layers, Collection) and not isinstance(dense_layers, str | Mapping):
        if all(_is_layer(layer, count) for layer in dense_layers):
            return {layer % count for layer in dense_layers}
    elif _is_layer(dense_layers, count + 1) and dense_layers >= 0:
        return set(range(dense_layers))
    accepted = f"a count 0..{count} or layers in -{count}..{count - 1}"
    raise ValueError(f"dense_layers must be {accepted}, got {dense_layers!r}")


def _is_layer(layer: object, count: int) -> bool:
    return isinstance(layer, Integral) and not isinstance(layer, bool) and -count <= layer < count


def _in_order(x):
    """Settings with text keys in order, whatever the order and the type in which they were given."""
    if isinstance(x, Mapping):
        return sorted((str(key), _in_order(value)) for key, value in x.items())
    return [*map(_in_order, x)] if isinstance(x, list | tuple) else str(x)


def _follows_budget(select: partial, config: StemConfig) -> bool:
    """Whether a pattern keeps more blocks at density 1; its own checks of its parameters raise on the way."""
    q = torch.randn(1, 1, max(16 * config.block_size, 1024), 8, generator=torch.Generator().manual_seed(0))
    kept = select(q, q, q).density()
    full = config.replace(density=1.0, k_start=None, k_start_regimes=None, allocation="position_decay", threshold=None)
    return kept == 1 or kept < select(q, q, q, config=full).density()


def _config(options: Mapping[str, object]) -> StemConfig:
    make = StemConfig if options.get("preset") is None else partial(StemConfig.preset, options["preset"])
    return make(**{name: value for name, value in options.items() if name in CONFIG_FIELDS})

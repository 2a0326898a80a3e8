"""lm-eval's Hugging Face model class with Stem attention, named `stem`, and its cache for `--use_cache`."""

import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from math import isnan
from pathlib import Path
from statistics import fmean

import torch
from lm_eval.api.model import CachingLM, hash_args
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from stem import hf
from stem.hf.models import attention_modules
from stem.impl.coverage import IMPLS
from stem.patterns.options import METHOD_OPTIONS, config_from_options, method_from_options, per_layer
from stem.pretrained import resolve
from stem.validation import check_choice

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

    def __init__(self, pretrained: str | torch.nn.Module | None = None, tokenizer=None, **options) -> None:
        if not isinstance(pretrained, str | torch.nn.Module) or not pretrained:
            raise TypeError(f"pretrained must be a model's name, folder or file, or a model, got {pretrained!r}")
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
        self._described = {**given, "config": asdict(config_from_options(given))}
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
        """Hash of all that answers depend on, as it is now, forward hooks apart: 12 hexadecimal digits.

        That is this package's version, each layer's attention, lm-eval's options but batch size and device, the
        tokenizer, the model's configs, and every weight and buffer that is in memory (about a second a GB).
        """
        options = {name: value for name, value in self._options.items() if name not in NO_PART_IN_ANSWERS}
        layers = [getattr(module, "stem_layer", None) for module in attention_modules(self.model).values()]
        attention = [layer and (layer.attention, layer.impl, _method(layer.config)) for layer in layers]
        configs = [self.model.config.to_dict(), self.model.config._attn_implementation]
        if (generation := getattr(self.model, "generation_config", None)) is not None:
            configs.append(generation.to_dict())
        about = [version("stem-sparse-attention"), attention, options, _tokenization(self.tokenizer), configs]
        digest = hashlib.sha256(repr(_in_order(about)).encode())
        for x in (*self.model.parameters(), *self.model.buffers()):
            if not x.is_meta:
                digest.update(f"{x.dtype} {tuple(x.shape)}".encode())
                digest.update(x.detach().flatten().view(torch.uint8).cpu().numpy())
        return digest.hexdigest()[:12]

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


def resolved(name):
    """Return the folder of a packaged model or GGUF file; see `stem.pretrained.resolve`. Objects pass through."""
    return resolve(name) if isinstance(name, str) else name


def _method(config):
    """A layer's config, or what names a Selector in another process too."""
    if isinstance(config, partial):
        return [_method(config.func), config.args, config.keywords]
    return getattr(config, "__qualname__", config)


def _tokenization(tokenizer) -> str:
    """Rules by which a tokenizer cuts a text, as JSON, without the truncation and padding of its last call."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    rules |= dict(truncation=tokenizer.truncation_side, padding=tokenizer.padding_side)
    return json.dumps(rules, sort_keys=True)


def _in_order(x):
    """Settings with text keys in order, whatever the order and the type in which they were given."""
    if isinstance(x, Mapping):
        return sorted((str(key), _in_order(value)) for key, value in x.items())
    return [*map(_in_order, x)] if isinstance(x, list | tuple) else str(x)

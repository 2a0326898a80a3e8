"""Methods that a comparison runs: Stem, its variants and presets, every other pattern, and a control that must fail."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import stem
from stem import hf, patterns
from stem.budget import block_budget, causal_pairs
from stem.config import StemConfig
from stem.experiments.long_context import samples

# Name -> changes to the preset "adaptive". They differ in the last block of queries, in which the question stands: the
# preset scores it exactly, "cells alone" scores it like all other blocks, "dense end" keeps all of its key blocks.
ADAPTIVE = {
    "stem adaptive": {},
    "stem adaptive, cells alone": dict(exact_last_blocks=0),
    "stem adaptive, dense end": dict(exact_last_blocks=0, dense_last_blocks=1),
}
BLIND = (
    "sliding_window", "longformer", "bigbird", "sparse_transformer_strided", "sparse_transformer_fixed", "a_shape",
    "tri_shape", "random",
)  # fmt: skip  # patterns that depend on the shapes alone


@dataclass(frozen=True)
class Method:
    """One attention to compare."""

    name: str
    attention: StemConfig | hf.Selector | None = None  # what `stem.hf.enable` takes; None is dense attention
    block_size: int | None = None
    asked: float | None = None  # density asked for; None where the method sets its own


def methods(names: Iterable[str], densities: Iterable[float], block_sizes: Iterable[int]) -> list[Method]:
    """Every name at every density in (0, 1] and block size [tokens], and for each block size the control "window".

    All of them force one sink block and two local blocks, so that low densities leave something to choose.

    Args:
        names: Names of `all_names`; "dense" is skipped. The names in `ADAPTIVE` get the preset's threshold, which
            `calibrated` replaces. "stem softmax" is "stem adaptive, cells alone" with one budget for all rows in place
            of the threshold.
    """
    found = []
    for block_size in block_sizes:
        found.append(Method("window", window_control(block_size), block_size))
        adaptive = StemConfig.preset("adaptive", block_size=block_size, dense_up_to=0)
        own = {name: adaptive.replace(**changes) for name, changes in ADAPTIVE.items()}
        for density in densities:
            own["stem"] = StemConfig(block_size=block_size, density=density, sink_blocks=1, local_blocks=2)
            uniform = dict(exact_last_blocks=0, allocation="uniform", threshold=None, density=density)
            own["stem softmax"] = adaptive.replace(**uniform)
            for name in names:
                if name != "dense":
                    attention = own[name] if name in own else _selector(name, own["stem"])
                    found.append(Method(name, attention, block_size, density))
    return found


def _selector(name: str, config: StemConfig) -> hf.Selector:
    """A pattern as a selector; a pattern of `BLIND` selects once for all layers of the same shapes."""
    choose, made = partial(patterns.select, name, config=config), {}

    def select_once(q: Tensor, k: Tensor, v: Tensor):
        key = (q.shape, k.shape, q.device)
        if key not in made:
            made[key] = choose(q, k, v)
        return made[key]

    return select_once if name in BLIND else choose


def presets() -> list[Method]:
    """Stem with the schedules of its three sources, each of which sets its own density."""
    configs = {name: StemConfig.preset(name) for name in ("paper", "angelslim", "hpc_ops")}
    return [Method(f"stem, {name}", config, config.block_size) for name, config in configs.items()]


def all_names() -> tuple[str, ...]:
    """All names that `methods` takes: Stem, its variants, the other patterns, and last the costly oracles."""
    others = [name for name in patterns.names() if name != "stem"]
    others.sort(key=lambda name: (name.startswith("oracle"), name in BLIND))
    return ("stem", *ADAPTIVE, "stem softmax", *others)


def window_control(block_size: int = 64) -> StemConfig:
    """The control that must fail: one sink block and the two most recent blocks, whatever the scores say (our choice).

    A measure on which the control does as well as dense attention cannot see a broken prefill.
    """
    return StemConfig(block_size=block_size, k_start=3, decay=1.0, sink_blocks=1, local_blocks=2)


def calibrated(
    model, tokenizer, length: int, density: float, config: StemConfig, show: Callable = print
) -> StemConfig | None:
    """The config with the threshold that gives a density, solved on windows of `length` tokens of calibration texts.

    Returns None where the forced blocks alone exceed the density, and where no threshold fits, which it tells `show`.
    """
    blocks = -(-length // config.block_size)
    if int(block_budget(blocks, window_control(config.block_size)).sum()) / causal_pairs(blocks) > density:
        return None
    prompts = torch.cat(samples.calibration_windows(tokenizer, length, 1))
    try:
        return stem.calibrate(model, [prompts], density, config, tolerance=0.01).config
    except ValueError as error:
        show(f"adaptive at density {density}, blocks of {config.block_size}, {length} tokens is left out: {error}")
        return None

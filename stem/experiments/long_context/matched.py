"""Speed at matched accuracy: time of every method's operator on q, k and v of a real model, beside dense kernels.

Writes results/long_context/matched/. Without densities of its own, a run times each method at the density that
`matched_report.picked` shows for it: the lowest at which its answers and documents are within the bounds. Calls of a
method and of the fastest dense kernel take turns, so `speedup` is the median ratio of a turn, with its 95 % interval.
Selections of other methods than Stem and adaptive run in this repository's PyTorch code, so `attention_ms`, the time
over their lists, is shown too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from statistics import median

import torch
from torch import Tensor

import stem
from stem.config import StemConfig
from stem.experiments import records
from stem.experiments.long_context import matched_report, measures, methods, report, samples
from stem.experiments.long_context.methods import NO_VALUE, Method
from stem.experiments.speed import candidates, drop_in
from stem.experiments.theory import flow
from stem.planning import select
from stem.selection import BlockSelection
from stem.validation import check_number

NAMES = ("stem", "adaptive", methods.TUNED, "flashprefill", "flashprefill_v2", "xattention", "vertical_slash")
DENSITIES = (0.08, 0.15, 0.25)  # where no rows pick densities
HEADLINE = candidates.Shape(2**17)  # one layer of Llama-3.1-8B
INPUTS = CAPTURED, RANDOM = "captured", "random"
ROUNDS, TOLERANCE = 20, 0.02  # of the search for a threshold, and of its density as a share of it
ALLOWED = 0.02  # relative L2 difference of an operator to its selection's attention by another kernel
SECONDS, LEAST_TURNS, MOST_TURNS = 1.5, 7, 25  # no turn of two calls begins later, once there have been so many
SAME = ("method", "block_size", "asked", "source", "tokens")  # they name a row
Layers = Sequence[tuple[Tensor, Tensor, Tensor]]


def rows(
    layers: Layers,
    source: str,
    pairs: Iterable[tuple[str, float]],
    block_size: int = 128,
    show: Callable = print,
) -> Iterator[dict]:
    """Rows of dense kernels and of methods: mean times of a layer, the mean density, and speed-ups.

    Args:
        layers: q [1, Hq, N, D], k and v [1, Hkv, N, D] of each layer.
        source: Where they come from, in words.
        pairs: Method and the density asked of it, in (0, 1].
    """
    q, k, _ = layers[0]
    about = dict(source=source, tokens=q.shape[2], layers=len(layers))
    about |= dict(q_heads=q.shape[1], kv_heads=k.shape[1], head_dim=q.shape[3])
    kernels, times = candidates.dense_attends(q.device.type), {}
    with torch.no_grad():
        for provider in kernels.keys() - {*candidates.peers.FP8}:
            times[provider] = layer_ms(partial(kernels[provider], problem=None), layers)
            row = dict(method=provider, block_size=None, asked=None, density=1.0, operator_ms=times[provider])
            yield row | about
        fastest = min(times, key=times.get)
        dense = partial(kernels[fastest], problem=None)
        for name, density in pairs:
            try:
                method = next(iter(methods.candidates(name, density, block_size, q.shape[2])), None)
                if method is None:
                    raise ValueError("forced blocks leave the scores nothing to choose")
                row = dict(method=name, block_size=block_size, asked=density, dense=fastest)
                yield row | about | _measured(method, layers, dense)
            except (ValueError, RuntimeError) as error:
                show(f"{name} at density {density}, {source}: {type(error).__name__}: {str(error)[:200]}")


def _measured(method: Method, layers: Layers, dense: Callable) -> dict[str, float]:
    attention = method.attention
    if isinstance(attention, StemConfig):
        attention = attention if attention.threshold is None else with_threshold(attention, method.asked, layers)
        operate = partial(_by_config, attention)
        choose = partial(_choose, attention)
    else:
        choose = attention
        operate = partial(_by_selector, attention)
    selections = [choose(*qkv) for qkv in layers]
    _check(operate(*layers[0]), layers[0], selections[0])
    attends = [(*qkv, selection) for qkv, selection in zip(layers, selections, strict=True)]
    return dict(
        density=round(sum(of.density() for of in selections) / len(layers), 4),
        **in_turns(dense, operate, layers),
        selection_ms=layer_ms(choose, layers),
        attention_ms=layer_ms(stem.block_sparse_attention, attends),
    )


def in_turns(dense: Callable, operate: Callable, layers: Layers) -> dict[str, float]:
    """Median times of two calls that take turns on all layers [ms a layer], and their ratio with its 95 % interval."""
    calls, times, begun = (dense, operate), ([], []), None
    for turn in range(MOST_TURNS + 1):  # the first one warms up
        if turn > LEAST_TURNS and time.perf_counter() - begun > SECONDS:
            break
        begun = time.perf_counter() if turn == 1 else begun
        for number in (0, 1) if turn % 2 else (1, 0):
            ms = pass_ms(calls[number], layers)
            times[number].extend([ms] if turn else [])
    found = dict(dense_ms=median(times[0]), operator_ms=median(times[1]), turns=len(times[0]))
    found |= drop_in.paired(before / after for before, after in zip(*times, strict=True))
    return {name: float(f"{value:.5g}") for name, value in found.items()}


def _by_config(config: StemConfig, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return stem.stem_attention(q, k, v, config)


def _by_selector(choose: Callable, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return stem.block_sparse_attention(q, k, v, choose(q, k, v))


def _choose(config: StemConfig, q: Tensor, k: Tensor, v: Tensor) -> BlockSelection:
    return replace(select(q, k, v, config, q.shape[3] ** -0.5, None), dropped=config.dropped)


def _check(out: Tensor, qkv: tuple[Tensor, Tensor, Tensor], selection: BlockSelection) -> None:
    """Raise RuntimeError unless the output is that of another implementation over the selected blocks."""
    other = stem.block_sparse_attention(*qkv, selection, impl="triton" if out.is_cuda else "torch").float()
    error = float((out.float() - other).norm() / other.norm())
    if not error < ALLOWED:
        raise RuntimeError(f"the operator differs from attention over its selection by {error:.3g}")


def with_threshold(config: StemConfig, density: float, layers: Layers) -> StemConfig:
    """The config with the threshold that gives a density on these layers, by bisection of its logarithm."""
    low, high = -20.0, 0.0  # base e
    for _ in range(ROUNDS):
        found = config.replace(threshold=float(torch.tensor((low + high) / 2, dtype=torch.float64).exp()))
        kept = sum(_choose(found, *qkv).density() for qkv in layers) / len(layers)
        if abs(kept - density) <= TOLERANCE * density:
            return found
        low, high = ((low + high) / 2, high) if kept > density else (low, (low + high) / 2)
    raise ValueError(f"density={density} is not reached on these layers; the nearest is {kept:.4f}")


def layer_ms(call: Callable, layers: Sequence[tuple], repeats: int = 5) -> float:
    """Time of a call on each layer in turn, as the median of repeats, divided by the number of layers [ms]."""
    pass_ms(call, layers)  # warms up
    return float(f"{median(pass_ms(call, layers) for _ in range(repeats)):.5g}")


def pass_ms(call: Callable, layers: Sequence[tuple]) -> float:
    """Time of one call on each layer, divided by the number of layers [ms]."""
    synchronize = torch.cuda.synchronize if layers[0][0].is_cuda else lambda: None
    synchronize()
    start = time.perf_counter()
    for inputs in layers:
        call(*inputs)
    synchronize()
    return (time.perf_counter() - start) * 1e3 / len(layers)


def random_layer(shape: candidates.Shape, device: str, seed: int = 0) -> Layers:
    """One layer of random normal q, k and v."""
    generator = torch.Generator(device).manual_seed(seed)
    make = partial(torch.randn, device=device, dtype=getattr(torch, shape.dtype), generator=generator)
    return [tuple(make(1, heads, shape.tokens, shape.head_dim) for heads in (shape.q_heads, *[shape.kv_heads] * 2))]


def captured_layers(model, ids: Tensor) -> Layers:
    """q, k and v of all layers on one prompt int64 [1, N]."""
    found = flow.captures(model, ids.to(next(model.parameters()).device), range(model.config.num_hidden_layers))
    return [tuple(x.contiguous() for x in found[layer]) for layer in sorted(found)]


def picked_pairs(models: Iterable[str], length: int) -> list[tuple[str, float]]:
    """Methods and the densities that the rows of these models' longest samples, up to a length, pick for them.

    Left out are oracles, the step of Table 5 that is no method of its own, and methods whose density was not chosen
    and that have no documents.
    """
    found, timed = {}, [name for name in methods.all_names() if not name.startswith("oracle") and name != NO_VALUE]
    for model in models:
        for method, (point, is_chosen) in matched_report.picked(model, matched_report.longest(model, length)).items():
            if method in timed and (is_chosen is not None or point.documents.count):
                found[method, round(point.asked, 4)] = None
    return [*found]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2", help="name for stem.pretrained.load (default: %(default)s)")
    parser.add_argument("--length", type=int, help="of the prompt [tokens] (default: 8192, smoke 512)")
    parser.add_argument("--methods", metavar="NAME", nargs="+", choices=methods.all_names(), help="only these methods")
    told = "asked of every method, in (0, 1]; by default each method's own, see `matched_report.picked`"
    parser.add_argument("--densities", metavar="SHARE", nargs="+", type=float, help=told)
    about = "captured from the model, random normal in the headline's shape (a GPU alone), or both (default)"
    parser.add_argument("--inputs", choices=INPUTS, nargs="+", default=INPUTS, help=about)


def main(options: argparse.Namespace) -> None:
    """Measure and write results/long_context/matched/; rows of other methods, densities, lengths and sources stay."""
    full, found = options.profile == "full", []
    for density in options.densities or ():
        check_number("densities", density, 0.0, 1.0, open_below=True)
    block_size = matched_report.BLOCK_SIZE if full else 16

    def pairs(models: Iterable[str], length: int) -> list[tuple[str, float]]:
        picked = [] if options.densities else picked_pairs(models, length)
        picked = [pair for pair in picked if not options.methods or pair[0] in options.methods]
        return picked or [*product(options.methods or NAMES, options.densities or DENSITIES)]

    length = options.length or (8192 if full else 512)
    if CAPTURED in options.inputs:
        model, tokenizer, name = measures.load(options.model)
        ids = samples.document_windows(tokenizer, length, 1, ("python source",))["python source"]
        of_model = pairs([report.MODELS.get(name, name)], length)
        found += rows(captured_layers(model, ids), f"captured from {name}", of_model, block_size)
    if RANDOM in options.inputs and torch.cuda.is_available() and full:
        chosen = report.rows(parts=("choice",))
        every = pairs(chosen.model.unique() if len(chosen) else (), HEADLINE.tokens)
        found += rows(random_layer(HEADLINE, "cuda"), "random normal", every, block_size)
    print("wrote", records.write_rows("long_context/matched", found, options.profile, same=SAME))

"""Speed at matched accuracy: time of every method's operator on q, k and v of a real model, beside dense kernels.

Writes results/long_context/matched/. The rows hold times at several densities. `report.matched` then shows each method
at the lowest density at which its answers and documents are within the bounds. Selections of other methods than Stem
and adaptive run in this repository's PyTorch code, so `attention_ms`, the time over their lists, is shown too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from statistics import median

import torch
from torch import Tensor

import stem
from stem.config import StemConfig
from stem.experiments import records
from stem.experiments.long_context import measures, methods, samples
from stem.experiments.long_context.methods import Forced, Method
from stem.experiments.speed import candidates
from stem.experiments.theory import flow
from stem.planning import select
from stem.selection import BlockSelection
from stem.validation import check_number

NAMES = ("stem", "adaptive", methods.TUNED, "flashprefill", "flashprefill_v2", "xattention", "vertical_slash")
DENSITIES = (0.08, 0.15, 0.25)
FORCED = Forced(1, 1)
HEADLINE = candidates.Shape(2**17)  # one layer of Llama-3.1-8B
INPUTS = CAPTURED, RANDOM = "captured", "random"
ROUNDS, TOLERANCE = 20, 0.02  # of the search for a threshold, and of its density as a share of it
ALLOWED = 0.02  # relative L2 difference of an operator to its selection's attention by another kernel
SAME = ("method", "block_size", "asked", "source", "tokens")  # they name a row
Layers = Sequence[tuple[Tensor, Tensor, Tensor]]


def rows(
    layers: Layers,
    source: str,
    names: Iterable[str] = NAMES,
    densities: Iterable[float] = DENSITIES,
    block_size: int = 128,
    forced: Callable[[str, float], Forced] = lambda name, density: FORCED,
    show: Callable = print,
) -> Iterator[dict]:
    """Rows of dense kernels and of methods: mean times of a layer, and the mean density.

    Args:
        layers: q [1, Hq, N, D], k and v [1, Hkv, N, D] of each layer.
        source: Where they come from, in words.
        forced: Name and density -> forced blocks.
    """
    q, k, _ = layers[0]
    about = dict(source=source, tokens=q.shape[2], layers=len(layers))
    about |= dict(q_heads=q.shape[1], kv_heads=k.shape[1], head_dim=q.shape[3])
    with torch.no_grad():
        for provider, attend in candidates.dense_attends(q.device.type).items():
            if provider not in candidates.peers.FP8:
                latency = layer_ms(partial(attend, problem=None), layers)
                yield dict(method=provider, block_size=None, asked=None, **about, density=1.0, operator_ms=latency)
        for name in names:
            for density in densities:
                try:
                    method = methods.make(name, density, block_size, forced(name, density))
                    yield dict(method=name, block_size=block_size, asked=density, **about, **_measured(method, layers))
                except (ValueError, RuntimeError) as error:
                    show(f"{name} at density {density}, {source}: {type(error).__name__}: {str(error)[:200]}")


def _measured(method: Method, layers: Layers) -> dict[str, float]:
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
        operator_ms=layer_ms(operate, layers),
        selection_ms=layer_ms(choose, layers),
        attention_ms=layer_ms(stem.block_sparse_attention, attends),
    )


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
    cuda = layers[0][0].is_cuda
    times = []
    for repeat in range(repeats + 1):  # the first one warms up
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for qkv in layers:
            call(*qkv)
        if cuda:
            torch.cuda.synchronize()
        times += [(time.perf_counter() - start) * 1e3 / len(layers)] if repeat else []
    return float(f"{median(times):.5g}")


def random_layer(shape: candidates.Shape, device: str, seed: int = 0) -> Layers:
    """One layer of random normal q, k and v."""
    generator = torch.Generator(device).manual_seed(seed)
    make = partial(torch.randn, device=device, dtype=getattr(torch, shape.dtype), generator=generator)
    return [tuple(make(1, heads, shape.tokens, shape.head_dim) for heads in (shape.q_heads, *[shape.kv_heads] * 2))]


def captured_layers(model, ids: Tensor) -> Layers:
    """q, k and v of all layers on one prompt int64 [1, N]."""
    found = flow.captures(model, ids.to(next(model.parameters()).device), range(model.config.num_hidden_layers))
    return [tuple(x.contiguous() for x in found[layer]) for layer in sorted(found)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2", help="name for stem.pretrained.load (default: %(default)s)")
    parser.add_argument("--length", type=int, help="of the prompt [tokens] (default: 8192, smoke 512)")
    named = dict(choices=methods.all_names(), default=NAMES)
    parser.add_argument("--methods", metavar="NAME", nargs="+", help="only these methods", **named)
    shares = dict(type=float, default=DENSITIES, help="densities asked for, in (0, 1]")
    parser.add_argument("--densities", metavar="SHARE", nargs="+", **shares)
    about = "captured from the model, random normal in the headline's shape (a GPU alone), or both (default)"
    parser.add_argument("--inputs", choices=INPUTS, nargs="+", default=INPUTS, help=about)


def main(options: argparse.Namespace) -> None:
    """Measure and write results/long_context/matched/; rows of other methods, densities, lengths and sources stay."""
    full, found = options.profile == "full", []
    for density in options.densities:
        check_number("densities", density, 0.0, 1.0, open_below=True)
    about = dict(names=options.methods, densities=options.densities, block_size=128 if full else 16)
    if CAPTURED in options.inputs:
        model, tokenizer, name = measures.load(options.model)
        length = options.length or (8192 if full else 512)
        ids = samples.document_windows(tokenizer, length, 1, ("python source",))["python source"]
        found += rows(captured_layers(model, ids), f"captured from {name}", **about)
    if RANDOM in options.inputs and torch.cuda.is_available() and full:
        found += rows(random_layer(HEADLINE, "cuda"), "random normal", **about)
    print("wrote", records.write_rows("long_context/matched", found, options.profile, same=SAME))

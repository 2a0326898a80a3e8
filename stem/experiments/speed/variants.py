"""Variants of the operator on one shape, with their errors: low density, mean correction, FP8, and captured tensors.

    python -m stem.experiments.speed.variants --profile full --model PATH

Rows go to results/speed/variants/<machine>.csv. An error is the mean relative L2 error of sampled query rows against
fp64 attention to the same blocks and stand-ins; dense attention is compared with all keys. (Outputs of random normals
shrink with the row, so the error of all rows as one vector would be that of the first rows.)
"""

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import stem
from stem import metrics, pretrained
from stem.experiments import records
from stem.experiments.documents import stdlib_documents
from stem.experiments.speed import bench, candidates, gate, peers
from stem.experiments.speed.candidates import SHAPES, Shape
from stem.experiments.theory import flow
from stem.planning import plan_for, select

ADAPTIVE = stem.StemConfig.preset("adaptive", dense_up_to=0)
GROUPS = dict(lists="group")
VARIANTS = {
    "density 10 %": stem.StemConfig(density=0.1),
    "density 10 %, means": stem.StemConfig(density=0.1, dropped="mean"),
    "density 10 %, cells": stem.StemConfig(density=0.1, dropped="cells"),
    "density 10 %, blocks of 64": stem.StemConfig(density=0.1, block_size=64),
    "density 10 %, groups": stem.StemConfig(density=0.1, **GROUPS),
    "density 10 %, groups, blocks of 64": stem.StemConfig(density=0.1, block_size=64, **GROUPS),
    "adaptive, 8 %": ADAPTIVE,
    "adaptive, 8 %, 4 query cells": ADAPTIVE.replace(score_query_cells=4),
    "adaptive, 8 %, groups": ADAPTIVE.replace(**GROUPS),
    "adaptive, 5 %": ADAPTIVE,
    "adaptive, 5 %, means": ADAPTIVE.replace(dropped="mean"),
    "adaptive, 5 %, groups, means": ADAPTIVE.replace(dropped="mean", **GROUPS),
    "density 25 %": stem.StemConfig(density=0.25),
    "released": candidates.CONFIGS["released"],
    "released, FP8": candidates.CONFIGS["released"].replace(compute="fp8"),
}
ON_CPU = ("density 10 %", "density 10 %, means", "adaptive, 8 %")
CAPTURED = ("released", "released, FP8")
SHORT = ("density 25 %",)  # on SHORT_TOKENS, where launches cost more
SHORT_TOKENS = 2**13
TOKENS = {("cuda", "full"): 2**17, ("cuda", "smoke"): 2**14, ("cpu", "full"): 2**12, ("cpu", "smoke"): 2**11}
CAPTURED_TOKENS = 2**15
CAPTURED_LAYERS = 4  # spread over the model
ROUNDS = 30  # of the search for a threshold


def threshold_for(density: float, q: Tensor, k: Tensor, v: Tensor, config: stem.StemConfig) -> stem.StemConfig:
    """The config with the threshold at which it keeps about this share of the blocks of q, k and v, by bisection."""
    low, high = math.log(1e-7), 0.0  # of the logarithm of the threshold
    for _ in range(ROUNDS):
        config = config.replace(threshold=math.exp((low + high) / 2))
        found = select(q, k, v, config).density()
        if abs(found - density) < 0.005 * density:
            break
        low, high = ((low + high) / 2, high) if found > density else (low, (low + high) / 2)
    return config


def row_of(
    call: Callable[[], Tensor], qkv: tuple[Tensor, ...], selection: stem.BlockSelection | None, seed: int
) -> dict[str, Any]:
    """Columns error, latency_ms and its quantiles, peak_memory_mib, density and tflops of a call; None is dense."""
    q, k, v = qkv
    size = selection.block_size if selection else candidates.CONFIGS["released"].block_size
    rows = gate.sampled_rows(q.shape[2], size, seed).to(q.device)
    expected = gate.reference_rows(*qkv, rows, selection)
    with gate.poisoned_buffers() if selection else nullcontext():
        found = call()[:, :, rows].double()
    squares = [x.square().sum((0, 1, 3)) for x in (found - expected, expected)]  # of each row
    row = dict(error=(squares[0] / squares[1]).sqrt().mean().item())
    row |= bench.measure(call, q.device.type)
    shape = Shape(q.shape[2], q.shape[0], q.shape[1], k.shape[1], q.shape[3])
    flop = metrics.attention_flops(selection, q.shape[3]) if selection else shape.dense_flops()
    return row | dict(density=selection.density() if selection else 1.0, tflops=flop / row["latency_ms"] / 1e9)


def case(
    what: str, qkv: tuple[Tensor, ...], names: Sequence[str], *, dense: Mapping[str, Callable], seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Rows of dense attention by provider, and of the operator with each variant; a failure leaves its message."""
    q, k, _ = qkv
    about = dict(what=what) | asdict(
        Shape(q.shape[2], 1, q.shape[1], k.shape[1], q.shape[3], str(q.dtype).removeprefix("torch."))
    )
    for name, call in dense.items():
        yield about | dict(variant="dense", provider=name) | _attempt(lambda call=call: row_of(call, qkv, None, seed))
    for name in names:

        def operate(name: str = name) -> dict[str, Any]:
            config = VARIANTS[name]
            if config.threshold:
                config = threshold_for(0.08 if "8 %" in name else 0.05, *qkv, config)
            plan = plan_for(*qkv, config)
            selection = select(*qkv, config)
            choosing = bench.measure(lambda: select(*qkv, config), q.device.type)["latency_ms"]
            row = row_of(partial(stem.stem_attention, *qkv, config), qkv, selection, seed)
            return row | dict(choosing_ms=choosing, implementation=plan.impl, threshold=config.threshold)

        yield about | dict(variant=name, provider="stem") | _attempt(operate)


def _attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return measure() | dict(message="")
    except Exception as error:  # a variant's failure costs one row
        return dict(message=bench.first_line(error))


def dense_calls(qkv: tuple[Tensor, ...]) -> dict[str, Callable[[], Tensor]]:
    """Dense causal attention by provider: SDPA and the peers that are installed, FP8 among them."""
    device = qkv[0].device.type
    calls = {name: partial(attend, *qkv, None) for name, attend in candidates.dense_attends(device).items()}
    for name in peers.FP8.keys() & calls:
        rounded = peers.rounded_to_fp8(*qkv)
        calls[name] = partial(peers.attend_in_fp8, rounded)
    return calls


def captured_cases(path: str, tokens: int, device: str, seed: int) -> Iterator[dict[str, Any]]:
    """Rows of CAPTURED on q, k, v of some layers of a model, on source code of the standard library."""
    model, tokenizer = pretrained.load(path, device=device, dtype=getattr(torch, SHAPES[device].dtype))
    text = "\n".join(stdlib_documents().values())[: 8 * tokens]  # more than enough characters
    ids = torch.tensor(tokenizer(text).input_ids[:tokens])[None].to(device)
    last = model.config.num_hidden_layers - 1
    for layer in sorted({round(last * i / (CAPTURED_LAYERS - 1)) for i in range(CAPTURED_LAYERS)}):
        with torch.no_grad():
            qkv = tuple(x.contiguous() for x in flow.capture(model, ids, layer))
            yield from case(f"captured, layer {layer}", qkv, CAPTURED, dense=dense_calls(qkv), seed=seed)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, and write the rows after each of them."""
    parser = argparse.ArgumentParser(prog="python -m stem.experiments.speed.variants", description=__doc__)
    parser.add_argument("--profile", choices=records.PROFILES, default="smoke")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, metavar="VARIANT", help="measure these only")
    parser.add_argument("--model", help="also on q, k, v of this model, see stem.pretrained.load")
    parser.add_argument("--tokens", type=int, default=CAPTURED_TOKENS, help="of the model's prompt")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: CUDA where there is one")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for row in _everything(options, device):
        rows.append(row)
        same = ("what", "variant", "provider", "tokens")
        path = records.write_rows("speed/variants", rows, options.profile, same=same)
        shown = ("what", "variant", "provider", "density", "latency_ms", "choosing_ms", "tflops", "error", "message")
        values = [row.get(name, "") for name in shown]
        print("  ".join(f"{x:.4g}" if type(x) is float else str(x) for x in values), flush=True)
    print(f"wrote {path}")


@torch.no_grad()
def _everything(options: argparse.Namespace, device: str) -> Iterator[dict[str, Any]]:
    names = options.variants or ([name for name in VARIANTS if name not in SHORT] if device == "cuda" else ON_CPU)
    cases = [(TOKENS[device, options.profile], names)]
    if device == "cuda" and not options.variants:
        cases.append((SHORT_TOKENS, SHORT))
    for tokens, these in cases:
        shape = replace(SHAPES[device], tokens=tokens)
        qkv = candidates.Problem(shape, candidates.CONFIGS["released"], device, "torch", options.seed).qkv
        yield from case("random normal", qkv, these, dense=dense_calls(qkv), seed=options.seed)
    if options.model:
        yield from captured_cases(options.model, options.tokens, device, options.seed)


if __name__ == "__main__":
    main()

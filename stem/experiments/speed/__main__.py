"""Measure this machine, write results/speed/<machine>.csv and print a short table."""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch

from stem.experiments import records
from stem.experiments.speed import bench, beyond, candidates, report


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure part by part, and write the rows after each part."""
    parser = argparse.ArgumentParser(prog="python -m stem.experiments.speed", description=__doc__)
    parser.add_argument("--profile", choices=records.PROFILES, default="smoke", help="which lengths, and which file")
    told = "of the operator, the drop-in and the first token, in this order; other rows stay"
    parser.add_argument("--lengths", type=int, nargs="+", metavar="TOKENS", help=told)
    parser.add_argument("--parts", choices=("operator", *beyond.PARTS), nargs="+", help="these only; other rows stay")
    told = "for the parts drop-in and break-even in place of SmolLM2 and random weights, see stem.pretrained.load"
    parser.add_argument("--model", default=beyond.SMALL, metavar="NAME", help=told)
    parser.add_argument("--impls", nargs="+", metavar="IMPL", help="default: triton and hopper on CUDA, torch on a CPU")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: CUDA where there is one")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.model != beyond.SMALL and not {*(options.parts or beyond.PARTS)} <= {"drop-in", "break-even"}:
        parser.error("--model needs --parts drop-in, break-even or both")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    rows, start = [], time.perf_counter()
    same = ("operation", "provider", "config", "tokens") if options.lengths or options.parts else None
    for label, found in _everything(options, device):
        rows += found
        print(f"{time.perf_counter() - start:6.1f} s  {label}  {len(found)} rows", flush=True)
        # an interrupted run keeps the rows of its finished parts
        frame = pd.DataFrame(rows, columns=list(bench.COLUMNS))
        path = records.write_rows("speed", frame, options.profile, same=same)
    print(f"{report.table(rows)}\nwrote {path}")


def _everything(options: argparse.Namespace, device: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield (label, rows): the operator by length, then `beyond`, then the operator at extreme lengths."""
    lengths = options.lengths or bench.LENGTHS[device, options.profile]
    common = dict(impls=options.impls, seed=options.seed)
    parts = options.parts or ("operator", *(() if options.lengths else beyond.PARTS))
    lengths = lengths if "operator" in parts else ()
    ordinary = [n for n in lengths if n < bench.ONE_CONFIG_TOKENS or options.lengths]
    for tokens, found in bench.sweep(ordinary, device, **common) if lengths else ():
        yield f"{tokens:>8,} tokens", found
    others = dict(parts=parts, lengths=options.lengths, model=options.model)
    yield from beyond.beyond_the_operator(device, options.profile, **others, **common)
    once = dict(common, impls=options.impls or candidates.default_impls(device), configs=[*bench.CONFIGS][:1], dense=())
    for tokens in sorted(set(lengths) - set(ordinary)):
        yield f"{tokens:>8,} tokens", bench.case(replace(bench.SHAPES[device], tokens=tokens), device, **once)


if __name__ == "__main__":
    main()

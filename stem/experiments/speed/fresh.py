"""First prefills of fresh processes, with an empty and with a filled disk cache of compiled kernels.

    python -m stem.experiments.speed.fresh --profile full

Rows go to results/speed/fresh/<machine>.csv. Each process imports everything, attends densely once, which starts CUDA
and cuBLAS, and then times its first prefill through stem.hf, a second one, and one of each other length. The model has
two layers in the shape of Llama-3.1-8B and random weights. Kernels are counted by Triton's compilation listener, and
stderr tells how long each took to compile beside the others: in all, with reading its source, and by stage.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from triton import knobs

import stem
from stem import hf
from stem.experiments import records
from stem.experiments.markdown import MISSING, by_device, full_rows, markdown_table, not_run, number, tokens_label
from stem.experiments.speed import first_token

CONFIGS = {name: stem.StemConfig.preset(name) for name in ("adaptive", "paper", "angelslim", "hpc_ops")}
CONFIGS |= {
    "adaptive, means": stem.StemConfig.preset("adaptive", dropped="mean"),
    "density 0.1, groups, blocks of 64": stem.StemConfig(density=0.1, lists="group", block_size=64),
}
ON = {"cuda": tuple(CONFIGS), "cpu": ("paper",)}  # device -> configs
LENGTHS = {"cuda": (12007, 40009, 2049, 8192, 700), "cpu": (300, 200)}  # tokens, the first prefill's first
SHAPE = {
    "cuda": first_token.LLAMA_8B | dict(hidden_size=4096, num_attention_heads=32, num_hidden_layers=2, vocab_size=1024),
    "cpu": first_token.TINY,
}
CACHES = ("empty", "filled")


def process(config: str, lengths: Sequence[int], device: str) -> list[dict[str, Any]]:
    """A row for the first prefill of this process, for the second, and for the first of each other length.

    Columns: tokens, prefill ("first", "second" or "another length"), latency_ms, and the kernels that Triton compiled
    and loaded from its disk cache.
    """
    hits: list[bool] = []

    def note(*, src, times, cache_hit: bool, **_) -> None:
        hits.append(cache_hit)
        if not cache_hit:
            stages = ", ".join(f"{stage} {time / 1e6:.1f}" for stage, time in times.lowering_stages)
            print(f"compiled {src.name} in {times.total / 1e6:.1f} s: {stages}", file=sys.stderr)

    knobs.compilation.listener = note
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = first_token.random_llama(SHAPE[device], device, dtype)
    first, *others = lengths
    calls, rows = [("first", first), ("second", first), *(("another length", tokens) for tokens in others)], []
    with torch.inference_mode():
        for tokens in lengths:
            _timed(lambda tokens=tokens: first_token.first_token(model, _ids(model, tokens)))
        with hf.stem_prefill(model, CONFIGS[config]):
            for which, tokens in calls:
                ids, before = _ids(model, tokens), len(hits)
                ms = _timed(lambda ids=ids: first_token.first_token(model, ids))
                found = dict(compiled=hits[before:].count(False), loaded=hits[before:].count(True))
                rows.append(dict(tokens=tokens, prefill=which, latency_ms=ms) | found)
    knobs.compilation.listener = None
    return rows


def _ids(model: torch.nn.Module, tokens: int) -> torch.Tensor:
    return torch.zeros(1, tokens, dtype=torch.int64, device=model.device)


def _timed(call: Callable[[], torch.Tensor]) -> float:
    """Time until the result of a call is there [ms]."""
    start = time.perf_counter()
    call().isfinite().all().item()
    return 1e3 * (time.perf_counter() - start)


def cases(device: str, configs: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows of `process` in two new processes for each config, the second with the disk cache of the first."""
    for config in configs:
        with tempfile.TemporaryDirectory() as cache:
            for state in CACHES:
                command = [sys.executable, "-m", __spec__.name, "--process", config, "--device", device]
                environment = os.environ | dict(TRITON_CACHE_DIR=cache)
                done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
                for row in json.loads(done.stdout.splitlines()[-1]):
                    yield dict(config=config, disk_cache=state) | row


def table() -> str:
    """For each machine a table of `cases`."""
    rows = full_rows("speed/fresh")
    if rows.empty:
        return not_run("make speed PROFILE=full")
    parts = []
    for device, part in by_device(rows):
        lines = []
        for (config, state), group in part.groupby(["config", "disk_cache"], sort=False):
            others = group[group.prefill == "another length"]
            times = [number(group[group.prefill == which].latency_ms.mean() / 1e3) for which in ("first", "second")]
            kernels = [f"{rows.compiled.sum()} and {rows.loaded.sum()}" for rows in (group[:1], others)]
            lengths = ", ".join(map(tokens_label, others.tokens)) or MISSING
            lines.append([config, state, tokens_label(group.tokens.iloc[0]), *times, *kernels, lengths])
        header = ["config", "disk cache", "tokens", "first prefill [s]", "second [s]", "kernels compiled and loaded"]
        header += ["at other lengths", "these"]
        parts.append(f"**{device}**\n\n{markdown_table(header, lines)}")
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, start the processes, and write the rows; with --process, be one of them."""
    parser = argparse.ArgumentParser(prog="python -m stem.experiments.speed.fresh", description=__doc__)
    parser.add_argument("--profile", choices=records.PROFILES, default="smoke")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: CUDA where there is one")
    parser.add_argument("--configs", nargs="+", choices=tuple(CONFIGS), help="these only; other rows stay")
    parser.add_argument("--process", metavar="CONFIG", help="print the rows of this process as JSON")
    options = parser.parse_args(arguments)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.process:
        print(json.dumps(process(options.process, LENGTHS[device], device)))
        return
    rows, same = [], ("config", "disk_cache", "tokens", "prefill") if options.configs else None
    for row in cases(device, options.configs or ON[device]):
        rows.append(row)
        path = records.write_rows("speed/fresh", rows, options.profile, same=same)
        print(*row.values(), sep="  ", flush=True)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()

"""Answers and losses of every method on one model, at 4K and 8K tokens: writes results/long_context/answers/.

On a GPU one process takes the times alone, and then several share the GPU for the rest: one waits for the host while
another computes. `--processes` sets how many; the default is three on each GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from stem import pretrained
from stem.experiments import records
from stem.experiments.long_context import comparison
from stem.experiments.long_context.measures import fused
from stem.experiments.long_context.methods import all_names
from stem.experiments.long_context.study import STUDIES, Study
from stem.experiments.losses import check_output_embedding
from stem.experiments.processes import run_in_processes

PROCESSES = 3  # on each GPU
SAVE_EVERY_S = 10.0
SAME = ("method", "block_size", "asked", "measure", "task", "length", "start", "model")  # columns that name a row


def measure(
    study: Study,
    model: str,
    seed: int = 0,
    *,
    processes: int = 1,
    limit_s: float = math.inf,
    eager: bool = False,
    show: Callable = print,
    save: Callable | None = None,
) -> list[dict]:
    """All rows of a study, measured in one process or in several that share the GPUs.

    Args:
        study: Measurements to take.
        model: A name for `stem.pretrained.load`.
        seed: Seed of the RULER samples and of the bootstrap.
        processes: 1 measures in this process. A larger number starts as many processes, spread over the GPUs, and one
            more that takes the times. The processes on the GPU of that one wait until it has ended.
        limit_s: No measurement begins after so many seconds.
        eager: True does not compile the model's layers on a GPU.
        show: Called with progress lines.
        save: Called with all rows so far, about every 10 s.
    Raises:
        ValueError: If processes is below 1.
        RuntimeError: If a part failed, after all others have ended and their rows were saved.
    """
    if processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}")
    if processes == 1:
        return _part(study, model, seed, None, None, None, limit_s, eager, show, save)
    gpus, saved = torch.cuda.device_count(), time.monotonic()
    alone = multiprocessing.get_context("spawn").Event()  # set when the times have been taken
    with tempfile.TemporaryDirectory() as folder:

        def on_poll(codes: list[int | None]) -> None:
            nonlocal saved
            if codes[0] is not None:
                alone.set()
            if save and time.monotonic() - saved > SAVE_EVERY_S and (rows := _collect(folder)):
                save(rows)
                saved = time.monotonic()

        tasks = []
        for number in range(processes + 1):
            gpu = number % gpus if gpus else None
            wait = alone.wait if number and not gpu else None
            about = (study, model, seed, f"{number}/{processes}", gpu, wait, limit_s, eager)
            tasks.append(partial(_write_part, *about, str(Path(folder) / f"{number}.json")))
        codes = run_in_processes(tasks, len(tasks), on_poll)
        rows = _collect(folder)
    if save and rows:
        save(rows)
    if failed := [number for number, code in enumerate(codes) if code]:
        raise RuntimeError(f"parts {failed} of {processes} failed, see above; {len(rows)} rows of the others were kept")
    return rows


def _part(study, model, seed, part, gpu, wait, limit_s, eager, show, save) -> list[dict]:
    cuda = torch.cuda.is_available()
    started = time.monotonic()
    if gpu is not None:
        torch.cuda.set_device(gpu)
    network, tokenizer = pretrained.load(model, dtype=torch.bfloat16 if cuda else torch.float32)
    check_output_embedding(network)
    with nullcontext() if eager or not cuda else fused(network):
        name = Path(network.name_or_path).name
        options = dict(part=part, wait=wait, limit_s=limit_s - (time.monotonic() - started), show=show, save=save)
        return comparison.run(study, network, tokenizer, name, seed, **options)


def _write_part(study, model, seed, part, gpu, wait, limit_s, eager, path) -> None:
    """Measure one part, and keep its rows so far in a JSON file."""

    def save(rows: list[dict]) -> None:
        partial_path = Path(f"{path}.partial")
        partial_path.write_text(json.dumps(rows))
        os.replace(partial_path, path)

    _part(study, model, seed, part, gpu, wait, limit_s, eager, partial(print, f"[{part}]", flush=True), save)


def _collect(folder: str) -> list[dict]:
    """Rows that all parts have written so far, in the order of the parts."""
    files = sorted(Path(folder).glob("*.json"), key=lambda path: int(path.stem))
    return [row for path in files for row in json.loads(path.read_text())]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this part to its parser."""
    parser.add_argument("--model", default="smollm2", help="name for stem.pretrained.load (default: %(default)s)")
    parser.add_argument("--methods", metavar="NAME", nargs="+", choices=all_names(), help="measure only these methods")
    add_shared_arguments(parser)


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of every part that calls `measure`."""
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=math.inf, help="no measurement begins after this time [s]")
    shared = max(1, PROCESSES * torch.cuda.device_count())
    parser.add_argument(
        "--processes", type=int, default=shared, help="processes that share the GPUs (default: %(default)s)"
    )
    parser.add_argument("--eager", action="store_true", help="do not compile the model's layers on a GPU")


def main(options: argparse.Namespace) -> None:
    """Measure and write results/long_context/answers/; with --methods, the rows of other methods stay."""
    study, same = STUDIES[options.profile], SAME if options.methods else None
    measure(
        replace(study, names=tuple(options.methods or study.names)),
        options.model,
        options.seed,
        processes=options.processes,
        limit_s=options.limit,
        eager=options.eager,
        show=partial(print, flush=True),
        save=partial(records.write_rows, "long_context/answers", profile=options.profile, same=same),
    )

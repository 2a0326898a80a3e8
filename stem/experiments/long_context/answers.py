"""Answers and losses of every method on one model, at 4K and 8K tokens: writes results/long_context/answers/.

On a GPU one process takes the times alone. Then several share the GPU for the rest: one waits for the host while
another computes.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from operator import setitem

import torch

from stem.experiments import records
from stem.experiments.long_context import comparison
from stem.experiments.long_context.measures import fused, load
from stem.experiments.long_context.methods import all_names
from stem.experiments.long_context.study import STUDIES, Study
from stem.experiments.processes import run_in_processes
from stem.validation import check_integer

PROCESSES = 3  # on each GPU
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
    """Rows of a study, measured in one process or in several that share the GPUs.

    Args:
        study, seed, limit_s, show, save: As in `comparison.run`.
        model: A name for `stem.pretrained.load`.
        processes: 1 measures in this process. With more, one takes the times, and then all take the rest.
        eager: True does not compile the model's layers on a GPU.
    Raises:
        ValueError: If processes is below 1.
        RuntimeError: If a part failed, after all others have ended and their rows were saved.
    """
    check_integer("processes", processes, 1)
    if processes == 1:
        return _part(study, model, seed, None, limit_s, eager, show, save)
    started = saved = time.monotonic()
    with multiprocessing.get_context("spawn").Manager() as manager:
        found, codes = manager.dict(), []  # number of a part -> its rows so far

        def rows() -> list[dict]:
            return [row for _, part in sorted(found.items()) for row in part]

        def on_poll(_: list) -> None:
            nonlocal saved
            if save and found and time.monotonic() - saved > comparison.SAVE_EVERY_S:
                save(rows())
                saved = time.monotonic()

        for numbers in ([0], range(1, processes + 1)):
            left, tasks = limit_s - (time.monotonic() - started), []
            for number in numbers:
                tell, keep = partial(print, f"[{number}/{processes}]", flush=True), partial(setitem, found, number)
                tasks.append(partial(_part, study, model, seed, (number, processes), left, eager, tell, keep))
            codes += run_in_processes(tasks, len(tasks), on_poll)
        kept = rows()
    if save and kept:
        save(kept)
    if failed := [number for number, code in enumerate(codes) if code]:
        raise RuntimeError(f"parts {failed} of {processes} failed, see above; {len(kept)} rows of the others were kept")
    return kept


def _part(study, model, seed, part, limit_s, eager, show, save) -> list[dict]:
    """Rows of one part, on the GPU that its number falls on; None is the whole study."""
    started, cuda = time.monotonic(), torch.cuda.is_available()
    if cuda and part:
        torch.cuda.set_device(part[0] % torch.cuda.device_count())
    network, tokenizer, name = load(model)
    with nullcontext() if eager or not cuda else fused(network):
        options = dict(part=part, limit_s=limit_s - (time.monotonic() - started), show=show, save=save)
        return comparison.run(study, network, tokenizer, name, seed, **options)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2", help="name for stem.pretrained.load (default: %(default)s)")
    parser.add_argument("--methods", metavar="NAME", nargs="+", choices=all_names(), help="measure only these methods")
    add_shared_arguments(parser)


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of every part that calls `measure`."""
    shared = max(1, PROCESSES * torch.cuda.device_count())
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=math.inf, help="no measurement begins after this time [s]")
    parser.add_argument("--processes", type=int, default=shared, help="that share the GPUs (default: %(default)s)")
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

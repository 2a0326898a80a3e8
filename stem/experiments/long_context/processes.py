"""A comparison in several processes that share the GPUs: one waits for the host while another computes."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

from stem import pretrained
from stem.experiments.long_context import comparison
from stem.experiments.long_context.plan import Plan

POLL_S = 1.0
SAVE_EVERY_S = 10.0


def measure(
    plan: Plan,
    model: str,
    seed: int = 0,
    *,
    processes: int = 1,
    limit_s: float = math.inf,
    eager: bool = False,
    show: Callable = print,
    save: Callable | None = None,
) -> list[dict]:
    """All rows of a plan.

    Args:
        plan: What to measure.
        model: A name for stem.pretrained.load.
        seed: Of the RULER samples and the bootstrap.
        processes: 1 measures here. More measure in as many new processes, dealt to the GPUs in turn; one more takes the
            times, and those on its GPU wait for it.
        limit_s: What has not begun after so many seconds is left out.
        eager: Do not compile the model's layers on a GPU.
        show: Called with progress lines.
        save: Called with all rows so far, now and then.
    Raises:
        ValueError: If processes is below 1.
        RuntimeError: If a part failed, after all others have ended and what there is was saved.
    """
    if processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}")
    if processes == 1:
        return _part(plan, model, seed, None, None, None, limit_s, eager, show, save)
    rows: list[dict] = []
    gpus = torch.cuda.device_count()
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    alone = context.Event()  # set when the times have been taken
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for number in range(processes + 1):
            gpu = number % gpus if gpus else None
            wait = alone.wait if number and not gpu else None
            about = (plan, model, seed, f"{number}/{processes}", gpu, wait, limit_s, eager)
            running.append(context.Process(target=_write_part, args=(*about, str(Path(folder) / f"{number}.json"))))
            running[-1].start()
        saved = time.monotonic()
        while any(process.is_alive() for process in running):
            if not running[0].is_alive():
                alone.set()
            time.sleep(POLL_S)
            if save and time.monotonic() - saved > SAVE_EVERY_S and (rows := _collect(folder)):
                save(rows)
                saved = time.monotonic()
        failed = [number for number, process in enumerate(running) if process.exitcode]
        rows = _collect(folder)
    if save and rows:
        save(rows)
    if failed:
        raise RuntimeError(f"parts {failed} of {processes} failed, see above; {len(rows)} rows of the others were kept")
    return rows


def _part(plan, model, seed, part, gpu, wait, limit_s, eager, show, save) -> list[dict]:
    cuda = torch.cuda.is_available()
    started = time.monotonic()
    if gpu is not None:
        torch.cuda.set_device(gpu)
    network, tokenizer = pretrained.load(model, dtype=torch.bfloat16 if cuda else torch.float32)
    with nullcontext() if eager or not cuda else comparison.fused(network):
        name = Path(network.name_or_path).name
        options = dict(part=part, wait=wait, limit_s=limit_s - (time.monotonic() - started), show=show, save=save)
        return comparison.run(plan, network, tokenizer, name, seed, **options)


def _write_part(plan, model, seed, part, gpu, wait, limit_s, eager, path) -> None:
    """One process: `_part`, its rows written to a JSON file as they come."""

    def save(rows: list[dict]) -> None:
        partial = Path(f"{path}.partial")
        partial.write_text(json.dumps(rows))
        os.replace(partial, path)

    _part(plan, model, seed, part, gpu, wait, limit_s, eager, partial(print, f"[{part}]", flush=True), save)


def _collect(folder: str) -> list[dict]:
    """The rows that all parts have written so far, in the order of the parts."""
    files = sorted(Path(folder).glob("*.json"), key=lambda path: int(path.stem))
    return [row for path in files for row in json.loads(path.read_text())]

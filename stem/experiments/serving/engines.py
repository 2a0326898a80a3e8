"""Engines of vLLM in this process, and how long their prompts take."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from importlib.util import find_spec
from statistics import median
from typing import NamedTuple

import torch

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine is in this process
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
if not torch.cuda.is_available():
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

SCHEDULER = "stem.vllm.AlignedScheduler"
BLOCK_SIZE = 128  # of vLLM's pages [tokens]
MEASURED = 2.0  # see timed [s]
MOST_ROUNDS = 60
SAMPLED = 20  # between two samples of the clock [ms]
QUERIED = ("timestamp", "clocks.sm", "power.draw.instant", "clocks_event_reasons.sw_power_cap")


def is_installed() -> bool:
    """Whether vLLM can be imported here."""
    return find_spec("vllm") is not None


@contextmanager
def engine(model: str, settings: Mapping | None, longest: int, chunk: int | None = None, **options) -> Iterator:
    """A vllm.LLM for prompts of up to `longest` tokens, without cached prefixes; it ends with the with block.

    Args:
        model: Folder of a model.
        settings: Settings of stem.vllm; None is vLLM's own attention.
        chunk: Tokens of a step at most; None takes whole prompts.
        options: Other arguments of vllm.LLM.
    """
    from vllm import LLM

    ours = {} if settings is None else dict(additional_config={"stem": dict(settings)}, scheduler_cls=SCHEDULER)
    if settings is not None and torch.cuda.is_available():
        ours["attention_backend"] = "CUSTOM"
    room = -(-(longest + 64) // BLOCK_SIZE) * BLOCK_SIZE
    steps = dict(max_model_len=room, max_num_batched_tokens=chunk or room, block_size=BLOCK_SIZE)
    shared = dict(skip_tokenizer_init=True, enforce_eager=True, enable_prefix_caching=False, max_num_seqs=8)
    llm = LLM(model, **{**shared, **steps, **ours, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def answer(llm, prompts: Sequence[Sequence[int]], tokens: int = 1) -> tuple[list[list[int]], float]:
    """Greedy tokens for each prompt of token ids, and the time until all are there [s]."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    outputs = llm.generate([dict(prompt_token_ids=list(ids)) for ids in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs], time.perf_counter() - start


class Timing(NamedTuple):
    """How an engine answered."""

    answers: list[list[int]]
    """Tokens."""

    all_ms: list[float]
    """Time of each round [ms]."""

    clock_mhz: float
    """Median clock of the GPU's multiprocessors in these rounds [MHz]; NaN if unknown."""

    power_w: float
    """Median power that the GPU drew in them [W]; NaN if unknown."""

    capped: float
    """Share of them in which the limit of the power held the clock down; NaN if unknown."""


def timed(llms: Sequence, prompts: Sequence[Sequence[int]], tokens: int = 1) -> list[Timing]:
    """Answers of each engine, of some tokens to all these prompts together.

    The engines take turns, another one first in each round, so that a change of the clock meets all of them. Each warms
    up first, then answers three times, and up to MOST_ROUNDS times while the rounds take less than MEASURED seconds
    together.
    """
    found = [answer(llm, prompts, tokens)[0] for llm in llms]
    spans: list[list[tuple[float, float]]] = [[] for _ in llms]  # beginning and length of each round [s]
    with clock_samples() as samples:
        rounds, taken = 0, 0.0
        while rounds < 3 or (rounds < MOST_ROUNDS and taken < MEASURED):
            rounds += 1
            for place in range(rounds, rounds + len(llms)):
                begun = time.time()
                seconds = answer(llms[place % len(llms)], prompts, tokens)[1]
                spans[place % len(llms)].append((begun, seconds))
                taken += seconds
    timings = []
    for answers, own in zip(found, spans, strict=True):
        here = [x[1:] for x in samples if any(begun <= x[0] <= begun + seconds for begun, seconds in own)]
        mhz, watts, capped = zip(*here, strict=True) if here else [[float("nan")]] * 3
        measured = median(mhz), median(watts), sum(capped) / len(capped)
        timings.append(Timing(answers, [1e3 * seconds for _, seconds in own], *measured))
    return timings


@contextmanager
def clock_samples() -> Iterator[list[tuple[float, float, float, float]]]:
    """Samples of the GPU, there when the with block has ended; see parsed.

    nvidia-smi takes them, in a process of its own; none without it.
    """
    samples: list[tuple[float, float, float, float]] = []
    if not torch.cuda.is_available() or not shutil.which("nvidia-smi"):
        yield samples
        return
    gpu = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    query = [f"--query-gpu={','.join(QUERIED)}", "--format=csv,noheader,nounits", "-lms", str(SAMPLED), "-i", gpu]
    with tempfile.TemporaryFile("w+") as file:
        process = subprocess.Popen(["nvidia-smi", *query], stdout=file)
        try:
            yield samples
        finally:
            process.terminate()
            process.wait()
            file.seek(0)
            samples += parsed(file.read())


def parsed(text: str) -> list[tuple[float, float, float, float]]:
    """Samples from what nvidia-smi printed until it was stopped, maybe within a line.

    Each is the time [s since 1970], the clock of the multiprocessors [MHz], the power [W], and whether the limit of the
    power held the clock down (0 or 1).
    """
    found = []
    rows = [line.split(", ") for line in text.split("\n")[:-1]]
    for date, mhz, watts, capped in (row for row in rows if len(row) == len(QUERIED)):  # no messages
        when = datetime.strptime(date, "%Y/%m/%d %H:%M:%S.%f").timestamp()
        found.append((when, _number(mhz), _number(watts), {"Active": 1.0, "Not Active": 0.0}.get(capped, float("nan"))))
    return found


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:  # "[N/A]"
        return float("nan")

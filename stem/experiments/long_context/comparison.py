"""Rows that compare methods with dense attention on the same samples of one model.

A row is one mean over samples, beside the mean of dense attention on the same samples. `low` and `high` bound the
difference of both (95 % bootstrap interval over samples). Every group of rows holds the control, a short window that
must fail. A measure on which the control does not fail proves nothing.

    answer        log-likelihood of RULER's right answer after its prompt, in one forward [nats]
    right         share of samples in which every token of the right answer is the likeliest
    loss          next-token loss on one kind of document, over positions start..stop - 1 [nats per token]
    generated     share of right answers in text decoded densely after the sparse prefill; blind to broken prefills
    time          prefill of one prompt in a batch, in turn with dense attention [ms]; the interval is over repetitions

`density` is the computed share of the causal block pairs, and `asked` the density asked for. `ms` is the time of one
sample in this run, in which other processes may have used the GPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from stem import hf
from stem.experiments.long_context.measures import (
    answer_scores,
    document_losses,
    generated_scores,
    interval,
    prefill_ms,
)  # fmt: skip
from stem.experiments.long_context.methods import ADAPTIVE, Method, all_names, calibrator, methods, presets
from stem.experiments.long_context.samples import Prompts, document_windows, exact_prompts
from stem.experiments.long_context.study import Study, deal

TIMED_TOKENS = {"cuda": 131_072, "cpu": 1_024}  # in a timed batch, enough to keep a GPU busy
REPETITIONS = 3  # of a timed prefill
WARM_UPS = {"cuda": 2, "cpu": 1}  # the first compiles the layers for one shape, the second for all shapes
SAVE_EVERY_S = 10


class Comparison:
    """Measures methods and dense attention on the same samples of one model.

    Dense attention is measured once for each group of samples, with the first method. `rows` holds the means, and
    `samples` the single values of all measures but the loss.
    """

    def __init__(self, model, tokenizer, name: str, seed: int = 0) -> None:
        self.model, self.tokenizer, self.name, self.seed = model, tokenizer, name, seed
        self.rows: list[dict] = []
        self.samples: list[dict] = []
        self._dense: dict[tuple, _Measured] = {}

    def answers(self, method: Method, prompts: Prompts) -> None:
        """Add rows of the measures "answer" and "right"."""
        ours, dense = self._measure(method, prompts.ids, "answer", lambda: answer_scores(self.model, prompts))
        about = dict(task=prompts.task, length=prompts.ids.shape[1], density=ours.density, ms=ours.ms)
        for place, measure in enumerate(("answer", "right")):
            self._add(method, dict(measure=measure, **about), ours.result[place].float(), dense.result[place].float())

    def generated(self, method: Method, prompts: Prompts) -> None:
        """Add a row of the measure "generated"; its `ms` includes decoding."""
        ours, dense = self._measure(
            method, prompts.ids, "generated", lambda: generated_scores(self.model, self.tokenizer, prompts)
        )
        about = dict(task=prompts.task, length=prompts.ids.shape[1], density=ours.density, ms=ours.ms)
        self._add(method, dict(measure="generated", **about), ours.result, dense.result)

    def loss(self, method: Method, kinds: Mapping[str, Tensor], spans: int = 4) -> None:
        """Add rows of the measure "loss": the later half of each kind, and `spans` equal spans of all kinds."""
        ids = torch.cat(list(kinds.values()))
        ours, dense = self._measure(method, ids, "loss", lambda: document_losses(self.model, ids))
        length = ids.shape[1]
        groups = [("all", slice(None), length * i // spans, length * (i + 1) // spans) for i in range(spans)]
        first = 0
        for kind, windows in kinds.items():
            groups.append((kind, slice(first, first := first + len(windows)), length // 2, length))
        for kind, rows, start, stop in groups:
            about = dict(measure="loss", task=kind, length=length, density=ours.density, ms=ours.ms)
            values = [of.result[rows, start:stop].mean(-1) for of in (ours, dense)]
            self._add(method, about | dict(start=start, stop=stop), *values)

    def time(self, method: Method, prompts: Prompts) -> None:
        """Add a row of the measure "time": prefill of a batch, divided by its prompts [ms].

        The method and dense attention take turns, so that their ratio also holds on a busy GPU.
        """
        device = next(self.model.parameters()).device
        count = max(1, TIMED_TOKENS[device.type] // prompts.ids.shape[1])
        ids, started, density = prompts.ids[:count].to(device), time.monotonic(), 1.0
        pairs = []
        for _ in range(WARM_UPS[device.type] + REPETITIONS):
            ours = dense = prefill_ms(self.model, ids)
            if method.attention is not None:
                with hf.stem_prefill(self.model, method.attention) as report:
                    ours = prefill_ms(self.model, ids)
                density = report.density()
            pairs.append((ours, dense))
        values, dense = torch.tensor(pairs[-REPETITIONS:]).T
        ms = (time.monotonic() - started) * 1e3 / len(ids)
        about = dict(measure="time", task=prompts.task, length=ids.shape[1], density=density, ms=ms)
        self._add(method, about, values, dense)

    def _measure(self, method: Method, ids: Tensor, name: str, measure: Callable) -> tuple[_Measured, _Measured]:
        """Results of `measure` under the method and under dense attention; dense results are kept."""
        key = (name, tuple(ids.shape), int((ids * torch.arange(ids.numel()).view_as(ids)).sum()))
        if key not in self._dense:
            self._dense[key] = _timed(measure, len(ids), lambda: 1.0)
        if method.attention is None:
            return self._dense[key], self._dense[key]
        with hf.stem_prefill(self.model, method.attention) as report:
            return _timed(measure, len(ids), report.density), self._dense[key]

    def _add(self, method: Method, about: dict, values: Tensor, dense: Tensor) -> None:
        low, high = interval(values - dense, self.seed)
        numbers = dict(value=values.mean(), dense=dense.mean(), difference=(values - dense).mean(), low=low, high=high)
        who = dict(method=method.name, block_size=method.block_size, asked=method.asked)
        numbers = {name: float(f"{float(number):.5g}") for name, number in numbers.items()}
        about = about | {"density": round(about["density"], 4), "ms": float(f"{about['ms']:.4g}")}
        self.rows.append({**who, **about, **numbers, "count": len(values), "model": self.name, "seed": self.seed})
        if about["measure"] != "loss":
            for sample, pair in enumerate(zip(values.tolist(), dense.tolist(), strict=True)):
                self.samples.append({**who, **about, "sample": sample, "value": pair[0], "dense": pair[1]})


class _Measured(NamedTuple):
    result: object
    density: float
    ms: float
    """Time of one sample [ms]."""


def _timed(measure: Callable, samples: int, density: Callable[[], float]) -> _Measured:
    started = time.monotonic()
    result = measure()  # ends on the CPU, so the GPU is done
    return _Measured(result, density(), (time.monotonic() - started) * 1e3 / samples)


def run(
    study: Study,
    model,
    tokenizer,
    name: str,
    seed: int = 0,
    *,
    part: str | None = None,
    wait: Callable | None = None,
    limit_s: float = math.inf,
    show: Callable = print,
    save: Callable | None = None,
) -> list[dict]:
    """All rows of a study, measured in this process.

    Args:
        study: Measurements to take.
        model, tokenizer: From `stem.pretrained.load`.
        name: Name of the model in the rows.
        seed: Seed of the RULER samples and of the bootstrap.
        part: Share of the measurements, see `study.deal`; None is all of them.
        wait: Called after the samples are prepared and before the model is used.
        limit_s: No measurement begins after so many seconds; `show` is told how many were left out.
        show: Called with progress lines.
        save: Called with all rows so far, about every 10 s.
    Raises:
        ExceptionGroup: Of the measurements that failed, after all others.
    """
    comparison, started, saved = Comparison(model, tokenizer, name, seed), time.monotonic(), time.monotonic()
    names = study.names or all_names()
    known = [Method("dense"), *methods(names, study.densities, study.block_sizes)]
    known += presets() if study.presets else []
    order = ["dense", "window", *names[:4], *(method.name for method in presets()), *names[4:]]
    known.sort(key=lambda method: order.index(method.name))
    found = {(method.name, method.block_size, method.asked): method for method in known}
    jobs = deal([job for of in found for job in study.jobs(*of)], part)
    calibrate = {length: cache(calibrator(model, tokenizer, length, show)) for length in study.lengths}
    samples = dict(zip(study.lengths, study.samples, strict=True))
    prompts, kinds, errors = {}, {}, []
    for task, length in dict.fromkeys((job.task, job.length) for job in jobs):
        if task is None:
            kinds[length] = document_windows(tokenizer, length, study.windows)
        else:
            prompts[task, length] = exact_prompts(task, tokenizer, length, samples[length], seed)
    show(f"{len(jobs)} measurements, prepared in {time.monotonic() - started:.0f} s")
    if wait:
        wait()
    for number, job in enumerate(jobs):
        if time.monotonic() - started > limit_s:
            show(f"{len(jobs) - number} measurements left out after {limit_s} s")
            break
        method = found[job.method, job.block_size, job.asked]
        inputs = kinds[job.length] if job.task is None else prompts[job.task, job.length]
        try:
            adapts = method.name in ADAPTIVE
            if adapts:
                method = replace(method, attention=calibrate[job.length](method.asked, method.attention))
            if not adapts or method.attention is not None:
                getattr(comparison, job.what)(method, inputs)
        except Exception as error:  # one failure must not cost hours of other measurements; raised at the end
            error.add_note(f"measuring {job}")
            errors.append(error)
            show(f"{job.what} of {method.name} failed: {error}")
        if time.monotonic() - saved > SAVE_EVERY_S:
            saved = time.monotonic()
            show(f"{number + 1} of {len(jobs)}, {saved - started:.0f} s: {method.name}, {job.what}, {job.length}")
            if save and comparison.rows:
                save(comparison.rows)
    if save and comparison.rows:
        save(comparison.rows)
    if errors:
        raise ExceptionGroup(f"{len(errors)} of {len(jobs)} measurements of {name} failed", errors)
    return comparison.rows

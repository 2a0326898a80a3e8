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
from functools import cache, partial

import torch
from torch import Tensor

from stem import hf
from stem.experiments.long_context import measures
from stem.experiments.long_context.methods import ADAPTIVE, Method, all_names, calibrated, methods, presets
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
        self._dense: dict[tuple, tuple] = {}

    def answers(self, method: Method, prompts: Prompts) -> None:
        """Add rows of the measures "answer" and "right"."""
        ours, dense, cost = self._measure(method, prompts.ids, measures.answer_scores, prompts)
        about = dict(task=prompts.task, length=prompts.ids.shape[1], **cost)
        for measure, *values in zip(("answer", "right"), ours, dense, strict=True):
            self._add(method, dict(measure=measure, **about), *values)

    def generated(self, method: Method, prompts: Prompts) -> None:
        """Add a row of the measure "generated"; its `ms` includes decoding."""
        ours, dense, cost = self._measure(method, prompts.ids, measures.generated_scores, self.tokenizer, prompts)
        about = dict(measure="generated", task=prompts.task, length=prompts.ids.shape[1])
        self._add(method, about | cost, ours, dense)

    def loss(self, method: Method, kinds: Mapping[str, Tensor], spans: int = 4) -> None:
        """Add rows of the measure "loss": the later half of each kind, and `spans` equal spans of all kinds."""
        ids = torch.cat(list(kinds.values()))
        *losses, cost = self._measure(method, ids, measures.document_losses, ids)
        length, first = ids.shape[1], 0
        groups = [("all", slice(None), length * i // spans, length * (i + 1) // spans) for i in range(spans)]
        for kind, windows in kinds.items():
            groups.append((kind, slice(first, first := first + len(windows)), length // 2, length))
        for kind, rows, start, stop in groups:
            about = dict(measure="loss", task=kind, length=length, **cost, start=start, stop=stop)
            self._add(method, about, *(of[rows, start:stop].mean(-1) for of in losses))

    def time(self, method: Method, prompts: Prompts) -> None:
        """Add a row of the measure "time": prefill of a batch, divided by its prompts [ms].

        The method and dense attention take turns, so that their ratio also holds on a busy GPU.
        """
        device = next(self.model.parameters()).device
        count = max(1, TIMED_TOKENS[device.type] // prompts.ids.shape[1])
        ids, started, density, pairs = prompts.ids[:count].to(device), time.monotonic(), 1.0, []
        for _ in range(WARM_UPS[device.type] + REPETITIONS):
            ours = dense = measures.prefill_ms(self.model, ids)
            if method.attention is not None:
                with hf.stem_prefill(self.model, method.attention) as report:
                    ours = measures.prefill_ms(self.model, ids)
                density = report.density()
            pairs.append((ours, dense))
        values, dense = torch.tensor(pairs[-REPETITIONS:]).T
        ms = (time.monotonic() - started) * 1e3 / len(ids)
        about = dict(measure="time", task=prompts.task, length=ids.shape[1], density=density, ms=ms)
        self._add(method, about, values, dense)

    def _measure(self, method: Method, ids: Tensor, measure: Callable, *about) -> tuple:
        """Results under the method and under dense attention, and the method's cost; dense results are kept."""

        def timed() -> tuple:
            started = time.monotonic()
            result = measure(self.model, *about)  # ends on the CPU, so the GPU is done
            return result, (time.monotonic() - started) * 1e3 / len(ids)

        key = (measure, tuple(ids.shape), int((ids * torch.arange(ids.numel()).view_as(ids)).sum()))
        if key not in self._dense:
            self._dense[key] = timed()
        (dense, ms), density = self._dense[key], 1.0
        ours = dense
        if method.attention is not None:
            with hf.stem_prefill(self.model, method.attention) as report:
                ours, ms = timed()
            density = report.density()
        return ours, dense, dict(density=density, ms=ms)

    def _add(self, method: Method, about: dict, values: Tensor, dense: Tensor) -> None:
        values, dense = values.float(), dense.float()
        low, high = measures.interval(values - dense, self.seed)
        numbers = dict(value=values.mean(), dense=dense.mean(), difference=(values - dense).mean(), low=low, high=high)
        who = dict(method=method.name, block_size=method.block_size, asked=method.asked)
        numbers = {name: float(f"{float(number):.5g}") for name, number in numbers.items()}
        about = about | {"density": round(about["density"], 4), "ms": float(f"{about['ms']:.4g}")}
        self.rows.append({**who, **about, **numbers, "count": len(values), "model": self.name, "seed": self.seed})
        if about["measure"] != "loss":
            for sample, pair in enumerate(zip(values.tolist(), dense.tolist(), strict=True)):
                self.samples.append({**who, **about, "sample": sample, "value": pair[0], "dense": pair[1]})


def run(
    study: Study,
    model,
    tokenizer,
    name: str,
    seed: int = 0,
    *,
    part: tuple[int, int] | None = None,
    limit_s: float = math.inf,
    show: Callable = print,
    save: Callable | None = None,
) -> list[dict]:
    """All rows of a study, measured in this process.

    Args:
        model, tokenizer, name: From `stem.pretrained.load`, and the model's name in the rows.
        seed: Seed of the RULER samples and of the bootstrap.
        part: Share of the measurements, see `study.deal`; None is all of them.
        limit_s: No measurement begins after so many seconds; `show` is told how many were left out.
        save: Called with all rows so far, about every 10 s.
    Raises:
        ExceptionGroup: Of the measurements that failed, after all others.
    """
    comparison, started, saved = Comparison(model, tokenizer, name, seed), time.monotonic(), time.monotonic()
    names, inputs, errors = study.names or all_names(), {}, []
    calibrate = cache(partial(calibrated, model, tokenizer, show=show))
    known = [Method("dense"), *methods(names, study.densities, study.block_sizes)]
    known += presets() if study.presets else []
    order = ["dense", "window", *names[:4], *(method.name for method in presets()), *names[4:]]
    known.sort(key=lambda method: order.index(method.name))
    found = {(method.name, method.block_size, method.asked): method for method in known}
    jobs = deal([job for of in found for job in study.jobs(*of)], part)
    for task, length in dict.fromkeys((job.task, job.length) for job in jobs):
        if task is None:
            inputs[task, length] = document_windows(tokenizer, length, study.windows)
        else:
            inputs[task, length] = exact_prompts(task, tokenizer, length, study.samples, seed)
    show(f"{len(jobs)} measurements, prepared in {time.monotonic() - started:.0f} s")
    for number, job in enumerate(jobs):
        if time.monotonic() - started > limit_s:
            show(f"{len(jobs) - number} measurements left out after {limit_s} s")
            break
        method = found[job.method, job.block_size, job.asked]
        try:
            if method.name in ADAPTIVE:
                method = replace(method, attention=calibrate(job.length, method.asked, method.attention))
                if method.attention is None:
                    continue
            getattr(comparison, job.what)(method, inputs[job.task, job.length])
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

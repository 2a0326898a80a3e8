"""Rows that compare methods with dense attention on the same samples of one model: parts "answers" and "loss".

A row is one mean over samples, beside the mean of dense attention on the same samples. `values` holds the samples
themselves, in the order of the other rows of its task, so that any two methods can be compared pair by pair. `low` and
`high` bound the difference to dense attention (95 % bootstrap interval over samples). Every group of rows holds the
control, a short window that must fail. A measure on which the control does not fail proves nothing.

    answer        log-likelihood of RULER's right answer after its prompt, in one forward [nats]
    right         share of samples in which every token of the right answer is the likeliest
    loss          next-token loss on one kind of document, over positions start..stop - 1 [nats per token]
    generated     share of right answers in text decoded densely after the sparse prefill; blind to broken prefills

`density` is the computed share of the causal block pairs, and `asked` the density asked for. `sink_blocks`,
`local_blocks` and `dense_last_blocks` are the forced blocks: of the pairs in `methods.GRID`, those with which the
method did best on calibration samples that no row reports. `chosen` is the share of the kept blocks that scores chose.
`threshold` is that of an adaptive method.
"""

from __future__ import annotations

import argparse
import math
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor

import stem
from stem import hf
from stem.config import StemConfig
from stem.experiments import documents, records
from stem.experiments.long_context import measures, methods, ruler, samples
from stem.experiments.long_context.measures import InChunks
from stem.experiments.long_context.methods import Method
from stem.experiments.long_context.samples import Prompts
from stem.validation import check_integer, check_number

DOCUMENTS = "documents"  # task of the losses; the other tasks are RULER's
CALIBRATION_TASK, CALIBRATION_SAMPLES, CALIBRATION_SEED = "niah_multikey_1", 4, 1000
TOLERANCE = 0.05  # of a calibrated density, as a share of it
SAVE_EVERY_S = 10
SAME = ("method", "block_size", "asked", "measure", "task", "length", "start", "stop", "model")  # they name a row


@dataclass(frozen=True)
class Study:
    """Measurements of one model. Of two lengths, tasks, densities or sizes the first is the more important one."""

    lengths: tuple[int, ...]  # of the samples [tokens]
    tasks: tuple[str, ...]  # RULER tasks, and "documents"
    names: tuple[str, ...] = ()  # of `methods.all_names`; empty means all
    densities: tuple[float, ...] = (0.1, 0.25)
    block_sizes: tuple[int, ...] = (128,)
    samples: int = 16  # of each RULER task
    windows: int = 8  # of each kind of document
    kinds: tuple[str, ...] | None = None  # of document; None means all
    presets: bool = False  # True also measures `methods.presets()`
    generates: bool = False  # True also generates the answers of tasks with one answer
    calibrates: bool = False  # True takes the calibration texts as documents


class Comparison:
    """Measures methods and dense attention on the same samples of one model.

    Dense attention is measured once for each group of samples, with the first method. `rows` holds the means, and
    `samples` the single values of all measures but the loss.
    """

    def __init__(self, model, tokenizer, name: str, seed: int = 0) -> None:
        self.model, self.tokenizer, self.name, self.seed = model, tokenizer, name, seed
        self.rows: list[dict] = []
        self.samples: list[dict] = []
        self._dense: dict[tuple, Tensor | tuple] = {}

    def answers(self, method: Method, prompts: Prompts) -> None:
        """Add rows of the measures "answer" and "right"."""
        ours, dense, density = self._measure(method, prompts.ids, measures.answer_scores, prompts)
        about = dict(task=prompts.task, length=prompts.ids.shape[1], density=density)
        for measure, *values in zip(("answer", "right"), ours, dense, strict=True):
            self._add(method, dict(measure=measure, **about), *values)

    def generated(self, method: Method, prompts: Prompts) -> None:
        """Add a row of the measure "generated"."""
        ours, dense, density = self._measure(method, prompts.ids, measures.generated_scores, self.tokenizer, prompts)
        about = dict(measure="generated", task=prompts.task, length=prompts.ids.shape[1], density=density)
        self._add(method, about, ours, dense)

    def loss(self, method: Method, kinds: Mapping[str, Tensor], spans: int = 4) -> None:
        """Add rows of the measure "loss": each kind whole and its later half, and `spans` equal spans of all kinds."""
        ids = torch.cat(list(kinds.values()))
        ours, dense, density = self._measure(method, ids, measures.document_losses, ids)
        length, first = ids.shape[1], 0
        groups = [("all", slice(None), length * i // spans, length * (i + 1) // spans) for i in range(spans)]
        for kind, windows in kinds.items():
            rows = slice(first, first := first + len(windows))
            groups += [(kind, rows, start, length) for start in (0, length // 2)]
        for kind, rows, start, stop in groups:
            about = dict(measure="loss", task=kind, length=length, density=density, start=start, stop=stop)
            self._add(method, about, *(of[rows, start:stop].mean(-1) for of in (ours, dense)))

    def _measure(self, method: Method, ids: Tensor, measure: Callable, *about) -> tuple:
        """Results under the method and under dense attention, and the method's density; dense results are kept."""
        key = (measure, tuple(ids.shape), int((ids * torch.arange(ids.numel()).view_as(ids)).sum()))
        if key not in self._dense:
            self._dense[key] = measure(self.model, *about)
        dense = self._dense[key]
        if method.attention is None:
            return dense, dense, 1.0
        with attending(self.model, method, ids.shape[1]) as report:
            ours = measure(self.model if method.chunk is None else InChunks(self.model, method.chunk), *about)
        return ours, dense, report.density()

    def _add(self, method: Method, about: dict, values: Tensor, dense: Tensor) -> None:
        values, dense = values.float(), dense.float()
        low, high = measures.interval(values - dense, self.seed)
        numbers = dict(value=values.mean(), dense=dense.mean(), difference=(values - dense).mean(), low=low, high=high)
        numbers = {name: float(f"{float(number):.5g}") for name, number in numbers.items()}
        who = dict(method=method.name, block_size=method.block_size, asked=method.asked)
        share = chosen_share(method, about["length"], about["density"], self.model)
        kept = dict(asdict(method.forced) if method.forced else {}, chosen=None if share is None else round(share, 4))
        if (threshold := getattr(method.attention, "threshold", None)) is not None:
            kept["threshold"] = float(f"{threshold:.5g}")
        about = about | {"density": round(about["density"], 4)}
        row = {**who, **about, **numbers, "count": len(values), "model": self.name, "seed": self.seed, **kept}
        self.rows.append(row | {"values": " ".join(f"{value:.5g}" for value in values.tolist())})
        if about["measure"] != "loss":
            for sample, pair in enumerate(zip(values.tolist(), dense.tolist(), strict=True)):
                self.samples.append({**who, **about, "sample": sample, "value": pair[0], "dense": pair[1]})


def attending(model, method: Method, length: int | None = None):
    """Context in which a model attends by a method that is not dense; it yields the report of `stem.hf`.

    Methods that read prompts in chunks need the prompts' length.
    """
    layers = model.config.get_text_config().num_hidden_layers
    of = {layer: method.attention for layer in range(method.dense_layers, layers)}
    prompt_length = None if method.chunk is None else length
    return hf.stem_prefill(model, of if method.dense_layers else method.attention, prompt_length=prompt_length)


def chosen_share(method: Method, length: int, density: float, model) -> float | None:
    """Share of the kept blocks of the sparse layers that scores chose, from the mean density of all layers."""
    layers = model.config.get_text_config().num_hidden_layers
    sparse = (density * layers - method.dense_layers) / (layers - method.dense_layers)
    return method.chosen_share(length, sparse)


class ForcedChoice:
    """Chooses each method's forced blocks, and thresholds of adaptive methods, on samples that no row reports."""

    def __init__(self, model, tokenizer, show: Callable = print, seed: int = CALIBRATION_SEED) -> None:
        self.model, self.show = model, show
        self.windows = cache(lambda length: torch.cat(samples.calibration_windows(tokenizer, length, 1)))
        draw = partial(samples.exact_prompts, CALIBRATION_TASK, tokenizer, samples=CALIBRATION_SAMPLES, seed=seed)
        self.prompts = cache(lambda length: draw(length=length))

    @cache  # noqa: B019 - lives as long as a run
    def best(self, name: str, density: float, block_size: int, length: int, of_documents: bool) -> Method | None:
        """The candidate that loses least on documents, or on needles; None if none leaves enough to the scores.

        Names of `methods.TRANSFERRED` take their forced blocks and threshold from "adaptive" at one length.
        """
        if name in methods.TRANSFERRED:
            found = self.best("adaptive", density, block_size, methods.TRANSFER_LENGTH, True)
            return found and replace(found, name=name, chunk=methods.TRANSFERRED[name])
        found = [self._calibrated(each, length) for each in methods.candidates(name, density, block_size, length)]
        found = [each for each in found if each is not None]
        if len(found) < 2:
            return found[0] if found else None
        losses = [self._loss(each, length, of_documents) for each in found]
        return found[min(range(len(found)), key=losses.__getitem__)]

    def _loss(self, method: Method, length: int, of_documents: bool) -> float:
        with attending(self.model, method):
            if of_documents:
                return measures.document_losses(self.model, self.windows(length)).mean().item()
            return -measures.answer_scores(self.model, self.prompts(length))[0].mean().item()

    @cache  # noqa: B019
    def _calibrated(self, method: Method, length: int) -> Method | None:
        """The method with the threshold of its density, if it has one; None where no threshold fits."""
        if not isinstance(method.attention, StemConfig) or method.attention.threshold is None:
            return method
        try:
            within = dict(tolerance=TOLERANCE * method.asked)
            found = stem.calibrate(self.model, self.windows(length).split(1), method.asked, method.attention, **within)
        except ValueError as error:
            self.show(f"{method.name} at density {method.asked}, {length} tokens is left out: {error}")
            return None
        return replace(method, attention=found.config)


def run(
    study: Study,
    model,
    tokenizer,
    name: str,
    seed: int = 0,
    *,
    limit_s: float = math.inf,
    show: Callable = print,
    save: Callable | None = None,
) -> list[dict]:
    """Measure a study; returns the rows.

    At each length the first task is measured at all densities before the next task. Methods at a density and block
    size that leaves their scores less than `methods.LEAST_CHOSEN` of the kept blocks have no row.

    Args:
        model, tokenizer, name: See `measures.load`.
        seed: Of the samples.
        limit_s: No measurement begins after this time [s].
        show: Called with lines on the progress.
        save: Called with all rows so far, every `SAVE_EVERY_S` seconds and at the end.
    Raises:
        ExceptionGroup: Of the measurements that failed, after all others.
    """
    comparison, started, saved, errors = Comparison(model, tokenizer, name, seed), time.monotonic(), 0.0, []
    choice, names = ForcedChoice(model, tokenizer, show), methods.chosen_names(study.names or methods.all_names())
    jobs = [  # complete methods have their own block size, so they are measured once
        (length, task, density, method.block_size if isinstance(method, Method) else block_size, method)
        for length in study.lengths
        for task in study.tasks
        for block_size in study.block_sizes
        for density, of in _stages(study, names)
        for method in of
    ]
    jobs = list(dict.fromkeys(jobs))
    inputs = cache(partial(_inputs, tokenizer, study, seed))
    for number, (length, task, density, block_size, method) in enumerate(jobs):
        if time.monotonic() - started > limit_s:
            show(f"{len(jobs) - number} of {len(jobs)} measurements left out after {limit_s} s")
            break
        try:
            if isinstance(method, str):
                found = choice.best(method, density, block_size, length, task == DOCUMENTS)
            else:
                found = methods.control(block_size) if method is None else method
            if found is None:
                show(f"{method} at density {density} has nothing to choose at {length} tokens, blocks of {block_size}")
            elif task == DOCUMENTS:
                comparison.loss(found, inputs(task, length))
            else:
                comparison.answers(found, inputs(task, length))
                if study.generates and task in ruler.ONE_ANSWER:
                    comparison.generated(found, inputs(task, length))
        except Exception as error:  # one failure must not cost the other measurements; raised at the end
            error.add_note(f"measuring {method} on {task} at {length} tokens, density {density}")
            traceback.clear_frames(error.__traceback__)  # they hold tensors
            errors.append(error)
            show(f"{method} on {task} failed: {error}")
        if save and comparison.rows and time.monotonic() - saved > SAVE_EVERY_S:
            save(comparison.rows)
            saved = time.monotonic()
            show(f"{number + 1} of {len(jobs)}, {saved - started:.0f} s: {task}, {length} tokens, density {density}")
    if save and comparison.rows:
        save(comparison.rows)
    if errors:
        raise ExceptionGroup(f"{len(errors)} of {len(jobs)} measurements of {name} failed", errors)
    return comparison.rows


def _stages(study: Study, names: Sequence[str]) -> list[tuple[float | None, list[Method | str | None]]]:
    """Densities and the methods to measure there: names, complete methods, and None for the control."""
    first: list[Method | str | None] = [Method("dense"), None]
    stages = [(None, first), *((density, list(names)) for density in study.densities)]
    return [*stages, (None, methods.presets())] if study.presets else stages


def _inputs(tokenizer, study: Study, seed: int, task: str, length: int):
    if task == DOCUMENTS and study.calibrates:
        windows = samples.calibration_windows(tokenizer, length, study.windows)
        return {f"calibration text {number}": of for number, of in enumerate(windows, 1)}
    if task == DOCUMENTS:
        kinds = {} if study.kinds is None else dict(kinds=study.kinds)
        return samples.document_windows(tokenizer, length, study.windows, **kinds)
    return samples.exact_prompts(task, tokenizer, length, study.samples, seed)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the parts "answers", "loss" and "extension"."""
    parser.add_argument("--model", default="smollm2", help="name for stem.pretrained.load (default: %(default)s)")
    parser.add_argument(
        "--methods",
        metavar="NAME",
        nargs="+",
        choices=methods.chosen_names((*methods.all_names(), *methods.TRANSFERRED)),
        help="only these methods",
    )
    parser.add_argument("--lengths", metavar="TOKENS", nargs="+", type=int, help="lengths of the samples")
    parser.add_argument("--densities", metavar="SHARE", nargs="+", type=float, help="densities asked for, in (0, 1]")
    parser.add_argument("--block-sizes", metavar="TOKENS", nargs="+", type=int, help="block sizes")
    parser.add_argument("--tasks", metavar="TASK", nargs="+", choices=(*samples.FIXED_ORDER, DOCUMENTS), help="tasks")
    parser.add_argument("--kinds", metavar="KIND", nargs="+", choices=tuple(documents.KINDS), help="of documents")
    parser.add_argument("--samples", metavar="COUNT", type=int, help="samples of each task")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=math.inf, help="no measurement begins after this time [s]")


def with_options(study: Study, options: argparse.Namespace) -> Study:
    """The study with what the options name in place of its own."""
    given = dict(
        names=options.methods,
        lengths=options.lengths,
        densities=options.densities,
        block_sizes=options.block_sizes,
        tasks=options.tasks,
        kinds=options.kinds,
    )
    changes = {name: tuple(value) for name, value in given.items() if value}
    for density in changes.get("densities", ()):
        check_number("densities", density, 0.0, 1.0, open_below=True)
    if options.samples is not None:
        check_integer("samples", options.samples, 1)
        changes["samples"] = options.samples
    return replace(study, **changes)


def measure(study: Study, part: str, options: argparse.Namespace) -> None:
    """Measure a study with the options of a command, and write its rows to results/long_context/PART/.

    Rows of other methods, densities, tasks, lengths and models stay.
    """
    write = partial(records.write_rows, f"long_context/{part}", profile=options.profile, same=SAME)
    told = dict(limit_s=options.limit, show=partial(print, flush=True), save=write)
    run(with_options(study, options), *measures.load(options.model), options.seed, **told)

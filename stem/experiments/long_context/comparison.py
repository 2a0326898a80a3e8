"""Every method on the same samples of a real model: teacher-forced answers and loss on long documents, as rows.

`python -m stem.experiments.long_context.comparison --profile full` writes results/long_context/answers/.
A row is one mean over samples beside the mean of
dense attention on the same ones; `low` and `high` bound their difference (95 %, bootstrap over samples). Each
group of rows holds the control, a short window, which must fail: where it does not, the measure proves nothing.

    answer        log-likelihood of RULER's right answer after its prompt, in one forward [nats]
    right         share of samples in which every token of that answer is the likeliest
    loss          next-token loss on a kind of document, over positions start..stop - 1 [nats per token]
    generated     share of right answers that a dense decoder gives after the sparse prefill (cannot see a broken one)
    time          prefill of one prompt in a batch, in turn with dense attention [ms]; the interval is over repetitions

`density` is what was computed, `asked` what was asked for, `ms` how long a sample took in this run, other processes or
not. On a GPU the times are taken first, then the rest in three processes that share it; several GPUs get three each
(`--processes`).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

import stem
from stem import hf, patterns
from stem.budget import block_budget, causal_pairs
from stem.config import StemConfig
from stem.experiments import documents, records
from stem.experiments.long_context import ruler
from stem.experiments.long_context.plan import PLANS, Plan, deal
from stem.metrics import block_attention_mass
from stem.scores import block_scores
from stem.selection import select_blocks

FIXED_ORDER = (*ruler.ONE_ANSWER, "niah_multivalue", "niah_multiquery", "ruler_vt")  # one natural order of the answers
NUMBERS_PER_BATCH = {"cuda": 240_000_000, "cpu": 5_000_000}  # hidden states of one layer
LOGITS_AT_ONCE = {"cuda": 16_384, "cpu": 512}
RESAMPLES = 2000
PROCESSES = 3  # that share a GPU
TIMED_TOKENS = {"cuda": 131_072, "cpu": 1_024}  # of a batch whose prefill is timed, enough to keep a GPU busy
REPETITIONS = 3  # of it
WARM_UPS = {"cuda": 2, "cpu": 1}  # before it is timed: layers compile for a shape, then for all shapes
SAVE_EVERY_S = 10
SOURCES = ("paper", "angelslim", "hpc_ops")
# The preset; and with the last block of queries, in which the question stands, scored as all others, or kept whole.
ADAPTIVE = {
    "stem adaptive": {},
    "stem adaptive, cells alone": dict(exact_last_blocks=0),
    "stem adaptive, dense end": dict(exact_last_blocks=0, dense_last_blocks=1),
}
SAME = ("method", "block_size", "asked", "measure", "task", "length", "start", "model")  # name what a row measured
BLIND = (
    "sliding_window", "longformer", "bigbird", "sparse_transformer_strided", "sparse_transformer_fixed", "a_shape",
    "tri_shape", "random",
)  # fmt: skip  # patterns that depend on the shapes alone


_KIND_TOKENS: dict[tuple[str, str], list[int]] = {}  # what `document_windows` has tokenized


class Prompts(NamedTuple):
    """Samples of one task, each exactly as long as it says."""

    task: str
    ids: Tensor
    """int64 [samples, length]: filler, prompt, right answer."""

    answer_tokens: Tensor
    """int64 [samples], how many tokens at the end are the answer."""

    answers: list[list[str]]
    """What a generated text has to contain."""


@dataclass(frozen=True)
class Method:
    """One attention to compare: what `stem.hf.enable` takes (None is dense), and how it was asked for."""

    name: str
    attention: StemConfig | hf.Selector | None = None
    block_size: int | None = None
    asked: float | None = None
    """Density asked for."""


def exact_prompts(task: str, tokenizer, length: int, samples: int, seed: int = 0) -> Prompts:
    """RULER samples brought to exactly `length` tokens, so that a batch needs no padding (our choice).

    The gap that RULER leaves is filled in front of the prompt with the end of the language reference. What a tokenizer
    begins every text with, such as a BOS token, stands at the very start and nowhere else.

    Args:
        task: One of `FIXED_ORDER`; several answers are scored in the order of the question, or of their appearance.
        tokenizer, samples, seed: As in `ruler.build_samples`.
        length: Filler, prompt and answer [tokens].
    Raises:
        ValueError: If the task has no natural order of answers, or a sample does not fit.
    """
    if task not in FIXED_ORDER:
        raise ValueError(f"task must be one of {', '.join(FIXED_ORDER)}, got {task!r}")
    rows, start = ruler.stored_samples(task, tokenizer, length, samples, seed), _start(tokenizer)
    plain = partial(tokenizer, add_special_tokens=False, verbose=False)
    prompts = plain([f"{row['input']} {row['gen_prefix']}" for row in rows]).input_ids
    answers = plain([" " + ", ".join(_ordered(task, row)) for row in rows]).input_ids
    filler = plain(documents.prose()[-8 * length :]).input_ids[-length:]
    ids = []
    for prompt, answer in zip(prompts, answers, strict=True):
        missing = length - len(start) - len(prompt) - len(answer)
        if not 0 <= missing <= len(filler):
            raise ValueError(f"length={length}: a sample of {task} has {length - missing} tokens")
        ids.append(start + filler[len(filler) - missing :] + prompt + answer)
    counts = torch.tensor([len(answer) for answer in answers])
    return Prompts(task, torch.tensor(ids), counts, [row["outputs"] for row in rows])


def document_windows(tokenizer, length: int, count: int, kinds: Sequence[str] = tuple(documents.KINDS)) -> dict:
    """Kind of document -> int64 [count, length], windows spread over all of its text, each begun as a text is."""
    found, start = {}, _start(tokenizer)
    for kind in kinds:
        behaviour = documents.fingerprint(str(tokenizer(ruler.TOKENIZER_SAMPLE).input_ids))
        tokens = _KIND_TOKENS.get((kind, behaviour))
        if tokens is None:
            encoded = tokenizer(documents.KINDS[kind](), add_special_tokens=False, verbose=False)
            tokens = _KIND_TOKENS[kind, behaviour] = encoded.input_ids
        windows = documents.windows(tokens, length - len(start), count)
        found[kind] = torch.tensor([start + window for window in windows])
    return found


def methods(
    names: Iterable[str], densities: Iterable[float], block_sizes: Iterable[int], calibrate=None
) -> list[Method]:
    """All combinations, and for each block size the control.

    Args:
        names: Of `stem.patterns`, and beside these "stem adaptive" (the preset: its score keeps peaks, one threshold
            holds for all rows, heads and layers, the last one scored exactly), "stem adaptive, cells alone" (which
            scores it as the others), "stem adaptive, dense end" (which keeps all of it) and "stem softmax" (cells alone
            and equal rows).
        densities, block_sizes: What to ask for; forced blocks are few (one sink, two local), so that low densities
            leave something to choose.
        calibrate: (density, config) -> StemConfig for both that adapt, or None where the forced blocks alone cost
            more; without it they are left out.
    """
    found = []
    for block_size in block_sizes:
        found.append(Method("window", window_control(block_size), block_size))
        for density in densities:
            config = StemConfig(block_size=block_size, density=density, sink_blocks=1, local_blocks=2)
            adaptive = StemConfig.preset("adaptive", block_size=block_size, dense_up_to=0)
            for name in names:
                if name == "dense" or (name in ADAPTIVE and calibrate is None):
                    continue
                elif name in ADAPTIVE:
                    attention = calibrate(density, adaptive.replace(**ADAPTIVE[name]))
                elif name == "stem softmax":
                    cells_alone = adaptive.replace(exact_last_blocks=0)
                    attention = cells_alone.replace(allocation="uniform", threshold=None, density=density)
                elif name == "stem":
                    attention = config
                else:
                    attention = _selector(name, config)
                if attention is None:
                    continue
                found.append(Method(name, attention, block_size, density))
    return found


def _selector(name: str, config: StemConfig) -> hf.Selector:
    """A pattern's selection; one that does not look at the tensors is made once for all layers of these shapes."""
    if name not in BLIND:
        return partial(patterns.select, name, config=config)
    made: dict = {}

    def select(q: Tensor, k: Tensor, v: Tensor):
        key = (q.shape, k.shape, q.device)
        if key not in made:
            made[key] = patterns.select(name, q, k, v, config)
        return made[key]

    return select


def presets() -> list[Method]:
    """Stem with the schedules of its three sources, which set their own density."""
    configs = {name: StemConfig.preset(name) for name in SOURCES}
    return [Method(f"stem, {name}", config, config.block_size) for name, config in configs.items()]


def all_names() -> tuple[str, ...]:
    """What `methods` takes: Stem, its variants, and every other pattern, the costly oracles last."""
    others = [name for name in patterns.names() if name != "stem" and not name.startswith("oracle")]
    oracles = [name for name in patterns.names() if name.startswith("oracle")]
    return ("stem", *ADAPTIVE, "stem softmax", *sorted(others, key=lambda name: name in BLIND), *oracles)


def window_control(block_size: int = 64) -> StemConfig:
    """The method that must fail: one sink block and the two most recent ones, whatever the scores say (our choice)."""
    return StemConfig(block_size=block_size, k_start=3, decay=1.0, sink_blocks=1, local_blocks=2)


@torch.no_grad()
def answer_scores(model, prompts: Prompts, tokens_per_batch: int | None = None) -> tuple[Tensor, Tensor]:
    """Teacher-forced answers, in one forward each: log-likelihood fp32 [samples] [nats], all right bool [samples]."""
    head = model.get_output_embeddings()
    logp, right = [], []
    longest = int(prompts.answer_tokens.max())
    for ids, counts in _batches(model, tokens_per_batch, prompts.ids, prompts.answer_tokens):
        hidden = model.get_decoder()(ids, use_cache=False).last_hidden_state[:, -longest - 1 : -1]
        logits, targets = head(hidden).float(), ids[:, -longest:]
        asked = torch.arange(longest, device=ids.device) >= longest - counts[:, None]  # answers end together
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        logp.append(-(losses * asked).sum(-1).cpu())
        right.append(((logits.argmax(-1) == targets) | ~asked).all(-1).cpu())
    return torch.cat(logp), torch.cat(right)


@torch.no_grad()
def document_losses(model, ids: Tensor, tokens_per_batch: int | None = None) -> Tensor:
    """Loss of every next token of documents int64 [n, N], all of it prefill: fp32 [n, N - 1] on the CPU [nats]."""
    head, parts = model.get_output_embeddings(), []
    for (batch,) in _batches(model, tokens_per_batch, ids):
        hidden = model.get_decoder()(batch, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        pieces = zip(
            *(x.split(LOGITS_AT_ONCE[batch.device.type]) for x in (hidden, batch[:, 1:].flatten())), strict=True
        )
        losses = [F.cross_entropy(head(h).float(), target, reduction="none") for h, target in pieces]
        parts.append(torch.cat(losses).view(len(batch), -1).cpu())
    return torch.cat(parts)


@torch.no_grad()
def generated_scores(model, tokenizer, prompts: Prompts, tokens_per_batch: int | None = None) -> Tensor:
    """Greedy answers after a sparse prefill, decoded densely: fp32 [samples], share of the answers in the text.

    Raises:
        ValueError: If the answers differ in length, so that the prompts do.
    """
    count = int(prompts.answer_tokens[0])
    if (prompts.answer_tokens != count).any():
        raise ValueError(f"answers of {prompts.task} must have one length, got {prompts.answer_tokens.tolist()} tokens")
    texts, compiled = [], _swap_compiled(model, [None] * len(model.get_decoder().layers))  # decoding has other shapes
    for (ids,) in _batches(model, tokens_per_batch, prompts.ids[:, :-count]):
        options = dict(do_sample=False, max_new_tokens=count + 4, pad_token_id=tokenizer.eos_token_id)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        texts += tokenizer.batch_decode(out[:, ids.shape[1] :])
    _swap_compiled(model, compiled)
    hits = [np.mean([answer in text for answer in of]) for text, of in zip(texts, prompts.answers, strict=True)]
    return torch.tensor(hits, dtype=torch.float32)


@torch.no_grad()
def prefill_ms(model, ids: Tensor) -> float:
    """Time of a prefill of int64 [n, N] tokens on the model's device [ms for one prompt]."""
    started = time.perf_counter()
    model.get_decoder()(ids, use_cache=False).last_hidden_state[:, -1].cpu()
    return (time.perf_counter() - started) * 1e3 / len(ids)


def interval(differences: Tensor, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of differences [n] that belong together in pairs."""
    values = differences.double().numpy()
    chosen = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(values[chosen].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


class Comparison:
    """Measures methods against dense attention on the same samples of one model.

    Dense attention is measured once for each group of samples, when the first method asks for it. `rows` holds the
    means, `samples` what they are means of (not for losses).
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
        """Add rows of the measure "loss": for each kind its later half, for all kinds together `spans` equal spans."""
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
        """Add a row of the measure "time": prefill of a batch, for each of its prompts [ms].

        Dense attention is timed afresh in turn with the method, so that their ratio holds on a busy GPU as well.
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

    def _measure(self, method: Method, ids: Tensor, name: str, measure) -> tuple[_Measured, _Measured]:
        """What `measure` gives under the method and under dense attention; the latter from the first time."""
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
    """Milliseconds for each sample."""


def _timed(measure, samples: int, density) -> _Measured:
    started = time.monotonic()
    result = measure()  # ends on the CPU, so the GPU is done
    return _Measured(result, density(), (time.monotonic() - started) * 1e3 / samples)


class LastRow(NamedTuple):
    """How the last query block of a prompt chooses among the key blocks, in every layer and head: [layers, Hq, nk]."""

    mass: Tensor
    """fp32, true attention probability on each key block, given what the layers below computed."""

    rank: Tensor
    """int64, place of the block in Stem's score, 0 = best."""

    kept: Tensor
    """bool, whether Stem kept it."""


@torch.no_grad()
def last_row(model, ids: Tensor, config: StemConfig) -> LastRow:
    """Look into a sparse prefill of int64 [1, N] tokens; everything on the CPU."""
    found = []

    def select(q: Tensor, k: Tensor, v: Tensor):
        scores = block_scores(q, k, v, config)
        budget = block_budget(scores.shape[-1], config)
        selection = select_blocks(scores, budget, config, q_len=q.shape[2], kv_len=k.shape[2])
        row = q[:, :, (selection.num_q_blocks - 1) * config.block_size :]
        mass = block_attention_mass(row, k, config.block_size)[0, :, -1]
        rank = scores[0, :, -1].argsort(descending=True).argsort()
        found.append([of.cpu() for of in (mass.float(), rank, selection.to_mask()[0, :, -1])])
        return selection

    with hf.stem_prefill(model, select):
        model(ids, use_cache=False, logits_to_keep=1)
    return LastRow(*(torch.stack(of) for of in zip(*found, strict=True)))


def needle_block(prompts: Prompts, sample: int, block_size: int) -> int:
    """Key block in which the answer of a task with one answer first appears in its prompt."""
    ids, count = prompts.ids[sample], int(prompts.answer_tokens[sample])
    answer = ids[-count:]
    starts = (ids.unfold(0, len(answer), 1) == answer).all(-1).nonzero()
    return int(starts[0]) // block_size


def calibrator(model, tokenizer, length: int, show=print):
    """What `methods` takes as `calibrate`: thresholds are solved on two windows that no comparison reads.

    Where no threshold fits, `show` is told so and the method is left out.
    """
    tokens = [tokenizer(text[: 8 * length], verbose=False).input_ids for text in calibration_texts()]
    prompts = torch.tensor([of[:length] for of in tokens])

    def solve(density: float, config: StemConfig) -> StemConfig | None:
        forced = window_control(config.block_size)
        blocks = -(-length // config.block_size)
        if int(block_budget(blocks, forced).sum()) / causal_pairs(blocks) > density:
            return None
        try:
            return stem.calibrate(model, [prompts], density, config, tolerance=0.01).config
        except ValueError as error:
            show(f"adaptive at density {density}, blocks of {config.block_size}, {length} tokens is left out: {error}")
            return None

    return solve


def calibration_texts() -> tuple[str, str]:
    """Python source and English text outside of `documents.KINDS`, each of more than 32 thousand tokens."""
    names = ("turtle", "_pydecimal", "tokenize", "random", "statistics", "configparser", "imaplib", "smtplib")
    source = "\n".join(documents.stdlib_documents(names).values())
    described = Path(importlib.import_module("transformers").__path__[0]) / "training_args.py"
    return source, described.read_text(encoding="utf-8")


def _start(tokenizer) -> list[int]:
    """What a tokenizer begins every text with: a BOS token, or nothing."""
    return tokenizer("").input_ids


def _ordered(task: str, row: Mapping) -> list[str]:
    """The answers in the one order that a reader would give."""
    return sorted(row["outputs"], key=row["input"].index) if task == "niah_multivalue" else row["outputs"]


def _batches(model, tokens_per_batch: int | None, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of the tensors together, a batch at a time, on the model's device; the first is [n, tokens]."""
    device = next(model.parameters()).device
    hidden = model.config.get_text_config().hidden_size
    most = max(1, (tokens_per_batch or NUMBERS_PER_BATCH[device.type] // hidden) // tensors[0].shape[1])
    size = math.ceil(len(tensors[0]) / math.ceil(len(tensors[0]) / most))  # batches of about one size
    for parts in zip(*(tensor.split(size) for tensor in tensors), strict=True):
        yield tuple(part.to(device) for part in parts)


def run(
    plan: Plan,
    model,
    tokenizer,
    name: str,
    seed: int = 0,
    *,
    part: str | None = None,
    wait=None,
    limit_s: float = math.inf,
    show=print,
    save=None,
) -> list[dict]:
    """All rows of a plan.

    Args:
        plan: What to measure.
        model, tokenizer: From `stem.pretrained.load`.
        name: Of the model, for the rows.
        seed: Of the RULER samples and the bootstrap.
        part: A share of the measurements, see `stem.experiments.long_context.plan.deal`; None is all.
        wait: Called when all samples are prepared, before the model is used.
        limit_s: Leave out what has not begun after so many seconds; how much that was is shown.
        show: Called with progress lines.
        save: Called with all rows so far, now and then.
    Raises:
        ExceptionGroup: Of the measurements that failed, after all others.
    """
    comparison, started, saved = Comparison(model, tokenizer, name, seed), time.monotonic(), time.monotonic()
    names = plan.names or all_names()
    known = [Method("dense"), *methods(names, plan.densities, plan.block_sizes, lambda density, config: config)]
    known += presets() if plan.presets else []
    order = ["dense", "window", *names[:4], *(method.name for method in presets()), *names[4:]]
    known.sort(key=lambda method: order.index(method.name))
    found = {(method.name, method.block_size, method.asked): method for method in known}
    jobs = deal([job for of in found for job in plan.jobs(*of)], part)
    calibrate = {length: cache(calibrator(model, tokenizer, length, show)) for length in plan.lengths}
    samples = dict(zip(plan.lengths, plan.samples, strict=True))
    prompts, kinds, errors = {}, {}, []
    for task, length in dict.fromkeys((job.task, job.length) for job in jobs):
        if task is None:
            kinds[length] = document_windows(tokenizer, length, plan.windows)
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
        except Exception as error:  # hours of other measurements need not be lost with one; raised at the end
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


@contextlib.contextmanager
def fused(model) -> Iterator[None]:
    """Compile each layer around its attention for a while: fewer and larger kernels, the same numbers up to rounding.

    The attention itself stays outside of the graphs, so that another method does not mean another compilation.
    """
    AttentionInterface.register(hf.NAME, torch.compiler.disable(hf.stem_attention_forward))
    for layer in model.get_decoder().layers:
        layer.compile(dynamic=True)
    try:
        yield
    finally:
        AttentionInterface.register(hf.NAME, hf.stem_attention_forward)
        _swap_compiled(model, [None] * len(model.get_decoder().layers))


def _swap_compiled(model, calls: Sequence) -> list:
    """Give the layers these compiled calls (what Module.compile sets; None is eager), and return those they had."""
    layers = model.get_decoder().layers
    before = [layer._compiled_call_impl for layer in layers]
    for layer, call in zip(layers, calls, strict=True):
        layer._compiled_call_impl = call
    return before


def main() -> None:
    """Measure and write results/long_context/answers/; with only some methods, the rows of the others stay."""
    from stem.experiments.long_context import processes

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--profile", choices=records.PROFILES, default="smoke")
    parser.add_argument("--model", default="smollm2", help="a name for stem.pretrained.load")
    parser.add_argument("--seed", type=int, default=0)
    only = dict(nargs="+", help="only these; other rows stay")
    parser.add_argument("--methods", metavar="NAME", choices=all_names(), **only)
    add_options(parser)
    arguments = parser.parse_args()
    plan, same = PLANS[arguments.profile], SAME if arguments.methods else None
    processes.measure(
        replace(plan, names=tuple(arguments.methods or plan.names)),
        arguments.model,
        arguments.seed,
        processes=arguments.processes,
        limit_s=arguments.limit,
        eager=arguments.eager,
        show=partial(print, flush=True),
        save=partial(records.write_rows, "long_context/answers", profile=arguments.profile, same=same),
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of a comparison at the command line."""
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds after which nothing more begins")
    shared = max(1, PROCESSES * torch.cuda.device_count())
    parser.add_argument("--processes", type=int, default=shared, help="that share the GPUs; one takes the times before")
    parser.add_argument("--eager", action="store_true", help="do not compile the model's layers on a GPU")


if __name__ == "__main__":
    main()

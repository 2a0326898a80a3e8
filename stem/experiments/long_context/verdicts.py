"""Verdicts on the paper's claims about quality, each computed from rows where scores had a choice.

A verdict is "reproduced", "partly", "not reproduced" or "not testable here", with a reason. Every difference is paired
by sample and has a 95 % bootstrap interval. "Reproduced" needs an interval that excludes zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from stem.experiments.long_context import report
from stem.experiments.long_context.measures import interval
from stem.experiments.long_context.methods import NO_VALUE
from stem.experiments.long_context.report import Difference
from stem.experiments.markdown import full_rows, tokens_label

STEPS = {"decay": (NO_VALUE, "uniform_topk"), "value": ("stem", NO_VALUE), "both": ("stem", "uniform_topk")}
SHARE_OF_PAPER = 1 / 3  # a smaller part of the paper's effect is reproduced partly
ASKED = 0.25  # density at which the paper's claims are compared
MATTERS = 0.05  # share of a layer's kept blocks that the value term replaces where it matters


class Verdict(NamedTuple):
    """Our value in words, and the verdict."""

    ours: str
    verdict: str

    def __bool__(self) -> bool:
        return bool(self.ours)


NONE = Verdict("", "not testable here yet")


def of_difference(difference: Difference, better: int, told: str) -> Verdict:
    """Verdict on the sign of a paired difference; better is -1 where a negative difference supports the claim."""
    if not difference.count:
        return NONE
    if not difference.excludes_zero:
        return Verdict(told, "not reproduced: the interval holds zero")
    return Verdict(told, "reproduced" if better * difference.mean > 0 else "not reproduced: the opposite sign")


def ablation(step: str) -> Verdict:
    """Table 5: what a step changes in the loss on documents, at the longest windows of each of `_models`."""
    rows = report.rows(parts=("loss",))
    rows = report.whole(rows[(rows.task != "all")]) if len(rows) else rows
    after, before = STEPS[step]
    rows = rows[(rows.block_size.isna() | (rows.block_size == 128))] if len(rows) else rows
    found = {}
    for (model, length), of in sorted(rows.groupby(["model", "length"]), key=_importance) if len(rows) else ():
        change = report.paired(of, after, before, block_size=128, asked=ASKED)
        if change.count and model not in found:
            where = f"{model}, density {ASKED:.0%}{on_answers(step, model)}"
            told = f"loss {change} windows of {tokens_label(length)} ({where})"
            found[model] = of_difference(change, -1, told)
    return _of_models(found)


def on_answers(step: str, model: str) -> str:
    """Cells of one model's answers that a step of Table 5 changes, by intervals without zero; "" without any."""
    rows = report.rows(parts=("answers",))
    rows = rows[(rows.model == model) & (rows.measure == "answer") & rows.asked.notna()] if len(rows) else rows
    cells = [
        report.paired(cell, *STEPS[step], block_size=size, asked=asked)
        for (_, _, size, asked), cell in (rows.groupby(["task", "length", "block_size", "asked"]) if len(rows) else ())
    ]
    if not (cells := [cell for cell in cells if cell.count]):
        return ""
    above, below = sum(cell.low > 0 for cell in cells), sum(cell.high < 0 for cell in cells)
    told = f"{len(cells)} cell{'s' * (len(cells) > 1)}"
    return f"; answers: higher in {above} and lower in {below} of {told}"


def value_size() -> Verdict:
    """Eq. 6 and 7: spread of the value term beside routing, and the kept blocks that it replaces, over all layers."""
    rows, found = full_rows("long_context/logits", claim="Eq. 6 and 7"), {}
    if len(rows):
        rows = rows.assign(model=rows.model.replace(report.MODELS))
    for (model, length), of in sorted(rows.groupby(["model", "tokens"]), key=_importance) if len(rows) else ():
        most = of.changed_most.max()
        told = (
            f"spread over the blocks of a row, value over routing: {of.spread.mean():.1%} (at most "
            f"{of.spread_most.max():.1%}); it changes {of.changed.mean():.1%} of the kept blocks (at most {most:.1%}; "
            f"n = {len(of)} windows of {tokens_label(length)}, all layers of {model})"
        )
        verdict = "not reproduced: too small to matter" if most < MATTERS else "partly: in some layers"
        found.setdefault(model, Verdict(told, verdict))
    return _of_models(found)


def value_term(paper_change: float) -> Verdict:
    """Table 1: change of the squared error of the logits by the value term, mean over windows.

    Args:
        paper_change: The paper's relative change, below 0.
    """
    found = {}
    for model, (wide, about) in _logits("Table 1", "error").items():
        change = _difference(wide["output-aware"] / wide["score-aware"] - 1)
        told = f"{change.mean:+.1%} [{change.low:+.1%}, {change.high:+.1%}], n = {change.count} {about}"
        found[model] = of_difference(change, -1, told)
        if found[model].verdict == "reproduced" and change.mean > SHARE_OF_PAPER * paper_change:
            found[model] = found[model]._replace(verdict="partly: the sign, at a smaller size")
    return _of_models(found)


def pruning() -> Verdict:
    """Fig. 3: error in the last quarter of the prompt after each of the three earlier quarters was pruned."""
    found = {}
    for model, (wide, about) in _logits("Fig. 3", "error_last").items():
        ratios = [_difference(np.log(wide[f"quarter {i}"] / wide[f"quarter {i + 1}"])) for i in (1, 2)]
        means = ", ".join(f"{wide[f'quarter {i}'].mean():.2g}" for i in (1, 2, 3))
        shown = ", ".join(f"{np.exp(x.mean):.2f} [{np.exp(x.low):.2f}, {np.exp(x.high):.2f}]" for x in ratios)
        told = f"what reaches the last quarter: {means}; ratios {shown}, n = {ratios[0].count} {about}"
        falls = [x.low > 0 for x in ratios]
        found[model] = Verdict(told, "reproduced" if all(falls) else "partly" if any(falls) else "not reproduced")
    return _of_models(found)


class Against(NamedTuple):
    """A method against dense attention or another method on needles or documents."""

    what: str  # "needles" or "documents"
    difference: Difference  # [nats], [nats per token]
    density: float  # computed
    length: int  # [tokens]
    model: str

    def __str__(self) -> str:
        where = f"{self.model}, {tokens_label(self.length)}, density {self.density:.1%}"
        return f"{self.what} {self.difference} ({where})"


def against(method: str, other: str = "dense", asked: float = ASKED) -> list[Against]:
    """Needles of one task and documents in blocks of 128 tokens: the longest samples of the first of Qwen's models."""
    found = []
    for what, part, measure in (("needles", "answers", "answer"), ("documents", "loss", "loss")):
        rows = report.rows(parts=(part,))
        if rows.empty:
            continue
        of_task = rows.task == report.NEEDLES if measure == "answer" else rows.task != "all"
        rows = report.whole(rows[(rows.measure == measure) & of_task])
        rows = rows[rows.block_size.isna() | (rows.block_size == 128)]
        for (model, length), of in sorted(rows.groupby(["model", "length"]), key=_importance):
            difference = report.paired(of, method, other, block_size=128, asked=asked)
            if difference.count:
                own = of[(of.method == method) & (of.asked.isna() | (of.asked == asked))]
                found.append(Against(what, difference, own.density.mean(), length, model))
                break
    return found


def near_dense() -> Verdict:
    """Tables 2 and 4: needles and documents of published Stem at the density of the claim; see `against`."""
    found = against("stem")
    reason = "not testable here: the paper's models have 8B parameters and generate answers"
    return Verdict("; ".join(map(str, found)), reason) if found else NONE


def _importance(group: tuple) -> tuple:
    """Sort key of (model, length), rows: Qwen's models first, then the longest windows."""
    (model, length), _ = group
    return not model.startswith("Qwen"), -length


def _of_models(found: dict[str, Verdict]) -> Verdict:
    """Join what each of `_models` found, in words; the verdict is the first one's, and names others that differ."""
    found = {model: found[model] for model in _models(found)}
    first, *_ = [*found.values(), NONE]
    different = [f"{model}: {of.verdict}" for model, of in found.items() if of.verdict != first.verdict]
    return Verdict("; ".join(of.ours for of in found.values()), "; ".join([first.verdict, *different]))


def _models(names: Iterable[str]) -> list[str]:
    """Models, in their order, on which a claim of the paper is judged: Qwen's, or the first one where none is there."""
    names = list(names)
    return [name for name in names if name.startswith("Qwen")] or names[:1]


def _logits(claim: str, column: str) -> dict[str, tuple[pd.DataFrame, str]]:
    """Model -> errors of one claim by window and method, at its longest windows, and a description of them."""
    rows, found = full_rows("long_context/logits", claim=claim), {}
    if rows.empty:
        return found
    rows = rows.assign(model=rows.model.replace(report.MODELS))
    for (model, length), of in sorted(rows.groupby(["model", "tokens"]), key=_importance):
        wide = of.pivot_table(index=["text", "sample"], columns="method", values=column)
        found.setdefault(model, (wide, f"windows of {tokens_label(length)} ({model})"))
    return found


def _difference(values: pd.Series) -> Difference:
    return Difference(values.mean(), *interval(torch.tensor(values.to_numpy())), len(values))

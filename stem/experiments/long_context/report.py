"""Tables, verdicts and figures from the rows of results/long_context/; nothing is measured here.

Densities, block sizes, tasks and counts come from the rows. A row is blank where scores chose less than
`methods.LEAST_CHOSEN` of the kept blocks. Nothing is concluded from blank rows. Tables of
needles are in needle_report.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from stem.experiments.long_context.measures import interval
from stem.experiments.long_context.methods import LEAST_CHOSEN, TRANSFERRED
from stem.experiments.markdown import MISSING, full_rows, markdown_table, not_run, number, tokens_label

CLOSE, FAILS = -0.5, -5.0  # mean difference of an answer to dense attention [nats]
MEASURES = ("answer", "right", "generated", "loss")
MODELS = {  # names in rows -> here
    "qwen2.5-coder-0.5b-0.9.0": "Qwen2.5-Coder-0.5B",
    "qwen2.5-coder-1.5b-0.2.0": "Qwen2.5-Coder-1.5B",
    "smollm2-0.1.2": "SmolLM2-135M",
    "smollm2": "SmolLM2-135M",
    "smollm2-32k": "SmolLM2-135M, extended",
    "gemma3-270m-1.0.0": "Gemma 3 270M",
}
PARTS = ("answers", "loss", "extension")
NEEDLES = "niah_multikey_1"  # the task on which verdicts about needles rest
UNITS = {"answer": "log p(answer), minus dense [nats]", "loss": "loss, minus dense [nats per token]"}
CELL = ["model", "measure", "task", "length", "start", "stop"]  # columns that name a group of equal samples


class Difference(NamedTuple):
    """Mean of paired differences, its 95 % bootstrap interval, and the number of pairs."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        digits = 3 if max(abs(self.low), abs(self.high)) >= 0.0095 else 5
        mean, low, high = (f"{value:+.{digits}f}" for value in self[:3])
        return f"{mean} [{low}, {high}], n = {self.count}"


def rows(device: str | None = None, parts: Sequence[str] = PARTS) -> pd.DataFrame:
    """Rows of full runs, of all devices or one; "cell" joins task and length, and blank rows hold no differences."""
    found = [full_rows(f"long_context/{part}") for part in parts]
    found = pd.concat([of for of in found if len(of)] or found[:1], ignore_index=True)
    if found.empty or "model" not in found:
        return found
    found = found[found.model.notna() & found.measure.isin(MEASURES)]
    found = found[found.device == device] if device else found
    if found.empty:
        return found
    found = found.reindex(columns=[*dict.fromkeys([*found.columns, "chosen", "values", "start", "stop"])])
    few = found.chosen < LEAST_CHOSEN
    found.loc[few, ["value", "difference", "low", "high", "values"]] = None
    return found.assign(model=found.model.replace(MODELS), cell=found.task + ", " + found.length.map(tokens_label))


def verdict(nats: float, *ends: float) -> str:
    """Verdict on a mean difference of answers to dense attention [nats], by a rule fixed before rows were read.

    Verdicts on the ends of its interval that differ from the mean's stand behind it in brackets.
    """
    told = ["close to dense" if x > CLOSE else "worse than dense" if x > FAILS else "fails" for x in (nats, *ends)]
    others = [each for each in dict.fromkeys(told[1:]) if each != told[0]]
    return f"{told[0]} (or {' or '.join(others)})" if others else told[0]


def paired(rows: pd.DataFrame, method: str, other: str = "dense", *, block_size: float, asked: float) -> Difference:
    """Difference of two methods on equal samples of all tasks in the rows: method minus other.

    Args:
        rows: Of one model, measure and length, each task with one pair of start and stop.
        method, other: The other one may be "dense".
        block_size, asked: Of the compared rows [tokens], in (0, 1]. Methods without a density of their own have none.
    Returns:
        NaN means and no pairs if a method is blank or missing everywhere.
    """
    found = []
    for _, of in rows.groupby(CELL, dropna=False):
        values = [values_of(of, name, block_size, asked) for name in (method, other)]
        if all(value is not None for value in values):
            found.append(values[0] - values[1])
    if not found:
        return Difference(float("nan"), float("nan"), float("nan"), 0)
    differences = torch.cat(found)
    return Difference(differences.mean().item(), *interval(differences), len(differences))


def values_of(of: pd.DataFrame, method: str, block_size: float, asked: float) -> Tensor | None:
    """Values of one method by sample in the rows of one cell and measure; None if they are blank or missing."""
    own = of.asked.isna() | (of.asked == asked)
    of = of[(of.method == method) & (of.block_size.isna() | (of.block_size == block_size)) & own].dropna(
        subset="values"
    )
    return torch.tensor([float(x) for x in str(of["values"].iloc[0]).split()]) if len(of) else None


def coverage(rows: pd.DataFrame) -> pd.DataFrame:
    """Number of methods, densities, block sizes, tasks and (fewest) samples, by model, measure and length."""
    chosen = rows[(rows.method != "dense") & (rows.task != "all")].dropna(subset="difference")
    groups = chosen.groupby(["model", "measure", "length"], sort=False)
    counts = dict(methods=("method", "nunique"), densities=("asked", "nunique"), block_sizes=("block_size", "nunique"))
    return groups.agg(**counts, tasks=("task", "nunique"), samples=("count", "min"))


def controls(rows: pd.DataFrame) -> pd.DataFrame:
    """Failures of the control, the short window: one line per model, measure, cell and block size.

    For documents, the last span of all kinds counts. The control fails where the interval of its difference to dense
    attention lies on the bad side of zero, and for answers beyond `FAILS`.
    """
    window = rows[(rows.method == "window") & rows.measure.isin(MEASURES)]
    window = window[(window.measure != "loss") | (window.task == "all") & (window.stop == window.length)]
    loss = window.measure == "loss"
    near = window.low.where(loss, window.high)  # the end of the interval nearer to zero
    fails = near.where(~loss, -near) < window.measure.map({"answer": FAILS}).fillna(0.0)
    columns = ["model", "measure", "cell", "block_size", "density", "dense", "difference"]
    return window[columns].assign(near=near, fails=fails).set_index(columns[:4]).sort_index()


def whole(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of answers, and of documents the rows over all positions of one kind."""
    starts = rows[(rows.measure == "loss") & (rows.task != "all")].groupby(["model", "length"]).start.transform("min")
    return rows[(rows.measure != "loss") | (rows.start == starts.reindex(rows.index))]


def complete(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows without those of documents whose method, at a density, lacks kinds that others of its length have."""
    cell = [rows[name] for name in ("model", "measure", "length")]
    own = [rows[name] for name in ("method", "block_size", "asked")]
    kinds, of_own = (rows.task.groupby(by, dropna=False).transform("nunique") for by in (cell, [*cell, *own]))
    return rows[(rows.measure != "loss") | (of_own == kinds)]


def differences(rows: pd.DataFrame, measure: str, asked: float, block_size: int, by: str = "cell") -> pd.DataFrame:
    """Differences to dense attention at one density and block size: methods, best first, by cell, and their means.

    The columns are "density" (computed), "chosen", "mean", then one for each value of `by`. Methods that lack a cell
    come last and have no mean.
    """
    chosen = whole(rows[rows.measure == measure])
    chosen = chosen[(chosen.asked == asked) & (chosen.block_size == block_size)].dropna(subset="difference")
    table = chosen.pivot_table(index="method", columns=by, values="difference", sort=False)
    table.insert(0, "mean", table.mean(axis=1, skipna=False))
    for name in ("chosen", "density"):
        table.insert(0, name, chosen.groupby("method")[name].mean())
    return table.sort_values("mean", ascending=measure == "loss")


def points(rows: pd.DataFrame, measure: str = "answer", task: str | None = None) -> pd.DataFrame:
    """One point per method, block_size, asked and length: computed density, and nats lost against dense attention.

    Args:
        task: Task that counts; None takes the task with most rows, and documents of all kinds, see `complete`.
    Returns:
        Columns method, block_size, asked, length, density, nats (difference of answers or losses), n (fewest samples).
    """
    found = whole(rows[rows.measure == measure]).dropna(subset="difference")
    if measure == "loss":
        found = complete(found[found.task != "all"])
    elif len(found):
        found = found[found.task == (task or found.groupby("task", sort=False).size().idxmax())]
    keys = ["method", "block_size", "asked", "length"]
    values = dict(density=("density", "mean"), nats=("difference", "mean"), n=("count", "min"))
    return found.groupby(keys, dropna=False, sort=False).agg(**values).reset_index()


def by_method(rows: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Differences to dense attention at the densities asked for, methods with all columns first, each group best first.

    Methods of `methods.TRANSFERRED` are left out, see `transfer`, and documents of some kinds only, see `complete`.
    """
    rows = complete(rows.dropna(subset="difference"))
    rows = rows[rows.asked.notna() & ~rows.method.isin(TRANSFERRED)]
    table = rows.pivot_table(index="method", columns=list(columns), values="difference")
    sign = 1 if (rows.measure == "loss").all() else -1
    order = pd.DataFrame(dict(missing=table.isna().any(axis=1), loss=sign * table.mean(axis=1)))
    return table.loc[order.sort_values(["missing", "loss"]).index]


def sides(rows: pd.DataFrame) -> pd.DataFrame:
    """Numbers of rows, and of those below and above dense attention by an interval without zero, and the lowest.

    One line per model, length and task. Rows without a density that was asked for do not count.
    """
    rows = rows[rows.asked.notna()].dropna(subset="difference")
    rows = rows.assign(below=rows.high < 0, above=rows.low > 0)
    counts = dict(below=("below", "sum"), above=("above", "sum"), rows=("low", "size"), lowest=("difference", "min"))
    return rows.groupby(["model", "length", "task"]).agg(**counts).round(4)


def to_oracle(rows: pd.DataFrame, oracles: Mapping[str, str], asked: float, block_size: int = 128) -> pd.DataFrame:
    """Paired differences of methods to their oracles, and of the oracles to dense attention, by length of one task."""
    lines = {}
    for name, oracle in oracles.items():
        for length, of in rows.groupby("length"):
            gap = paired(of, name, oracle, block_size=block_size, asked=asked)
            if gap.count:
                own = paired(of, oracle, block_size=block_size, asked=asked)
                lines[name, tokens_label(length)] = {"minus its oracle": str(gap), "oracle minus dense": str(own)}
    return pd.DataFrame(lines).T


def lowest_density(points: pd.DataFrame, bound: float) -> pd.DataFrame:
    """Lowest measured density of each method, block size and length whose mean loss is within a bound, and its nats.

    Args:
        bound: Largest loss against dense attention [nats]: negative for answers, positive for documents.
    """
    good = points.nats >= bound if bound < 0 else points.nats <= bound
    found = points[good & points.asked.notna()].sort_values("density")
    return found.groupby(["length", "block_size", "method"], sort=False)[["density", "nats"]].first()


def quality() -> str:
    """Documents of each machine and model against dense attention: one table per length and block size."""
    found = rows(parts=("loss",))
    if found.empty:
        return not_run("make quality PROFILE=full")
    found = whole(found[found.task != "all"])
    parts = []
    for (device, model, length), part in found.groupby(["device", "model", "length"]):
        dense = part[part.method == "dense"].groupby("task").value.first()
        kinds = ", ".join(f"{kind} {loss:.2f}" for kind, loss in dense.items())
        parts.append(
            f"**{model}** on {device}, {part['count'].min():.0f} windows of {tokens_label(length)} tokens of each kind "
            f"of text, every layer sparse. Dense loss [nats per token]: {kinds}. Cells hold the loss above dense, its "
            "95 % interval, and the computed density where it differs from the density asked for."
        )
        parts.append(table_by_density(part))
    cost = _cost_sentence()
    return "\n\n".join([*parts, cost] if cost else parts)


def table_by_density(part: pd.DataFrame, form: str = "{:+.3f}") -> str:
    """Markdown table of paired differences to dense attention: one column per block size and density asked for.

    Cells of methods that were not measured on all tasks of the rows name the number of theirs. Methods that set their
    own density come last, in a column of their own.
    """
    part = part.dropna(subset="difference")
    columns = sorted(part.dropna(subset="asked").groupby(["block_size", "asked"]).groups)
    cells, order, own = {}, {}, []
    for method, of in part[part.method != "dense"].groupby("method", sort=False):
        for size, asked in columns:
            row = of[(of.block_size == size) & (of.asked == asked)]
            if len(row):
                difference, density = to_dense(part, row), row.density.mean()
                told = f" ({density:.1%})" if abs(density - asked) > 0.005 else ""
                told += of_kinds(row, part)
                cells[method, size, asked] = _interval(difference, form) + told
                order.setdefault(method, []).append(difference.mean)
        if of.asked.isna().all():
            row = of[of.block_size == of.block_size.max()]
            told = f"{_interval(to_dense(part, row), form)} ({row.density.mean():.1%}){of_kinds(row, part)}"
            own.append([method, *[MISSING] * len(columns), told])
    sign = -1 if "loss" in set(part.measure) else 1
    best = sorted(order, key=lambda method: (-len(order[method]), -sign * sum(order[method]) / len(order[method])))
    header = ["method", *(f"blocks of {size:.0f}, {asked:.0%}" for size, asked in columns)]
    lines = [[name, *(cells.get((name, *at), MISSING) for at in columns)] for name in best]
    if own:
        header, lines = [*header, "own density"], [*([*line, MISSING] for line in lines), *own]
    return markdown_table(header, lines)


def of_kinds(rows: pd.DataFrame, every: pd.DataFrame) -> str:
    """Number of kinds (tasks) in a method's rows and in all rows, " (2 of 5 kinds)"; "" where it lacks none."""
    own, all_of = rows.task.nunique(), every.task.nunique()
    return f" ({own} of {all_of} kinds)" if own < all_of else ""


def to_dense(part: pd.DataFrame, of: pd.DataFrame) -> Difference:
    """Difference to dense attention of one method's rows at one density, from samples where the rows hold them."""
    row = of.iloc[0]
    found = paired(part, row.method, block_size=row.block_size, asked=row.asked)
    return found if found.count else Difference(row.difference, row.low, row.high, row["count"])


def _interval(difference: Difference, form: str) -> str:
    mean, low, high = (form.format(value) for value in difference[:3])
    return f"{mean} [{low}, {high}]"


def _cost_sentence() -> str:
    """Sentence on the time of block selection at the longest timed length, beside Stem's scores and selection."""
    cost, own = full_rows("long_context/selection_cost"), full_rows("speed")
    if cost.empty:
        return ""
    row = cost.loc[cost.tokens.idxmax()]
    own = own[(own.device == row.device) & (own.tokens == row.tokens) & (own.config == "default")] if len(own) else own
    if own.empty:
        return ""
    parts = own[own.operation.isin(("scores", "selection"))].latency_ms.sum()
    attention = own[own.operation == "attention"].latency_ms.min()
    return (
        f"Selection by `adaptive` takes {number(row.selection_ms)} ms at {tokens_label(row.tokens)} tokens in a layer "
        f"of an 8B model on {row.device}, {row.share:.1%} of the whole operator at density {row.density:.1%}. Stem's "
        f"scores and selection take {number(parts)} ms there, and attention over a quarter of the blocks "
        f"{number(attention)} ms."
    )

"""Tables, verdicts and figures from the rows of results/long_context/answers/ and .../extension/; nothing is measured.

Densities, block sizes, tasks and counts are those that the rows hold; what a run did not reach is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from stem.experiments import figures, records
from stem.experiments.markdown import tokens_label

CLOSE, FAILS = -0.5, -5.0  # mean difference of an answer to dense attention [nats]
WORSE = {"answer": "high", "right": "high", "generated": "high", "loss": "low"}  # the end of the interval nearer to 0
UNITS = {"density": "computed share of the causal block pairs", "ms": "prefill of one prompt [ms]"}
MODELS = {  # names in rows -> here
    "smollm2-0.1.2": "8K model",
    "smollm2": "8K model",
    "smollm2-32k": "extended model",
    "gemma3-270m-1.0.0": "Gemma 3 270M",
    "gemma3-270m": "Gemma 3 270M",
}
NATS = "log p(answer), minus dense [nats]"


def rows(device: str, extension_device: str | None = None) -> pd.DataFrame:
    """Full rows of one device: the embedded model's, those of the extended one, and those of other models.

    Args:
        device, extension_device: As in the column device; the second is that of the extension, default the first.
    Returns:
        All columns of both experiments and "cell", task and length in one text.
    """
    parts = []
    for experiment, of in (("long_context/answers", device), ("long_context/extension", extension_device or device)):
        found = records.read_rows(experiment)
        parts.append(found[(found.device == of) & (found.profile == "full")])
    found = pd.concat([part for part in parts if len(part)], ignore_index=True)
    return found.assign(model=found.model.replace(MODELS), cell=found.task + ", " + found.length.map(tokens_label))


def verdict(nats: float) -> str:
    """What a mean difference of answers to dense attention amounts to: a rule fixed before rows were read."""
    return "close to dense" if nats > CLOSE else "worse than dense" if nats > FAILS else "fails"


def coverage(rows: pd.DataFrame) -> pd.DataFrame:
    """How much each measure rests on: methods, densities, block sizes and the fewest samples, by model and length."""
    chosen = rows[(rows.method != "dense") & rows.measure.isin([*WORSE, "time"]) & (rows.task != "all")]
    groups = chosen.groupby(["model", "measure", "length"], sort=False)
    counts = dict(methods=("method", "nunique"), densities=("asked", "nunique"), block_sizes=("block_size", "nunique"))
    return groups.agg(**counts, tasks=("task", "nunique"), samples=("count", "min"))


def controls(rows: pd.DataFrame) -> pd.DataFrame:
    """Whether the short window fails where it must: one line for each model, measure, cell and block size.

    Of documents, the last span of all kinds counts. "fails" means that the interval of the difference to dense
    attention lies on the bad side of zero, and beyond `FAILS` for answers.
    """
    window = rows[(rows.method == "window") & rows.measure.isin(WORSE)]
    documents = (window.measure == "loss") & (window.task == "all")
    window = window[(window.measure != "loss") | documents & (window.stop == window.length)]
    near = pd.Series([row[WORSE[row.measure]] for _, row in window.iterrows()], window.index, dtype=float)
    limits = window.measure.map({"answer": FAILS}).fillna(0.0)
    fails = near.where(window.measure != "loss", -near) < limits
    columns = ["model", "measure", "cell", "block_size", "density", "dense", "difference"]
    return window[columns].assign(near=near, fails=fails).set_index(columns[:4]).sort_index()


def differences(rows: pd.DataFrame, measure: str, asked: float, block_size: int, by: str = "cell") -> pd.DataFrame:
    """Methods at one density and block size, best first: what each loses, by cell, and its mean over these.

    Columns "density" (computed), "mean", then one for each value of `by`. Of documents, each kind's later half counts;
    methods that lack a cell come last and have no mean.
    """
    chosen = rows[(rows.measure == measure) & (rows.task != "all")]
    chosen = chosen[(chosen.asked == asked) & (chosen.block_size == block_size)]
    table = chosen.pivot_table(index="method", columns=by, values="difference", sort=False)
    density = chosen.groupby("method").density.mean()
    table.insert(0, "mean", table.mean(axis=1, skipna=False))
    table.insert(0, "density", density)
    return table.sort_values("mean", ascending=measure == "loss")


def generated(rows: pd.DataFrame, block_size: int) -> pd.DataFrame:
    """Shares of right answers by cell and method: "generated", and "right", in one sparse forward, on equal samples."""
    chosen = rows[rows.measure.isin(["generated", "right"]) & rows.block_size.isin([float("nan"), block_size])]
    table = chosen.pivot_table(index=["cell", "method"], columns="measure", values="value", sort=False)
    return table.reindex(columns=["generated", "right"]).dropna()


def points(rows: pd.DataFrame, task: str | None = None) -> pd.DataFrame:
    """Methods by method, block_size, asked and length: density, nats lost, ms of a prompt's prefill.

    Args:
        rows: Of one model.
        task: Whose answers count; None is the one that was asked of most methods.
    Returns:
        ms is of the measure "time", missing where that was not taken: the method's share of the dense pass beside it,
        times the median of all dense passes.
    """
    answers = rows[rows.measure == "answer"]
    task = answers.groupby("task", sort=False).size().idxmax() if task is None else task
    keys = ["method", "block_size", "asked", "length"]
    found = answers[answers.task == task].groupby(keys, dropna=False, sort=False)
    found = found.agg(density=("density", "mean"), nats=("difference", "mean"), n=("count", "min"))
    times = rows[rows.measure == "time"].groupby(keys, dropna=False)[["value", "dense"]].mean()
    times = (times.value / times.dense * times.dense.groupby("length").transform("median")).rename("ms")
    return found.reset_index().merge(times.reset_index(), on=keys, how="left").assign(task=task)


def best(points: pd.DataFrame, count: int = 6, also: Sequence[str] = ("stem", "window")) -> list[str]:
    """The methods that lose least where most methods have points, best first, and beside these the ones named."""
    chosen = points[points.asked.notna()]
    (asked, size) = chosen.groupby(["asked", "block_size"]).method.nunique().idxmax()
    mean = chosen[(chosen.asked == asked) & (chosen.block_size == size)].groupby("method").nats.mean()
    names = list(mean.sort_values(ascending=False).index)
    return [*names[:count], *(name for name in also if name not in names[:count] and name in set(points.method))]


def against(points: pd.DataFrame, x: str, methods: Sequence[str]) -> Figure:
    """What answers lose against "density" or "ms": one panel a length, one colour a method, one line a block size."""
    shown = points[points.method.isin(methods) & points[x].notna()]
    shown = shown.assign(blocks=shown.block_size.fillna(0).astype(int))
    lengths = sorted(shown.length.unique())
    figure, _ = figures.new(len(lengths), width=5.2, height=4.0)
    for place, (ax, length) in enumerate(zip(figure.axes, lengths, strict=True)):
        options = dict(x=x, y="nats", hue="method", hue_order=methods, style="blocks", markers=True, palette="husl")
        sns.lineplot(shown[shown.length == length], ax=ax, legend=place + 1 == len(lengths), errorbar=None, **options)
        ax.axhline(0, color="grey")
        ax.set(title=f"{tokens_label(length)} tokens", xlabel=UNITS[x], ylabel="" if place else NATS)
    figure.axes[-1].legend(bbox_to_anchor=(1, 1))
    return figure


def near_and_fast(points: pd.DataFrame) -> pd.DataFrame:
    """Points close to dense by the rule and faster than it at their length, fastest first, with "speedup"."""
    dense = points[points.method == "dense"].set_index("length").ms
    found = points[points.method != "dense"].assign(speedup=points.length.map(dense) / points.ms)
    return found[(found.nats > CLOSE) & (found.speedup > 1)].sort_values("speedup", ascending=False)


def describe(points: pd.DataFrame) -> str:
    """Methods of `near_and_fast` as a sentence's list, one entry for each method and length."""
    found = points.drop_duplicates(["method", "length"]).sort_values("length", kind="stable")
    told = [f"{row.method} at {tokens_label(row.length)} ({row.speedup:.2f}×)" for row in found.itertuples()]
    return ", ".join(told) or "none"

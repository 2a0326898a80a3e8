"""Tables, verdicts and figures from the rows of results/long_context/answers/ and .../extension/; nothing is measured.

Densities, block sizes, tasks and counts come from the rows. Measurements that a run did not reach are left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from stem.config import StemConfig
from stem.experiments import figures
from stem.experiments.markdown import MISSING, full_rows, markdown_table, no_rows, number, tokens_label

CLOSE, FAILS = -0.5, -5.0  # mean difference of an answer to dense attention [nats]
MEASURES = ("answer", "right", "generated", "loss")
UNITS = {"density": "computed share of the causal block pairs", "ms": "prefill of one prompt [ms]"}
MODELS = {  # names in rows -> here
    "smollm2-0.1.2": "8K model",
    "smollm2": "8K model",
    "smollm2-32k": "extended model",
    "gemma3-270m-1.0.0": "Gemma 3 270M",
    "gemma3-270m": "Gemma 3 270M",
}
NATS = "log p(answer), minus dense [nats]"
ANSWERED = "Log-likelihood of the right answer, minus dense [nats], 95 % interval of the difference:"
GENERATED = "Share of right generated answers, minus dense. Decoding is dense and hides part of a prefill's loss:"
READ = "Loss on the later half of documents, minus dense [nats per token]:"
TIMED = (
    "Speed-up of the whole model's batched prefill over dense attention, timed in turn. Kernels select the blocks of "
    "the stem rows only. The other selections are eager PyTorch in fp32, written here from the papers, so that slow "
    "rows, flashprefill among them, say nothing about their authors' kernels:"
)


def rows(device: str, extension_device: str | None = None) -> pd.DataFrame:
    """Rows of full runs on one device (extended model: on `extension_device`); "cell" joins task and length."""
    answers, extension = full_rows("long_context/answers"), full_rows("long_context/extension")
    parts = (answers[answers.device == device], extension[extension.device == (extension_device or device)])
    found = pd.concat([part for part in parts if len(part)], ignore_index=True)
    return found.assign(model=found.model.replace(MODELS), cell=found.task + ", " + found.length.map(tokens_label))


def verdict(nats: float) -> str:
    """Verdict on a mean difference of answers to dense attention [nats], by a rule fixed before rows were read."""
    return "close to dense" if nats > CLOSE else "worse than dense" if nats > FAILS else "fails"


def coverage(rows: pd.DataFrame) -> pd.DataFrame:
    """Number of methods, densities, block sizes, tasks and (fewest) samples, by model, measure and length."""
    chosen = rows[(rows.method != "dense") & rows.measure.isin([*MEASURES, "time"]) & (rows.task != "all")]
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


def differences(rows: pd.DataFrame, measure: str, asked: float, block_size: int, by: str = "cell") -> pd.DataFrame:
    """Differences to dense attention at one density and block size: methods, best first, by cell, and their means.

    The columns are "density" (computed), "mean", then one for each value of `by`. For documents, the later half of each
    kind counts. Methods that lack a cell come last and have no mean.
    """
    chosen = rows[(rows.measure == measure) & (rows.task != "all")]
    chosen = chosen[(chosen.asked == asked) & (chosen.block_size == block_size)]
    table = chosen.pivot_table(index="method", columns=by, values="difference", sort=False)
    table.insert(0, "mean", table.mean(axis=1, skipna=False))
    table.insert(0, "density", chosen.groupby("method").density.mean())
    return table.sort_values("mean", ascending=measure == "loss")


def generated(rows: pd.DataFrame, block_size: int) -> pd.DataFrame:
    """Shares of right answers by cell and method: "generated", and "right" in one sparse forward, on equal samples."""
    chosen = rows[rows.measure.isin(["generated", "right"]) & rows.block_size.isin([float("nan"), block_size])]
    table = chosen.pivot_table(index=["cell", "method"], columns="measure", values="value", sort=False)
    return table.reindex(columns=["generated", "right"]).dropna()


def points(rows: pd.DataFrame, task: str | None = None) -> pd.DataFrame:
    """One point of a model per method, block_size, asked and length: density, nats lost, ms of a prompt's prefill.

    Args:
        task: Task whose answers count; None takes the task that most methods answered.
    Returns:
        Columns method, block_size, asked, length, density, nats, n (fewest samples), ms, task. ms is the method's time
        as a share of the dense time beside it, times the median of all dense times; NaN where it was not timed.
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
    """Names of the methods that lose least, best first, where most methods have points; then the names in `also`."""
    chosen = points[points.asked.notna()]
    (asked, size) = chosen.groupby(["asked", "block_size"]).method.nunique().idxmax()
    mean = chosen[(chosen.asked == asked) & (chosen.block_size == size)].groupby("method").nats.mean()
    names = list(mean.sort_values(ascending=False).index)
    return [*names[:count], *(name for name in also if name not in names[:count] and name in set(points.method))]


def against(points: pd.DataFrame, x: str, methods: Sequence[str]) -> Figure:
    """Nats lost over "density" or "ms": one panel per length, one colour per method, one line per block size."""
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
    """Points of `near_and_fast` as text, "stem at 4K (1.20×), ...", one entry per method and length, or "none"."""
    found = points.drop_duplicates(["method", "length"]).sort_values("length", kind="stable")
    told = [f"{row.method} at {tokens_label(row.length)} ({row.speedup:.2f}×)" for row in found.itertuples()]
    return ", ".join(told) or "none"


def quality() -> str:
    """Loss above dense by method and density: one table per machine and block size with both `stem` and `adaptive`."""
    rows = full_rows("long_context/loss")
    if rows.empty:
        return "No full run is committed yet: `make quality PROFILE=full` on a CUDA machine writes its rows."
    rows = rows[rows.groupby(["device", "block_size"]).method.transform(lambda of: {"adaptive", "stem"} <= set(of))]
    parts = []
    for (device, size), part in rows.groupby(["device", "block_size"], sort=True):
        texts = sorted(part.text.unique())
        asked = sorted(part[part.method == "stem"].asked.unique())
        means = part.groupby(["method", "asked"])[["gap", "density"]].mean()
        cells = {
            key: f"{gap:+.4f}" + (f" ({density:.1%})" if abs(density - key[1]) > 0.005 else "")
            for key, gap, density in means.itertuples()
        }
        order = part[part.asked.isin(asked)].groupby("method").gap.mean().sort_values().index
        lines = [[method, *(cells.get((method, at), MISSING) for at in asked)] for method in order]
        cost = _cost_sentence(device) if size == StemConfig.preset("adaptive").block_size else ""  # as it was timed
        parts.append(
            f"**{part.model.iloc[0]}** on {device}, every layer sparse, blocks of {size:.0f} tokens, windows of "
            f"{tokens_label(part.tokens.max())} tokens of {len(texts)} kinds of text ({', '.join(texts)}). Cells hold "
            "the loss above dense, mean over all positions [nats per token], and the computed density where it differs "
            f"from the density asked for.{_quality_sentence(means)}{cost}"
        )
        parts.append(markdown_table(["method", *(f"asked for {at:.0%}" for at in asked)], lines))
    return "\n\n".join(parts)


def _quality_sentence(means: pd.DataFrame) -> str:
    """Sentence on the gap of `adaptive` as a share of the gap of `stem`, at equal density and with half the blocks."""
    pairs = [(0.31, 0.31), (0.16, 0.16), (0.155, 0.31)]
    if not all(("adaptive", own) in means.index and ("stem", other) in means.index for own, other in pairs):
        return ""
    same, sparser, half = (means.gap["adaptive", own] / means.gap["stem", other] for own, other in pairs)
    return (
        f" `adaptive` leaves {same:.0%} of the gap of `stem` at a density of 31 % and {sparser:.0%} at 16 %. With half "
        f"the blocks it leaves {half:.0%} of the gap that `stem` has at 31 %."
    )


def _cost_sentence(device: str) -> str:
    """Sentence on the time of block selection at the longest timed length, beside Stem's scores and selection."""
    cost, own = full_rows("long_context/selection_cost"), full_rows("speed")
    cost = cost[cost.device == device]
    if cost.empty:
        return ""
    row = cost.loc[cost.tokens.idxmax()]
    own = own[(own.device == device) & (own.tokens == row.tokens) & (own.config == "default")]
    parts = own[own.operation.isin(("scores", "selection"))].latency_ms.sum()
    attention = own[own.operation == "attention"].latency_ms.min()
    return (
        f" Selection by `adaptive` takes {number(row.selection_ms)} ms at {tokens_label(row.tokens)} tokens in a layer "
        f"of an 8B model, {row.share:.1%} of the whole operator at density {row.density:.1%}. Stem's scores and "
        f"selection take {number(parts)} ms there, and attention over a quarter of the blocks {number(attention)} ms."
    )


def evaluation() -> str:
    """Answers and documents of each machine and model against dense attention, by method."""
    rows = pd.concat([full_rows("long_context/answers"), full_rows("long_context/extension")])
    if rows.empty:
        return no_rows("06_long_context_eval")
    rows = rows[rows.measure.isin(("answer", "loss", "generated", "time"))]
    parts = []
    for (device, model), part in rows.groupby(["device", "model"], sort=True):
        part = part[part.length.isin(part[part.method != "dense"].length)]
        if part.empty:
            continue
        asked, size = part[part.asked.notna()].groupby(["asked", "block_size"]).size().idxmax()  # of most measures
        sized = part.block_size.isna() | (part.block_size == size) | part.method.str.startswith("stem, ")  # presets
        at = part[(part.asked.isna() | (part.asked == asked)) & sized]
        loss = at[(at.measure == "loss") & (at.task != "all")]
        parts += [
            f"**{model}** on {device}, blocks of {size:.0f} tokens, asked for {asked:.0%} of the block pairs, "
            "teacher-forced in one sparse forward. The short window is the control that must fail.",
            _differences(ANSWERED, at[at.measure == "answer"], "{:.1f}"),
            _differences(GENERATED, at[at.measure == "generated"], "{:+.0%}"),
            _differences(READ, loss[loss.length == loss.length.max()], "{:+.3f}"),
            _by_density(part[(part.measure == "answer") & part.asked.notna()]),
            _times(at[at.measure == "time"]),
        ]
    return "\n\n".join(filter(None, parts))


def _by_density(answers: pd.DataFrame) -> str:
    """Answers of one task at the longest prompts, minus dense, one column per block size and density asked for."""
    counts = answers.drop_duplicates(["task", "asked", "block_size"]).groupby("task", sort=False).size()
    if counts.max() < 2:
        return ""
    of = answers[answers.task == counts.idxmax()]
    of = of[of.length == of.length.max()]
    table = of.pivot_table(index="method", columns=["block_size", "asked"], values="difference")
    table = table.loc[table.mean(axis=1).sort_values(ascending=False).index]
    names = [f"{size:.0f}, {asked:.0%}" for size, asked in table.columns]
    lines = [[method, *(MISSING if pd.isna(x) else f"{x:.1f}" for x in nats)] for method, nats in table.iterrows()]
    title = f"{of.task.iloc[0]} at {tokens_label(of.length.iloc[0])} by block size and density asked for, minus dense "
    return f"{title}[nats]:\n\n{markdown_table(['method', *names], lines)}"


def _times(rows: pd.DataFrame) -> str:
    """Speed-up of the whole model's prefill, one column per length, the fastest at the longest length first."""
    if rows.empty:
        return ""
    table = rows.assign(share=rows.value / rows.dense).pivot_table(index="method", columns="length", values="share")
    lines = [["dense [ms]", *(f"{ms:.3g}" for ms in rows.groupby("length").dense.median())]]
    for method, shares in table.drop("dense", errors="ignore").sort_values(table.columns[-1]).iterrows():
        lines.append([method, *(MISSING if pd.isna(of) else f"{1 / of:.2f}×" for of in shares)])
    return f"{TIMED}\n\n{markdown_table(['method', *map(tokens_label, table.columns)], lines)}"


def _differences(title: str, rows: pd.DataFrame, form: str) -> str:
    """One line per method, best first, one column per task and length, with computed density and sample counts."""
    if rows.empty:
        return ""
    rows = rows.assign(column=rows.task + ", " + rows.length.map(tokens_label))
    columns = rows.sort_values("length", kind="stable").column.unique()
    sign = -1 if "loss" in set(rows.measure) else 1
    order = (sign * rows.groupby("method").difference.mean().drop("dense")).sort_values(ascending=False).index
    value, difference = form.replace("+", ""), f"{form} [{form}, {form}]"
    lines = []
    for method in ("dense", *order):
        of, dense = rows[rows.method == method], method == "dense"
        texts = {
            row.column: value.format(row.value) if dense else difference.format(row.difference, row.low, row.high)
            for row in of.itertuples()
        }
        counts = " to ".join(dict.fromkeys(f"{count:.0f}" for count in of["count"].agg(["min", "max"])))
        found = (texts.get(column, MISSING) for column in columns)
        lines.append(["dense itself" if dense else method, f"{of.density.mean():.1%}", counts, *found])
    return f"{title}\n\n{markdown_table(['method', 'density', 'samples', *columns], lines)}"

"""Report on the rows of the training experiment: means and ranges over seeds, verdicts, sentences and figures.

A difference counts only if the seeds show it: `verdict` says "higher" or "lower" when the interval of the paired
differences lies on one side of a tolerance, and "level" otherwise.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stem.experiments import figures, records
from stem.experiments.markdown import MISSING, by_device, full_rows, markdown_table, no_rows, tokens_label
from stem.experiments.training import tasks

T_95 = {2: 12.7, 3: 4.30, 4: 3.18, 5: 2.78}  # number of seeds -> two-sided 95 % quantile of Student's t
LATE = 2048  # position from which the cost of Stem is read: before it, a row has few blocks to drop [tokens]
WORDS = {"loss": "text loss", "correct": "right answers"}
SWITCHED = {"dense → stem": "#5fb0e5", "stem → dense": "#8c6bb1"}  # models that read with another attention
PANELS = {"loss_text": "text loss [nats]", "loss_recall": "recall loss [nats]", "grad_norm": "gradient norm"}


def seeds_of(
    rows: pd.DataFrame, measure: str, trained: str, inferred: str, *, seq_len: int, task: str = "", shortest: int = 0
) -> pd.Series:
    """Mean of a measure for each seed, ascending, weighted by counts.

    Args:
        rows: Rows of stem.experiments.training.experiment, of one machine and profile.
        task: Beginning of the task's name; "" takes all.
        shortest: Leave out bins that start before this position or distance [tokens].
    """
    kept = (rows.measure == measure) & (rows.trained == trained) & (rows.inferred == inferred)
    kept &= (rows.seq_len == seq_len) & rows.task.str.startswith(task) & (rows.start >= shortest)
    found = rows[kept]
    sums = found.assign(weighted=found.value * found["count"]).groupby("seed")[["weighted", "count"]].sum()
    return sums.weighted / sums["count"]


def verdict(values: pd.Series, than: pd.Series, tolerance: float = 0.0) -> str:
    """Compare values paired by seed: "higher" or "lower" by more than the tolerance, or "level".

    With several seeds, "higher" and "lower" need the 95 % interval of the differences (Student's t) to lie beyond the
    tolerance. With one seed, the difference itself decides, and the word is followed by "(one seed)".
    """
    difference = (values - than).dropna()
    seeds = len(difference)
    if seeds == 0:
        return "level"
    margin = T_95.get(seeds, 2.6) * difference.std() / seeds**0.5 if seeds > 1 else 0.0
    low, high = difference.mean() - margin, difference.mean() + margin
    word = "higher" if low > tolerance else "lower" if high < -tolerance else "level"
    return word if seeds > 1 else f"{word} (one seed)"


def span(values: pd.Series, digits: int = 3) -> str:
    """Format mean and range over seeds, such as "0.812 (0.790 to 0.830)"; a single seed has no range."""
    mean, low, high = (f"{value:.{digits}f}" for value in (values.mean(), values.min(), values.max()))
    return f"{mean} ({low} to {high})" if len(values) > 1 else mean


def end_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Table of every arm at the end of its training: losses, gradient norm, spikes, speed and memory."""
    own = rows[(rows.place == "step") & (rows.trained == rows.inferred) & ~rows.trained.str.startswith("adapt")]
    last = own[own.groupby(["trained", "seed", "measure"]).stop.transform("max") == own.stop]
    table = last.groupby(["trained", "measure"], sort=False).value.agg(span_or_number).unstack()
    return table.reindex(index=own.trained.unique())


def span_or_number(values: pd.Series) -> str:
    """Format a cell like `span`, without decimals for whole numbers and for numbers from 1000."""
    whole = (values == values.round()).all() or values.abs().min() >= 1000
    return span(values, 0 if whole else 3)


def reading_table(rows: pd.DataFrame, measure: str, task: str) -> pd.DataFrame:
    """Table of the `span` of a measure for every reading (trained → inferred) at every length."""
    read = rows[(rows.measure == measure) & (rows.task == task)]
    table = {}
    for (trained, inferred), group in read.groupby(["trained", "inferred"], sort=False):
        cells = {n: seeds_of(group, measure, trained, inferred, seq_len=n) for n in sorted(group.seq_len.unique())}
        table[f"{trained} → {inferred}"] = {tokens_label(n): span(values) for n, values in cells.items()}
    return pd.DataFrame(table).T


def adaptation_table(rows: pd.DataFrame, shortest: int = LATE) -> pd.DataFrame:
    """Held-out loss [nats] of the fine-tuned models by reading and seed, at positions from `shortest` on.

    Returns:
        DataFrame with a row for each seed. Columns "<trained> dense" and "<trained> stem" hold the losses, for trained
        in pretrained, adapt_dense and adapt_stem. "gap" is the loss of the dense-tuned model read with Stem minus read
        dense. "gap_left" is the loss of the Stem-tuned model read with Stem minus the dense-tuned model read dense.
        "removed" is the share 1 - gap_left / gap.
    """
    held_out = rows[rows.task.str.startswith("held_out") & (rows.start >= shortest)]
    table = held_out.groupby(["seed", "trained", "inferred"], sort=False).value.mean().unstack([1, 2], sort=False)
    table.columns = table.columns.map(" ".join)
    before = [name for name in table if name.startswith("pretrained")]
    table[before] = table[before].ffill().bfill()  # read once, the same for every seed
    table["gap"] = table["adapt_dense stem"] - table["adapt_dense dense"]
    table["gap_left"] = table["adapt_stem stem"] - table["adapt_dense dense"]
    return table.assign(removed=1 - table.gap_left / table.gap).rename_axis(f"seed (positions from {shortest})")


def _lines(rows: pd.DataFrame, x: str, by: str, axis: Axes, **style) -> None:
    """Draw a line for each value of `by`: means over seeds, shaded from the smallest to the largest value."""
    ranges = rows.groupby([by, x], sort=False).value.agg(value="mean", low="min", high="max").reset_index()
    figures.lines(ranges, x, "value", by, axis, band=("low", "high"), **style)


def draw_curves(rows: pd.DataFrame) -> Figure:
    """Draw losses and gradient norms over steps: a line for each arm, shaded between the seeds."""
    own = rows[(rows.place == "step") & (rows.trained == rows.inferred)]
    figure, axes = figures.new(3, width=4.4)
    arms = own.trained[~own.trained.str.startswith("adapt")].unique()
    titles = [f"{len(arms)} arms learn the text", "Recall leaves the plateau of guessing", "Gradients, before clipping"]
    for axis, (measure, label), title in zip(axes, PANELS.items(), titles, strict=True):
        shown = own[(own.measure == measure) & own.trained.isin(arms)]
        _lines(shown, "stop", "trained", axis, title=title, xlabel="step", ylabel=label)
    axes[1].axhline(np.log(tasks.NUM_VALUES), color="black", linestyle=":")
    axes[1].set_ylim(0, 2)
    axes[2].set_ylim(0, None)
    for axis in axes[:2]:
        for text in axis.texts[:]:
            text.remove()  # the names beside the last panel serve all three
    figures.label_lines(axes[2])
    return figure


def draw_positions(rows: pd.DataFrame) -> Figure:
    """Draw text loss above that of dense by position, at the training length (left) and at the longest one.

    A line is an arm; the windows that were read are the same for all arms, so their own ups and downs cancel.
    """
    text = rows[(rows.measure == "loss") & (rows.task == "text") & (rows.trained == rows.inferred)]
    lengths = sorted(text.seq_len.unique())
    losses = text.pivot_table(index=["seq_len", "seed", "start"], columns="trained", values="value", sort=False)
    gaps = losses.drop(columns="dense").sub(losses["dense"], axis=0)
    gaps = gaps.melt(ignore_index=False, var_name="trained").reset_index()
    figure, axes = figures.new(2, width=5.2)
    for axis, length in zip(axes, (lengths[0], lengths[-1]), strict=True):
        style = dict(xlabel="position, from [tokens]", ylabel="text loss above dense [nats]")
        style["title"] = f"Rows of {tokens_label(length)} tokens, trained on {tokens_label(lengths[0])}"
        _lines(gaps[gaps.seq_len == length], "start", "trained", axis, **style)
        axis.axhline(0, color=figures.COLOURS["dense"], linewidth=1)
    return figure


def draw_distances(rows: pd.DataFrame, readings: Sequence[tuple[str, str]]) -> Figure:
    """Draw right answers by distance to the record, in rows of twice the training length: a line for each reading."""
    asked = rows[(rows.measure == "correct") & (rows.task == "recall")]
    trained_on = asked.seq_len.min()
    asked = asked.assign(reading=asked.trained + " → " + asked.inferred)
    wanted = [f"{trained} → {inferred}" for trained, inferred in readings]
    asked = asked[(asked.seq_len == 2 * trained_on) & asked.reading.isin(wanted)]
    colours = {f"{one} → {other}": figures.COLOURS[other if one == "dense" else one] for one, other in readings}
    colours |= {name: colour for name, colour in SWITCHED.items() if name in wanted}
    figure, axis = figures.new(width=7.5)
    style = dict(title="A window cannot answer from outside itself", xlabel="", ylabel="right answers")
    _lines(asked, "start", "reading", axis, colours=colours, **style)
    figures.tokens_axis(axis, asked.start)
    axis.set(xlabel="distance to the record, from [tokens]", ylim=(0, 1.05))
    axis.axhline(1 / tasks.NUM_VALUES, color="black", linestyle=":")
    axis.axvline(trained_on, color="black", linewidth=0.5)
    figures.label_lines(axis)
    return figure


def draw_adaptation(rows: pd.DataFrame) -> Figure:
    """Draw the cost of Stem on held-out text by position: before, after dense and after sparse fine-tuning."""
    held = rows[rows.task.str.startswith("held_out")]
    mean = held.groupby(["trained", "inferred", "seed", "start"]).value.mean()
    control = mean["adapt_dense"]["dense"]
    gaps = {
        "pretrained": mean["pretrained"]["stem"] - mean["pretrained"]["dense"],
        "tuned dense": mean["adapt_dense"]["stem"] - control,
        "tuned with Stem": mean["adapt_stem"]["stem"] - control,
    }
    frame = pd.concat(gaps, names=["model"]).rename("value").reset_index()
    figure, axis = figures.new()
    removed = 100 * adaptation_table(rows).removed.mean()
    style = dict(xlabel="position, from [tokens]", ylabel="loss read with Stem over read dense [nats]")
    style["title"] = f"Tuning with Stem removes {removed:.0f} % of its cost from position {LATE} on"
    _lines(frame, "start", "model", axis, **style)
    axis.axhline(0, color="0.4", linewidth=1)
    return figure


def save_figures(rows: pd.DataFrame) -> list[str]:
    """Draw the figures whose rows there are into results/training/ and return their names."""
    drawn = {"curves": draw_curves(rows), "position": draw_positions(rows)}
    drawn["distance"] = draw_distances(rows, own_readings(rows))
    if {"adapt_stem", "adapt_dense"} <= set(rows.trained):
        drawn["adaptation"] = draw_adaptation(rows)
    return [figures.save(figure, "training", name).name for name, figure in drawn.items()]


def own_readings(rows: pd.DataFrame) -> list[tuple[str, str]]:
    """List every arm with its own attention, and the control: the dense model through a sliding window."""
    arms = rows[rows.measure == "correct"].trained.unique()
    return [*((arm, arm) for arm in arms), ("dense", "sliding_window")]


def of_machine(profile: str) -> pd.DataFrame:
    """Rows of one profile on this machine if it has any, else on another machine; may be empty."""
    rows = records.read_rows("training")
    rows = rows[rows.profile == profile]
    own = rows[rows.machine == records.machine_name()]
    return own if len(own) or rows.empty else rows[rows.machine == rows.machine.iloc[-1]]


def verdict_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Table of the `verdict` on each comparison: every arm with dense, the selections, and models that switch.

    Returns:
        DataFrame with a row for each comparison and a column for each measure. A cell holds the verdict, then the
        `span` of the first model and of the other; it is empty where the comparison does not use the measure.
    """
    read = rows[rows.measure.isin(["loss", "correct"]) & rows.task.isin(["text", "recall"])]
    first, last = min(read.seq_len), max(read.seq_len)
    arms = list(read.trained.unique())
    loss, near, far = ("loss", "text", first), ("correct", "recall", first), ("correct", "recall", last)
    measures = {measure: f"{WORDS[measure[0]]} at {tokens_label(measure[2])}" for measure in (loss, near, far)}
    table = {}

    def compare(name: str, one: tuple[str, str], other: tuple[str, str], tolerances: dict[tuple, float]) -> None:
        cells = table.setdefault(name, {})
        for (measure, task, length), tolerance in tolerances.items():
            values, than = (seeds_of(read, measure, *pair, seq_len=length, task=task) for pair in (one, other))
            told = f"{verdict(values, than, tolerance)}: {span(values)} / {span(than)}"
            cells[measures[measure, task, length]] = told

    for arm in arms[1:]:
        compare(f"{arm} / dense", (arm, arm), ("dense", "dense"), {loss: 0.005, near: 0.01, far: 0.01})
    for one, other in (("stem", "uniform_topk"), ("stem_softmax", "stem")):
        if {one, other} <= set(arms):
            compare(f"{one} / {other}", (one, one), (other, other), {loss: 0.005, near: 0.005})
    for trained, inferred in (("dense", "stem"), ("stem", "dense")):
        name = f"trained {trained}: read {inferred} / read {trained}"
        compare(name, (trained, inferred), (trained, trained), {loss: 0.005, near: 0.01})
    return pd.DataFrame(table).T.reindex(columns=list(measures.values())).fillna("")


def adaptation_findings(rows: pd.DataFrame) -> list[str]:
    """Sentences about the cost of Stem that fine-tuning with it removes, over all held-out positions and late ones."""
    length = int(rows[rows.trained == "pretrained"].seq_len.iloc[0])
    tables = {f"over all {length} positions": adaptation_table(rows, 0)}
    tables[f"from position {LATE} on"] = adaptation_table(rows)

    def told(text: Callable[[pd.DataFrame], str]) -> str:
        return " and ".join(f"{text(table)} {where}" for where, table in tables.items())

    before = told(lambda table: f"{(table['pretrained stem'] - table['pretrained dense']).mean():+.4f} nats")
    late = adaptation_table(rows).filter(like="adapt_")
    losses = ", ".join(f"{name.removeprefix('adapt_')} {span(late[name])}" for name in late)
    return [
        f"Before any tuning, Stem costs {before}.",
        f"Tuned dense, it costs {told(lambda table: span(table.gap, 4))}.",
        f"Tuned with Stem, it still costs {told(lambda table: span(table.gap_left, 4))}.",
        f"Fine-tuning with Stem on removes {told(lambda table: f'{span(100 * table.removed, 0)} % of the gap')}.",
        f"Losses after tuning, from position {LATE} on: {losses}.",
    ]


def training() -> str:
    """Text loss and right recalls by machine and (trained with, read with), and sentences on fine-tuning."""
    rows = full_rows("training")
    if rows.empty:
        return no_rows("05_train_small_model")
    return "\n\n".join(_training_of(device, part) for device, part in by_device(rows))


def _training_of(device: str, rows: pd.DataFrame) -> str:
    adapted = {"adapt_dense", "adapt_stem", "pretrained"} <= set(rows.trained)
    adaptation = f"\n\nSmolLM2: {' '.join(adaptation_findings(rows))}" if adapted else ""
    rows = rows[rows.place.isin(("position", "distance")) & ~rows.trained.str.match("adapt_|pretrained")]
    rows = rows.assign(weighted=rows["value"] * rows["count"])
    sums = rows.groupby(["measure", "seq_len", "trained", "inferred"], sort=False)[["weighted", "count"]].sum()
    means = (sums["weighted"] / sums["count"]).unstack(["measure", "seq_len"])
    columns = {"loss": ("text loss [nats], {}", "{:.3f}"), "correct": ("recall, {}", "{:.1%}")}
    cells = {}
    for (measure, length), values in means.sort_index(axis=1, ascending=[False, True]).items():
        name, form = columns[measure]
        cells[name.format(tokens_label(length))] = values.map(form.format, na_action="ignore").fillna(MISSING)
    table = pd.DataFrame(cells).rename_axis(["trained with", "read with"]).reset_index()
    told = f"**{device}**, trained at {tokens_label(rows.seq_len.min())} tokens, {rows.seed.nunique()} seed(s). "
    told += "The dense model that reads through a sliding window is the control that must fail."
    return f"{told}\n\n{markdown_table(table.columns, table.to_numpy())}{adaptation}"

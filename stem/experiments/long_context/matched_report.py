"""Table of speed at matched accuracy, and of the search for settings of `adaptive` at a low density, from rows."""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd
import torch

from stem.experiments.long_context import report, tuning
from stem.experiments.long_context.choice import STUDIES
from stem.experiments.long_context.measures import interval
from stem.experiments.long_context.report import NEEDLES, Difference
from stem.experiments.markdown import MISSING, full_rows, markdown_table, not_run, number, tokens_label
from stem.experiments.speed.report import DENSE_LABELS

NATS, LOSS = -0.25, 0.005  # bounds of the mean difference to dense attention [nats], [nats per token]
BLOCK_SIZE = 128
ORACLE, REUSED = ", then true mass in the place of scores", ", then selections that several layers reuse"
GRID = STUDIES["full"].densities  # of which one is chosen
ABOUT = (
    f"Each method at its lowest density, of {', '.join(f'{density:.0%}' for density in GRID)}, at which needles "
    f"({NEEDLES}) lose at most {-NATS} nats and documents at most {LOSS} nats per token in the mean, in blocks of "
    f"{BLOCK_SIZE}. Needles and calibration texts of their own choose that density, and the losses shown are those of "
    "other samples. A method that misses a bound at one density need not be tried at lower ones. Where no density is "
    "within both bounds, or none was chosen, the highest one. The factors of a speed-up are the block pairs that are "
    "not computed, and the operator's rate on the others over the dense kernel's."
)
SEARCHED = 8  # settings that the table of the search shows
FEW = 8  # documents from which their mean has an interval
HEADER = ["what differs from the preset", "density of needles, documents", "needles", "documents", "divergence"]
EXACT = f"exact_last_blocks={tuning.ORACLE['exact_last_blocks']}"


class Point(NamedTuple):
    """A method at a density: paired differences to dense attention, and the density that its needles computed."""

    asked: float
    needles: Difference
    documents: Difference  # with a count of 0 where none were measured
    density: float

    @property
    def is_within(self) -> bool:
        return self.needles.mean >= NATS and self.documents.count > 0 and self.documents.mean <= LOSS


def points(rows: pd.DataFrame, model: str, length: int) -> dict[str, list[Point]]:
    """Method -> its points by rising density, where needles were measured in blocks of `BLOCK_SIZE`."""
    rows = report.whole(rows[(rows.model == model) & (rows.length == length) & (rows.task != "all")])
    needles = rows[(rows.measure == "answer") & (rows.task == NEEDLES)]
    documents, found = rows[rows.measure == "loss"], {}
    own = needles[(needles.block_size == BLOCK_SIZE) & needles.asked.notna()]
    for (method, asked), of in own.groupby(["method", "asked"]):
        pair = [report.paired(part, method, block_size=BLOCK_SIZE, asked=asked) for part in (needles, documents)]
        if pair[0].count:
            found.setdefault(method, []).append(Point(asked, *pair, of.density.mean()))
    return found


class Picked(NamedTuple):
    """A method's point on the reported samples, at the density that other samples chose."""

    point: Point  # of the highest density where none is chosen
    is_chosen: bool | None  # False: no density was within both bounds there; None: the method was not measured there


def picked(model: str, length: int) -> dict[str, Picked]:
    """Method -> the point at its lowest density of `GRID` within the bounds on the rows of "choice"."""
    chosen, found = points(report.rows(parts=("choice",)), model, length), {}
    for method, of in points(report.rows(parts=("answers", "loss")), model, length).items():
        within = {point.asked for point in chosen.get(method, ()) if point.is_within and point.asked in GRID}
        point = next((point for point in of if point.asked in within), None)
        found[method] = Picked(point or of[-1], point is not None if method in chosen else None)
    return found


def longest(model: str, length: int) -> int:
    """The longest samples, up to a length, of which a model has both needles and documents; the length without any."""
    rows = report.rows(parts=("answers", "loss"))
    lengths = sorted({of for of in rows[rows.model == model].length if of <= length}, reverse=True)
    measured = {of: sum(points(rows, model, of).values(), []) for of in lengths}
    return next((of for of, all_of in measured.items() if any(point.documents.count for point in all_of)), length)


def matched() -> str:
    """Each method at the density that other samples chose, and its operator's time there beside dense kernels."""
    times = full_rows("long_context/matched")
    if times.empty:
        return not_run("make quality PROFILE=full")
    captured = times[times.source.str.startswith("captured")]
    parts = []
    for (device, source, length), of in captured.groupby(["device", "source", "tokens"]):
        name = source.removeprefix("captured from ")
        model = report.MODELS.get(name, name)
        wide = times[(times.device == device) & (times.source == "random normal")]
        found = picked(model, at := longest(model, length))
        timed = {tokens_label(length): of} | {tokens_label(n): t for n, t in wide.groupby("tokens")}
        speeds = [speed_of(t, method, point.asked) for t in timed.values() for method, (point, _) in found.items()]
        parts.append(_table(found, timed))
        heads = of.iloc[0]
        parts.insert(
            -1,
            f"**{model}, {tokens_label(length)} tokens, on {device}.** {ABOUT} {_others(model, at, found)}"
            + (f"Needles and documents have {tokens_label(at)} tokens. " if at != length else "")
            + f"Times [ms] are of one layer with selection: the mean of {heads.layers:.0f} captured layers "
            f"({heads.q_heads:.0f} query and {heads.kv_heads:.0f} KV heads of {heads.head_dim:.0f})"
            + "".join(
                f", and random normal inputs at {tokens_label(n)} in the shape of Llama-3.1-8B"
                for n in [*wide.tokens.unique()]
            )
            + ". In brackets: attention over the lists alone. Calls of a method and of the fastest dense kernel take "
            "turns. A speed-up is the median ratio of a turn, with its 95 % interval. "
            + ("One without an interval is of an earlier run, without turns. " if any(map(_is_apart, speeds)) else "")
            + "Selections but Stem's and adaptive's are this repository's PyTorch code.",
        )
    return "\n\n".join(parts)


class Speed(NamedTuple):
    """A method's time on one kind of inputs, beside that of the fastest dense kernel."""

    row: pd.Series  # of results/long_context/matched/
    dense: str  # name of the dense kernel
    dense_ms: float
    ratio: float  # from low to high in 95 % of cases; NaN ends where a row holds none
    low: float
    high: float

    @property
    def factors(self) -> tuple[float, float]:
        """Block pairs that are not computed, and the operator's rate on the others over the dense kernel's."""
        return 1 / self.row.density, self.ratio * self.row.density


class Chosen(NamedTuple):
    """A method at the density that one model chose for it: its losses there, and its speed."""

    model: str
    length: int  # of needles and documents [tokens]
    point: Point
    captured: Speed | None  # on the model's own q, k and v
    wide: Speed  # on random inputs of the longest timed length


def speed_of(times: pd.DataFrame, method: str, asked: float) -> Speed | None:
    """Speed of a method at a density asked for, from rows of one device, source and length; None without its row."""
    row = times[(times.method == method) & (times.asked == asked)]
    dense = times[times.asked.isna()].sort_values("operator_ms")
    if row.empty or dense.empty:
        return None
    row, dense = row.iloc[0], dense.iloc[0]
    if pd.isna(row.get("speedup")):  # not measured in turns
        nan = float("nan")
        name = DENSE_LABELS.get(dense.method, dense.method)
        return Speed(row, name, dense.operator_ms, dense.operator_ms / row.operator_ms, nan, nan)
    return Speed(
        row, DENSE_LABELS.get(row.dense, row.dense), row.dense_ms, row.speedup, row.speedup_low, row.speedup_high
    )


def fastest() -> tuple[str, list[Chosen]] | None:
    """The method that takes least time at the longest timed length, and each model's density of it, highest first.

    Its time counts at the highest of the densities that models chose for it. Each model that measured it on the
    samples that choose has a density within the bounds there. None without such a method.
    """
    times = full_rows("long_context/matched")
    captured = times[times.source.str.startswith("captured")] if len(times) else times
    found: dict[tuple[str, str], list[Chosen | None]] = {}
    for (device, source, length), of in captured.groupby(["device", "source", "tokens"]) if len(captured) else ():
        name = source.removeprefix("captured from ")
        model = report.MODELS.get(name, name)
        wide = times[(times.device == device) & (times.tokens == times.tokens.max())]
        for method, (point, is_chosen) in picked(model, length).items():
            at = speed_of(wide, method, point.asked)
            is_timed = is_chosen and point.documents.count and at
            one = Chosen(model, length, point, speed_of(of, method, point.asked), at) if is_timed else None
            if is_chosen is not None:
                found.setdefault((device, method), []).append(one)
    whole = [
        (method, sorted(of, key=lambda one: -one.point.asked)) for (_, method), of in found.items() if None not in of
    ]
    return min(whole, key=lambda pair: pair[1][0].wide.row.operator_ms, default=None)


def _others(model: str, length: int, found: dict[str, Picked]) -> str:
    """Sentence on lower densities that are none of `GRID` and were within the bounds where densities are chosen."""
    chosen, told = points(report.rows(parts=("choice",)), model, length), []
    for method, of in points(report.rows(parts=("answers", "loss")), model, length).items():
        within = {point.asked for point in chosen.get(method, ()) if point.is_within} - set(GRID)
        told += [
            f"{method} at {point.asked:.0%}, with {str(point.needles).split(', n')[0]} nats on the needles here"
            for point in of
            if point.asked in within and point.asked < found[method].point.asked
        ]
    return f"Within both bounds there, too, but none of these densities: {'; '.join(told)}. " if told else ""


def _table(found: dict[str, Picked], times: dict[str, pd.DataFrame]) -> str:
    lines = []
    for method, (point, is_chosen) in found.items():
        cells = []
        for rows in times.values():
            cells += _speed(speed_of(rows, method, point.asked))
        if set(cells) == {MISSING} and is_chosen is None:
            continue
        values = [str(of).split(", n")[0] if of.count else MISSING for of in (point.needles, point.documents)]
        share = {True: "{:.1%}", False: "none to {:.1%}", None: "{:.1%}, not chosen"}[is_chosen].format(point.density)
        lines.append((not is_chosen, point.density, [method, share, *values, *cells]))
    header = ["method", "density", "needles", "documents"]
    for label, rows in times.items():
        dense = rows[rows.asked.isna()].sort_values("operator_ms").iloc[0]
        name = DENSE_LABELS.get(dense.method, dense.method)
        header += [f"{label} [ms]", f"over {name}, {number(dense.operator_ms)} ms"]
    return markdown_table(header, [line for *_, line in sorted(lines, key=lambda line: line[:2])])


def _is_apart(speed: Speed | None) -> bool:
    return speed is not None and pd.isna(speed.low)


def _speed(speed: Speed | None) -> list[str]:
    """Two cells: the operator's time and that of attention alone, then the speed-up with its factors."""
    if speed is None:
        return [MISSING, MISSING]
    pairs, rate = speed.factors
    ends = "" if speed.low != speed.low else f" [{speed.low:.2f}, {speed.high:.2f}]"
    times = f"{number(speed.row.operator_ms)} ({number(speed.row.attention_ms)})"
    return [times, f"{speed.ratio:.2f}×{ends} = {pairs:.2f} × {rate:.2f}"]


def section() -> str:
    """The section of results/README.md: `matched`, `search` and `reported`."""
    return "\n\n".join(filter(None, (matched(), search(), reported())))


def search() -> str:
    """The best settings that the search for `adaptive` at a low density found, on samples that no other row reports."""
    parts = []
    for (device, model, length, asked), of in _tuning(tuning.TUNING):
        own = of[(of.anchors == 1) & ~of.changes.str.contains(EXACT)].sort_values("score")
        others = of.drop(own.index)
        lines = [_setting(row) for row in pd.concat([own.head(SEARCHED), others]).itertuples()]
        parts.append(
            f"**Search for `adaptive` at {asked:.0%}** on {model} and {device}: {len(of)} settings at "
            f"{tokens_label(length)} tokens, on {_counts(of)} needles and calibration windows that no other table "
            f"reports. The best {min(SEARCHED, len(own))}{ORACLE if (others.anchors == 1).any() else ''}"
            f"{REUSED if (others.anchors > 1).any() else ''}. The divergence of the answers' tokens from dense "
            f"attention [nats] has no sign, so gains do not offset losses.\n\n{markdown_table(HEADER, lines)}"
        )
    return "\n\n".join(parts)


def reported() -> str:
    """The best settings of the search on the samples of the other tables, and their distance to exact shares."""
    parts = []
    for (device, model, length, asked), of in _tuning(tuning.REPORTED):
        lines = [_setting(row) + _to_oracle(row, of) for row in of.sort_values(["changes", "score"]).itertuples()]
        within, exact = (of.needles >= NATS) & (of.documents <= LOSS), of.changes.str.contains(EXACT)
        parts.append(
            f"**Settings of the search on other samples**, those of the tables of answers and losses, at {asked:.0%} "
            f"on {model} and {device}: {_counts(of)} needles and 8 windows of {' and of '.join(tuning.KINDS)}, of "
            f"{tokens_label(length)} tokens. The last columns are paired differences to the same setting with the true "
            f"attention mass in the place of scores. Within both bounds: {within[~exact].sum()} of {(~exact).sum()} "
            f"settings, and {within[exact].sum()} of {exact.sum()} with the true mass. {_beyond(of[exact])}\n\n"
            + markdown_table([*HEADER, "needles minus oracle", "documents minus oracle"], lines)
        )
    return "\n\n".join(parts)


def _beyond(rows: pd.DataFrame) -> str:
    """Sentence on the settings whose whole interval lies beyond a bound."""
    needles = sum(interval(_values(row.values))[1] < NATS for row in rows.itertuples())
    documents = sum(interval(_values(row.document_values))[0] > LOSS for row in rows.itertuples())
    return (
        f"Of the latter, the whole interval lies beyond the bound of needles in {needles} and beyond that of documents "
        f"in {documents}: there no better estimate of the mass would help."
    )


def _tuning(samples: str):
    """((device, model, length, density), rows) of the search on one kind of samples."""
    rows = full_rows("long_context/tuning")
    if rows.empty:
        return
    rows = rows.assign(thresholds=rows.thresholds.astype(object).fillna(""), model=rows.model.replace(report.MODELS))
    yield from rows[rows.samples == samples].groupby(["device", "model", "length", "asked"])


def _counts(rows: pd.DataFrame) -> str:
    return " to ".join(dict.fromkeys(f"{count:.0f}" for count in rows["count"].agg(["min", "max"])))


def _setting(row) -> list[str]:
    """Cells of a row of the search under `HEADER`."""
    changed = row.changes if row.anchors == 1 else f"the first line, reused by {row.anchors:.0f} layers each"
    documents = _values(row.document_values)
    last, _, layers = row.thresholds.partition("layers=")
    told = [f"threshold of the last block × {last.removeprefix('last=').strip()}"] if last else []
    return [
        "; ".join([changed, *told, *(["thresholds by layer"] if layers else [])]),
        f"{row.density_needles:.1%}, {row.density_documents:.1%}",
        _mean(_values(row.values), 2),
        _mean(documents, 4) if len(documents) >= FEW else f"{row.documents:+.4f}",
        MISSING if pd.isna(row.divergence) else f"{row.divergence:.2f}",
    ]


def _values(told: str) -> torch.Tensor:
    """Numbers of a cell of a row; none of an empty cell."""
    told = "" if pd.isna(told) else str(told)
    return torch.tensor([float(value) for value in told.split()])


def _mean(values: torch.Tensor, digits: int) -> str:
    low, high = interval(values)
    return f"{float(values.mean()):+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def _to_oracle(row, rows: pd.DataFrame) -> list[str]:
    """Paired differences to the same setting with exact shares, on needles and documents; empty for oracles."""
    same = rows[rows.changes.str.contains(EXACT) & (rows.thresholds == row.thresholds)]
    if EXACT in row.changes or same.empty:
        return [MISSING, MISSING]
    return [
        _mean(_values(getattr(row, column)) - _values(same[column].iloc[0]), digits)
        for column, digits in (("values", 2), ("document_values", 4))
    ]

"""Tables and sentences on needles: right and generated answers of every method, from rows."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from stem.experiments.long_context import report
from stem.experiments.long_context.methods import BLIND, TRANSFER_LENGTH, TRANSFERRED
from stem.experiments.markdown import MISSING, markdown_table, no_rows, tokens_label

RIVALS = ("vertical_slash", "flashprefill", "flashprefill_v2", "flexprefill", "stem, last block dense")
GENERATED = "Share of right generated answers, minus dense. Decoding is dense and hides part of a prefill's loss:"


def evaluation() -> str:
    """Answers of each machine and model against dense attention, by method."""
    everything = report.rows()
    found = everything[everything.measure.isin(("answer", "generated"))] if len(everything) else everything
    if found.empty:
        return no_rows("06_long_context_eval")
    parts = []
    for (device, model), part in found.groupby(["device", "model"], sort=True):
        part = part[part.length.isin(part[part.method != "dense"].length)]
        if part.empty:
            continue
        parts.append(
            f"**{model}** on {device}, log-likelihood of the right answer minus dense [nats], teacher-forced in one "
            "sparse forward, 95 % interval, and the computed density where it differs from the density asked for. The "
            "short window is the control that must fail."
        )
        answers = part[(part.measure == "answer") & part.task.notna()]
        for (length, task), of in answers.groupby(["length", "task"], sort=False):
            dense = of.dense.mean()
            count = " to ".join(dict.fromkeys(f"{count:.0f}" for count in of["count"].agg(["min", "max"])))
            title = f"{task}, {tokens_label(length)} tokens, {count} samples, dense {dense:.2f} nats:"
            parts += [title, report.table_by_density(of, "{:+.2f}")]
        parts += [above_dense(answers), last_block(answers)]
        beside = [ahead(answers, "adaptive", [other]) for other in RIVALS]
        beside.append(ahead(answers, "stem", ["uniform_topk"]))
        parts.append("\n".join(f"- {told}" for told in beside if told))
        of_model = everything[(everything.device == device) & (everything.model == model)]
        parts.append(transfer(of_model[of_model.measure.isin(("answer", "loss"))]))
        parts.append(_differences(GENERATED, part[part.measure == "generated"], "{:+.0%}"))
    return "\n\n".join(filter(None, parts))


def above_dense(answers: pd.DataFrame) -> str:
    """Sentence: cells in which a method is above dense attention by an interval without zero."""
    rows, found = answers[answers.asked.notna()].dropna(subset="difference"), []
    for place, row in zip(rows.index, rows.itertuples(), strict=True):
        cell = answers[(answers.task == row.task) & (answers.length == row.length)]
        of = report.to_dense(cell, rows.loc[[place]])
        if of.low > 0:
            found.append(
                f"{row.method} on {row.task} at {tokens_label(row.length)}, blocks of {row.block_size:.0f}, "
                f"{row.asked:.0%}: {of.mean:+.2f} [{of.low:+.2f}, {of.high:+.2f}]"
            )
    told = f"Above dense attention by an interval without zero in {len(found)} of {len(rows)} cells"
    return f"{told}{': ' if found else ''}{'; '.join(found)}." if len(rows) else ""


def last_block(answers: pd.DataFrame) -> str:
    """Table of how a dense last query block alone changes the answers of other methods, at equal density."""
    lines, suffix = [], ", last block dense"
    for (length, task, size, asked), _ in answers.dropna(subset="asked").groupby(
        ["length", "task", "block_size", "asked"]
    ):
        cell = answers[(answers.length == length) & (answers.task == task)]
        for name in sorted(name for name in set(cell.method) if name.endswith(suffix)):
            change = report.paired(cell, name, name.removesuffix(suffix), block_size=size, asked=asked)
            if change.count:
                lines.append([name.removesuffix(suffix), task, tokens_label(length), f"{asked:.0%}", change])
    header = ["method", "task", "tokens", "density", "change"]
    title = "What a dense last query block, at equal density, changes in the answers [nats]:"
    return f"{title}\n\n{markdown_table(header, lines)}" if lines else ""


def ahead(answers: pd.DataFrame, method: str, others: Sequence[str]) -> str:
    """Sentence: in how many cells of each task a method is above and below others by intervals without zero."""
    told = []
    for task, of in answers[answers.asked.notna()].groupby("task", sort=False):
        cells = of.groupby(["length", "block_size", "asked"])
        found = [
            report.paired(cell, method, other, block_size=size, asked=asked)
            for (_, size, asked), cell in cells
            for other in others
        ]
        if found := [each for each in found if each.count]:
            counts = [sum(low > 0 for _, low, *_ in found), sum(each.high < 0 for each in found)]
            means = sorted({f"{each.mean:+.2f}" for each in found}, key=float)
            cells = f"{len(found)} cell{'s' * (len(found) > 1)}"
            told.append(
                f"{task}: above in {counts[0]} and below in {counts[1]} of {cells}, "
                f"{' to '.join(dict.fromkeys((means[0], means[-1])))} nats"
            )
    names = f"{', '.join(others[:-1])} and {others[-1]}" if len(others) > 1 else others[0]
    return f"`{method}` beside {names}, by intervals without zero: {'; '.join(told)}." if told else ""


def transfer(rows: pd.DataFrame) -> str:
    """Table of `adaptive` with the threshold of another length, of `methods.TRANSFERRED`: densities and differences.

    One line per task, length, density asked for and way to read the prompt. Documents are all measured kinds together.
    """
    rows = rows[rows.task != "all"]
    found = report.whole(rows[rows.method.isin(TRANSFERRED)]).dropna(subset="difference")
    lines = []
    for (measure, length, asked, method), of in found.groupby(["measure", "length", "asked", "method"]):
        for task, cell in [("documents", of)] if measure == "loss" else of.groupby("task"):
            kinds = rows[(rows.measure == measure) & (rows.length == length) & rows.task.isin(cell.task)]
            difference = report.paired(report.whole(kinds), method, block_size=cell.block_size.iloc[0], asked=asked)
            chunk = TRANSFERRED[method]
            task += (
                report.of_kinds(cell, rows[(rows.measure == "loss") & (rows.length == length)]) if cell is of else ""
            )
            read = "whole" if chunk is None else f"chunks of {tokens_label(chunk)}"
            lines.append([task, tokens_label(length), f"{asked:.0%}", read, f"{cell.density.mean():.1%}", difference])
    title = (
        f"`adaptive` with one threshold: the one that gives a density on calibration documents of "
        f"{tokens_label(TRANSFER_LENGTH)}, used unchanged. Answers [nats] and losses [nats per token], minus dense:"
    )
    header = ["task", "tokens", "asked", "prompt", "computed", "difference"]
    return f"{title}\n\n{markdown_table(header, lines)}" if lines else ""


def generated(rows: pd.DataFrame, block_size: int) -> pd.DataFrame:
    """Shares of right answers by cell and method: "generated", and "right" in one sparse forward, on equal samples."""
    asked = rows[rows.measure == "generated"].asked
    chosen = rows[
        rows.measure.isin(["generated", "right"]) & (rows.block_size.isna() | (rows.block_size == block_size))
    ]
    chosen = chosen[chosen.asked.isna() | chosen.asked.isin(asked)]
    table = chosen.pivot_table(index=["cell", "method"], columns="measure", values="value", sort=False)
    return table.reindex(columns=["generated", "right"]).dropna()


def flips(rows: pd.DataFrame, method: str, block_size: float, asked: float, by: str = "generated") -> pd.DataFrame:
    """Samples of one cell by whether dense attention, and the method, are right (1.0 = right) by one measure.

    Columns: samples; means of before, log p(answer) under dense attention [nats], and of what the method changes in
    answer [nats] and right (share), both in one forward.
    """
    values = {
        (measure, who): report.values_of(rows[rows.measure == measure], name, block_size, asked).tolist()
        for measure in dict.fromkeys((by, "answer", "right"))
        for who, name in (("dense", "dense"), ("method", method))
    }
    frame = pd.DataFrame(values)
    changes = {measure: frame[measure].method - frame[measure].dense for measure in ("answer", "right")}
    found = frame[by].assign(samples=1, before=frame.answer.dense, **changes)
    return found.groupby(["dense", "method"]).agg(dict.fromkeys(["before", *changes], "mean") | dict(samples="sum"))


def _differences(title: str, rows: pd.DataFrame, form: str) -> str:
    """One line per method, best first, one column per task and length, with computed density, choice and samples."""
    rows = rows[(rows.method == "dense") | rows.difference.notna()]
    if rows.empty:
        return ""
    rows = rows.assign(column=rows.task + ", " + rows.length.map(tokens_label))
    columns = rows.sort_values("length", kind="stable").column.unique()
    order = rows.groupby("method").difference.mean().drop("dense", errors="ignore").sort_values(ascending=False).index
    value, difference = form.replace("+", ""), f"{form} [{form}, {form}]"
    lines = []
    for method in ("dense", *order):
        of, dense = rows[rows.method == method], method == "dense"
        texts = {
            row.column: value.format(row.value) if dense else difference.format(row.difference, row.low, row.high)
            for row in of.itertuples()
        }
        counts = " to ".join(dict.fromkeys(f"{count:.0f}" for count in of["count"].agg(["min", "max"])))
        chosen = "none" if method in BLIND and method != "random" else MISSING
        chosen = chosen if of.chosen.isna().all() else f"{of.chosen.mean():.0%}"
        found = (texts.get(column, MISSING) for column in columns)
        lines.append(["dense itself" if dense else method, f"{of.density.mean():.1%}", chosen, counts, *found])
    header = ["method", "density", "chosen by scores", "samples", *columns]
    return f"{title}\n\n{markdown_table(header, lines)}"

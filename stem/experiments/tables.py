"""Generated tables and sentences of README.md and results/README.md: `python -m stem.experiments.tables`.

A file of `FILES` holds `<!-- begin:NAME -->` and `<!-- end:NAME -->` for each of its sections. The text between the two
is computed from the committed rows of full runs.
"""

import os
import re

import pandas as pd

from stem.config import StemConfig
from stem.experiments import records, scoreboard
from stem.experiments.correctness import report as correctness
from stem.experiments.markdown import MISSING, by_device, full_rows, markdown_table, no_rows, number, tokens_label
from stem.experiments.speed import report as speed
from stem.experiments.training.report import adaptation_findings


def render(text: str, file: str) -> str:
    """The text of a file of `FILES` with each section between its markers computed again.

    Raises:
        ValueError: If the markers in the text are not exactly those of the file's sections.
    """
    found = re.findall(r"<!-- begin:(\w+) -->", text)
    if sorted(found) != sorted(FILES[file]):
        raise ValueError(f"{file} has markers for {sorted(found)}, its sections are {sorted(FILES[file])}")
    for name in FILES[file]:
        before, begin, rest = text.partition(f"<!-- begin:{name} -->\n")
        _, end, after = rest.partition(f"<!-- end:{name} -->")
        text = f"{before}{begin}{_links_from(file, SECTIONS[name]())}\n{end}{after}"
    return text


def _links_from(file: str, section: str) -> str:
    """Rewrite a section's links, which start at the repository's root, to start at the file's folder."""
    folder = os.path.dirname(file) or "."
    return re.sub(r"\]\((?!https?:|#)([^)#]*)", lambda link: f"]({os.path.relpath(link[1], folder)}", section)


def quality() -> str:
    """For each machine and block size that holds the published and this repository's selection: what each costs."""
    rows = full_rows("long_context/loss")
    if rows.empty:
        return "No full run is committed yet: `make quality PROFILE=full` on a CUDA machine writes its rows."
    rows = rows[rows.groupby(["device", "block_size"]).method.transform(lambda of: {"adaptive", "stem"} <= set(of))]
    parts = []
    for (device, size), part in rows.groupby(["device", "block_size"], sort=True):
        tokens, texts = part.tokens.max(), sorted(part.text.unique())
        asked = sorted(part[part.method == "stem"].asked.unique())
        told = f"**{part.model.iloc[0]}** on {device}, every layer sparse, blocks of {size:.0f}, windows of "
        told += (
            f"{tokens_label(tokens)} tokens of {len(texts)} kinds of text ({', '.join(texts)}): loss minus dense, mean "
        )
        told += (
            "over all positions [nats per token], and the density that was computed where it is not the one asked for."
        )
        means = part.groupby(["method", "asked"])[["gap", "density"]].mean()
        order = part[part.asked.isin(asked)].groupby("method").gap.mean().sort_values().index
        lines = [[method, *(_gap_at(means, method, at) for at in asked)] for method in order]
        header = ["method", *(f"asked for {at:.0%}" for at in asked)]
        cost = _cost_sentence(device) if size == StemConfig.preset("adaptive").block_size else ""  # as it was timed
        parts += [f"{told}{_quality_sentence(means)}{cost}", markdown_table(header, lines)]
    return "\n\n".join(parts)


def _gap_at(means: pd.DataFrame, method: str, asked: float) -> str:
    if (method, asked) not in means.index:
        return MISSING
    gap, density = means.loc[(method, asked)]
    return f"{gap:+.4f}" + (f" ({density:.1%})" if abs(density - asked) > 0.005 else "")


def _quality_sentence(means: pd.DataFrame) -> str:
    """How much of the published method's gap the adaptive selection leaves, at the same density and at half of it."""
    pairs = [(0.31, 0.31), (0.16, 0.16), (0.155, 0.31)]
    if not all(("adaptive", own) in means.index and ("stem", other) in means.index for own, other in pairs):
        return ""
    same, sparser, half = (means.gap["adaptive", own] / means.gap["stem", other] for own, other in pairs)
    return (
        f" This repository's `adaptive` leaves {same:.0%} of the gap of Stem as published at a density of 31 %, "
        f"{sparser:.0%} at 16 %, and {half:.0%} of its gap at 31 % with half the blocks."
    )


def _cost_sentence(device: str) -> str:
    """What choosing the blocks costs at the longest length that was timed, beside Stem's own scores and selection."""
    cost = full_rows("long_context/selection_cost")
    cost = cost[cost.device == device] if len(cost) else cost
    if cost.empty:
        return ""
    row = cost.sort_values("tokens").iloc[-1]
    timed = full_rows("speed")
    own = timed[(timed.device == device) & (timed.tokens == row.tokens) & (timed.config == "default")]
    parts = own[own.operation.isin(("scores", "selection"))].latency_ms.sum()
    attention = own[own.operation == "attention"].latency_ms.min()
    return (
        f" Choosing them takes {number(row.selection_ms)} ms at {tokens_label(row.tokens)} tokens of the shape above, "
        f"{row.share:.1%} of its whole operator at density {row.density:.1%}, where Stem's scores and selection take "
        f"{number(parts)} ms and attention over a quarter of the blocks "
        f"{number(attention)} ms."
    )


def evaluation() -> str:
    """For each machine and model: what answers and documents lose against dense attention, by method."""
    rows = pd.concat([full_rows("long_context/answers"), full_rows("long_context/extension")])
    if rows.empty:
        return no_rows("06_long_context_eval")
    rows = rows[rows.measure.isin(("answer", "loss", "generated", "time"))]
    parts = []
    for (device, model), part in rows.groupby(["device", "model"], sort=True):
        part = part[part.length.isin(part[part.method != "dense"].length)]
        if part.empty:
            continue
        answers = part[part.measure == "answer"]
        asked, size = part[part.asked.notna()].groupby(["asked", "block_size"]).size().idxmax()  # of most measures
        told = f"**{model}** on {device}, blocks of {size:.0f} tokens, asked for {asked:.0%} of the block pairs, "
        told += "teacher-forced in one sparse forward. The short window is the control that must fail."
        sized = part.block_size.isna() | (part.block_size == size) | part.method.str.startswith("stem, ")  # presets
        at = part[(part.asked.isna() | (part.asked == asked)) & sized]
        of = {measure: at[at.measure == measure] for measure in ("answer", "generated", "loss")}
        halves = of["loss"][(of["loss"].task != "all") & (of["loss"].length == of["loss"].length.max())]
        title = "Log-likelihood of the right answer, minus dense [nats], 95 % interval of the difference:"
        parts += [told, _differences(title, of["answer"], "{:.1f}")]
        title = "Generated answers that are right (decoded densely, blind to part of what a prefill lost), minus dense:"
        parts += [_differences(title, of["generated"], "{:+.0%}")]
        parts += [_differences("Loss on the later half of documents, minus dense [nats per token]:", halves, "{:+.3f}")]
        parts += [_by_density(answers), _times(at[at.measure == "time"])]
    return "\n\n".join(part for part in parts if part)


def _by_density(answers: pd.DataFrame) -> str:
    """What one task's answers lose at the longest prompts, one column for each density and block size asked for."""
    answers = answers[answers.asked.notna()]
    cells = answers.groupby("task", sort=False).apply(lambda of: len(of[["asked", "block_size"]].drop_duplicates()))
    if cells.max() < 2:
        return ""
    of = answers[answers.task == cells.idxmax()]
    of = of[of.length == of.length.max()]
    table = of.pivot_table(index="method", columns=["block_size", "asked"], values="difference")
    table = table.loc[table.mean(axis=1).sort_values(ascending=False).index]
    names = [f"{size:.0f}, {asked:.0%}" for size, asked in table.columns]
    lines = [[row.Index, *(MISSING if pd.isna(x) else f"{x:.1f}" for x in row[1:])] for row in table.itertuples()]
    title = f"{of.task.iloc[0]} at {tokens_label(of.length.iloc[0])} by block size and density asked for, minus dense "
    title += "[nats]:"
    return f"{title}\n\n{markdown_table(['method', *names], lines)}"


def _times(rows: pd.DataFrame) -> str:
    """Prefill of the whole model, one column a length, fastest at the longest first."""
    if rows.empty:
        return ""
    share = rows.assign(share=rows.value / rows.dense)
    table = share.pivot_table(index="method", columns="length", values="share")
    dense = rows.groupby("length").dense.median()
    lines = [["dense [ms]", *(f"{ms:.3g}" for ms in dense)]]
    for method, shares in table.drop("dense", errors="ignore").sort_values(table.columns[-1]).iterrows():
        lines.append([method, *(MISSING if pd.isna(of) else f"{1 / of:.2f}×" for of in shares)])
    title = "Prefill of a prompt in a batch by the whole model, times as fast as dense attention in turn with it:"
    return f"{title}\n\n{markdown_table(['method', *map(tokens_label, table.columns)], lines)}"


def _differences(title: str, rows: pd.DataFrame, form: str) -> str:
    """One line a method, best first, one column a task and length, with the density computed and the sample counts."""
    if rows.empty:
        return ""
    rows = rows.assign(column=[f"{task}, {tokens_label(n)}" for task, n in zip(rows.task, rows.length, strict=True)])
    columns = list(dict.fromkeys(rows.sort_values(["length"], kind="stable").column))
    dense = rows[rows.method == "dense"].set_index("column").value
    plain = form.replace("+", "")
    first = (plain.format(dense[column]) for column in columns)
    lines = [["dense itself", "100.0%", _counts(rows[rows.method == "dense"]), *first]]
    others = rows[rows.method != "dense"]
    loss = -1 if "loss" in set(rows.measure) else 1
    for method in (loss * others.groupby("method").difference.mean()).sort_values(ascending=False).index:
        of = others[others.method == method].set_index("column")
        texts = {
            column: f"{form.format(row.difference)} [{form.format(row.low)}, {form.format(row.high)}]"
            for column, row in of.iterrows()
        }
        found = (texts.get(column, MISSING) for column in columns)
        lines.append([method, f"{of.density.mean():.1%}", _counts(of), *found])
    return f"{title}\n\n{markdown_table(['method', 'density', 'samples', *columns], lines)}"


def _counts(rows: pd.DataFrame) -> str:
    """How many samples a mean is of, the fewest and the most."""
    fewest, most = int(rows["count"].min()), int(rows["count"].max())
    return f"{most}" if fewest == most else f"{fewest} to {most}"


def training() -> str:
    """For each machine and each pair (trained with, read with): held-out text loss and share of right recalls.

    A sentence says what fine-tuning a pretrained model removes of its sparse gap, where the rows hold that.
    """
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
    means = (
        (sums["weighted"] / sums["count"]).unstack(["measure", "seq_len"]).sort_index(axis=1, ascending=[False, True])
    )
    names = {"loss": "text loss [nats], {}", "correct": "recall, {}"}
    header = ["trained with", "read with", *(names[measure].format(tokens_label(length)) for measure, length in means)]
    forms = ["{:.1%}" if measure == "correct" else "{:.3f}" for measure, _ in means]
    lines = [
        [*arms, *(form.format(x) if x == x else MISSING for form, x in zip(forms, values, strict=True))]
        for arms, values in zip(means.index, means.to_numpy(), strict=True)
    ]
    told = f"**{device}**, trained at {tokens_label(rows.seq_len.min())} tokens, {rows.seed.nunique()} seed(s). "
    told += "The dense model that reads through a sliding window is the control that must fail."
    return f"{told}\n\n{markdown_table(header, lines)}{adaptation}"


SECTIONS = {
    "scoreboard": scoreboard.scoreboard,
    "headline": scoreboard.headline,
    "correctness": correctness.correctness,
    "speed": speed.speed,
    "beyond": speed.beyond,
    "quality": quality,
    "evaluation": evaluation,
    "training": training,
}
FILES = {"README.md": (), "results/README.md": tuple(SECTIONS)}  # file -> its sections


def main() -> None:
    """Rewrite the files of `FILES`."""
    for name in FILES:
        path = records.repository_root() / name
        path.write_text(render(path.read_text(), name))
        print(f"wrote {path}")


if __name__ == "__main__":
    main()

"""Generated tables and sentences of README.md and results/README.md: `python -m stem.experiments.tables`.

A file of `FILES` holds `<!-- begin:NAME -->` and `<!-- end:NAME -->` for each of its sections. The text between the two
is computed from the committed rows of full runs.
"""

import os
import re
from collections.abc import Sequence

import pandas as pd

from stem.config import StemConfig
from stem.experiments import records, scoreboard
from stem.experiments.markdown import MISSING, by_device, full_rows, markdown_table, no_rows, number, tokens_label
from stem.experiments.speed import bench
from stem.experiments.training.report import adaptation_findings

BASELINES = {"sdpa_cudnn": "cuDNN", "sdpa_flash": "FlashAttention-2", "sdpa_cpu": "SDPA"}
CONFIGS = {
    "released": "released schedule",
    "default": "density 0.25",
    "three_regime": "released schedule, forced blocks inside",
}
PRESETS = dict(zip(bench.PRESETS, ("paper", "angelslim", "hpc_ops", "adaptive"), strict=True))


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


def speed() -> str:
    """For each machine, one sentence and one table: the whole operator against every dense back end."""
    rows = full_rows("speed")
    if rows.empty:
        return no_rows("04_speed")
    return "\n\n".join(_speed_of(device, part) for device, part in by_device(rows))


def _speed_of(device: str, rows: pd.DataFrame) -> str:
    presets, rows = _presets(rows), rows[rows.operation.isin(["attention", "operator"])]
    dense = rows[rows.config == "dense"].pivot_table(index="tokens", columns="provider", values="latency_ms")
    stem = rows[(rows.operation == "operator") & rows.config.isin(CONFIGS) & rows.latency_ms.notna()]
    stem = stem.sort_values(["tokens", "config", "latency_ms"])
    stem = stem.drop_duplicates(["tokens", "config"])  # the fastest implementation
    names = [name for name in BASELINES if name in dense]
    header = ["tokens", "config", "density", *(f"dense, {BASELINES[name]} [ms]" for name in names), "Stem [ms]"]
    header += [f"speed-up over {BASELINES[name]}" for name in names]
    lines = []
    for row in stem.to_dict("records"):
        of = {name: dense[name].get(row["tokens"], float("nan")) for name in names}
        times = [number(of[name]) for name in names] + [number(row["latency_ms"])]
        ratios = [number(of[name] / row["latency_ms"], "×") for name in names]
        config = CONFIGS.get(row["config"], row["config"])
        lines.append([tokens_label(row["tokens"]), config, f"{row['density']:.1%}", *times, *ratios])
    shape = stem.iloc[0].to_dict()
    heads = f"{shape['q_heads']:.0f} query and {shape['kv_heads']:.0f} key-value heads of {shape['head_dim']:.0f}"
    told = f"**{device}**, {heads}, {shape['dtype']}, batch {shape['batch']:.0f}, random normal inputs; medians; "
    told += "scoring and selection are part of Stem's time."
    return f"{told}{_speed_sentence(stem, dense, names)}\n\n{markdown_table(header, lines)}{presets}"


def _presets(rows: pd.DataFrame) -> str:
    """The operator under every preset over the fastest dense back end, at lengths where most of them were measured."""
    told = "The operator under every preset, speed-up over the fastest dense back end"
    in_graphs = "The same when both are replayed from a CUDA graph, which launches all kernels at once"
    return _ratios(bench.over_dense(rows), told) + _ratios(bench.over_dense(rows, graph=True), in_graphs)


def _ratios(ratios: pd.DataFrame, told: str) -> str:
    if set(ratios) != set(PRESETS):
        return ""
    ratios = ratios.dropna(thresh=2)
    ratios = ratios[ratios.index <= max(bench.SHORT)]
    lengths = [tokens_label(tokens) for tokens in ratios.index[(ratios < 1 / 1.03).any(axis=1)]]
    told += (
        f"; at {', '.join(lengths)} some are more than 3 % slower:" if lengths else ", nowhere more than 3 % slower:"
    )
    lines = [
        [tokens_label(tokens), *(number(x, "×") for x in line)]
        for tokens, line in zip(ratios.index, ratios.values, strict=True)
    ]
    return f"\n\n{told}\n\n{markdown_table(['tokens', *(PRESETS[name] for name in ratios)], lines)}"


def _speed_sentence(stem: pd.DataFrame, dense: pd.DataFrame, names: Sequence[str]) -> str:
    measured = stem[stem.tokens.isin(dense.dropna(how="all").index)]
    if measured.empty:
        return ""
    best = measured[measured.tokens == measured.tokens.max()].sort_values("latency_ms").iloc[0]
    ratios = {name: dense[name].get(best.tokens, float("nan")) / best.latency_ms for name in names}
    told = " and ".join(f"{ratio:.2g} times as fast as {BASELINES[n]}" for n, ratio in ratios.items() if ratio == ratio)
    return f" At {tokens_label(best.tokens)} tokens and density {best.density:.1%} the whole operator is {told}."


BEYOND = {
    "forward+backward": "attention, forward and backward",
    "ttft": "first token of an 8B-shaped Llama, random weights",
    "captured attention": "attention on q, k, v of SmolLM2",
    "captured operator": "operator on q, k, v of SmolLM2",
}


def beyond() -> str:
    """For each machine: training, time to first token and a real model's tensors, against every dense back end."""
    rows = full_rows("speed")
    rows = rows[rows.operation.isin(list(BEYOND)) & rows.latency_ms.notna()] if len(rows) else rows
    if rows.empty:
        return no_rows("04_speed")
    parts = []
    for device, part in by_device(rows):
        names = [name for name in BASELINES if f"speedup_vs_{name}" in part and name in set(part.provider)]
        lines = []
        for (operation, tokens), of in part.groupby(["operation", "tokens"]):
            own = of[of.config != "dense"].sort_values("latency_ms")
            for row in own.to_dict("records"):
                speedups = [row[f"speedup_vs_{name}"] for name in names]
                ratios = [number(speedup, "×") for speedup in speedups]
                dense = [number(speedup * row["latency_ms"]) for speedup in speedups]
                about = [
                    BEYOND[operation],
                    tokens_label(tokens),
                    row["provider"].replace("_", ", "),
                    f"{row['density']:.1%}",
                ]
                lines.append(
                    [*about, *dense, number(row["latency_ms"]), *ratios, number(row["peak_memory_mib"] / 1024)]
                )
        header = ["what", "tokens", "sparse", "density", *(f"dense, {BASELINES[name]} [ms]" for name in names)]
        header += ["sparse [ms]", *(f"speed-up over {BASELINES[name]}" for name in names), "peak memory [GiB]"]
        parts.append(f"**{device}**\n\n{markdown_table(header, lines)}")
    return "\n\n".join(parts)


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
    speed = full_rows("speed")
    own = speed[(speed.device == device) & (speed.tokens == row.tokens) & (speed.config == "default")]
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


def correctness() -> str:
    """For each machine, one line for each claim: how many cases, and how near the largest error is to its tolerance."""
    rows = full_rows("correctness")
    if rows.empty:
        return no_rows("03_correctness")
    parts = []
    for device, part in by_device(rows):
        lines = []
        for claim, of in part.assign(share=part.error / part.tolerance).groupby("claim", sort=False):
            impls = ", ".join(dict.fromkeys(of.impl.dropna()))
            largest = f"{of.share.max():.2f}" if of.tolerance.any() else "no difference"
            lines.append([claim, impls, len(of), f"{of.passed.mean():.0%}", largest])
        header = ["claim", "implementations", "cases", "hold", "largest error / tolerance"]
        parts.append(f"**{device}**\n\n{markdown_table(header, lines)}")
    return "\n\n".join(parts)


SECTIONS = {
    "scoreboard": scoreboard.scoreboard,
    "headline": scoreboard.headline,
    "correctness": correctness,
    "speed": speed,
    "beyond": beyond,
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

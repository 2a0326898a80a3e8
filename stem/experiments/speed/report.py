"""Tables and verdicts of speed, from rows: speed-ups over dense attention and the sections of results/README.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from stem.experiments.markdown import by_device, full_rows, markdown_table, no_rows, number, tokens_label
from stem.experiments.speed.candidates import BASELINES, GRAPH, PRESETS, SHORT

DENSE_LABELS = {"sdpa_cudnn": "cuDNN", "sdpa_flash": "FlashAttention-2", "sdpa_cpu": "SDPA"}
CONFIG_LABELS = {
    "released": "released schedule",
    "default": "density 0.25",
    "three_regime": "released schedule, forced blocks inside",
}
PRESET_LABELS = dict(zip(PRESETS, ("paper", "angelslim", "hpc_ops", "adaptive"), strict=True))


def wins_from(rows: Iterable[dict[str, Any]] | pd.DataFrame, config: str, margin: float = 1.0) -> int | None:
    """Shortest length [tokens] from which on the operator's speed-up over every dense back end exceeds `margin`.

    None if there is no such measured length. Lengths without a dense time do not count.
    """
    frame = pd.DataFrame(rows)
    operator = frame[(frame["operation"] == "operator") & (frame["config"] == config)].set_index("tokens")
    speedups = operator[[f"speedup_vs_{name}" for name in BASELINES]].dropna(how="all").min(axis=1)
    speedups = speedups.groupby(level=0).max()  # the fastest implementation at each length
    return always_from(speedups > margin)


def always_from(wins: pd.Series) -> int | None:
    """First length (the index, ascending) from which on all entries are True; None if the last one is False."""
    always = wins[::-1].cummin()[::-1]
    return int(always.idxmax()) if always.any() else None


def over_dense(
    rows: Iterable[dict[str, Any]] | pd.DataFrame, configs: Sequence[str] = PRESETS, *, graph: bool = False
) -> pd.DataFrame:
    """Speed-up of the operator with impl=None over the fastest dense back end: tokens down, configs across.

    Args:
        rows: Of one machine.
        configs: Columns; configs without rows are left out.
        graph: Take the times of CUDA graphs, of both, instead of those of calls from Python.
    """
    frame, prefix = pd.DataFrame(rows).dropna(subset="latency_ms"), GRAPH if graph else ""
    dense = frame[(frame["operation"] == prefix + "attention") & (frame["config"] == "dense")]
    dense = dense.groupby("tokens").latency_ms.min()
    operator = frame[(frame["operation"] == prefix + "operator") & (frame["provider"] == "stem")]
    times = operator.pivot_table(index="tokens", columns="config", values="latency_ms")
    return times.rdiv(dense, axis=0).reindex(columns=[name for name in configs if name in times]).dropna(how="all")


def table(rows: Iterable[dict[str, Any]] | pd.DataFrame) -> str:
    """The rows as a text table of the columns that are compared, without empty ones."""
    frame = pd.DataFrame(rows)
    wanted = ["tokens", "config", "operation", "provider", "density", "latency_ms", "tflops", "gb_per_s"]
    wanted += ["peak_memory_mib", *(f"speedup_vs_{name}" for name in BASELINES), "error"]
    shown = frame[[column for column in wanted if column in frame and frame[column].notna().any()]]
    return shown.rename(columns=lambda name: name.replace("speedup_vs_", "vs_")).to_string(
        index=False, na_rep="", float_format=lambda x: f"{x:.4g}", max_colwidth=60
    )


def speed() -> str:
    """For each machine a sentence and tables: the whole operator against every dense back end."""
    rows = full_rows("speed")
    if rows.empty:
        return no_rows("04_speed")
    return "\n\n".join(_speed_of(device, part) for device, part in by_device(rows))


def _speed_of(device: str, rows: pd.DataFrame) -> str:
    presets, rows = _presets(rows), rows[rows.operation.isin(["attention", "operator"])]
    dense = rows[rows.config == "dense"].pivot_table(index="tokens", columns="provider", values="latency_ms")
    stem = rows[(rows.operation == "operator") & rows.config.isin(CONFIG_LABELS) & rows.latency_ms.notna()]
    stem = stem.sort_values(["tokens", "config", "latency_ms"])
    stem = stem.drop_duplicates(["tokens", "config"])  # the fastest implementation
    names = [name for name in DENSE_LABELS if name in dense]
    header = ["tokens", "config", "density", *(f"dense, {DENSE_LABELS[name]} [ms]" for name in names), "Stem [ms]"]
    header += [f"speed-up over {DENSE_LABELS[name]}" for name in names]
    lines = []
    for row in stem.to_dict("records"):
        of = {name: dense[name].get(row["tokens"], float("nan")) for name in names}
        times = [number(of[name]) for name in names] + [number(row["latency_ms"])]
        ratios = [number(of[name] / row["latency_ms"], "×") for name in names]
        config = CONFIG_LABELS.get(row["config"], row["config"])
        lines.append([tokens_label(row["tokens"]), config, f"{row['density']:.1%}", *times, *ratios])
    shape = stem.iloc[0].to_dict()
    heads = f"{shape['q_heads']:.0f} query and {shape['kv_heads']:.0f} key-value heads of {shape['head_dim']:.0f}"
    told = f"**{device}**, {heads}, {shape['dtype']}, batch {shape['batch']:.0f}, random normal inputs. Times "
    told += "are medians, and Stem's include scoring and selection."
    return f"{told}{_speed_sentence(stem, dense, names)}\n\n{markdown_table(header, lines)}{presets}"


def _presets(rows: pd.DataFrame) -> str:
    """Speed-ups of the operator with each preset over the fastest dense back end, called and in CUDA graphs."""
    told = "Speed-up of the operator with each preset over the fastest dense back end"
    called = _ratios(over_dense(rows), f"{told}, both called from Python")
    return called + _ratios(over_dense(rows, graph=True), f"{told}, both replayed from CUDA graphs")


def _ratios(ratios: pd.DataFrame, told: str) -> str:
    if set(ratios) != set(PRESET_LABELS):
        return ""
    ratios = ratios.dropna(thresh=2)
    ratios = ratios[ratios.index <= max(SHORT)]
    worst = ", ".join(f"{PRESET_LABELS[name]} {number(x, '×')}" for name, x in ratios.min().items())
    lines = [
        [tokens_label(tokens), *(number(x, "×") for x in line)]
        for tokens, line in zip(ratios.index, ratios.values, strict=True)
    ]
    header = ["tokens", *(PRESET_LABELS[name] for name in ratios)]
    return f"\n\n{told}; worst case: {worst}:\n\n{markdown_table(header, lines)}"


def _speed_sentence(stem: pd.DataFrame, dense: pd.DataFrame, names: Sequence[str]) -> str:
    measured = stem[stem.tokens.isin(dense.dropna(how="all").index)]
    if measured.empty:
        return ""
    best = measured[measured.tokens == measured.tokens.max()].sort_values("latency_ms").iloc[0]
    ratios = {name: dense[name].get(best.tokens, float("nan")) / best.latency_ms for name in names}
    told = " and ".join(
        f"{ratio:.2g} times as fast as {DENSE_LABELS[n]}" for n, ratio in ratios.items() if ratio == ratio
    )
    return f" At {tokens_label(best.tokens)} tokens and density {best.density:.1%} the whole operator is {told}."


BEYOND = {
    "forward+backward": "attention, forward and backward",
    "ttft": "first token of an 8B-shaped Llama, random weights",
    "captured attention": "attention on q, k, v of SmolLM2",
    "captured operator": "operator on q, k, v of SmolLM2",
}


def beyond() -> str:
    """For each machine a table: training, first token and a real model's tensors against every dense back end."""
    rows = full_rows("speed")
    rows = rows[rows.operation.isin(list(BEYOND)) & rows.latency_ms.notna()] if len(rows) else rows
    if rows.empty:
        return no_rows("04_speed")
    parts = []
    for device, part in by_device(rows):
        names = [name for name in DENSE_LABELS if f"speedup_vs_{name}" in part and name in set(part.provider)]
        lines = []
        for (operation, tokens), of in part.groupby(["operation", "tokens"]):
            own = of[of.config != "dense"].sort_values("latency_ms")
            for row in own.to_dict("records"):
                speedups = [row[f"speedup_vs_{name}"] for name in names]
                ratios = [number(speedup, "×") for speedup in speedups]
                dense = [number(speedup * row["latency_ms"]) for speedup in speedups]
                about = [BEYOND[operation], tokens_label(tokens), row["provider"].replace("_", ", ")]
                memory = number(row["peak_memory_mib"] / 1024)
                time = number(row["latency_ms"])
                lines.append([*about, f"{row['density']:.1%}", *dense, time, *ratios, memory])
        header = ["what", "tokens", "sparse", "density", *(f"dense, {DENSE_LABELS[name]} [ms]" for name in names)]
        header += ["sparse [ms]", *(f"speed-up over {DENSE_LABELS[name]}" for name in names), "peak memory [GiB]"]
        parts.append(f"**{device}**\n\n{markdown_table(header, lines)}")
    return "\n\n".join(parts)

"""Figures of speed: time, memory, roofline and speed-ups, from the rows of one machine."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stem.experiments import records
from stem.experiments.figures import COLOURS, PALETTE, label_lines, lines, log_y, new, styled, tokens_axis, tokens_label
from stem.experiments.speed.candidates import BASELINES
from stem.experiments.speed.factors import EVERY_BLOCK, WINDOW, kinds
from stem.experiments.speed.peers import FP8
from stem.experiments.speed.report import fastest_dense, over_dense, wins_from

ACCEPTED_LOSS = 0.03  # of speed against the fastest dense back end
LABELS = {
    "fa3": "dense, FlashAttention-3",
    "fa4": "dense, FlashAttention-4",
    "fa3_fp8": "dense, FlashAttention-3 in FP8",
    "sdpa_cudnn": "dense, SDPA cuDNN",
    "sdpa_flash": "dense, SDPA FlashAttention-2",
    "sdpa_cpu": "dense, SDPA CPU",
    "flex": "FlexAttention, Stem's blocks",
    "flex_flash": "FlexAttention FLASH, Stem's blocks",
    "fa4_sparse": "FlashAttention-4, Stem's blocks",
    "stem_torch": "Stem, torch",
    "stem_triton": "Stem, Triton",
    "stem_hopper": "Stem, Hopper",
    "stem": "Stem",
}
PARTS = ("scores", "selection", "attention", "operator")  # operations of one forward pass
WHOLE = {"ttft": "Time to first token", "forward+backward": "Forward and backward"}  # operations in words


@styled()
def speed(rows: pd.DataFrame, config: str | None = None) -> Figure:
    """Time of the whole operator and of the dense baselines with p20-p80 bands, and its speed-ups, over tokens."""
    rows, config = timed(rows, config)
    shown = rows[(rows.config == "dense") | (rows.operation == "operator") | (rows.provider == "flex")]
    last, fastest, ratio = headline(shown)
    figure, (left, right) = new(2, width=5.2)
    claim = f"{last.device_label}: Stem takes {_ms(last.latency_ms)} at {tokens_label(last.tokens)} tokens"
    lines(
        shown, "tokens", "latency_ms", "provider", left, title=claim, xlabel="tokens", ylabel="time [ms]",
        band=("latency_ms_p20", "latency_ms_p80"), labels=LABELS,
    )  # fmt: skip
    log_y(left)
    tokens_axis(left, shown.tokens)
    operator = shown[shown.operation == "operator"].sort_values("latency_ms").drop_duplicates("tokens")  # the fastest
    names = list(shown[shown.config == "dense"].provider.unique())
    table = operator.set_index("tokens").sort_index()[[f"speedup_vs_{name}" for name in names]]
    table.columns = [f"over {LABELS[name].removeprefix('dense, ')}" for name in names]
    _speedups(table, right, [COLOURS[name] for name in names], "over dense", shown.tokens)
    right.set(ylim=(0, None), title=f"{ratio:.1f}× over {fastest} at {tokens_label(last.tokens)} ({config} budget)")
    label_lines(right)
    return figure


@styled()
def breakdown(rows: pd.DataFrame, config: str | None = None) -> Figure:
    """Shares of scores, selection and attention in their summed time [%], over tokens."""
    rows, _ = timed(rows, config)
    stem = rows[rows.provider.str.startswith("stem")]
    parts = stem.pivot_table(index="tokens", columns="operation", values="latency_ms", aggfunc="min")
    parts = parts[["attention", "selection", "scores"]]
    share = 100 * parts.div(parts.sum(axis=1), axis=0)
    figure, ax = new()
    share.plot.bar(stacked=True, ax=ax, color=PALETTE[:3], width=0.7, rot=0)
    ax.set_xticklabels([tokens_label(n) for n in share.index])
    overhead = 100 - share.attention.iloc[-1]
    ax.set_title(f"{tokens_label(share.index[-1])} tokens: choosing the blocks is {overhead:.0f} % of the time")
    ax.set(xlabel="tokens", ylabel="share of the time [%]", ylim=(0, 100))
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


@styled()
def memory(rows: pd.DataFrame, config: str | None = None) -> Figure:
    """Peak memory beyond the inputs, output included [MiB], over tokens; CUDA rows only."""
    rows, _ = timed(rows, config)
    shown = rows[(rows.config == "dense") | (rows.operation == "operator")].dropna(subset="peak_memory_mib")
    figure, ax = new()
    last = shown[shown.operation == "operator"].sort_values(["tokens", "peak_memory_mib"]).iloc[-1]
    title = f"{tokens_label(last.tokens)} tokens: Stem needs {last.peak_memory_mib / 1024:.1f} GiB beyond its inputs"
    lines(
        shown, "tokens", "peak_memory_mib", "provider", ax, title=title, xlabel="tokens",
        ylabel="peak memory beyond the inputs [MiB]", labels=LABELS,
    )  # fmt: skip
    log_y(ax)
    tokens_axis(ax, shown.tokens)
    return figure


@styled()
def roofline(rows: pd.DataFrame, config: str | None = None) -> Figure:
    """Rate of attention alone [TFLOP/s] under the measured ceilings: the rows of operation "ceiling"."""
    peak, bandwidth = ceilings(rows)
    rows, _ = timed(rows, config)
    shown = rows[rows.operation == "attention"].dropna(subset="tflops")
    shown = shown.assign(intensity=shown.flop / shown.least_bytes)
    sparse = shown[shown.provider.str.startswith("stem")].sort_values(["tokens", "tflops"]).iloc[-1]
    figure, ax = new()
    share = f"{100 * sparse.tflops / peak:.0f} %"
    claim = f"{tokens_label(sparse.tokens)} tokens: Stem's attention at {share} of a matmul's rate"
    lines(
        shown, "intensity", "tflops", "provider", ax, title=claim, labels=LABELS,
        xlabel="operations per byte that must move [FLOP/B]", ylabel="kept pairs computed [TFLOP/s]",
    )  # fmt: skip
    x = np.geomspace(min(shown.intensity.min() / 2, peak / bandwidth / 2), shown.intensity.max() * 2, 200)
    ax.plot(x, np.minimum(peak, bandwidth * x), color="black", linewidth=1, label="measured ceilings")
    ax.set_xscale("log")
    log_y(ax)
    label_lines(ax)
    return figure


@styled()
def crossover(rows: pd.DataFrame, configs: Sequence[str] | None = None) -> Figure:
    """Speed-up of the whole operator over the fastest dense back end of each length, one line per config."""
    ratios = over_dense(rows, configs, fastest=True)
    wins = {name: wins_from(speedups) for name, speedups in ratios.items()}
    lengths = {name: "no length" if first is None else tokens_label(first) for name, first in wins.items()}
    figure, ax = new()
    _speedups(ratios.add_suffix(" budget"), ax, _colours(ratios), "over the fastest dense", ratios.index)
    _mark_without_choice(ratios, ax)
    dense = set(fastest_dense(rows)[ratios.index])
    dense = dense.pop() if len(dense) == 1 else "the fastest dense"
    ax.set_title(f"Stem beats {dense} from " + ", ".join(f"{n} ({name})" for name, n in lengths.items()))
    ax.set(ylim=(0, None))
    ax.legend()
    return figure


@styled()
def never_slower(ratios: Mapping[str, pd.DataFrame]) -> Figure:
    """Speed-ups of `report.over_dense` over tokens by panel title, a line per config, with the accepted loss shaded."""
    figure, axes = new(len(ratios), width=5.2)
    for (how, table), ax in zip(ratios.items(), np.atleast_1d(axes), strict=True):
        _speedups(table, ax, _colours(table), "over dense", table.index)
        _mark_without_choice(table, ax)
        ax.axhspan(1 - ACCEPTED_LOSS, 1.0, color="0.9", label=f"at most {ACCEPTED_LOSS:.0%} slower")
        tokens, name = table.stack().idxmin()
        ax.set_title(f"{how}: worst case {table[name][tokens]:.2f}×, {name} at {tokens_label(tokens)} tokens")
        ax.set_ylim(0, None)
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))  # beside the last panel, because lines fill all panels
    return figure


def _colours(table: pd.DataFrame) -> list[str]:
    """Colours of configs, the names of the columns."""
    return [COLOURS["stem" if name == "default" else name] for name in table]


def _mark_without_choice(table: pd.DataFrame, ax: Axes) -> None:
    """Mark speed-ups of configs that choose nothing: hollow where every block is kept, square for sinks and window."""
    kept = kinds(table.columns, table.index)
    for kind, marker in ((EVERY_BLOCK, "o"), (WINDOW, "s")):
        shown = table[kept == kind].stack().dropna()
        tokens = shown.index.get_level_values(0)
        if len(shown):
            ax.plot(tokens, shown, marker, mfc="white", mec="0.2", markersize=6, label=kind)


def _speedups(table: pd.DataFrame, ax: Axes, colours: Sequence, of: str, tokens: Iterable[int]) -> None:
    """Draw one line per column of speed-ups over tokens, and a dashed line at 1."""
    for (name, ratios), colour in zip(table.items(), colours, strict=False):
        measured = ratios.dropna()
        ax.plot(measured.index, measured, "o-", color=colour, markersize=4, label=name)
    ax.axhline(1.0, color="0.7", linestyle="--", linewidth=1)
    ax.set(ylabel=f"speed-up {of} [times]")
    tokens_axis(ax, tokens)


@styled()
def bars(rows: pd.DataFrame, operation: str, config: str) -> Figure:
    """Times of one operation by length, relative to the fastest dense back end, whose time [ms] is below the length.

    Raises:
        ValueError: If the rows hold no time of Stem for this operation and config.
    """
    shown = pd.DataFrame(rows)
    shown = shown[(shown.operation == operation) & shown.config.isin(["dense", config])].dropna(subset="latency_ms")
    if not shown.provider.str.startswith("stem").any():
        raise ValueError(f"rows must hold times of operation={operation!r} and config={config!r}, got none of Stem")
    times = shown.pivot_table(index="tokens", columns="provider", values="latency_ms", sort=False).sort_index()
    times = times[sorted(times, key=lambda name: [*BASELINES, name].index(name))]  # dense first, Stem in order of rows
    dense = times[[name for name in times if name in BASELINES and name not in FP8]].dropna(how="all")
    ratio = (dense.min(axis=1) / times.filter(regex="^stem").min(axis=1)).dropna()
    figure, ax = new()
    fastest = dense.min(axis=1).reindex(times.index)
    shares = times.div(fastest, axis=0).rename(columns=LABELS)
    shares.plot.bar(ax=ax, color=[COLOURS[name] for name in times], width=0.75, rot=0)
    ax.set_xticklabels([f"{tokens_label(n)}\n{_ms(fastest[n])}" for n in times.index])
    name = LABELS[dense.loc[ratio.index[-1]].idxmin()].removeprefix("dense, ")
    claim = f"{WHOLE.get(operation, operation)}: {ratio.iloc[-1]:.1f}× over {name} at {tokens_label(ratio.index[-1])}"
    ax.set(xlabel="tokens, time of the fastest dense", ylabel="time, fastest dense = 1", title=f"{claim} tokens")
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def timed(rows: pd.DataFrame, config: str | None = None) -> tuple[pd.DataFrame, str]:
    """Timed rows of the dense baselines and of one config, and the config's name (default: the first in the rows).

    Raises:
        ValueError: If the rows are of several machines or profiles, or hold no time of the config.
    """
    rows = pd.DataFrame(rows)
    for column in ("machine", "profile"):
        if column in rows and rows[column].nunique() > 1:
            raise ValueError(f"rows must be of one {column}, got {sorted(rows[column].unique())}")
    rows = rows[rows["operation"].isin(PARTS)].dropna(subset="latency_ms")
    names = [name for name in rows["config"].unique() if name != "dense"]
    if not names or (config is not None and config not in names):
        raise ValueError(f"rows must hold times of config={config or 'any'!r}, got {names}")
    config = names[0] if config is None else config
    return rows[rows["config"].isin(["dense", config])].astype({"tokens": int}), config


def headline(rows: pd.DataFrame) -> tuple[pd.Series, str, float]:
    """The operator's fastest row at the longest length with a dense time, that baseline's label, and the speed-up."""
    dense, operator = rows[rows.config == "dense"], rows[rows.operation == "operator"]
    tokens = max(set(dense.tokens) & set(operator.tokens))
    fastest = dense[dense.tokens == tokens].sort_values("latency_ms").iloc[0]
    last = operator[operator.tokens == tokens].sort_values("latency_ms").iloc[0].copy()
    last["device_label"] = last.get("device", records.device_name())
    return last, LABELS[fastest.provider].removeprefix("dense, "), fastest.latency_ms / last.latency_ms


def ceilings(rows: pd.DataFrame) -> tuple[float, float]:
    """Matmul rate [TFLOP/s] and copy bandwidth [TB/s] from the rows of operation "ceiling"."""
    found = pd.DataFrame(rows)
    found = found[found["operation"] == "ceiling"].set_index("provider")
    return float(found.loc["matmul", "tflops"]), float(found.loc["copy", "gb_per_s"]) / 1e3


def _ms(milliseconds: float) -> str:
    return f"{milliseconds / 1e3:.3g} s" if milliseconds >= 1e3 else f"{milliseconds:.3g} ms"

"""Figures in the house style: the title is the claim, axes carry units, tokens on a log2 axis, dense attention in grey.

Functions take rows (a DataFrame, one machine's) and return a matplotlib Figure; `save` puts it beside its CSV as SVG.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from torch import Tensor

from stem.experiments import records
from stem.experiments.markdown import tokens_label
from stem.selection import BlockSelection

PALETTE = sns.color_palette("colorblind")
DENSE_GREYS = ("0.25", "0.6", "0.4")
FAINTEST = 5  # shares of attention below 10**-FAINTEST are drawn white
LABELS = {
    "sdpa_cudnn": "dense, SDPA cuDNN",
    "sdpa_flash": "dense, SDPA FlashAttention-2",
    "sdpa_cpu": "dense, SDPA CPU",
    "flex": "FlexAttention, Stem's blocks",
    "stem_torch": "Stem, torch",
    "stem_triton": "Stem, Triton",
    "stem_hopper": "Stem, Hopper",
    "stem": "Stem",
}
PARTS = ("scores", "selection", "attention", "operator")  # operations that one prompt's forward pass consists of
COLOURS = dict(zip(("stem_triton", "flex", "stem_torch", "stem_hopper"), PALETTE, strict=False))
COLOURS["stem"] = COLOURS["stem_hopper"]
COLOURS |= dict(zip(("sdpa_cudnn", "sdpa_flash", "sdpa_cpu"), DENSE_GREYS, strict=False))
STYLE = {
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "axes.labelsize": "small",
    "xtick.labelsize": "small",
    "ytick.labelsize": "small",
    "legend.fontsize": "small",
    "legend.frameon": False,
    "figure.dpi": 72,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "stem",
}


@contextmanager
def styled() -> Iterator[None]:
    """House style for what is drawn inside. Restores its own settings only: plt.rc_context would also undo what a
    notebook's backend sets when the first figure is made, and later figures would not show."""
    before = {name: plt.rcParams[name] for name in STYLE}
    plt.rcParams.update(STYLE)
    try:
        yield
    finally:
        plt.rcParams.update(before)


@styled()
def new(columns: int = 1, *, width: float = 6.0, height: float = 3.6) -> tuple[Figure, Axes | np.ndarray]:
    """A figure in the house style with `columns` axes side by side, each `width` x `height` inches."""
    with sns.axes_style("whitegrid"):
        return plt.subplots(1, columns, figsize=(columns * width, height))


@styled()
def save(figure: Figure, experiment: str, name: str) -> Path:
    """Write results/<experiment>/<name>.svg, beside the CSV it was drawn from; the same figure gives the same bytes."""
    path = records.results_dir(experiment) / f"{name}.svg"
    figure.savefig(path, metadata={"Date": None})
    return path


def tokens_axis(ax: Axes, tokens) -> None:
    """A log2 x axis of tokens, labelled 1K, 2K, ... 1M at the lengths that were measured; others only if all are."""
    measured = sorted({int(n) for n in tokens})
    ticks = [n for n in measured if n % 1024 == 0] or measured
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [tokens_label(n) for n in ticks], minor=False)
    ax.set_xlabel("tokens")


def log_y(ax: Axes) -> None:
    """A log10 y axis with plain numbers, at 1, 2 and 5 times the powers of ten where those are few."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1e3 * low else (1,)))
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


@styled()
def lines(
    frame: pd.DataFrame,
    x: str,
    y: str,
    by: str,
    ax: Axes,
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    band: tuple[str, str] | None = None,
    labels: dict[str, str] | None = None,
    colours: dict[str, object] | None = None,
) -> Axes:
    """One line with markers per value of `by`, in its order of appearance, shaded between the two columns of `band`.

    A value named "dense..." is grey unless `colours` says otherwise; the rest follow the colour-blind palette.
    """
    fresh = iter(PALETTE * 4)
    for name, group in frame.groupby(by, sort=False):
        group = group.sort_values(x)
        default = "0.4" if str(name).startswith("dense") else next(fresh)
        colour = (colours or {}).get(name, default)
        ax.plot(group[x], group[y], "o-", color=colour, markersize=4, label=(labels or {}).get(name, name))
        if band:
            ax.fill_between(group[x], group[band[0]], group[band[1]], color=colour, alpha=0.2, linewidth=0)
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    ax.legend()
    return ax


@styled()
def selection(selection: BlockSelection, ax: Axes | None = None, *, head: int = 0, title: str | None = None) -> Axes:
    """The kept block pairs of one head of the first prompt: kept dark, causal but skipped light, the future blank."""
    if ax is None:
        _, ax = new(width=3.6)
    kept = selection.to_mask()[0, head].cpu().numpy()
    nq, nk = kept.shape
    causal = np.tri(nq, nk, nk - nq, dtype=bool)
    colours = ListedColormap(["white", "0.88", PALETTE[0]])
    ax.imshow(causal.astype(int) + kept, cmap=colours, vmin=0, vmax=2, interpolation="nearest")
    ax.grid(False)
    default = f"{kept.sum()} of {causal.sum()} causal block pairs are computed"
    ax.set_title(title or default)
    ax.set_xlabel(f"key block [{selection.block_size} tokens]")
    ax.set_ylabel(f"query block [{selection.block_size} tokens]")
    return ax


@styled()
def selections(chosen: Mapping[str, BlockSelection], *, head: int = 0, columns: int = 6) -> Figure:
    """One picture of `selection` per method, by name, in a grid; the titles say how much of the pairs is kept."""
    lines = -(-len(chosen) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(1.7 * columns, 2.1 * lines), squeeze=False)
    for ax in axes.flat[len(chosen) :]:
        ax.set_axis_off()
    for ax, (name, kept) in zip(axes.flat, chosen.items(), strict=False):
        selection(kept, ax, head=head).set_title(f"{name}\n{kept.density():.2f}", fontsize=7)
        ax.set(xlabel="", ylabel="", xticks=[], yticks=[])
    return figure


@styled()
def attention_map(mass: Tensor, kept: BlockSelection, ax: Axes, *, head: int = 0, title: str | None = None) -> Axes:
    """What a head attends to, dark where much: blue on the kept block pairs, grey on the others.

    mass: [rows, columns] of one head, shares of each row at any resolution that divides the blocks.
    """
    cell = -(-kept.kv_len // mass.shape[1])
    mask = kept.to_mask()[0, head].cpu()
    inside = mask.repeat_interleave(kept.block_size // cell, 0).repeat_interleave(kept.block_size // cell, 1)
    inside = inside[-mass.shape[0] :, : mass.shape[1]].numpy()
    first, last = (kept.kv_len - kept.q_len) // cell * cell, mass.shape[1] * cell
    shares = np.log10(mass.cpu().numpy().clip(10.0**-FAINTEST))
    for colours, shown in (("Greys", ~inside), ("Blues", inside)):
        colours = plt.get_cmap(colours, 2 * FAINTEST)
        part = np.ma.masked_where(~shown | (mass.cpu().numpy() == 0), shares)  # the future has no share at all
        ax.imshow(part, cmap=colours, vmin=-FAINTEST, vmax=0, extent=(0, last, last, first), interpolation="nearest")
    ax.grid(False)
    ax.set(xlabel="key [token]", ylabel="query [token]", title=title or f"{kept.density():.0%} of the pairs kept")
    return ax


@styled()
def speed(rows: pd.DataFrame, config: str | None = None) -> Figure:
    """Time of the whole operator and of its dense baselines over tokens, with p20-p80 bands, and their ratio."""
    rows, config = timed(rows, config)
    shown = rows[(rows.config == "dense") | (rows.operation == "operator") | (rows.provider == "flex")]
    last, fastest, ratio = headline(shown)
    figure, (left, right) = new(2, width=5.2)
    claim = f"{last.device_label}: Stem takes {_ms(last.latency_ms)} at {tokens_label(last.tokens)} tokens"
    lines(
        shown, "tokens", "latency_ms", "provider", left, title=claim, xlabel="tokens", ylabel="time [ms]",
        band=("latency_ms_p20", "latency_ms_p80"), labels=LABELS, colours=COLOURS,
    )  # fmt: skip
    log_y(left)
    tokens_axis(left, shown.tokens)
    operator = shown[shown.operation == "operator"].sort_values("latency_ms").drop_duplicates("tokens")  # the fastest
    for name in baselines(shown):
        column = f"speedup_vs_{name}"
        measured = operator.dropna(subset=column).sort_values("tokens")
        label = f"over {LABELS[name].removeprefix('dense, ')}"
        right.plot(measured.tokens, measured[column], "o-", color=COLOURS[name], markersize=4, label=label)
    right.axhline(1.0, color="0.7", linestyle="--", linewidth=1)
    right.legend()
    right.set(ylabel="speed-up of the whole operator [times]", ylim=(0, None))
    right.set_title(f"{ratio:.1f}× over {fastest} at {tokens_label(last.tokens)} ({config} budget)")
    tokens_axis(right, shown.tokens)
    return figure


@styled()
def breakdown(rows: pd.DataFrame, config: str | None = None) -> Figure:
    """Where the time goes: scores, selection and attention, as shares of their sum over tokens."""
    rows, _ = timed(rows, config)
    parts = rows[(rows.config != "dense") & rows.operation.isin(["scores", "selection", "attention"])]
    parts = parts[parts.provider != "flex"].pivot_table(
        index="tokens", columns="operation", values="latency_ms", aggfunc="min"
    )
    share = 100 * parts[["attention", "selection", "scores"]].div(parts.sum(axis=1), axis=0)
    figure, ax = new()
    share.plot.bar(stacked=True, ax=ax, color=[PALETTE[0], PALETTE[1], PALETTE[2]], width=0.7, rot=0)
    ax.set_xticklabels([tokens_label(n) for n in share.index])
    overhead = 100 - share.attention.iloc[-1]
    ax.set_title(f"{tokens_label(share.index[-1])} tokens: choosing the blocks is {overhead:.0f} % of the time")
    ax.set(xlabel="tokens", ylabel="share of the time [%]", ylim=(0, 100))
    ax.legend(loc="lower right", frameon=True)
    return figure


@styled()
def memory(rows: pd.DataFrame, config: str | None = None) -> Figure:
    """Peak memory beyond the inputs over tokens, the output included (measured on CUDA only)."""
    rows, _ = timed(rows, config)
    shown = rows[(rows.config == "dense") | (rows.operation == "operator")].dropna(subset="peak_memory_mib")
    figure, ax = new()
    last = shown[shown.operation == "operator"].sort_values(["tokens", "peak_memory_mib"]).iloc[-1]
    title = f"{tokens_label(last.tokens)} tokens: Stem needs {last.peak_memory_mib / 1024:.1f} GiB beyond its inputs"
    lines(
        shown, "tokens", "peak_memory_mib", "provider", ax, title=title, xlabel="tokens",
        ylabel="peak memory beyond the inputs [MiB]", labels=LABELS, colours=COLOURS,
    )  # fmt: skip
    log_y(ax)
    tokens_axis(ax, shown.tokens)
    return figure


@styled()
def roofline(rows: pd.DataFrame, config: str | None = None) -> Figure:
    """Attention alone under this machine's measured ceilings: a matmul and a copy (operation "ceiling" in the rows)."""
    peak, bandwidth = ceilings(rows)
    rows, _ = timed(rows, config)
    shown = rows[rows.operation == "attention"].dropna(subset="tflops")
    shown = shown.assign(intensity=shown.flop / shown.least_bytes)
    sparse = shown[shown.provider.str.startswith("stem")].sort_values(["tokens", "tflops"]).iloc[-1]
    figure, ax = new()
    share = f"{100 * sparse.tflops / peak:.0f} %"
    claim = f"{tokens_label(sparse.tokens)} tokens: Stem's attention at {share} of a matmul's rate"
    lines(
        shown, "intensity", "tflops", "provider", ax, title=claim, labels=LABELS, colours=COLOURS,
        xlabel="operations per byte that must move [FLOP/B]", ylabel="kept pairs computed [TFLOP/s]",
    )  # fmt: skip
    x = np.geomspace(min(shown.intensity.min() / 2, peak / bandwidth / 2), shown.intensity.max() * 2, 200)
    ax.plot(x, np.minimum(peak, bandwidth * x), color="black", linewidth=1, label="measured ceilings")
    ax.set_xscale("log")
    log_y(ax)
    ax.legend()
    return figure


@styled()
def crossover(rows: pd.DataFrame, configs: Sequence[str] | None = None) -> Figure:
    """Speed-up of the whole operator over the fastest dense back end of each length, one line per config."""
    names = [name for name in pd.DataFrame(rows)["config"].dropna().unique() if name != "dense"]
    names = [name for name in names if configs is None or name in configs]
    figure, ax = new()
    wins = {}
    for name, colour in zip(names, PALETTE, strict=False):
        shown, _ = timed(rows, name)
        dense = shown[shown.config == "dense"].groupby("tokens").latency_ms.min()
        operator = shown[shown.operation == "operator"].groupby("tokens").latency_ms.min()
        ratio = (dense / operator).dropna()
        if ratio.empty:
            continue
        ax.plot(ratio.index, ratio, "o-", color=colour, markersize=4, label=f"{name} budget")
        ahead = (ratio > 1)[::-1].cummin()[::-1]  # True where it and all longer ones win
        wins[name] = tokens_label(ahead.idxmax()) if ahead.any() else "no length"
    ax.axhline(1.0, color="0.7", linestyle="--", linewidth=1)
    ax.set_title("Stem beats every dense back end from " + ", ".join(f"{n} ({name})" for name, n in wins.items()))
    ax.set(ylabel="speed-up over the fastest dense [times]", ylim=(0, None))
    ax.legend()
    tokens_axis(ax, sorted({int(n) for line in ax.get_lines()[:-1] for n in line.get_xdata()}))
    return figure


@styled()
def never_slower(ratios: Mapping[str, pd.DataFrame], margin: float = 0.03) -> Figure:
    """Speed-ups from `bench.over_dense` over tokens, one line per config, and the loss that is accepted.

    Args:
        ratios: How they were measured -> speed-ups; one panel each.
        margin: Share of its speed that a config may lose to the fastest dense back end.
    """
    figure, axes = new(len(ratios), width=5.2)
    for (how, table), ax in zip(ratios.items(), np.atleast_1d(axes), strict=True):
        for name, colour in zip(table, PALETTE, strict=False):
            measured = table[name].dropna()
            ax.plot(measured.index, measured, "o-", color=colour, markersize=4, label=name)
        ax.axhline(1.0, color="0.7", linestyle="--", linewidth=1)
        ax.axhspan(1 - margin, 1.0, color="0.9", label=f"at most {margin:.0%} slower")
        tokens, name = table.stack().idxmin()
        ax.set_title(f"{how}: slowest {table[name][tokens]:.2f}×, {name} at {tokens_label(int(tokens))} tokens")
        ax.set(ylabel="speed-up over the fastest dense [times]")
        log_y(ax)
        tokens_axis(ax, table.index)
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))  # beside the last panel: lines fill all of them
    return figure


@styled()
def bars(rows: pd.DataFrame, operation: str, config: str, ylabel: str = "time [ms]") -> Figure:
    """Times of one operation by length: the dense back ends, FlexAttention and Stem side by side.

    Raises:
        ValueError: If the rows hold no time of this operation.
    """
    shown = pd.DataFrame(rows)
    shown = shown[(shown.operation == operation) & shown.config.isin(["dense", config])].dropna(subset="latency_ms")
    if not shown.provider.str.startswith("stem").any():
        raise ValueError(f"rows must hold times of operation={operation!r} and config={config!r}, got none of Stem")
    times = shown.pivot_table(index="tokens", columns="provider", values="latency_ms", sort=False).sort_index()
    dense = [name for name in times if name.startswith("sdpa")]
    sparse = times[[name for name in times if name.startswith("stem")]].min(axis=1)
    ratio = (times[dense].min(axis=1) / sparse).dropna()
    figure, ax = new()
    colours = [COLOURS[name] for name in times]
    times.rename(columns=LABELS).plot.bar(ax=ax, color=colours, width=0.75, rot=0)
    ax.set_xticklabels([tokens_label(int(n)) for n in times.index])
    last = ratio.index[-1]
    ax.set_title(f"{operation}: {ratio.loc[last]:.1f}× over the fastest dense at {tokens_label(int(last))} tokens")
    ax.set(xlabel="tokens", ylabel=ylabel)
    log_y(ax)
    ax.legend()
    return figure


def timed(rows: pd.DataFrame, config: str | None = None) -> tuple[pd.DataFrame, str]:
    """The rows that hold a time, of the dense baselines and one config (default: the first), and that config's name.

    Raises:
        ValueError: If the rows are of several machines or profiles, or of none with a time.
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


def baselines(rows: pd.DataFrame) -> list[str]:
    """The dense providers that the rows hold."""
    return list(rows[rows.config == "dense"].provider.unique())


def headline(rows: pd.DataFrame) -> tuple[pd.Series, str, float]:
    """The operator's row at the longest length that a dense baseline reached, that baseline's label, and the ratio."""
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

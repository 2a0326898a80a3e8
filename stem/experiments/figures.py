"""Figures in the house style: the title is the claim, axes carry units, tokens on a log2 axis, dense attention grey."""

from collections.abc import Iterator, Mapping
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
FAINTEST = 5  # shares of attention below 10**-FAINTEST are drawn white
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
    """Apply the house style to figures drawn inside, then restore these settings only.

    plt.rc_context would also undo the settings of a notebook's backend, and later figures would not show.
    """
    before = {name: plt.rcParams[name] for name in STYLE}
    plt.rcParams.update(STYLE)
    try:
        yield
    finally:
        plt.rcParams.update(before)


@styled()
def new(columns: int = 1, *, width: float = 6.0, height: float = 3.6) -> tuple[Figure, Axes | np.ndarray]:
    """Figure and axes in the house style: `columns` axes side by side, each `width` x `height` [inches]."""
    with sns.axes_style("whitegrid"):
        return plt.subplots(1, columns, figsize=(columns * width, height))


@styled()
def save(figure: Figure, experiment: str, name: str) -> Path:
    """Write results/<experiment>/<name>.svg and return its path; equal figures give equal bytes."""
    path = records.results_dir(experiment) / f"{name}.svg"
    figure.savefig(path, metadata={"Date": None})
    return path


def tokens_axis(ax: Axes, tokens) -> None:
    """Set a log2 x axis of tokens with 1K, 2K, ... 1M at the measured multiples of 1024, or all lengths without any."""
    measured = sorted({int(n) for n in tokens})
    ticks = [n for n in measured if n % 1024 == 0] or measured
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [tokens_label(n) for n in ticks], minor=False)
    ax.set_xlabel("tokens")


def log_y(ax: Axes) -> None:
    """Set a log10 y axis with plain numbers at powers of ten, and at 2 and 5 times these below three decades."""
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
    """Draw one line with markers per value of `by`, in order of appearance, shaded between the columns of `band`."""
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
def selections(chosen: Mapping[str, BlockSelection], *, head: int = 0, columns: int = 6) -> Figure:
    """Grid with the block pairs of one head per method: kept dark, skipped light, future blank; name and density."""
    lines = -(-len(chosen) // columns)
    figure = plt.figure(figsize=(1.7 * columns, 2.1 * lines))
    colours = ListedColormap(["white", "0.88", PALETTE[0]])
    for place, (name, selection) in enumerate(chosen.items(), 1):
        kept = selection.to_mask()[0, head].cpu().numpy()
        nq, nk = kept.shape
        causal = np.tri(nq, nk, nk - nq, dtype=bool)
        ax = figure.add_subplot(lines, columns, place, xticks=[], yticks=[])
        ax.imshow(causal.astype(int) + kept, cmap=colours, vmin=0, vmax=2, interpolation="nearest")
        ax.set_title(f"{name}\n{selection.density():.2f}", fontsize=7)
    return figure


@styled()
def attention_map(mass: Tensor, kept: BlockSelection, ax: Axes, *, head: int = 0, title: str) -> Axes:
    """Draw the attention of one head, darker for larger shares: blue on kept block pairs, grey on the others.

    `mass` holds the shares of each row, [rows, columns], at any resolution that divides the blocks of `kept`.
    """
    cell = -(-kept.kv_len // mass.shape[1])
    mask = kept.to_mask()[0, head].cpu()
    inside = mask.repeat_interleave(kept.block_size // cell, 0).repeat_interleave(kept.block_size // cell, 1)
    inside = inside[-mass.shape[0] :, : mass.shape[1]].numpy()
    first, last = (kept.kv_len - kept.q_len) // cell * cell, mass.shape[1] * cell
    shares = np.log10(mass.cpu().numpy().clip(10.0**-FAINTEST))
    for colours, shown in (("Greys", ~inside), ("Blues", inside)):
        colours = plt.get_cmap(colours, 2 * FAINTEST)
        part = np.ma.masked_where(~shown | (mass.cpu().numpy() == 0), shares)  # future keys have share 0
        ax.imshow(part, cmap=colours, vmin=-FAINTEST, vmax=0, extent=(0, last, last, first), interpolation="nearest")
    ax.grid(False)
    ax.set(xlabel="key [token]", ylabel="query [token]", title=title)
    return ax

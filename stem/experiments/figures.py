"""Figures in the house style: the title is the claim, axes carry units, tokens on a log2 axis, dense attention grey."""

import sys
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

PALETTE = sns.color_palette("colorblind").as_hex()
COLOURS = {  # one colour for each method in all notebooks
    **dict.fromkeys(("dense", "sdpa_cudnn", "dense, SDPA cuDNN"), "0.35"),
    **{"fa3": "0.1", "fa4": "0.5", "fa3_fp8": "0.8"},
    **dict.fromkeys(("sdpa_flash", "sdpa_cpu", "random", "random blocks"), "0.65"),
    **dict.fromkeys(("stem", "stem_hopper", "+ output-aware metric", "tuned with Stem"), PALETTE[0]),
    **dict.fromkeys(("uniform_topk", "uniform", "stem_triton", "a budget per row"), PALETTE[9]),
    **dict.fromkeys(("adaptive", "one threshold"), PALETTE[3]),
    **dict.fromkeys(("adaptive, cells alone", "a threshold per head", "adaptive, low density"), "#f0a57a"),
    **{"stem, last block dense": "#17807e", "xattention, last block dense": "#ffbf66"},
    **{"flashprefill_v2, last block dense": "#b08968", "oracle by threshold, low density": "0.2"},
    **dict.fromkeys(("stem_softmax", "stem_torch"), "#17807e"),
    **dict.fromkeys(("+ position decay", "stem, no value term"), "#08519c"),
    **{"paper": "#6a3d9a", "released": "#17807e", "three_regime": "#33a02c", "hpc_ops": "#c51b8a"},
    **dict.fromkeys(("xattention", "softmax before the sum"), PALETTE[1]),
    **dict.fromkeys(("vertical_slash", "flex"), PALETTE[2]),
    **{"fa4_sparse": PALETTE[6], "flex_flash": PALETTE[8]},
    "flexprefill": PALETTE[4],
    "flashprefill": PALETTE[5],
    "flashprefill_v2": "#6b3f1d",
    "subblock": "#7fbc41",
    "cosa": "#c51b8a",
    "blasst": "#bcbd22",
    **dict.fromkeys(("sliding_window", "window"), "#e377c2"),
    "longformer": "#7b4173",
    "bigbird": "#8c6d31",
    "sparse_transformer_strided": "#e7969c",
    "sparse_transformer_fixed": "#843c39",
    "a_shape": "#637939",
    "tri_shape": "#9c9ede",
    "pretrained": "#7f7f7f",
    "tuned dense": "#b8860b",
    **dict.fromkeys(("oracle_mass", "oracle", "oracle_output"), "black"),
}
FAINTEST = 5  # shares of attention below 10**-FAINTEST are drawn white
LINE_LABEL = "line label"  # gid of a text at the end of a line
STYLE = {
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.labelsize": 11,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "stem",
}


def use_in_notebook() -> None:
    """Show a notebook's figures in the house style, with `describe` as their alternative text."""
    plt.rcParams.update(STYLE)
    ipython = sys.modules.get("IPython")  # every kernel has imported it
    shell = ipython and ipython.get_ipython()
    if hasattr(shell, "kernel"):
        from IPython.core.pylabtools import print_figure

        plt.close(plt.figure())  # the backend sets its own formatter with the first figure
        png = shell.display_formatter.formatters["image/png"]
        png.for_type(Figure, lambda figure: (print_figure(figure, "png", base64=True), {"alt": describe(figure)}))


def describe(figure: Figure) -> str:
    """Alternative text of a figure: titles, axes and named lines of each panel, read from the figure itself."""
    told = [figure.get_suptitle(), " over ".join(filter(None, (figure.get_supylabel(), figure.get_supxlabel())))]
    for ax in figure.axes:
        title, names = ax.get_title(loc="left") or ax.get_title(), [text.get_text() for text in ax.texts]
        names += ax.get_legend_handles_labels()[1] if ax.get_legend() else []
        axes = f"{ax.get_ylabel()} over {ax.get_xlabel()}" if ax.get_xlabel() and ax.get_ylabel() else ax.get_xlabel()
        told.append(": ".join(part for part in (title, axes, ", ".join(names)) if part))
    told += [", ".join(text.get_text() for text in legend.get_texts()) for legend in figure.legends]
    return " ".join(". ".join(part for part in told if part).split())


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
def new(
    columns: int = 1, rows: int = 1, *, width: float = 6.0, height: float = 3.6, share: bool = False
) -> tuple[Figure, Axes | np.ndarray]:
    """Figure and axes in the house style: a grid of axes, each `width` x `height` [inches], or with shared scales."""
    with sns.axes_style("whitegrid"):
        return plt.subplots(rows, columns, figsize=(columns * width, rows * height), sharex=share, sharey=share)


@styled()
def save(figure: Figure, experiment: str, name: str) -> Path:
    """Write results/<experiment>/<name>.svg and return its path; equal figures give equal bytes."""
    path = records.results_dir(experiment) / f"{name}.svg"
    figure.savefig(path, metadata={"Date": None})
    return path


def tokens_axis(ax: Axes, tokens) -> None:
    """Set a log2 x axis of tokens, named at the measured multiples of 1024 and powers of two, or at all lengths."""
    measured = sorted({int(n) for n in tokens})
    ticks = [n for n in measured if n % 1024 == 0 or n & (n - 1) == 0] or measured
    ticks = ticks if len(ticks) <= 8 else ticks[::-2][::-1]  # more names would overlap
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [tokens_label(n) for n in ticks], minor=False)
    ax.set_xlabel("tokens")
    _move_labels(ax)


def log_y(ax: Axes) -> None:
    """Set a log10 y axis with plain numbers at powers of ten, and at 2 and 5 times these below three decades."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1e3 * low else (1,)))
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    _move_labels(ax)


def label_lines(ax: Axes) -> None:
    """Write the name of each named line beside its right end, in its colour, moved apart where names would overlap.

    Call it after the limits and scales of the axes are set; `log_y` and `tokens_axis` call it again.
    """
    for text in [text for text in ax.texts if text.get_gid() == LINE_LABEL]:
        text.remove()
    ax.autoscale_view()  # limits of new lines are set late, and transData does not ask for them
    ends = []
    for line in ax.get_lines():
        x, y = (np.asarray(values, float) for values in line.get_data())
        if not str(line.get_label()).startswith("_") and np.isfinite(y).any():
            last = np.flatnonzero(np.isfinite(y))[-1]
            place = ax.transAxes.inverted().transform(ax.transData.transform((x[last], y[last])))[1]
            ends.append((round(place, 2), line))  # lines that end together keep their order
    ends.sort(key=lambda end: end[0])
    rows = ax.get_subplotspec().get_gridspec().nrows
    gap = 1.3 * STYLE["legend.fontsize"] / 72 / (0.75 * ax.figure.get_figheight() / rows)
    highest = 1.0 - gap / 2  # a name at the top stays below the title
    places = [min(max(place, 0.0), highest) for place, _ in ends]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    for i in reversed(range(len(places))):
        places[i] = min(places[i], highest - gap * (len(places) - 1 - i))
    for place, (_, line) in zip(places, ends, strict=True):
        style = dict(color=line.get_color(), fontsize=STYLE["legend.fontsize"], va="center", gid=LINE_LABEL)
        ax.text(1.02, place, line.get_label(), transform=ax.transAxes, **style)


def _move_labels(ax: Axes) -> None:
    if any(text.get_gid() == LINE_LABEL for text in ax.texts):
        label_lines(ax)


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
    """Draw one line with markers per value of `by`, in order of appearance, shaded between the columns of `band`.

    A name of COLOURS has the same colour everywhere; `colours` may add others. Names stand at the ends of the lines.
    """
    known = COLOURS | (colours or {})
    taken = {known[name] for name in frame[by].unique() if name in known}
    fresh = (colour for colour in PALETTE * 4 if colour not in taken)
    for name, group in frame.groupby(by, sort=False):
        group = group.sort_values(x)
        colour = known[name] if name in known else next(fresh)
        ax.plot(group[x], group[y], "o-", color=colour, markersize=4, label=(labels or {}).get(name, name))
        if band:
            ax.fill_between(group[x], group[band[0]], group[band[1]], color=colour, alpha=0.2, linewidth=0)
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    label_lines(ax)
    return ax


@styled()
def selections(
    chosen: Mapping[str, BlockSelection], *, head: int = 0, columns: int = 4, mass: Tensor | None = None
) -> Figure:
    """Grid with the block pairs of one head per method: kept dark, skipped light, future blank; name and density.

    With `mass`, the head's shares of attention [rows, columns], the true attention is drawn beside the grid.
    """
    lines = -(-len(chosen) // columns)
    beside = 0.0 if mass is None else 4.2  # inches
    figure = plt.figure(figsize=(1.75 * columns + beside, max(2.0 * lines, beside)))
    grid = figure
    if mass is not None:
        left, grid = figure.subfigures(1, 2, width_ratios=(beside, 1.75 * columns))
        shares = np.log10(mass.cpu().numpy().clip(10.0**-FAINTEST))
        ax = left.add_subplot(xticks=[], yticks=[], xlabel="key block", ylabel="query block")
        ax.imshow(shares, cmap="Greys", vmin=-FAINTEST, vmax=0, interpolation="nearest")
        ax.set_title("true attention, dark is much")
        ax.grid(False)
    colours = ListedColormap(["white", "0.88", PALETTE[0]])
    for place, (name, selection) in enumerate(chosen.items(), 1):
        kept = selection.to_mask()[0, head].cpu().numpy()
        nq, nk = kept.shape
        causal = np.tri(nq, nk, nk - nq, dtype=bool)
        ax = grid.add_subplot(lines, columns, place, xticks=[], yticks=[])
        ax.imshow(causal.astype(int) + kept, cmap=colours, vmin=0, vmax=2, interpolation="nearest")
        ax.set_title(f"{name}\n{selection.density():.2f}", fontsize=8.5)
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

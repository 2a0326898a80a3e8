"""Figures of the comparison of methods on real models, from the points of `report`."""

from itertools import zip_longest

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from stem.experiments.figures import COLOURS, PALETTE, label_lines, new
from stem.experiments.long_context.report import UNITS
from stem.experiments.markdown import tokens_label

LINEAR = {"answer": 1.0, "loss": 0.01}  # up to here the axis of nats is linear, beyond it logarithmic
COLUMNS = 4
MARKERS = "so^D"  # of the lengths, shortest first


def against(points: pd.DataFrame, measure: str, block_size: int = 128) -> Figure:
    """Nats lost over the computed density in one block size: a panel per method, a line per length, the others grey.

    Args:
        points: `report.points` of one measure.
        measure: "answer" or "loss".
    """
    shown = points[(points.block_size == block_size) & points.asked.notna()].sort_values("density")
    lines = list(shown.groupby(["method", "length"]))
    markers = dict(zip(sorted(shown.length.unique()), MARKERS, strict=False))
    order = shown.groupby("method").nats.mean().abs().sort_values().index  # nearest to dense attention first
    figure, axes = new(min(COLUMNS, len(order)), -(-len(order) // COLUMNS), width=2.9, height=2.0, share=True)
    for ax, method in zip_longest(np.atleast_1d(axes).flat, order):
        if method is None:
            ax.remove()
            continue
        for (name, length), of in lines:
            style = dict(color="0.88", linewidth=1)
            if name == method:
                colour = COLOURS.get(method) or COLOURS.get(method.split(",")[0], PALETTE[0])  # a variant's method
                style = dict(color=colour, label=tokens_label(length), zorder=3)
                style |= dict(marker=markers[length], markersize=5)
            ax.plot(of.density, of.nats, **style)
        ax.axhline(0, color="grey", linewidth=1)
        ax.set_title(method, fontsize=9.5)
        ax.set_yscale("symlog", linthresh=LINEAR[measure])
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.xaxis.set_tick_params(labelbottom=True)
        label_lines(ax)
    figure.supxlabel("computed density", fontsize=11)
    figure.supylabel(UNITS[measure], fontsize=11)
    return figure

"""Figures of notebook 08: rates of the stages, and what the warps of one program do between the stamps."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from stem.experiments.figures import PALETTE, new, styled

COLOURS = {"until issued": "0.85", "waits for a slot": "#dcd0ec", "QKᵀ": PALETTE[0], "PV": PALETTE[2]}
COLOURS |= {"softmax": PALETTE[1], "softmax, PV": PALETTE[8]}
COLOURS |= {"load, QKᵀ": PALETTE[0], "softmax, block sums": PALETTE[1], "store": PALETTE[7]}

IN_TURN = ("one slot", "ring", "two consumers")
"""Stages in which a consumer computes QK^T, PV and the softmax one after the other."""

GROUPS = ("consumer 0", "consumer 1", "producer")


def segments(stage: str, group: int) -> list[tuple[str, str, str]]:
    """Names of the work of a group of warps: (name, mark, mark); "next" is the first mark of the next step."""
    if group == 2:
        return [("waits for a slot", "tile", "logits"), ("waits for a slot", "logits", "output")]
    if stage == "fp8":
        first = [("until issued", "tile", "issued"), ("softmax", "issued", "weights"), ("QKᵀ", "weights", "logits")]
        return [*first, ("softmax, PV", "logits", "output")]
    last = [("PV", "logits", "output"), ("softmax", "output", "next")]
    if stage not in IN_TURN:
        last = [("softmax, PV", "logits", "output")]
    return [("until issued", "tile", "issued"), ("QKᵀ", "issued", "logits"), *last]


@styled()
def rates(table: pd.DataFrame, title: str) -> Figure:
    """Rate of each stage [TFLOP/s] as a dot on a line from 0, with its gain over the stage before."""
    figure, ax = new(width=7, height=0.45 * len(table) + 0.9)
    places = range(len(table))[::-1]
    ax.hlines(places, 0, table.tflops, color="0.8")
    ax.plot(table.tflops, places, "o", color=PALETTE[0], markersize=8)
    for place, rate, gain in zip(places, table.tflops, table.gain, strict=True):
        told = f"{rate:.0f}" if gain != gain else f"{rate:.0f}, {gain:.2f}×"
        ax.annotate(told, (rate, place), xytext=(9, 0), textcoords="offset points", va="center")
    ax.set_yticks(places, table.index)
    ax.set(xlim=(0, 1.2 * table.tflops.max()), xlabel="kept pairs computed [TFLOP/s]", title=title)
    ax.grid(False, axis="y")
    return figure


@styled()
def timelines(rows: pd.DataFrame, stages: Sequence[str], cycles: int = 9000) -> Figure:
    """Draw the work of each group of warps of one program, a panel for each stage, over `cycles` clock cycles."""
    figure, axes = new(len(stages), width=10.5 / len(stages), height=2.6)
    names: dict[str, None] = {}
    for ax, stage in zip(axes if len(stages) > 1 else [axes], stages, strict=True):
        shown = rows[(rows.part == "attention") & (rows.stage == stage) & (rows.program == 0)]
        start = shown[shown.group == 0].tile.min()
        for group, of_group in shown.dropna(subset="tile").groupby("group"):
            names |= dict.fromkeys(_lane(ax, of_group.sort_values("step"), stage, group, start))
        used = sorted(shown.group.unique())
        ax.set_yticks(used, [GROUPS[int(group)] for group in used])
        ax.set(xlim=(0, cycles), ylim=(2.6, -0.6), title=stage, xlabel="clock cycles")
        ax.grid(False, axis="y")
    _legend(figure, names)
    return figure


def _lane(ax: Axes, steps: pd.DataFrame, stage: str, group: int, start: float) -> list[str]:
    """Draw the steps of one group of warps as bars; names of what was drawn."""
    drawn = []
    ends = steps.assign(next=steps.tile.shift(-1))
    for name, first, last in segments(stage, int(group)):
        if {first, last} <= set(ends.columns):
            bars = ends.dropna(subset=[first, last])
            look = dict(color=COLOURS[name], edgecolor="white", linewidth=0.5, height=0.75)
            ax.barh([group] * len(bars), bars[last] - bars[first], left=bars[first] - start, **look)
            drawn.append(name)
    if group == 2:
        for mark, letter in (("logits", "$K$"), ("output", "$V$")):
            clocks = steps[mark].dropna() - start
            ax.plot(clocks, [2] * len(clocks), linestyle="", marker=letter, color="black", markersize=6)
    return drawn


def _legend(figure: Figure, names: dict[str, None]) -> None:
    patches = [Patch(color=COLOURS[name], label=name) for name in names]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches))


@styled()
def schedule(rows: pd.DataFrame, stages: Sequence[str], processors: int = 8) -> Figure:
    """Tasks of a few multiprocessors over time [clock cycles], a panel for each stage; white gaps are idle."""
    figure, axes = new(len(stages), width=10.5 / len(stages), height=2.8)
    for ax, stage in zip(axes, stages, strict=True):
        shown = rows[(rows.stage == stage) & rows.task.notna()]
        for place, (_, tasks) in zip(range(processors), shown.groupby("sm"), strict=False):
            for name, first, last in (("attends", "task", "attended"), ("stores", "attended", "stored")):
                colour = PALETTE[0] if name == "attends" else PALETTE[1]
                ax.barh([place] * len(tasks), tasks[last] - tasks[first], left=tasks[first], color=colour)
        ax.set(title=stage, xlabel="clock cycles", ylabel="multiprocessor" if ax is axes[0] else "")
        ax.grid(False, axis="y")
    handles = [Patch(color=PALETTE[0], label="attends"), Patch(color=PALETTE[1], label="stores its rows")]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


@styled()
def cell_timelines(rows: pd.DataFrame, stages: Sequence[str]) -> Figure:
    """Draw the work of one program that pairs cells over clock cycles, a lane for each stage."""
    figure, ax = new(width=10.5, height=0.5 * len(stages) + 1.4)
    parts = (
        ("load, QKᵀ", "before", "logits"),
        ("softmax, block sums", "logits", "weights"),
        ("store", "weights", "stored"),
    )
    for place, stage in enumerate(stages):
        steps = rows[(rows.part == "cells") & (rows.stage == stage)].dropna(subset="logits").sort_values("step")
        steps = steps.assign(before=steps.stored.shift()).dropna(subset="before")
        for name, first, last in parts:
            left = steps[first] - steps.before.min()
            ax.barh([place] * len(steps), steps[last] - steps[first], left=left, color=COLOURS[name], edgecolor="white")
    ax.set_yticks(range(len(stages)), stages)
    ax.set(ylim=(len(stages) - 0.4, -0.6), xlim=(0, None), xlabel="clock cycles", title="Tiles of 128 by 64 cells")
    ax.grid(False, axis="y")
    _legend(figure, dict.fromkeys(name for name, _, _ in parts))
    return figure

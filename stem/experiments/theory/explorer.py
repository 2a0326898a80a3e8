"""Explorers of notebook 01: the budget of every row, and the blocks that a method keeps of a real head's attention.

`explore` and `explore_budget` return widgets in a notebook that a person has open, and pictures everywhere else.
"""

import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product
from typing import NamedTuple, get_args

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from stem import hf, metrics, patterns
from stem.attention import block_sparse_attention
from stem.budget import block_budget, causal_pairs
from stem.config import BlockSize, StemConfig
from stem.experiments import figures
from stem.experiments.theory import flow
from stem.reference import dense_attention
from stem.selection import BlockSelection

SHOWN = ("stem", "xattention", "vertical_slash", "oracle_mass")
RESOLUTION = 64  # rows of an attention map, at most twice as many


@dataclass(frozen=True)
class Choice:
    """Layer, head, method and settings of one picture; decay and value_weight affect the method "stem" only."""

    layer: int
    head: int = 0
    method: str = "stem"
    density: float = 0.25
    block_size: int = 32
    decay: float = 0.7
    value_weight: float = 0.2

    @property
    def config(self) -> StemConfig:
        """Settings of the method, with one sink block and two local blocks."""
        chosen = {name: getattr(self, name) for name in ("block_size", "density", "decay", "value_weight")}
        return StemConfig(score_stride=min(16, self.block_size // 4), sink_blocks=1, local_blocks=2, **chosen)


class Measures(NamedTuple):
    """Density, recall, error and loss of a choice."""

    density: float  # kept block pairs over causal block pairs of the layer
    recall: float  # share of the head's true attention on kept blocks, mean over query blocks
    error: float  # relative error of the layer's attention output, all heads
    loss: float  # of the model above dense when only this layer is sparse [nats per token]


class Explorer:
    """One prompt in one model. Results of dense passes are cached."""

    def __init__(self, model: nn.Module, ids: Tensor) -> None:
        self.model, self.ids = model, ids
        self._captured: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def qkv(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of a layer in the dense pass, fp32; see stem.experiments.theory.flow.capture."""
        if layer not in self._captured:
            self._captured[layer] = tuple(x.float() for x in flow.capture(self.model, self.ids, layer))
        return self._captured[layer]

    @cached_property
    def dense_loss(self) -> float:
        return self._loss()

    def selection(self, choice: Choice) -> BlockSelection:
        return patterns.select(choice.method, *self.qkv(choice.layer), choice.config)

    def measures(self, choice: Choice) -> Measures:
        """Density, recall, error and loss; the loss takes one forward pass of the model."""
        q, k, v = self.qkv(choice.layer)
        kept = self.selection(choice)
        recall = metrics.attention_recall(q, k, kept)[0, choice.head]
        error = metrics.rel_l2_error(block_sparse_attention(q, k, v, kept), dense_attention(q, k, v))
        dense_loss = self.dense_loss
        with hf.stem_prefill(self.model, {choice.layer: lambda *_: kept}):
            loss = self._loss()
        return Measures(kept.density(), float(recall), error, loss - dense_loss)

    def draw(self, choice: Choice, ax: Axes) -> Measures:
        """Draw the kept blocks over the attention map of one head, and return its measures."""
        q, k, _ = self.qkv(choice.layer)
        found = self.measures(choice)
        cell = min(choice.block_size, 2 ** max(0, (k.shape[2] // RESOLUTION).bit_length() - 1))
        kv_head = choice.head // (q.shape[1] // k.shape[1])
        one_head = q[:, choice.head : choice.head + 1], k[:, kv_head : kv_head + 1]
        mass = metrics.block_attention_mass(*one_head, cell)[0, 0]
        title = f"{choice.method}\nrecall {found.recall:.2f}, loss {found.loss:+.4f}"
        figures.attention_map(mass, self.selection(choice), ax, head=choice.head, title=title)
        return found

    @torch.no_grad()
    def _loss(self) -> float:
        logits = self.model(self.ids[:, :-1], use_cache=False).logits[0]
        return float(F.cross_entropy(logits.float(), self.ids[0, 1:]))


class _Picture(Figure):
    """A figure that a notebook shows as the value of a cell, without pyplot."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()


def explore(
    model: nn.Module,
    ids: Tensor,
    layer: int = 0,
    head: int = 0,
    *,
    density: float = 0.25,
    block_size: int = 32,
    methods: Sequence[str] = SHOWN,
):
    """Show the blocks a method keeps of a head's true attention: ipywidgets if `live()`, else a figure of `methods`.

    `ids` [1, N] should be a short prompt, because each change draws a map and computes a loss.
    """
    explorer, start = Explorer(model, ids), Choice(layer, head, density=density, block_size=block_size)
    return panel(explorer, start) if live() else grid(explorer, [replace(start, method=method) for method in methods])


def live() -> bool:
    """Return True if STEM_WIDGETS is 1, or if it is unset and Jupyter or VS Code has started this kernel.

    Kernels of papermill, nbval and nbconvert have neither JPY_SESSION_NAME nor the notebook's file as a name.
    """
    if (asked := os.environ.get("STEM_WIDGETS")) is not None:
        return asked == "1"
    ipython = sys.modules.get("IPython")  # every kernel has imported it
    shell = ipython and ipython.get_ipython()
    return hasattr(shell, "kernel") and ("JPY_SESSION_NAME" in os.environ or "__vsc_ipynb_file__" in shell.user_ns)


@figures.styled()
def grid(explorer: Explorer, choices: Sequence[Choice], columns: int = 4) -> Figure:
    """Grid with a picture of each choice, for the value of a cell; a figure of pyplot would be shown twice."""
    lines = -(-len(choices) // columns)
    figure = _Picture(figsize=(2.8 * columns, 3.5 * lines), layout="constrained")
    for place, choice in enumerate(choices, 1):
        ax = figure.add_subplot(lines, columns, place)
        explorer.draw(choice, ax)
        ax.label_outer()
    of = choices[0]
    figure.suptitle(f"Layer {of.layer}, head {of.head}: {of.density:.0%} of the block pairs of {of.block_size}")
    return figure


def panel(explorer: Explorer, start: Choice):
    """Sliders and menus beside one picture that follows them: an ipywidgets box."""
    import ipywidgets

    settings = explorer.model.config
    wide = {"description_width": "6em"}
    slider = partial(ipywidgets.FloatSlider, continuous_update=False, step=0.05, style=wide)
    whole = partial(ipywidgets.IntSlider, continuous_update=False, min=0, style=wide)
    menu = partial(ipywidgets.Dropdown, style=wide)
    controls = {
        "layer": whole(description="layer", value=start.layer, max=settings.num_hidden_layers - 1),
        "head": whole(description="head", value=start.head, max=settings.num_attention_heads - 1),
        "method": menu(description="method", value=start.method, options=patterns.names()),
        "density": slider(description="density", value=start.density, min=0.05, max=1.0),
        "block_size": menu(description="block size", value=start.block_size, options=get_args(BlockSize)),
        "decay": slider(description="decay", value=start.decay, min=0.05, max=1.0),
        "value_weight": slider(description="value weight", value=start.value_weight, min=0.0, max=2.0),
    }
    picture, text = ipywidgets.Image(format="png"), ipywidgets.HTML()

    def update(_=None) -> None:
        choice = Choice(**{name: control.value for name, control in controls.items()})
        for name in ("decay", "value_weight"):
            controls[name].disabled = choice.method != "stem"
        with figures.styled():
            figure = _Picture(figsize=(5.5, 5.5), layout="constrained")
            found = explorer.draw(choice, figure.subplots())
            picture.value = figure._repr_png_()
        text.value = (
            f"density {found.density:.3f}<br>recall of this head {found.recall:.3f}<br>error of this layer's output "
            f"{found.error:.3f}<br>loss with only this layer sparse {found.loss:+.4f} nats"
        )

    for control in controls.values():
        control.observe(update, names="value")
    update()
    return ipywidgets.HBox([ipywidgets.VBox([*controls.values(), text]), picture])


def draw_budget(ax: Axes, blocks: int, k_start: int, decay: float) -> None:
    """Draw the key blocks that each of `blocks` query blocks keeps under position decay, over all of its key blocks."""
    config = StemConfig(k_start=min(k_start, blocks), decay=decay)
    budget, rows = block_budget(blocks, config), torch.arange(blocks)
    ax.fill_between(rows, rows + 1, color="0.9", step="mid")
    ax.fill_between(rows, budget, color=figures.COLOURS["stem"], step="mid")
    density = int(budget.sum()) / causal_pairs(blocks)
    ax.set(title=f"k_start {config.k_start}, μ {decay:g}: density {density:.0%}", xlabel="query block")
    ax.set(ylabel="key blocks", xlim=(0, blocks - 1), ylim=(0, blocks))


@figures.styled()
def explore_budget(blocks: int = 256, k_starts: Sequence[int] = (64, 128), decays: Sequence[float] = (1.0, 0.7, 0.3)):
    """Show what Token Position-Decay (Eq. 3) keeps of every row: sliders if `live()`, else a grid over both options."""
    if not live():
        figure = _Picture(figsize=(3.3 * len(decays), 2.6 * len(k_starts)), layout="constrained")
        panels = figure.subplots(len(k_starts), len(decays), squeeze=False).flat
        for ax, (k_start, decay) in zip(panels, product(k_starts, decays), strict=True):
            draw_budget(ax, blocks, k_start, decay)
            ax.label_outer()
        return figure
    import ipywidgets

    slider = partial(ipywidgets.FloatSlider, min=0.05, max=1.0, step=0.05, continuous_update=False)
    start = ipywidgets.IntSlider(description="k_start", value=k_starts[0], min=1, max=blocks, continuous_update=False)
    mu, picture = slider(description="μ", value=decays[1]), ipywidgets.Image(format="png")

    def update(_=None) -> None:
        with figures.styled():
            figure = _Picture(figsize=(5.5, 4.0), layout="constrained")
            draw_budget(figure.subplots(), blocks, start.value, mu.value)
            picture.value = figure._repr_png_()

    for control in (start, mu):
        control.observe(update, names="value")
    update()
    return ipywidgets.HBox([ipywidgets.VBox([start, mu]), picture])

"""Thresholds of `adaptive` that differ by layer and for the last query block (our choice).

A layer's multiple of the threshold follows from what the model loses when that layer alone is sparse: at the wanted
density, all layers lose the same for one more block.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from stem import hf
from stem.config import StemConfig
from stem.planning import select
from stem.selection import BlockSelection

MULTIPLES = (1 / 8, 1 / 2, 2.0, 8.0)  # of the threshold, at which a single layer is measured
LAST = 0.25  # multiple of the last block, whose query asks the question
TOLERANCE = 0.02  # of a density, as a share of it
ROUNDS, SLOPE = 12, 1.3  # the threshold falls about as fast as density**-SLOPE
Attention = StemConfig | Callable[[Tensor, Tensor, Tensor], BlockSelection]


@dataclass(frozen=True)
class Thresholds:
    """Multiples of one threshold: of each layer (empty: 1 for all), and of the last query block in every layer."""

    layers: tuple[float, ...] = ()
    last: float = 1.0

    def attention(self, config: StemConfig, layers: int) -> list[Attention]:
        """Config or selector of each layer of a model, for an adaptive config with the threshold."""
        configs = [_scaled(config, multiple) for multiple in self.layers or (1.0,) * layers]
        return configs if self.last == 1 else [_LastBlock(each, _scaled(each, self.last)) for each in configs]

    @classmethod
    def parse(cls, told: str) -> "Thresholds":
        """The inverse of `str`; raises ValueError for other words."""
        try:
            fields = dict(layers="", last="1") | dict(of.split("=") for of in told.split())
            layers, last = fields.pop("layers"), float(fields.pop("last"))
            found = cls(tuple(float(of) for of in layers.split(",") if layers), last)
        except ValueError:
            fields = told
        if fields:
            raise ValueError(f"thresholds must read 'last=0.25 layers=1,2,0.5' or one of the two, got {told!r}")
        return found

    def __str__(self) -> str:
        """Multiples in words of the column `thresholds`; empty where there is one threshold."""
        told = [f"last={self.last:.4g}"] if self.last != 1 else []
        return " ".join([*told, *(["layers=" + ",".join(f"{x:.3g}" for x in self.layers)] if self.layers else [])])


def _scaled(config: StemConfig, multiple: float) -> StemConfig:
    return config.replace(threshold=min(1.0, config.threshold * multiple))


@dataclass(frozen=True)
class _LastBlock:
    """Selector of one config, and of another one for the last query block."""

    config: StemConfig
    of_last: StemConfig

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> BlockSelection:
        scale = q.shape[3] ** -0.5
        mask, last = (select(q, k, v, of, scale, None).to_mask() for of in (self.config, self.of_last))
        mask[:, :, -1] = last[:, :, -1]
        found = BlockSelection.from_mask(mask, self.config.block_size, q_len=q.shape[2], kv_len=k.shape[2])
        return replace(found, dropped=self.config.dropped)


@torch.no_grad()
def calibrated(model, windows: Tensor, density: float, config: StemConfig, thresholds: Thresholds) -> StemConfig:
    """The config with the threshold at which the model computes the density on windows int64 [n, N].

    The config's own threshold is the first guess. Raises ValueError where none fits within TOLERANCE.
    """
    low, high, guess = -math.inf, 0.0, math.log(config.threshold)
    layers = model.config.get_text_config().num_hidden_layers
    for _ in range(ROUNDS):
        found = config.replace(threshold=math.exp(guess))
        with hf.stem_prefill(model, thresholds.attention(found, layers)) as report:
            for window in windows.split(1):
                model.get_decoder()(window, use_cache=False)
        missing = math.log(report.density() / density)
        if abs(missing) <= TOLERANCE:
            return found
        low, high = (guess, high) if missing > 0 else (low, guess)
        step = guess + SLOPE * missing
        guess = step if low < step < high else (max(low, guess - 4) + high) / 2
    raise ValueError(f"density={density} was not reached with {thresholds}; the last one was {report.density():.4f}")


def by_layer(densities: Sequence[Sequence[float]], errors: Sequence[Sequence[float]], density: float) -> Thresholds:
    """Multiples of the layers with the smallest sum of errors at a mean density.

    Args:
        densities, errors: [layers, MULTIPLES], of a layer that is sparse alone, and of the model then, above 0. Between
            multiples, densities and the logarithms of errors are interpolated; errors count as rising with them.
        density: Mean over the layers.
    """
    places, grid = np.arange(len(MULTIPLES)), np.linspace(0, len(MULTIPLES) - 1, 161)
    kept = np.stack([np.interp(grid, places, of) for of in densities])
    rising = np.log(np.maximum.accumulate(np.maximum(errors, 1e-9), axis=1))
    lost = np.exp(np.stack([np.interp(grid, places, of) for of in rising]))
    low, high, layers = -20.0, 20.0, np.arange(len(kept))
    for _ in range(60):  # price of a block
        price = math.exp((low + high) / 2)
        best = (lost + price * kept).argmin(1)
        low, high = ((low + high) / 2, high) if kept[layers, best].mean() > density else (low, (low + high) / 2)
    multiples = np.exp(np.interp(grid[best], places, np.log(MULTIPLES)))
    return Thresholds(tuple(float(f"{x:.3g}") for x in multiples))

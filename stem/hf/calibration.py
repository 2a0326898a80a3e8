"""Calibration: the share threshold at which a model computes a wanted density."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from stem.config import StemConfig

SMALLEST = 1e-9  # threshold below which hardly any share of a row falls
ROUNDS = 30  # most thresholds tried
MARGIN = 0.1  # least share of the interval that a round takes away at either end


class Calibration(NamedTuple):
    """What `calibrate` found."""

    config: StemConfig
    """The given settings with `allocation="adaptive"` and the threshold."""

    density: float
    """Realised density on the prompts, mean over the layers that use Stem."""


def calibrate(
    model: torch.nn.Module,
    prompts: Iterable[Tensor],
    density: float,
    config: StemConfig | None = None,
    *,
    tolerance: float = 0.005,
) -> Calibration:
    """Solve the threshold of `allocation="adaptive"` on a model (no paper source: our choice).

    False position on the logarithm of the threshold; each round runs the prompts with sparse attention, so that the
    realised density includes what sparse layers do to the layers above them.

    Args:
        model: As in stem.hf.enable.
        prompts: Token ids, int64 [N] or [B, N], as long as those the threshold is for.
        density: Wanted share of the causal block pairs, in (0, 1).
        config: Everything but the budget, default StemConfig().
        tolerance: Largest accepted |realised - wanted|.
    Raises:
        ValueError: If density or prompts are not usable, the forced blocks alone exceed density, or no threshold fits.
    """
    if not 0 < density < 1:
        raise ValueError(f"density must be in (0, 1), got {density!r}")
    prompts = [prompt[None] if prompt.ndim == 1 else prompt for prompt in prompts]
    if not prompts:
        raise ValueError("prompts must hold at least one tensor of token ids, got none")
    shortest = min(prompt.shape[1] for prompt in prompts)
    if config is not None and shortest <= config.dense_up_to:
        raise ValueError(
            f"prompts must be longer than config.dense_up_to={config.dense_up_to} tokens, up to which everything is "
            f"kept, got one of {shortest}"
        )
    base = (config or StemConfig()).replace(density=None, k_start=None, k_start_regimes=None, min_blocks=0)

    def realised(threshold: float) -> Calibration:
        adaptive = base.replace(allocation="adaptive", threshold=threshold)
        return Calibration(adaptive, _density(model, prompts, adaptive))

    forced = realised(1.0)
    if forced.density > density + tolerance:
        raise ValueError(
            f"density must be at least that of the sink and local blocks, {forced.density:.3f} on these prompts, "
            f"got {density}; ask for more, or for fewer forced blocks"
        )
    low, high, best = (math.log(SMALLEST), 1.0), (0.0, forced.density), forced  # (log threshold, density)
    guess = -math.log(max(prompt.shape[1] for prompt in prompts) / base.block_size)  # an even share of the last row
    for _ in range(ROUNDS):
        if abs(best.density - density) <= tolerance:
            return best
        found = realised(math.exp(guess))
        low, high = (low, (guess, found.density)) if found.density < density else ((guess, found.density), high)
        best = min(best, found, key=lambda calibration: abs(calibration.density - density))
        share = (low[1] - density) / (low[1] - high[1])  # where a line between the two would meet the density
        guess = low[0] + min(max(share, MARGIN), 1 - MARGIN) * (high[0] - low[0])
    raise ValueError(
        f"density={density} was not reached within tolerance={tolerance}; the nearest threshold, "
        f"{best.config.threshold:.3g}, gives {best.density:.4f}: use longer prompts, smaller blocks, more tolerance"
    )


@torch.no_grad()
def _density(model: torch.nn.Module, prompts: list[Tensor], config: StemConfig) -> float:
    from stem import hf

    device = next(model.parameters()).device
    with hf.stem_prefill(model, config) as report:
        for prompt in prompts:
            model(prompt.to(device), use_cache=False)
    return report.density()

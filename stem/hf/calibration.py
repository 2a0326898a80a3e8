"""Calibration: the threshold of `allocation="adaptive"` at which a model computes a wanted density."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from stem.config import StemConfig, check_config
from stem.hf.models import check_model
from stem.hf.switch import stem_prefill
from stem.validation import check_number

SMALLEST = 1e-9  # a threshold at which nearly every block is kept
ROUNDS = 30  # thresholds tried before giving up
MARGIN = 0.1  # each round cuts at least this share of the interval off at either end


class Calibration(NamedTuple):
    """Result of `calibrate`."""

    config: StemConfig  # the given settings with `allocation="adaptive"` and the threshold
    density: float  # realised density on the prompts, as Report.density gives it


@torch.no_grad()
def calibrate(
    model: torch.nn.Module,
    prompts: Iterable[Tensor],
    density: float,
    config: StemConfig | None = None,
    *,
    tolerance: float = 0.005,
) -> Calibration:
    """Find the threshold of `allocation="adaptive"` that gives a wanted density (no paper source: our choice).

    The search is false position on the logarithm of the threshold. Each round runs all prompts with sparse attention,
    because a sparse layer changes the inputs of the layers above it.

    Args:
        prompts: Token ids, int [N] or [B, N] each, unpadded, of your serving length. One tensor [N] is one prompt.
        density: Wanted share of the causal block pairs, in (0, 1).
        config: Every setting but the budget, default StemConfig().
        tolerance: Largest accepted |realised - wanted|, at least 0.
    Raises:
        TypeError: If prompts are no tensors of token ids, or density or tolerance is no number.
        ValueError: If a prompt is too short, a number out of range, density below the forced blocks', or nothing fits.
    """
    check_number("density", density, 0, 1, open_below=True)
    if density == 1:
        raise ValueError(f"density must be in (0, 1), got {density!r}")
    check_number("tolerance", tolerance, 0)
    config = StemConfig() if config is None else config
    check_config(config)
    check_model(model)
    prompts = [prompt.to(next(model.parameters()).device) for prompt in _token_ids(prompts)]
    lengths = [prompt.shape[1] for prompt in prompts]
    if min(lengths) <= config.dense_up_to:
        raise ValueError(
            f"prompts must be longer than config.dense_up_to={config.dense_up_to} tokens, because shorter ones keep "
            f"every block, got one of {min(lengths)}"
        )
    base = config.replace(density=None, k_start=None, k_start_regimes=None, min_blocks=0)

    def realised(threshold: float) -> Calibration:
        adaptive = base.replace(allocation="adaptive", threshold=threshold)
        with stem_prefill(model, adaptive) as report:
            for prompt in prompts:
                model(prompt, use_cache=False)
        return Calibration(adaptive, report.density())

    forced = realised(1.0)
    if math.isnan(forced.density):
        raise ValueError(f"no layer of {type(model).__name__} computed sparse attention on these prompts")
    if forced.density > density + tolerance:
        raise ValueError(
            f"density must be at least that of the sink and local blocks, {forced.density:.3f} on these prompts, "
            f"got {density}; ask for more, or for fewer forced blocks"
        )
    low, high, best = (math.log(SMALLEST), 1.0), (0.0, forced.density), forced  # (log threshold, density)
    guess = min(0.0, math.log(base.block_size / max(lengths)))  # an even share of the last row
    for _ in range(ROUNDS):
        if abs(best.density - density) <= tolerance:
            return best
        found = realised(math.exp(guess))
        low, high = (low, (guess, found.density)) if found.density < density else ((guess, found.density), high)
        best = min(best, found, key=lambda calibration: abs(calibration.density - density))
        share = (low[1] - density) / (low[1] - high[1])  # where the line through both meets the density
        guess = low[0] + min(max(share, MARGIN), 1 - MARGIN) * (high[0] - low[0])
    raise ValueError(
        f"density={density} was not reached within tolerance={tolerance}; the nearest threshold, "
        f"{best.config.threshold:.3g}, gives {best.density:.4f}: use longer prompts, smaller blocks, more tolerance"
    )


def _token_ids(prompts: Iterable[Tensor]) -> list[Tensor]:
    accepted = "tensors of token ids, int [N] or [B, N], for example [tokenizer(text, return_tensors='pt').input_ids]"
    if isinstance(prompts, Tensor) and prompts.ndim == 1:
        prompts = [prompts]
    if isinstance(prompts, str | Mapping) or not isinstance(prompts, Iterable):
        raise TypeError(f"prompts must be {accepted}, got {_brief(prompts)}")
    prompts = list(prompts)
    if not prompts:
        raise ValueError(f"prompts must be {accepted}, got none")
    for prompt in prompts:
        if not isinstance(prompt, Tensor) or prompt.is_floating_point() or prompt.dtype == torch.bool:
            raise TypeError(f"prompts must be {accepted}, got one of {_brief(prompt)}")
        if prompt.ndim not in (1, 2) or not prompt.numel():
            raise ValueError(f"prompts must be {accepted}, got one of shape {tuple(prompt.shape)}")
    return [prompt[None] if prompt.ndim == 1 else prompt for prompt in prompts]


def _brief(value) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else f"{type(value).__name__} {str(value)[:40]!r}"

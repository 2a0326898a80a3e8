"""What notebook 01 computes beside the method itself: recall by density, and how best to spend a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import pandas as pd
import torch
from torch import Tensor

from stem import metrics, patterns
from stem.budget import block_budget
from stem.config import StemConfig


def recall_by_density(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    methods: Mapping[str, str | StemConfig],
    densities: Sequence[float],
    config: StemConfig,
) -> pd.DataFrame:
    """Share of the true attention on the kept blocks, mean over heads, of several methods at several densities.

    Args:
        q, k, v: As in stem.stem_attention.
        methods: Label -> name of a pattern, or settings of Stem.
        densities: Replace the density of `config`, or of the settings.
        config: Of the patterns.
    Returns:
        Columns method, density (asked for), recall.
    """
    mass = metrics.block_attention_mass(q, k, config.block_size)
    rows = []
    for label, method in methods.items():
        own = isinstance(method, StemConfig)
        select = partial(patterns.select, "stem" if own else method, q, k, v)
        for density in densities:
            kept = select((method if own else config).replace(density=density)).to_mask()
            rows.append(dict(method=label, density=density, recall=float((mass * kept).sum(-1).mean())))
    return pd.DataFrame(rows)


def lost_by_allocation(mass: Tensor, densities: Sequence[float]) -> pd.DataFrame:
    """Least share of the attention that a budget loses, when rows, heads or all of them share it.

    Within each group the largest shares are kept, which loses least; only the size of the groups differs.

    Args:
        mass: Shares of each row, [layers, Hq, n, n], causal, rows summing to 1.
        densities: Share of the causal block pairs that is kept, the same for each allocation.
    Returns:
        Columns allocation, density, lost (mean over rows), lowest and highest (density of a head).
    """
    n = mass.shape[-1]
    causal = torch.ones(n, n, dtype=torch.bool, device=mass.device).tril()
    pairs = mass[..., causal].flatten(0, 1)  # [heads, pairs]
    rank = mass.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    rows = []
    for density in densities:
        budget = block_budget(n, StemConfig(density=density, allocation="uniform")).to(mass.device)
        count = int(budget.sum())
        kept = {
            "a budget per row": (rank < budget[:, None])[..., causal].flatten(0, 1),
            "a threshold per head": _largest(pairs, count),
            "one threshold": _largest(pairs.flatten()[None], count * len(pairs)).view_as(pairs),
        }
        for name, mask in kept.items():
            of_head = mask.double().mean(1)
            lost = 1 - float((pairs * mask).sum()) / (len(pairs) * n)
            about = dict(lowest=float(of_head.min()), highest=float(of_head.max()))
            rows.append(dict(allocation=name, density=density, lost=lost, **about))
    return pd.DataFrame(rows)


def _largest(x: Tensor, count: int) -> Tensor:
    """The `count` largest entries of each row of [rows, M], as a mask."""
    mask = torch.zeros_like(x, dtype=torch.bool)
    return mask.scatter_(1, x.topk(count, dim=1).indices, True)


class Claims:
    """The paper's claims as notebook 01 checks them: called once for each, then shown as one table."""

    def __init__(self, on: str) -> None:
        """on: the model and text of claims that name no other."""
        self._on, self._rows = on, []

    def __call__(self, claim: str, paper: str, ours: str, verdict: str, on: str | None = None) -> None:
        """Add a claim with the paper's value, ours, a plain verdict, and what ours was measured on."""
        self._rows.append(dict(claim=claim, paper=paper, ours=ours, verdict=verdict, on=on or self._on))

    def table(self) -> pd.DataFrame:
        """A row per claim, columns claim, paper, ours, verdict, on."""
        return pd.DataFrame(self._rows)


def effect(losses: pd.DataFrame, method: str, before: str) -> str:
    """What a method does to the loss against another on the same text, in words, beyond two standard errors or not.

    losses: rows of stem.experiments.long_context.document_loss.document_loss_rows.
    """
    loss = losses.pivot(index=["document", "start"], columns="method", values="loss")
    change = loss[method] - loss[before]
    mean, noise = change.mean(), 2 * change.sem()
    word = "helps" if mean < -noise else "hurts" if mean > noise else "makes no clear difference"
    return f"{word} ({mean:+.3f} ± {noise:.3f} nats)"

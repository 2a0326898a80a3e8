"""Evidence of notebook 01: recall by density, attention lost by budget, losses, and the table of the paper's claims."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import pandas as pd
import torch
from torch import Tensor

from stem import hf, metrics, patterns
from stem.budget import block_budget
from stem.config import StemConfig
from stem.experiments.losses import check_output_embedding, token_losses
from stem.scores import block_scores


def recall_by_density(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    methods: Mapping[str, str | StemConfig],
    densities: Sequence[float],
    config: StemConfig,
) -> pd.DataFrame:
    """Recall by method label and density: the share of true attention on kept blocks, mean over heads.

    A method is the name of a pattern, with the settings `config`, or a StemConfig. Each density replaces theirs.

    Returns:
        Columns method, density (asked for), recall.
    """
    mass = metrics.block_attention_mass(q, k, config.block_size)
    rows = []
    for (label, method), density in product(methods.items(), densities):
        pattern, own = ("stem", method) if isinstance(method, StemConfig) else (method, config)
        kept = patterns.select(pattern, q, k, v, own.replace(density=density)).to_mask()
        rows.append(dict(method=label, density=density, recall=float((mass * kept).sum(-1).mean())))
    return pd.DataFrame(rows)


def lost_by_allocation(mass: Tensor, densities: Sequence[float]) -> pd.DataFrame:
    """Attention lost by the best selection when a budget is fixed per row, per head, or for all heads together.

    Each group keeps its largest shares, which loses least. Only the size of the groups differs.

    Args:
        mass: Attention per block, [layers, Hq, n, n], causal, each row sums to 1.
    Returns:
        Columns allocation, density, lost (mean over rows), lowest and highest (density of a single head).
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
            lost = 1 - float((pairs * mask).sum()) / (len(pairs) * n)
            lowest, highest = map(float, mask.double().mean(1).aminmax())
            rows.append(dict(allocation=name, density=density, lost=lost, lowest=lowest, highest=highest))
    return pd.DataFrame(rows)


def _largest(x: Tensor, count: int) -> Tensor:
    """Mask of the `count` largest entries of each row of [rows, M]."""
    mask = torch.zeros_like(x, dtype=torch.bool)
    return mask.scatter_(1, x.topk(count, dim=1).indices, True)


@dataclass
class Claims:
    """Table of the paper's claims that notebook 01 fills, one call a claim; `on` is the usual model and text."""

    on: str
    rows: list[dict[str, str]] = field(default_factory=list)

    def __call__(self, claim: str, paper: str, ours: str, verdict: str, on: str | None = None) -> None:
        self.rows.append(dict(claim=claim, paper=paper, ours=ours, verdict=verdict, on=on or self.on))


def value_effect(layers: Mapping[int, tuple[Tensor, Tensor, Tensor]], config: StemConfig) -> pd.DataFrame:
    """Size of the value term of Eq. 7 beside the routing term, and its effect on the selection, in each layer.

    Args:
        layers: Layer -> q, k, v, see `flow.captures`.
    Returns:
        Columns layer, spread (standard deviation of the value term over a row's blocks, over that of the routing term,
        each the mean of all rows and heads), changed (share of the kept block pairs that the value term replaces).
    """
    rows = []
    for layer, qkv in layers.items():
        q, k, v = (x.float() for x in qkv)
        configs = config, config.replace(value_weight=0.0)
        both, routing = (block_scores(q, k, v, each) for each in configs)
        spread = _spread_in_rows(both - routing) / _spread_in_rows(routing)
        with_value, without = (patterns.select("stem", q, k, v, each).to_mask() for each in configs)
        changed = float((with_value & ~without).sum() / with_value.sum())
        rows.append(dict(layer=layer, spread=spread, changed=changed))
    return pd.DataFrame(rows)


def _spread_in_rows(scores: Tensor) -> float:
    """Standard deviation over the blocks of a row, mean over all rows; blocks without a finite score do not count."""
    seen = scores.isfinite()
    count, scores = seen.sum(-1, keepdim=True), scores.where(seen, 0.0)
    centred = (scores - scores.sum(-1, keepdim=True) / count).where(seen, 0.0)
    return float((centred.square().sum(-1) / count[..., 0]).sqrt().mean())


def value_verdict(change: float, free_blocks: int) -> str:
    """Verdict on Table 1 from the relative change of the logits' error and the blocks of a late row that scores choose.

    Changes below three per cent are none: two short prompts show a direction only.
    """
    if free_blocks < 2:
        return f"not testable at this length: scores choose {free_blocks} block of a late row"
    return "reproduced" if change < -0.03 else "not reproduced"


@torch.no_grad()
def document_losses(
    model,
    tokenizer,
    methods: Mapping[str, StemConfig | hf.Selector | None],
    texts: Mapping[str, str],
    length: int,
    bucket: int,
) -> pd.DataFrame:
    """Next-token loss by position in the first `length` tokens of long documents, every method on the same texts.

    Args:
        methods: Name -> attention as `stem.hf.enable` takes it; None is the model's own dense attention.
        bucket: Positions per row [tokens], a divisor of `length`.
    Returns:
        Columns method, document, start (first position of the bucket), loss (mean [nats per token]).
    Raises:
        ValueError: If a text is too short, `bucket` does not divide `length`, or the model caps its logits.
    """
    if bucket < 1 or length % bucket:
        raise ValueError(f"bucket must divide length={length}, got {bucket}")
    check_output_embedding(model)
    rows = []
    for document, text in texts.items():
        ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, : length + 1].to(model.device)
        if ids.shape[1] <= length:
            raise ValueError(f"texts[{document!r}] has {ids.shape[1]} tokens, more than length={length} are needed")
        for method, attention in methods.items():
            with contextlib.nullcontext() if attention is None else hf.stem_prefill(model, attention):
                losses = token_losses(model, ids[:, :-1], ids[:, 1:])[0].split(bucket)
            for start, part in zip(range(0, length, bucket), losses, strict=True):
                rows.append(dict(method=method, document=document, start=start, loss=part.mean().item()))
    return pd.DataFrame(rows)


def effect(losses: pd.DataFrame, method: str, before: str) -> str:
    """Effect in `document_losses` against the method `before`, in words: a change counts beyond two standard errors."""
    loss = losses.pivot(index=["document", "start"], columns="method", values="loss")
    change = loss[method] - loss[before]
    mean, noise = change.mean(), 2 * change.sem()
    word = "helps" if mean < -noise else "hurts" if mean > noise else "makes no clear difference"
    return f"{word} ({mean:+.3f} ± {noise:.3f} nats)"

"""Causal information flow (Eq. 1): which tokens later layers depend on, and the damage of pruning some rows."""

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from stem import hf, patterns
from stem.config import StemConfig
from stem.reference import attention_probabilities
from stem.scores import block_scores
from stem.selection import BlockSelection, select_blocks
from stem.validation import check_integer


def influence(probabilities: Tensor, layers: int) -> Tensor:
    """Share of each token's value in the last layer's output when every layer applies the same P (Eq. 1).

    Args:
        probabilities: [..., N, N], rows sum to 1, entry (i, j) = weight of token j in row i.
        layers: Number of times P is applied, >= 1, else ValueError.
    Returns:
        [..., N], the column means of P^layers, which sum to 1. Early columns, which every row reads, grow with depth.
    """
    check_integer("layers", layers, 1)
    return torch.linalg.matrix_power(probabilities, layers).mean(-2)


def select_in_rows(
    q: Tensor, k: Tensor, v: Tensor, *, config: StemConfig, keep: float, first_row: int, last_row: int
) -> BlockSelection:
    """Keep a share of the blocks in query blocks first_row..last_row - 1 (on the key grid), and all blocks elsewhere.

    `keep` is the share of each pruned row's causal blocks, in (0, 1]; at least one block and the forced ones stay.
    Our choice: the paper does not say how its Fig. 3 prunes. An equal share of every row makes spans comparable.
    """
    scores = block_scores(q, k, v, config)
    row = torch.arange(scores.shape[-1])
    pruned = (row >= first_row) & (row < last_row)
    budget = torch.where(pruned, (keep * (row + 1)).ceil(), row + 1).int()
    return select_blocks(scores, budget, config, q_len=q.shape[2], kv_len=k.shape[2])


@dataclass(frozen=True)
class Trace:
    """Hidden states, logits and density of one forward pass of a model."""

    hidden: tuple[Tensor, ...]  # after each layer, [1, N, C] each
    logits: Tensor  # [1, N, V]
    density: float  # realised, mean over layers; 1 for a dense pass

    def errors(self, dense: "Trace", rows: slice = slice(None)) -> list[float]:
        """Mean squared differences to a dense pass over the positions `rows`: one per layer, then of the logits."""
        pairs = zip([*self.hidden, self.logits], [*dense.hidden, dense.logits], strict=True)
        return [float((a[:, rows].float() - b[:, rows].float()).square().mean(dtype=torch.float64)) for a, b in pairs]


@torch.no_grad()
def trace(model: nn.Module, ids: Tensor, select=None) -> Trace:
    """Trace of a forward pass over token ids [1, N]; `select` is an argument of stem.hf.enable, or None for dense."""
    with nullcontext() if select is None else hf.stem_prefill(model, select) as report:
        out = model(ids, output_hidden_states=True, use_cache=False)
    return Trace(out.hidden_states[1:], out.logits, 1.0 if report is None else report.density())


def prune_spans(model: nn.Module, ids: Tensor, config: StemConfig, spans: int, keep: float) -> list[dict]:
    """Prune one of `spans` equal spans of query blocks at a time and measure every layer's error (the paper's Fig. 3).

    Returns:
        One row per span and layer: span, first_token, last_token, layer (the number of layers stands for the logits),
        mse (over all positions) and mse_last_span (over the prompt's last span).
    """
    blocks = -(-ids.shape[1] // config.block_size)
    edges = torch.linspace(0, blocks, spans + 1).round().int().tolist()
    tail = slice(edges[-2] * config.block_size, None)
    dense = trace(model, ids)
    rows = []
    for span, (first, last) in enumerate(pairwise(edges)):
        pruned = trace(model, ids, partial(select_in_rows, config=config, keep=keep, first_row=first, last_row=last))
        first_token, last_token = first * config.block_size, min(last * config.block_size, ids.shape[1])
        about = dict(span=span, first_token=first_token, last_token=last_token)
        for layer, (mse, mse_tail) in enumerate(zip(pruned.errors(dense), pruned.errors(dense, tail), strict=True)):
            rows.append(about | dict(layer=layer, mse=mse, mse_last_span=mse_tail))
    return rows


@torch.no_grad()
def captures(model: nn.Module, ids: Tensor, layers: Iterable[int]) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """Layer -> q [1, Hq, N, D], k and v [1, Hkv, N, D] after position encoding, from one dense pass."""
    captured = {}

    def keep_everything(layer: int, q: Tensor, k: Tensor, v: Tensor) -> BlockSelection:
        captured[layer] = (q.clone(), k.clone(), v.clone())
        return patterns.select("dense", q, k, v)

    with hf.stem_prefill(model, {layer: partial(keep_everything, layer) for layer in layers}):
        model.get_decoder()(ids, use_cache=False)  # without the logits
    return captured


def capture(model: nn.Module, ids: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of one layer; see `captures`."""
    return captures(model, ids, [layer])[layer]


def rollout(model: nn.Module, ids: Tensor, residual: float = 0.0) -> Tensor:
    """Share of each token in the output after each layer of a model, from its head-averaged attention alone (Eq. 1).

    Memory is O(N^2) per layer. Each layer keeps the share `residual` of a token's own stream, in [0, 1), else
    ValueError (our choice: the paper has none).

    Returns:
        fp64 [layers, N], row l = share of each token in the average output after l + 1 layers; rows sum to 1.
    """
    if not 0 <= residual < 1:
        raise ValueError(f"residual must be in [0, 1), got {residual!r}")
    mixed, shares = None, []
    for _, (q, k, _) in sorted(captures(model, ids, range(model.config.num_hidden_layers)).items()):
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=q.device).tril()
        attention = attention_probabilities(q, k, causal)[0][0].mean(0).double()
        attention = residual * torch.eye(len(attention), device=q.device) + (1 - residual) * attention
        mixed = attention if mixed is None else attention @ mixed
        shares.append(mixed.mean(0))
    return torch.stack(shares)

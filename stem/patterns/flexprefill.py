"""FlexPrefill (arXiv 2502.20766): each head follows columns and diagonals, or its pooled queries."""

import torch
from torch import Tensor

from stem.budget import causal_pairs
from stem.config import StemConfig
from stem.patterns.common import (
    bisect,
    block_counts,
    block_means,
    check_blocks,
    check_share,
    distances,
    last_probabilities,
    offset_sums,
    pool_blocks,
    select_mask,
    target_pairs,
)
from stem.scores import mask_future
from stem.selection import BlockSelection

MIN_BUDGET = 512


def select(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: StemConfig,
    *,
    gamma: float | None = None,
    tau: float = 0.1,
    min_budget: int | None = None,
) -> BlockSelection:
    """Block columns and diagonals that hold a share gamma of the last block's attention, or pairs of pooled scores.

    The last B queries give each column and each diagonal its mass. A head whose pooled estimate of its block mass is
    within tau of the true one (root of the Jensen-Shannon divergence, natural logarithm) is query-aware: it keeps the
    best pairs of softmax(mean q_i . mean k_j / sqrt(d)) over the whole prompt until they hold gamma, beside minimal
    columns and diagonals. First column and diagonal are always kept, and prompts of at most max(2 B, min_budget) tokens
    are dense. The last B queries are those of q, and a query-aware head chooses among q's rows: a chunk of a prompt
    estimates with its own.

    gamma: Share in [0, 1], 0.9 or 0.95 in the paper. None solves it for the config's density in these rows, over all
        heads, whose densities differ; the minimal columns and diagonals are the least density.
    tau: Largest distance of a query-aware head, in [0, 1]; 0 leaves columns and diagonals only.
    min_budget: Least columns, and least diagonals, in whole blocks [tokens]; None is 512 with a given gamma and one
        block where gamma is solved.
    """
    check_share(gamma=gamma, tau=tau)
    check_blocks(0, min_budget=min_budget)
    if min_budget is None:
        min_budget = config.block_size if gamma is None else MIN_BUDGET
    nq, nk = block_counts(q, k, config)
    if k.shape[2] <= max(2 * config.block_size, min_budget):
        return select_mask(torch.ones(nk, nk, dtype=torch.bool, device=q.device), q, k, config)
    heads = _Heads(q, k, config.block_size, tau, max(1, -(-min_budget // config.block_size)))
    if gamma is None:
        target = target_pairs(config, nk) / causal_pairs(nk) * q.shape[1] * int(heads.causal.sum())
        share = bisect(heads.pairs, target, torch.zeros(q.shape[0], device=q.device))
    else:
        share = torch.full((q.shape[0],), gamma, dtype=torch.float64, device=q.device)
    return select_mask(heads.keep(share), q, k, config)


class _Heads:
    """What the choice needs, prepared once for any gamma."""

    def __init__(self, q: Tensor, k: Tensor, size: int, tau: float, least: int) -> None:
        self.size, self.least = size, least
        probabilities = last_probabilities(q, k, size)  # [B, Hq, up to size, Nkv]
        vertical, slash = probabilities.mean(2), offset_sums(probabilities) / probabilities.shape[2]
        column_mass = pool_blocks(vertical, size)  # [B, Hq, nk], sums to 1
        self.cumulative = [x.sort(-1, descending=True)[0].cumsum(-1) for x in (vertical, slash)]
        self.column_rank = _rank(column_mass)
        q_means, k_means = block_means(q, size, k.shape[2] - q.shape[2]), block_means(k, size)
        k_means = k_means.repeat_interleave(q.shape[1] // k.shape[1], 1)
        nq, nk = q_means.shape[2], k_means.shape[2]
        distance = distances(nk, q.device)[-nq:]
        self.slash_rank = _rank(pool_blocks(slash, size))[..., distance.clamp_min(0)]  # [B, Hq, nq, nk]
        self.causal = distance >= 0
        self.forced = (distance == 0) | (torch.arange(nk, device=q.device) == 0)
        scale = q.shape[-1] ** -0.5
        last = q[:, :, -size:].to(q_means.dtype).mean(2, keepdim=True)
        estimate = (last @ k_means.mT * scale).softmax(-1)[:, :, 0]
        self.query_aware = _distance(estimate, column_mass) < tau  # [B, Hq]
        pairs = mask_future(q_means @ k_means.mT * scale).softmax(-1)  # sums to nq in each head
        ordered, order = pairs.flatten(2).sort(stable=True, descending=True)
        before = torch.zeros_like(ordered).scatter_(-1, order, ordered.cumsum(-1) - ordered)
        self.before = before.view_as(pairs) / nq  # share of the pairs that come before this one

    def keep(self, gamma: Tensor) -> Tensor:
        """Block pairs of every head for gamma [B]: bool [B, Hq, nq, nk]."""
        columns, slashes = (self._blocks(cumulative, gamma)[..., None, None] for cumulative in self.cumulative)
        lines = (self.column_rank[:, :, None] < columns) | (self.slash_rank < slashes)
        pairs = (self.before < gamma[:, None, None, None]) & self.query_aware[..., None, None]
        return (lines | pairs | self.forced) & self.causal

    def pairs(self, gamma: Tensor) -> Tensor:
        """How many block pairs of each prompt `keep` keeps: int64 [B]."""
        return self.keep(gamma).sum((1, 2, 3))

    def _blocks(self, cumulative: Tensor, gamma: Tensor) -> Tensor:
        """Columns (or diagonals) of each head: int64 [B, Hq] [blocks]."""
        tokens = (cumulative <= gamma[:, None, None]).sum(-1) + 1  # the smallest number whose mass exceeds gamma
        return (tokens // self.size + 1).clamp_min(self.least).masked_fill(self.query_aware, self.least)


def _rank(x: Tensor) -> Tensor:
    """Place of each entry in descending order, ties to the lower index."""
    return x.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


def _distance(p: Tensor, q: Tensor) -> Tensor:
    """Root of the Jensen-Shannon divergence of two distributions over the last dimension, natural logarithm."""
    middle = (p + q) / 2
    divergence = (torch.xlogy(p, p / middle) + torch.xlogy(q, q / middle)).sum(-1) / 2
    return divergence.clamp_min(0).sqrt()

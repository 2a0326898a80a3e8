"""FlexPrefill (arXiv 2502.20766): each head follows columns and diagonals, or its pooled queries."""

import torch
from torch import Tensor

from stem.patterns.common import (
    Prompt,
    block_means,
    by_block,
    check_blocks,
    check_share,
    last_probabilities,
    offset_sums,
    ranks,
    select_mask,
    target_of_rows,
)
from stem.patterns.window import select_dense
from stem.scores import mask_future
from stem.selection import BlockSelection

MIN_BUDGET = 512
BISECTIONS = 30


def select(
    prompt: Prompt, *, gamma: float | None = None, tau: float = 0.1, min_budget: int | None = None
) -> BlockSelection:
    """Keep columns and diagonals that hold a share gamma of the last queries' attention, or pairs of pooled scores.

    With B the block size, the last B queries of q give each column and each diagonal its mass. A head is query-aware if
    the pooled estimate of its block mass is within tau of the true mass (root of the Jensen-Shannon divergence, natural
    logarithm). A query-aware head keeps the best pairs of softmax(mean q_i . mean k_j / sqrt(d)) until they hold gamma
    of the sum over all rows of q, and the minimal columns and diagonals. All heads keep the first column and the
    diagonal. Prompts of at most max(2 B, min_budget) tokens are dense. Each chunk of a prompt estimates with its own
    queries.

    Args:
        gamma: Share, in [0, 1], 0.9 or 0.95 in the paper. None solves one value for all heads, so that they have the
            config's density together in the rows of q. The minimal columns and diagonals are the least density.
        tau: Largest distance of a query-aware head, in [0, 1]; 0 makes no head query-aware.
        min_budget: Least columns and least diagonals of a head, rounded up to whole blocks [tokens]. None is 512 with
            a given gamma, and one block where gamma is solved.
    """
    check_share(gamma=gamma, tau=tau)
    check_blocks(0, min_budget=min_budget)
    q, k, _, config = prompt
    if min_budget is None:
        min_budget = config.block_size if gamma is None else MIN_BUDGET
    if k.shape[2] <= max(2 * config.block_size, min_budget):
        return select_dense(prompt)
    heads = _Heads(prompt, tau, max(1, -(-min_budget // config.block_size)))
    low = torch.zeros(q.shape[0], dtype=torch.float64, device=q.device)
    share = _bisect(heads, target_of_rows(prompt), low) if gamma is None else low + gamma
    return select_mask(prompt, heads.keep(share))


class _Heads:
    """Masses, ranks and kinds of the heads, computed once for every gamma that is tried."""

    def __init__(self, prompt: Prompt, tau: float, least: int) -> None:
        q, k, _, config = prompt
        size = self.size = config.block_size
        self.least = least
        probabilities = last_probabilities(q, k, size)  # [B, Hq, up to size, Nkv]
        vertical, slash = probabilities.mean(2), offset_sums(probabilities) / probabilities.shape[2]
        column_mass = by_block(vertical, size).sum(-1)  # [B, Hq, nk], sums to 1
        self.cumulative = [x.sort(-1, descending=True)[0].cumsum(-1) for x in (vertical, slash)]
        self.column_rank = ranks(column_mass)
        q_means, k_means = block_means(q, size, k.shape[2] - q.shape[2]), block_means(k, size)
        k_means = k_means.repeat_interleave(q.shape[1] // k.shape[1], 1)
        distance = prompt.distances[-prompt.nq :]
        self.slash_rank = ranks(by_block(slash, size).sum(-1))[..., distance.clamp_min(0)]  # [B, Hq, nq, nk]
        self.causal = distance >= 0
        self.forced = prompt.local_and_first(first_blocks=1)[-prompt.nq :]
        scale = q.shape[-1] ** -0.5
        last = q[:, :, -size:].to(q_means.dtype).mean(2, keepdim=True)
        estimate = (last @ k_means.mT * scale).softmax(-1)[:, :, 0]
        self.query_aware = _distance(estimate, column_mass) < tau  # [B, Hq]
        pairs = mask_future(q_means @ k_means.mT * scale).softmax(-1)  # sums to nq in each head
        ordered, order = pairs.flatten(2).sort(stable=True, descending=True)
        before = torch.zeros_like(ordered).scatter_(-1, order, ordered.cumsum(-1) - ordered)
        self.before = before.view_as(pairs) / prompt.nq  # share of the pairs that come before this one

    def keep(self, gamma: Tensor) -> Tensor:
        """Return the block pairs of every head for gamma [B]: bool [B, Hq, nq, nk]."""
        columns, slashes = (self._blocks(cumulative, gamma)[..., None, None] for cumulative in self.cumulative)
        lines = (self.column_rank[:, :, None] < columns) | (self.slash_rank < slashes)
        pairs = (self.before < gamma[:, None, None, None]) & self.query_aware[..., None, None]
        return (lines | pairs | self.forced) & self.causal

    def _blocks(self, cumulative: Tensor, gamma: Tensor) -> Tensor:
        """Return the number of columns, or diagonals, of each head: int64 [B, Hq] [blocks]."""
        tokens = (cumulative <= gamma[:, None, None]).sum(-1) + 1  # the smallest number whose mass exceeds gamma
        return (tokens // self.size + 1).clamp_min(self.least).masked_fill(self.query_aware, self.least)


def _bisect(heads: _Heads, target: float, low: Tensor) -> Tensor:
    """Return for each prompt the gamma in [0, 1] whose number of block pairs is nearest to the target: fp64 [B]."""
    high = torch.ones_like(low)
    best, gap = low, (heads.keep(low).sum((1, 2, 3)) - target).abs()
    for step in range(BISECTIONS + 1):
        tried = high if step == 0 else (low + high) / 2
        count = heads.keep(tried).sum((1, 2, 3))
        best, gap = torch.where((count - target).abs() < gap, tried, best), gap.minimum((count - target).abs())
        if step:
            low, high = torch.where(count < target, tried, low), torch.where(count < target, high, tried)
    return best


def _distance(p: Tensor, q: Tensor) -> Tensor:
    """Return the root of the Jensen-Shannon divergence over the last dimension, natural logarithm."""
    middle = (p + q) / 2
    divergence = (torch.xlogy(p, p / middle) + torch.xlogy(q, q / middle)).sum(-1) / 2
    return divergence.clamp_min(0).sqrt()

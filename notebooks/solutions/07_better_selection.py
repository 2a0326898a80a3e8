"""Solutions of notebook 07."""

import math

import torch


def my_corner(q, cell):
    """Each coordinate of the query takes the largest or the smallest coordinate of the keys."""
    return q.clamp_min(0) @ cell.amax(0) + q.clamp_max(0) @ cell.amin(0)


def my_threshold(prompts, density):
    """The diagonals are paid for first; of the past, the smallest share that still fits is the threshold."""
    sizes = [(len(shares), shares.shape[1]) for shares in prompts]
    causal, forced = sum(h * n * (n + 1) // 2 for h, n in sizes), sum(h * n for h, n in sizes)
    past = torch.cat([shares.tril(-1).flatten() for shares in prompts])
    return past.topk(math.ceil(density * causal) - forced).values[-1]


def my_selection(shares, count):
    """The diagonal counts as larger than every share, the future as smaller; then one threshold decides."""
    n = shares.shape[-1]
    causal, diagonal = torch.ones(n, n, dtype=torch.bool).tril(), torch.eye(n, dtype=torch.bool)
    ranked = shares.masked_fill(~causal, -1).masked_fill(diagonal, torch.inf)
    places = ranked.flatten().topk(count).indices
    return torch.zeros(shares.numel(), dtype=torch.bool).index_fill(0, places, True).view_as(shares)

"""Solutions of notebook 01."""

import torch


def exact_uniform_cost(n, k):
    """n rows of k blocks, less the corner of the triangle that the first k - 1 rows lack."""
    return n * k - k * (k - 1) // 2


def my_value_term(v, size):
    norms = v.norm(dim=-1).unflatten(2, (-1, size))  # [B, Hkv, blocks, size]
    return norms.amax(-1).log().clamp_min(0)


def my_k_start(n, decay, density):
    """The cost never falls as k grows, so half of the interval is enough in each step."""
    row = torch.arange(1, n + 1, dtype=torch.float64)
    low, high = 0, 2 * n  # low is too little, high is enough
    while high - low > 1:
        k = (low + high) // 2
        budget = torch.floor(k - k * (1 - decay) * row / n).minimum(row).clamp_min(1)
        low, high = (low, k) if budget.sum() >= density * n * (n + 1) / 2 else (k, high)
    return high

"""What the methods share: an evenly spread budget of equal cost, and top-k by scores."""

from __future__ import annotations

from torch import Tensor

from stem.budget import block_budget, causal_pairs
from stem.config import StemConfig
from stem.scores import mask_future
from stem.selection import BlockSelection, select_blocks


def block_counts(q: Tensor, k: Tensor, config: StemConfig) -> tuple[int, int]:
    """Query and key blocks of these tensors."""
    nk = -(-k.shape[2] // config.block_size)
    return nk - (k.shape[2] - q.shape[2]) // config.block_size, nk


def uniform_budget(config: StemConfig, num_kv_blocks: int) -> StemConfig:
    """A config with constant rows, forced blocks inside, that costs what `config` costs at this length."""
    if config.allocation == "adaptive":
        raise ValueError("allocation='adaptive' belongs to the pattern 'stem', got it for a pattern of fixed density")
    pairs = int(block_budget(num_kv_blocks, config).sum())
    return config.replace(
        allocation="uniform",
        density=pairs / causal_pairs(num_kv_blocks),
        k_start=None,
        k_start_regimes=None,
        min_blocks=0,
        dense_last_blocks=0,
        decay_from="first_row",
        forced="inside",
    )


def select_by_scores(
    scores: Tensor, q: Tensor, k: Tensor, config: StemConfig, *, sink_blocks: int, local_blocks: int
) -> BlockSelection:
    """The best-scoring blocks of each row at equal cost, forced blocks inside the budget.

    scores: broadcastable to [B, Hq, nq, nk], larger = keep; future blocks are masked here.
    """
    nq, nk = block_counts(q, k, config)
    config = uniform_budget(config, nk).replace(sink_blocks=sink_blocks, local_blocks=local_blocks)
    scores = mask_future(scores.expand(q.shape[0], q.shape[1], nq, nk).clone())
    return select_blocks(scores, block_budget(nk, config), config, q_len=q.shape[2], kv_len=k.shape[2])

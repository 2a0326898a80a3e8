"""Stem, and the ablation of its paper with a constant budget."""

from torch import Tensor

from stem.budget import block_budget
from stem.config import StemConfig
from stem.patterns.common import block_counts, check_blocks, uniform_budget
from stem.scores import block_scores
from stem.selection import BlockSelection, select_blocks


def select(q: Tensor, k: Tensor, v: Tensor, config: StemConfig) -> BlockSelection:
    """Keep the best blocks by Output-Aware Metric, budget of Token Position-Decay (Algorithm 1); reads every field."""
    budget = block_budget(block_counts(q, k, config)[1], config)
    return select_blocks(block_scores(q, k, v, config), budget, config, q_len=q.shape[2], kv_len=k.shape[2])


def select_uniform(
    q: Tensor, k: Tensor, v: Tensor, config: StemConfig, *, row_blocks: int | None = None
) -> BlockSelection:
    """Keep the best blocks by routing scores under a constant budget (Stem's "uniform" ablation, Table 5).

    The config's scores count, without their value term. Its sink and local blocks are inside the budget.

    Args:
        row_blocks: Budget of every row, >= 1 [blocks]. None solves it for the config's density.
    """
    check_blocks(1, row_blocks=row_blocks)
    config = uniform_budget(config, block_counts(q, k, config)[1], row_blocks)
    return select(q, k, v, config.replace(value_weight=0.0))

"""Stem itself, and the paper's ablation of it."""

from torch import Tensor

from stem.budget import block_budget
from stem.config import StemConfig
from stem.patterns.common import block_counts, check_blocks, uniform_budget
from stem.scores import block_scores
from stem.selection import BlockSelection, select_blocks


def select(q: Tensor, k: Tensor, v: Tensor, config: StemConfig) -> BlockSelection:
    """Output-Aware Metric and Token Position-Decay (Algorithm 1), every field of the config as documented."""
    budget = block_budget(block_counts(q, k, config)[1], config)
    return select_blocks(block_scores(q, k, v, config), budget, config, q_len=q.shape[2], kv_len=k.shape[2])


def select_uniform(
    q: Tensor, k: Tensor, v: Tensor, config: StemConfig, *, row_blocks: int | None = None
) -> BlockSelection:
    """Score-aware metric with a constant budget of equal cost: the paper's "uniform" ablation (Table 5).

    row_blocks: Blocks of every row, >= 1; None solves it for the config's density. The config's sink and local blocks
        are inside.
    """
    check_blocks(1, row_blocks=row_blocks)
    config = uniform_budget(config, block_counts(q, k, config)[1], row_blocks)
    return select(q, k, v, config.replace(value_weight=0.0))

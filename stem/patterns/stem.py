"""Stem, and the ablation of its paper with a constant budget."""

from stem.patterns.common import Prompt, check_blocks, select_best, with_even_rows
from stem.scores import block_scores
from stem.selection import BlockSelection


def select(prompt: Prompt) -> BlockSelection:
    """Keep the best blocks by Output-Aware Metric, budget of Token Position-Decay (Algorithm 1); reads every field."""
    return select_best(prompt, block_scores(*prompt))


def select_uniform(prompt: Prompt, *, row_blocks: int | None = None) -> BlockSelection:
    """Keep the best blocks by routing scores under a constant budget (Stem's "uniform" ablation, Table 5).

    The config's scores count, without their value term. Its sink and local blocks are inside the budget.

    Args:
        row_blocks: Budget of every row, >= 1 [blocks]. None solves it for the config's density.
    """
    check_blocks(1, row_blocks=row_blocks)
    return select(with_even_rows(prompt, row_blocks, value_weight=0.0))

"""XAttention (arXiv 2503.16428): antidiagonal sums, softmax at the resolution of the stride, sums over blocks."""

from stem.patterns.common import Prompt, check_blocks, check_share, select_even, select_share
from stem.scores import block_scores
from stem.selection import BlockSelection


def select(prompt: Prompt, *, tau: float | None = None, sink_blocks: int = 1, local_blocks: int = 1) -> BlockSelection:
    """Keep first and local blocks, and the largest shares of a softmax over antidiagonal sums (XAttention).

    The antidiagonals have the length of the config's score_stride.

    Args:
        tau: Share of the row that the kept blocks reach, in [0, 1], 0.9 in the paper's experiments; the density
            follows. None keeps the same number of blocks in every row, solved for the config's density.
        sink_blocks, local_blocks: First and most recent blocks that are kept, inside the density [blocks]. The diagonal
            is kept in any case.
    """
    check_share(tau=tau)
    check_blocks(0, sink_blocks=sink_blocks, local_blocks=local_blocks)
    q, k, v, config = prompt
    cells = config.block_size // config.score_stride
    budget = {} if tau is None else dict(allocation="position_decay", threshold=None)  # "adaptive" has no effect here
    pairs = dict(score_cells=cells, score_query_cells=None, score_peak=0.0, score_pooling="mean")
    scored = config.replace(reduction="softmax", routing_scale="mean", value_weight=0.0, **pairs, **budget)
    scores = block_scores(q, k, v, scored)
    if tau is None:
        return select_even(prompt, scores, sink_blocks=sink_blocks, local_blocks=local_blocks)
    return select_share(prompt, scores.exp(), tau, sink_blocks=sink_blocks, local_blocks=local_blocks)

"""XAttention (arXiv 2503.16428): antidiagonal scores, softmax at stride resolution, block sums."""

from torch import Tensor

from stem.config import StemConfig
from stem.patterns.common import select_by_scores
from stem.scores import block_scores
from stem.selection import BlockSelection


def select(q: Tensor, k: Tensor, v: Tensor, config: StemConfig) -> BlockSelection:
    """XAttention's score at `config.score_stride`, top-k at equal cost; first block and diagonal always kept."""
    cells = config.block_size // config.score_stride
    scored = config.replace(reduction="softmax", score_cells=cells, routing_scale="mean", value_weight=0.0)
    return select_by_scores(block_scores(q, k, v, scored), q, k, config, sink_blocks=1, local_blocks=1)

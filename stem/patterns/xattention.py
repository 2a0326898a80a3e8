"""XAttention (arXiv 2503.16428): antidiagonal scores, softmax at stride resolution, block sums."""

import torch
from torch import Tensor

from stem.config import StemConfig
from stem.patterns.common import block_counts, check_share, distances, select_by_scores, select_mask, top_share
from stem.scores import block_scores
from stem.selection import BlockSelection


def select(q: Tensor, k: Tensor, v: Tensor, config: StemConfig, *, tau: float | None = None) -> BlockSelection:
    """The blocks of the largest share of their row, by a softmax over sums of antidiagonals of `config.score_stride`.

    tau: Share of the row, in [0, 1], that the kept blocks hold (the paper's selection, 0.9 in its use): first block and
        diagonal, then blocks in descending order until it is reached; the density follows. None keeps the top blocks
        of each row at the config's density instead, first block and diagonal inside it.
    """
    check_share(tau=tau)
    cells = config.block_size // config.score_stride
    budget = dict(allocation="uniform", threshold=None) if tau is not None else {}  # the scores do not depend on it
    pairs = dict(score_cells=cells, score_query_cells=None, score_peak=0.0, score_pooling="mean")
    scored = config.replace(reduction="softmax", routing_scale="mean", value_weight=0.0, **pairs, **budget)
    scores = block_scores(q, k, v, scored)
    if tau is None:
        return select_by_scores(scores, q, k, config, sink_blocks=1, local_blocks=1)
    nq, nk = block_counts(q, k, config)
    distance = distances(nk, q.device)[-nq:]
    forced = (distance == 0) | (torch.arange(nk, device=q.device) == 0)
    return select_mask(top_share(scores.exp(), forced, tau), q, k, config)

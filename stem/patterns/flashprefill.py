"""FlashPrefill (arXiv 2603.06199): every query against mean keys, blocks near the row's largest."""

import math

import torch
from torch import Tensor

from stem.patterns.common import Prompt, block_means, check_blocks, check_share, select_mask, target_of_rows
from stem.scores import mask_future
from stem.selection import BlockSelection


def select(
    prompt: Prompt,
    *,
    alpha: float | None = None,
    sink_blocks: int = 2,
    window_blocks: int = 4,
    dense_last_blocks: int = 2,
) -> BlockSelection:
    """Keep blocks whose score is at least alpha times the row's largest (FlashPrefill).

    The score of a block pair is the sum over its queries of exp(q . mean k / sqrt(d)). First blocks, a window and dense
    last rows are always kept and are the least density: 0.23 at 64 blocks, 0.12 at 128. The last rows are those of q: a
    prompt in chunks has dense rows at the end of each chunk.

    Args:
        alpha: Share of the row's largest score, in [0, 1], 0.08 to 0.22 in the sources. None solves one value for all
            heads, so that they have the config's density together in the rows of q.
        sink_blocks: First blocks, >= 0 [blocks].
        window_blocks: Width of the window, >= 0 [blocks]; the diagonal is kept in any case.
        dense_last_blocks: Last rows that keep every block, >= 0 [blocks].
    """
    check_share(alpha=alpha)
    check_blocks(0, sink_blocks=sink_blocks, window_blocks=window_blocks, dense_last_blocks=dense_last_blocks)
    nq = prompt.nq
    forced = prompt.local_and_first(local_blocks=max(window_blocks, 1), first_blocks=sink_blocks)[-nq:]
    forced[max(0, nq - dense_last_blocks) :] = True
    scores = _scores(prompt)
    levels = scores - scores.amax(-1, keepdim=True)  # log of the ratio to the row's largest, [B, Hq, nq, nk]
    levels = levels.masked_fill(forced.tril(prompt.nk - nq), torch.inf)
    if alpha is None:
        count = max(1, round(target_of_rows(prompt)))
        least = levels.flatten(1).sort(-1, descending=True)[0][:, count - 1, None, None, None]
    else:
        least = math.log(alpha) if alpha else -math.inf
    return select_mask(prompt, levels >= least)


def _scores(prompt: Prompt) -> Tensor:
    """Return the logarithm of the scores, -inf in the future: [B, Hq, nq, nk]."""
    q, k, _, config = prompt
    size, offset = config.block_size, k.shape[2] - q.shape[2]
    means = block_means(k, size).repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = q.to(means.dtype) @ means.mT * q.shape[-1] ** -0.5  # [B, Hq, Nq, nk]
    edges = (offset % size, -k.shape[2] % size)
    logits = torch.nn.functional.pad(logits, (0, 0, *edges), value=-torch.inf)
    return mask_future(logits.unflatten(2, (-1, size)).logsumexp(3))

"""FlashPrefill (arXiv 2603.06199) and V2 (arXiv 2608.19758): every query against mean keys, blocks near the largest."""

import math

import torch
from torch import Tensor

from stem.patterns.common import Prompt, block_means, check_blocks, check_share, select_levels, select_mask
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
    scores = mask_future(_blocks_of_queries(prompt, _logits(prompt)).logsumexp(3))
    return _select(prompt, scores, alpha, sink_blocks, window_blocks, dense_last_blocks)


def select_v2(
    prompt: Prompt,
    *,
    alpha: float | None = None,
    sink_blocks: int = 2,
    window_blocks: int = 4,
    dense_last_blocks: int = 8,
) -> BlockSelection:
    """Keep blocks whose energy is at least alpha times the row's largest (FlashPrefill V2, arXiv 2608.19758).

    The energy of a block pair is the sum over its queries of exp(q . mean k / sqrt(d) - m), with m the query's largest
    logit, so that every query counts alike. First blocks, a window and dense last rows are always kept and are the
    least density: 0.31 at 64 blocks, 0.17 at 128. The last rows are those of q, as in `select`. In the paper dropped
    blocks stand in by their means: give a config with `dropped="mean"`.

    Args:
        alpha: Share of the row's largest energy, in [0, 1], 0.1 in the paper. None solves it as in `select`.
        sink_blocks, window_blocks, dense_last_blocks: See `select` [blocks].
    """
    logits = _logits(prompt)
    relative = _blocks_of_queries(prompt, logits - logits.amax(-1, keepdim=True))
    energies = mask_future(relative.logsumexp(3))
    return _select(prompt, energies, alpha, sink_blocks, window_blocks, dense_last_blocks)


def _select(
    prompt: Prompt, scores: Tensor, alpha: float | None, sink_blocks: int, window_blocks: int, dense_last_blocks: int
) -> BlockSelection:
    """Keep blocks by logarithms of scores [B, Hq, nq, nk], -inf in the future; see `select`."""
    check_share(alpha=alpha)
    check_blocks(0, sink_blocks=sink_blocks, window_blocks=window_blocks, dense_last_blocks=dense_last_blocks)
    nq = prompt.nq
    forced = prompt.local_and_first(local_blocks=max(window_blocks, 1), first_blocks=sink_blocks)[-nq:]
    forced[max(0, nq - dense_last_blocks) :] = True
    levels = scores - scores.amax(-1, keepdim=True)  # log of the ratio to the row's largest, [B, Hq, nq, nk]
    levels = levels.masked_fill(forced.tril(prompt.nk - nq), torch.inf)
    if alpha is None:
        return select_levels(prompt, levels)
    return select_mask(prompt, levels >= (math.log(alpha) if alpha else -math.inf))


def _logits(prompt: Prompt) -> Tensor:
    """Return q . mean k / sqrt(d) of every query and key block, -inf in the future: [B, Hq, Nq, nk]."""
    q, k, _, config = prompt
    size, offset = config.block_size, k.shape[2] - q.shape[2]
    means = block_means(k, size).repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = q.to(means.dtype) @ means.mT * q.shape[-1] ** -0.5
    rows = torch.arange(offset, k.shape[2], device=q.device)[:, None] // size
    return logits.masked_fill_(rows < torch.arange(prompt.nk, device=q.device), -torch.inf)


def _blocks_of_queries(prompt: Prompt, x: Tensor) -> Tensor:
    """Return x [B, Hq, Nq, nk] by query blocks, -inf for queries that do not exist: [B, Hq, nq, block_size, nk]."""
    size, kv_len = prompt.config.block_size, prompt.k.shape[2]
    edges = ((kv_len - prompt.q.shape[2]) % size, -kv_len % size)
    return torch.nn.functional.pad(x, (0, 0, *edges), value=-torch.inf).unflatten(2, (-1, size))

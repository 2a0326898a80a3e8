"""First blocks and a window: StreamingLLM's A-shape, and Tri-shape with dense last rows."""

import torch
from torch import Tensor

from stem.config import StemConfig
from stem.patterns.common import block_counts, check_blocks, distances, select_mask
from stem.patterns.window import add_window
from stem.selection import BlockSelection


def select_a_shape(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: StemConfig,
    *,
    sink_blocks: int | None = None,
    window_blocks: int | None = None,
) -> BlockSelection:
    """First blocks and a window (StreamingLLM, A-shape): keep j where j < sinks or i - j < window.

    First blocks and the diagonal are the least density.

    sink_blocks: First blocks, >= 0; None takes the config's. StreamingLLM itself keeps 4 tokens.
    window_blocks: Width, the diagonal included, >= 1; None solves it for the config's density.
    """
    kept = _sinks(q, k, config, sink_blocks)
    check_blocks(1, window_blocks=window_blocks)
    return select_mask(add_window(kept, config, window_blocks), q, k, config)


def select_tri_shape(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: StemConfig,
    *,
    sink_blocks: int | None = None,
    window_blocks: int | None = None,
    last_tokens: int = 100,
) -> BlockSelection:
    """A-shape whose last rows are dense (Tri-shape of SCBench).

    First blocks, the diagonal and the dense rows are the least density. The last rows are those of the keys seen so
    far: every chunk of a prompt fed in chunks has its own.

    sink_blocks, window_blocks: As in the A-shape.
    last_tokens: The blocks that hold the last tokens of the keys are dense, >= 0 [tokens].
    """
    kept = _sinks(q, k, config, sink_blocks)
    check_blocks(1, window_blocks=window_blocks)
    check_blocks(0, last_tokens=last_tokens)
    first_dense = max(0, k.shape[2] - last_tokens) // config.block_size
    if last_tokens:
        kept = kept | (torch.arange(kept.shape[0], device=q.device) >= first_dense)[:, None]
    return select_mask(add_window(kept, config, window_blocks), q, k, config)


def _sinks(q: Tensor, k: Tensor, config: StemConfig, sink_blocks: int | None) -> Tensor:
    """Diagonal and first blocks: bool [nk, nk]."""
    check_blocks(0, sink_blocks=sink_blocks)
    sink_blocks = config.sink_blocks if sink_blocks is None else sink_blocks
    distance = distances(block_counts(q, k, config)[1], q.device)
    return (distance == 0) | (torch.arange(distance.shape[1], device=q.device) < sink_blocks)

"""Patterns by distance: every block, and local windows with and without first blocks."""

from stem.patterns.common import Prompt, check_blocks, select_window
from stem.selection import BlockSelection


def select_dense(prompt: Prompt) -> BlockSelection:
    """Keep every causal block. Only the block size of the config is read."""
    q, k, _, config = prompt
    return BlockSelection.every_block(*q.shape[:3], k.shape[2], config.block_size, q.device)


def select_sliding(prompt: Prompt, *, window_blocks: int | None = None) -> BlockSelection:
    """Keep the most recent blocks: i - j < window.

    Args:
        window_blocks: Width of the window, >= 1 [blocks]. None solves it for the config's density. Where the density
            lies between two widths, the first rows have the wider one.
    """
    return select_longformer(prompt, window_blocks=window_blocks, global_blocks=0)


def select_longformer(
    prompt: Prompt, *, window_blocks: int | None = None, global_blocks: int = 1, dilation: int = 1
) -> BlockSelection:
    """Keep a window and global blocks: i - j < window or j < global (Longformer, arXiv 2004.05150, made causal).

    Global rows see all of their past without a rule of their own, because the global blocks come first. The global
    blocks and the diagonal are the least density.

    Args:
        window_blocks: Number of blocks in the window, >= 1. None solves it for the config's density.
        global_blocks: First blocks that every row sees, >= 0 [blocks]. The paper chooses them by task.
        dilation: Step between the window's blocks, >= 1 [blocks]: the window holds every dilation-th of the last
            window * dilation blocks. A dilation d alone keeps at most 1 / d of the causal pairs.
    """
    check_blocks(1, window_blocks=window_blocks, dilation=dilation)
    check_blocks(0, global_blocks=global_blocks)
    return select_window(prompt, prompt.local_and_first(first_blocks=global_blocks), window_blocks, dilation)


def select_a_shape(
    prompt: Prompt, *, sink_blocks: int | None = None, window_blocks: int | None = None
) -> BlockSelection:
    """Keep first blocks and a window: j < sinks or i - j < window (StreamingLLM, arXiv 2309.17453).

    The first blocks and the diagonal are the least density.

    Args:
        sink_blocks: First blocks, >= 0 [blocks]. None takes the config's. StreamingLLM itself keeps 4 tokens.
        window_blocks: Width of the window, >= 1 [blocks]. None solves it for the config's density.
    """
    return select_tri_shape(prompt, sink_blocks=sink_blocks, window_blocks=window_blocks, last_tokens=0)


def select_tri_shape(
    prompt: Prompt, *, sink_blocks: int | None = None, window_blocks: int | None = None, last_tokens: int = 100
) -> BlockSelection:
    """Keep the A-shape, and every block in the last rows (Tri-shape of SCBench, arXiv 2412.10319).

    The first blocks, the diagonal and the dense rows are the least density. The last rows are those of the keys given
    so far: a prompt in chunks has dense rows at the end of each chunk.

    Args:
        sink_blocks, window_blocks: As in `select_a_shape`.
        last_tokens: Rows that hold one of the last tokens are dense, >= 0 [tokens].
    """
    check_blocks(1, window_blocks=window_blocks)
    check_blocks(0, sink_blocks=sink_blocks, last_tokens=last_tokens)
    kept = prompt.local_and_first(first_blocks=prompt.config.sink_blocks if sink_blocks is None else sink_blocks)
    if last_tokens:
        kept[max(0, prompt.k.shape[2] - last_tokens) // prompt.config.block_size :] = True
    return select_window(prompt, kept, window_blocks)

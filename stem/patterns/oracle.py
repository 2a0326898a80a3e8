"""Oracles: the blocks that dense attention needs most. They bound every method at equal cost."""

from torch import Tensor

from stem.metrics import block_attention_mass, block_output_mass
from stem.patterns.common import Prompt, check_blocks, check_share, select_even, select_share
from stem.selection import BlockSelection


def select_mass(
    prompt: Prompt, *, tau: float | None = None, sink_blocks: int = 0, local_blocks: int = 1
) -> BlockSelection:
    """Keep the diagonal and the blocks of the largest true attention mass. No paper source: our choice.

    Args:
        tau: Share of the row's mass that the kept blocks reach, in [0, 1]; the density follows. None keeps the same
            number of blocks in every row, solved for the config's density.
        sink_blocks, local_blocks: First and most recent blocks that are kept, inside the density [blocks]. The diagonal
            is kept in any case.
    """
    mass = block_attention_mass(prompt.q, prompt.k, prompt.config.block_size)
    return _select(prompt, mass, tau, sink_blocks, local_blocks)


def select_output(
    prompt: Prompt, *, tau: float | None = None, sink_blocks: int = 0, local_blocks: int = 1
) -> BlockSelection:
    """Keep the diagonal and the blocks of the largest sum of P_ij * norm(V_j), the best choice for Stem's Eq. 9.

    Args:
        tau: Share of the row's sum that the kept blocks reach, in [0, 1]. None: see `select_mass`.
        sink_blocks, local_blocks: See `select_mass`.
    """
    mass = block_output_mass(*prompt[:3], prompt.config.block_size)
    return _select(prompt, mass, tau, sink_blocks, local_blocks)


def _select(prompt: Prompt, mass: Tensor, tau: float | None, sink_blocks: int, local_blocks: int) -> BlockSelection:
    check_share(tau=tau)
    check_blocks(0, sink_blocks=sink_blocks, local_blocks=local_blocks)
    if tau is None:
        return select_even(prompt, mass, sink_blocks=sink_blocks, local_blocks=local_blocks)
    return select_share(prompt, mass, tau, sink_blocks=sink_blocks, local_blocks=local_blocks)

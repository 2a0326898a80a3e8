"""Oracles: the blocks that dense attention needs most. They bound every method at equal cost."""

from torch import Tensor

from stem.config import StemConfig
from stem.metrics import block_attention_mass, block_output_mass
from stem.patterns.common import check_share, select_by_scores, select_share
from stem.selection import BlockSelection


def select_mass(q: Tensor, k: Tensor, v: Tensor, config: StemConfig, *, tau: float | None = None) -> BlockSelection:
    """Keep the diagonal and the blocks of the largest true attention mass. No paper source: our choice.

    Args:
        tau: Share of the row's mass that the kept blocks reach, in [0, 1]; the density follows. None keeps the same
            number of blocks in every row, solved for the config's density.
    """
    return _select(block_attention_mass(q, k, config.block_size), q, k, config, tau)


def select_output(q: Tensor, k: Tensor, v: Tensor, config: StemConfig, *, tau: float | None = None) -> BlockSelection:
    """Keep the diagonal and the blocks of the largest sum of P_ij * norm(V_j), the best choice for Stem's Eq. 9.

    Args:
        tau: Share of the row's sum that the kept blocks reach, in [0, 1]. None: see `select_mass`.
    """
    return _select(block_output_mass(q, k, v, config.block_size), q, k, config, tau)


def _select(mass: Tensor, q: Tensor, k: Tensor, config: StemConfig, tau: float | None) -> BlockSelection:
    check_share(tau=tau)
    if tau is None:
        return select_by_scores(mass, q, k, config, sink_blocks=0, local_blocks=1)
    return select_share(mass, tau, q, k, config, sink_blocks=0)

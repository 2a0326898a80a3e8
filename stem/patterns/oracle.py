"""Oracles: the blocks that dense attention really needs. They bound every method at equal cost."""

from torch import Tensor

from stem.config import StemConfig
from stem.metrics import block_attention_mass, block_output_mass
from stem.patterns.common import block_counts, check_share, distances, select_by_scores, select_mask, top_share
from stem.selection import BlockSelection


def select_mass(q: Tensor, k: Tensor, v: Tensor, config: StemConfig, *, tau: float | None = None) -> BlockSelection:
    """Blocks of the largest true attention mass.

    tau: Share of the row's mass, in [0, 1], that the kept blocks hold, diagonal first; None keeps the top blocks of
        each row at the config's density.
    """
    return _select(block_attention_mass(q, k, config.block_size), q, k, config, tau)


def select_output(q: Tensor, k: Tensor, v: Tensor, config: StemConfig, *, tau: float | None = None) -> BlockSelection:
    """Blocks of the largest sum of P_ij * norm(V_j), optimal for the bound of Eq. 9.

    tau: As in the oracle of the mass, of the row's sum.
    """
    return _select(block_output_mass(q, k, v, config.block_size), q, k, config, tau)


def _select(mass: Tensor, q: Tensor, k: Tensor, config: StemConfig, tau: float | None) -> BlockSelection:
    check_share(tau=tau)
    if tau is None:
        return select_by_scores(mass, q, k, config, sink_blocks=0, local_blocks=1)
    nq, nk = block_counts(q, k, config)
    return select_mask(top_share(mass, distances(nk, q.device)[-nq:] == 0, tau), q, k, config)

"""Oracles: top-k by what dense attention really does. They bound every method at equal cost."""

from torch import Tensor

from stem.config import StemConfig
from stem.metrics import block_attention_mass, block_output_mass
from stem.patterns.common import select_by_scores
from stem.selection import BlockSelection


def select_mass(q: Tensor, k: Tensor, v: Tensor, config: StemConfig) -> BlockSelection:
    """Blocks of the largest true attention mass."""
    return select_by_scores(block_attention_mass(q, k, config.block_size), q, k, config, sink_blocks=0, local_blocks=1)


def select_output(q: Tensor, k: Tensor, v: Tensor, config: StemConfig) -> BlockSelection:
    """Blocks of the largest sum of P_ij * norm(V_j), optimal for the bound of Eq. 9."""
    mass = block_output_mass(q, k, v, config.block_size)
    return select_by_scores(mass, q, k, config, sink_blocks=0, local_blocks=1)

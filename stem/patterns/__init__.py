"""Methods on one frame: each is select(q, k, v, config) -> BlockSelection, and everything downstream is shared.

All but "dense" and "stem" spend what the config's own schedule costs, spread evenly over the rows, so that methods are
compared at equal density.
"""

from __future__ import annotations

from torch import Tensor

from stem.config import StemConfig
from stem.patterns import bigbird, dense, oracle, stem, window, xattention
from stem.selection import BlockSelection
from stem.validation import check_config, check_qkv

_SELECT = {
    "dense": dense.select,
    "stem": stem.select,
    "uniform_topk": stem.select_uniform,
    "sliding_window": window.select_sliding,
    "a_shape": window.select_a_shape,
    "longformer": window.select_longformer,
    "bigbird": bigbird.select,
    "random": bigbird.select_random,
    "xattention": xattention.select,
    "oracle_mass": oracle.select_mass,
    "oracle_output": oracle.select_output,
}


def names() -> tuple[str, ...]:
    """Names that `select` takes."""
    return tuple(_SELECT)


def select(name: str, q: Tensor, k: Tensor, v: Tensor, config: StemConfig | None = None) -> BlockSelection:
    """The blocks that a method keeps.

    Args:
        name: One of `names()`.
        q, k, v: As in stem.stem_attention.
        config: Block size and density (default StemConfig()); other fields as the method's docstring says.
    Raises:
        ValueError, TypeError: For an unknown name, bad tensors, or `allocation="adaptive"` with a method other than
            "stem" and "dense".
    """
    if name not in _SELECT:
        raise ValueError(f"name must be one of {', '.join(map(repr, _SELECT))}, got {name!r}")
    config = StemConfig() if config is None else config
    check_qkv(q, k, v)
    check_config(config)
    return _SELECT[name](q, k, v, config)

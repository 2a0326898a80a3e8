"""Methods on one frame: each is select(q, k, v, config) -> BlockSelection, and everything downstream is shared.

All but "dense" and "stem" solve one of their own parameters for what the config's schedule costs, so that methods are
compared at equal density; where blocks that a method always keeps cost more, its docstring says so. The parameters of
the sources are keywords: a given one holds, and where it is the solved one, the density follows from it.
"""

from __future__ import annotations

import inspect

from torch import Tensor

from stem.autocast import autocast_once
from stem.config import StemConfig, check_config
from stem.patterns import (
    bigbird,
    dense,
    flashprefill,
    flexprefill,
    oracle,
    sparse_transformer,
    stem,
    streaming,
    vertical_slash,
    window,
    xattention,
)
from stem.selection import BlockSelection
from stem.validation import check_finite, check_qkv

_SELECT = {
    "dense": dense.select,
    "stem": stem.select,
    "uniform_topk": stem.select_uniform,
    "sliding_window": window.select_sliding,
    "longformer": window.select_longformer,
    "bigbird": bigbird.select,
    "sparse_transformer_strided": sparse_transformer.select_strided,
    "sparse_transformer_fixed": sparse_transformer.select_fixed,
    "a_shape": streaming.select_a_shape,
    "tri_shape": streaming.select_tri_shape,
    "vertical_slash": vertical_slash.select,
    "flexprefill": flexprefill.select,
    "xattention": xattention.select,
    "flashprefill": flashprefill.select,
    "random": bigbird.select_random,
    "oracle_mass": oracle.select_mass,
    "oracle_output": oracle.select_output,
}


def names() -> tuple[str, ...]:
    """Names that `select` takes."""
    return tuple(_SELECT)


def keywords(name: str) -> dict[str, object]:
    """The native parameters of a method and their defaults; None is solved or chosen as the method's docstring says."""
    _check_name(name)
    parameters = inspect.signature(_SELECT[name]).parameters.values()
    return {each.name: each.default for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY}


@autocast_once
def select(
    name: str, q: Tensor, k: Tensor, v: Tensor, config: StemConfig | None = None, **native: float | None
) -> BlockSelection:
    """The blocks that a method keeps.

    Args:
        name: One of `names()`.
        q, k, v: As in stem.stem_attention.
        config: Block size and density (default StemConfig()); other fields as the method's docstring says.
        native: The method's own parameters, see `keywords`; they win over the config.
    Raises:
        ValueError, TypeError: For an unknown name or keyword, bad tensors, or `allocation="adaptive"` with a method
            other than "stem" and "dense".
    """
    accepted = keywords(name)
    if unknown := sorted(set(native) - set(accepted)):
        takes = f"takes {', '.join(accepted)}" if accepted else "takes none"
        raise TypeError(f"pattern {name!r} {takes} beside the config, got {', '.join(unknown)}")
    config = StemConfig() if config is None else config
    check_qkv(q, k, v)
    check_finite(q=q, k=k, v=v)
    check_config(config)
    return _SELECT[name](q, k, v, config, **native)


def _check_name(name: str) -> None:
    if name not in _SELECT:
        raise ValueError(f"name must be one of {', '.join(map(repr, _SELECT))}, got {name!r}")

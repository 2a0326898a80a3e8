"""Methods that Stem is compared with: each gives the key blocks that every query block keeps.

`select(name, q, k, v, config)` returns a BlockSelection, and all later code is shared by the methods.

| name | file | blocks that a row keeps |
|---|---|---|
| dense | window.py | every causal block |
| stem | stem.py | the best by Output-Aware Metric, budget of Token Position-Decay |
| uniform_topk | stem.py | the best by routing scores, constant budget |
| sliding_window | window.py | a local window |
| longformer | window.py | a local window, global blocks |
| a_shape | window.py | a local window, first blocks |
| tri_shape | window.py | a local window, first blocks; the last rows are dense |
| sparse_transformer_strided | sparse_transformer.py | a local window, every stride-th block |
| sparse_transformer_fixed | sparse_transformer.py | its own group, the last blocks of all groups |
| bigbird | bigbird.py | a local window, global blocks, random blocks |
| random | bigbird.py | random blocks, the config's sink and local blocks |
| vertical_slash | vertical_slash.py | columns and diagonals of the last queries' attention |
| flexprefill | flexprefill.py | such columns and diagonals, or the best pairs of pooled scores |
| xattention | xattention.py | the best by a softmax over antidiagonal sums |
| flashprefill | flashprefill.py | blocks near the row's largest sum against mean keys |
| flashprefill_v2 | flashprefill.py | the same with equal weight for every query, and more dense rows |
| subblock | subblock.py | the best by a log-sum-exp over pairs of cells, constant budget |
| cosa | cosa.py | blocks that hold a row's maximum of antidiagonal sums, then the best by mass |
| blasst | blasst.py | blocks that a dense kernel with skipped softmax would not skip |
| oracle_mass | oracle.py | the best by true attention mass |
| oracle_output | oracle.py | the best by true attention mass times value norms |

All methods but "dense" and "stem" solve one of their own parameters, so that they keep as many block pairs as the
config's schedule and can be compared at equal density. A parameter that is given is not solved. Density can be higher
than requested where a method always keeps more blocks; its docstring then gives the least density.

`reuse` gives the layers of a model the selections of anchor layers (Kascade). `skip_negligible` removes the blocks that
BLASST skips from any selection, in ascending order or in that of `cosa_priority`.

In the docstrings row i is a query block, j a key block, and i - j = 0 the diagonal. Windows include the diagonal.
"""

from __future__ import annotations

import inspect
from dataclasses import replace

from torch import Tensor

from stem.autocast import autocast_once
from stem.config import StemConfig, check_config
from stem.patterns import (
    bigbird,
    blasst,
    cosa,
    flashprefill,
    flexprefill,
    oracle,
    sparse_transformer,
    stem,
    subblock,
    vertical_slash,
    window,
    xattention,
)
from stem.patterns.blasst import skip_negligible
from stem.patterns.common import Prompt
from stem.patterns.cosa import cosa_priority
from stem.patterns.reuse import reuse
from stem.selection import BlockSelection
from stem.transforms import refused_by_name
from stem.validation import check_choice, check_finite, check_qkv

__all__ = ["cosa_priority", "keywords", "names", "reuse", "select", "skip_negligible"]

_SELECT = {
    "dense": window.select_dense,
    "stem": stem.select,
    "uniform_topk": stem.select_uniform,
    "sliding_window": window.select_sliding,
    "longformer": window.select_longformer,
    "bigbird": bigbird.select,
    "sparse_transformer_strided": sparse_transformer.select_strided,
    "sparse_transformer_fixed": sparse_transformer.select_fixed,
    "a_shape": window.select_a_shape,
    "tri_shape": window.select_tri_shape,
    "vertical_slash": vertical_slash.select,
    "flexprefill": flexprefill.select,
    "xattention": xattention.select,
    "flashprefill": flashprefill.select,
    "flashprefill_v2": flashprefill.select_v2,
    "subblock": subblock.select,
    "cosa": cosa.select,
    "blasst": blasst.select,
    "random": bigbird.select_random,
    "oracle_mass": oracle.select_mass,
    "oracle_output": oracle.select_output,
}


def names() -> tuple[str, ...]:
    """Return the names that `select` takes."""
    return tuple(_SELECT)


def keywords(name: str) -> dict[str, object]:
    """Return a method's own parameters with their defaults; its docstring says how it chooses a value for None."""
    check_choice("name", name, names())
    parameters = inspect.signature(_SELECT[name]).parameters.values()
    return {each.name: each.default for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY}


@refused_by_name("patterns.select")
@autocast_once
def select(
    name: str, q: Tensor, k: Tensor, v: Tensor, config: StemConfig | None = None, **native: float | None
) -> BlockSelection:
    """Return the key blocks that a method keeps in each query block.

    Args:
        name: One of `names()`.
        q, k, v: See stem.stem_attention. Without queries the selection is empty.
        config: Block size, density and `dropped` (default StemConfig()). Methods that read other fields say so.
        native: The method's own parameters, see `keywords`. They win over the config.
    Raises:
        ValueError, TypeError: If a name, keyword, value or tensor is not accepted, or if `allocation="adaptive"` is
            given to a method that solves a parameter for a density.
    """
    accepted = keywords(name)
    if unknown := sorted(set(native) - set(accepted)):
        takes = f"takes {', '.join(accepted)}" if accepted else "takes none"
        raise TypeError(f"pattern {name!r} {takes} beside the config, got {', '.join(unknown)}")
    config = StemConfig() if config is None else config
    check_qkv(q, k, v)
    check_finite(q=q, k=k, v=v)
    check_config(config)
    if not q.numel():
        name, native = "dense", {}
    return replace(_SELECT[name](Prompt(q, k, v, config), **native), dropped=config.dropped)

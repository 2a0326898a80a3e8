"""Methods that a comparison runs, each with its own forced blocks, and a control that must fail.

A method's forced blocks are its sink, its local blocks and its dense last rows. At equal density, every forced block is
one that the method's scores cannot choose. So a comparison tries the pairs of `GRID` on calibration texts for every
method (see comparison.py), and the rows say which share of the kept blocks was chosen.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from stem import hf, patterns
from stem.budget import causal_pairs
from stem.config import StemConfig

GRID = ((1, 1), (1, 2), (2, 4), (4, 4))  # (sink, local) blocks; the last is the paper's
LEAST_CHOSEN = 0.2  # smallest chosen share from which a row says something about a method's scores
DENSE_LAYERS = 2  # first layers that AngelSlim keeps dense
NO_VALUE = "stem, no value term"  # position decay alone, the middle row of the paper's Table 5
CONFIG_FORCED = ("stem", NO_VALUE, "uniform_topk", "random", "subblock")  # read the config's sink and local blocks
ADAPTIVE = ("adaptive", "adaptive, cells alone")  # the preset, and without exact shares of the last block of queries
BLIND = (
    "sliding_window", "longformer", "bigbird", "sparse_transformer_strided", "sparse_transformer_fixed", "a_shape",
    "tri_shape", "random",
)  # fmt: skip  # patterns that depend on the shapes alone
OWN = (NO_VALUE, *ADAPTIVE)  # names that are no pattern's
PRESETS = ("paper", "angelslim", "hpc_ops")


@dataclass(frozen=True)
class Forced:
    """Blocks that a method keeps whatever its scores are."""

    sink_blocks: int
    local_blocks: int
    dense_last_blocks: int = 0

    def pairs(self, num_blocks: int) -> int:
        """Forced block pairs of one head in a prompt of n key blocks."""
        first_dense = max(0, num_blocks - self.dense_last_blocks)
        rows = (min(row + 1, self.sink_blocks + max(1, self.local_blocks)) for row in range(first_dense))
        return sum(rows) + causal_pairs(num_blocks) - causal_pairs(first_dense)

    def chosen_share(self, num_blocks: int, density: float) -> float:
        """(kept - forced) / kept block pairs of a prompt of n key blocks at a density, at least 0."""
        return max(0.0, 1 - self.pairs(num_blocks) / (density * causal_pairs(num_blocks)))


@dataclass(frozen=True)
class Method:
    """One attention to compare."""

    name: str
    attention: StemConfig | hf.Selector | None = None  # what `stem.hf.enable` takes; None is dense attention
    block_size: int | None = None
    asked: float | None = None  # density asked for; None where the method sets its own
    forced: Forced | None = None  # None where scores choose nothing
    dense_layers: int = 0  # first layers that stay dense

    def chosen_share(self, length: int, density: float) -> float | None:
        """Share of the kept blocks that scores chose in the sparse layers, at the density that they computed."""
        return self.forced and self.forced.chosen_share(-(-length // self.block_size), density)


def candidates(name: str, density: float, block_size: int, length: int) -> list[Method]:
    """One method with every forced choice that leaves its scores at least `LEAST_CHOSEN` of the kept blocks.

    Args:
        name: A name of `all_names`. Patterns without forced blocks of their own choice have one candidate. Adaptive
            methods get the preset's threshold, which the caller calibrates for the density.
        density, block_size, length: Asked for, in (0, 1]; of blocks; of the prompts [tokens].
    """
    if name in BLIND and name != "random":
        return [_method(name, density, block_size, None)]
    found = [_method(name, density, block_size, forced) for forced in _forced_choices(name, block_size)]
    return [each for each in found if each.chosen_share(length, density) >= LEAST_CHOSEN]


def _forced_choices(name: str, block_size: int) -> list[Forced]:
    if name == "vertical_slash":  # MInference's 30 first tokens and 100 nearest offsets
        return [Forced(1, 1 + -(-99 // block_size))]
    if name in ("flexprefill", "blasst"):
        return [Forced(int(name == "flexprefill"), 1)]
    native = {} if name in OWN else patterns.keywords(name)
    dense = sorted({0, native.get("dense_last_blocks", 0)})
    if not native.keys() & {"sink_blocks"} and name not in (*OWN, *CONFIG_FORCED):
        return [Forced(1, 1)]
    return [Forced(*pair, last) for pair in GRID for last in dense]


def _method(name: str, density: float, block_size: int, forced: Forced | None) -> Method:
    kept = {} if forced is None else dict(sink_blocks=forced.sink_blocks, local_blocks=forced.local_blocks)
    if name in ADAPTIVE:
        changes = dict(exact_last_blocks=0) if name != "adaptive" else {}
        attention = StemConfig.preset("adaptive", block_size=block_size, dense_up_to=0, **kept, **changes)
        return Method(name, attention, block_size, density, forced)
    config, native = StemConfig(block_size=block_size, density=density), {}
    if name in CONFIG_FORCED:
        config = config.replace(**kept)
    elif forced is not None:
        values = dict(
            sink_blocks=forced.sink_blocks,
            local_blocks=forced.local_blocks,
            window_blocks=forced.local_blocks,
            dense_last_blocks=forced.dense_last_blocks,
        )
        native = {key: value for key, value in values.items() if key in patterns.keywords(name)}
    if name in (NO_VALUE, "stem"):
        return Method(name, config if name == "stem" else config.replace(value_weight=0.0), block_size, density, forced)
    attention = _selector(name, config, native)
    return Method(name, attention, block_size, density, forced)


def _selector(name: str, config: StemConfig, native: dict[str, int]) -> hf.Selector:
    """A pattern as a selector; a pattern of `BLIND` selects once for all layers of the same shapes."""
    choose, made = partial(patterns.select, name, config=config, **native), {}

    def select_once(q: Tensor, k: Tensor, v: Tensor):
        key = (q.shape, k.shape, q.device)
        if key not in made:
            made[key] = choose(q, k, v)
        return made[key]

    return select_once if name in BLIND else choose


def presets() -> list[Method]:
    """Stem with the schedules of its three sources, each of which sets its own density and forced blocks.

    AngelSlim's comes twice: in all layers, and with its default of `DENSE_LAYERS` dense first layers.
    """
    configs = {name: StemConfig.preset(name) for name in PRESETS}
    forced = {name: Forced(of.sink_blocks, of.local_blocks) for name, of in configs.items()}
    found = [Method(f"stem, {name}", of, of.block_size, None, forced[name]) for name, of in configs.items()]
    of = configs["angelslim"]
    told = f"stem, angelslim, {DENSE_LAYERS} dense layers"
    return [*found, Method(told, of, of.block_size, None, forced["angelslim"], DENSE_LAYERS)]


def control(block_size: int) -> Method:
    """The control "window" as a method."""
    return Method("window", window_control(block_size), block_size)


def all_names() -> tuple[str, ...]:
    """All names that `candidates` takes: Stem, adaptive, the other patterns, and last the costly oracles."""
    others = [name for name in patterns.names() if name not in ("stem", "dense")]
    others.sort(key=lambda name: (name.startswith("oracle"), name in BLIND))
    return ("stem", *OWN, *others)


def chosen_names(names: Iterable[str]) -> tuple[str, ...]:
    """The names that are in `all_names`, in that order."""
    return tuple(name for name in all_names() if name in set(names))


def window_control(block_size: int = 64) -> StemConfig:
    """The control that must fail: one sink block and the two most recent blocks, whatever the scores say (our choice).

    A measure on which the control does as well as dense attention cannot see a broken prefill.
    """
    return StemConfig(block_size=block_size, k_start=3, decay=1.0, sink_blocks=1, local_blocks=2)

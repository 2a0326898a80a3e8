"""Methods that a comparison runs, each with its own forced blocks, and a control that must fail.

A method's forced blocks are its sink, its local blocks and its dense last rows. At equal density, every forced block is
one that the method's scores cannot choose. So a comparison tries the pairs of `GRID` on calibration texts for every
method (see comparison.py), and the rows say which share of the kept blocks was chosen.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from stem import hf, patterns
from stem.budget import causal_pairs
from stem.config import StemConfig
from stem.selection import BlockSelection

GRID = ((1, 1), (1, 2), (2, 4), (4, 4))  # (sink, local) blocks; the last is the paper's
LEAST_CHOSEN = 0.2  # smallest chosen share from which a row says something about a method's scores
REALISED = 0.92  # share of its density that a threshold computes on prompts that it was not calibrated on (our choice)
DENSE_LAYERS = 2  # first layers that AngelSlim keeps dense
NO_VALUE = "stem, no value term"  # position decay alone, the middle row of the paper's Table 5
TUNED = "adaptive, low density"  # settings tuned for 8 % of the blocks, see `VARIANTS`
ORACLE, TUNED_ORACLE = "oracle by threshold", "oracle by threshold, low density"  # true mass, otherwise the same
EVERY = 1 << 20  # blocks, more than any prompt has
LOW_DENSITY = dict(dropped="cells", score_cells=32, score_pooling="mean")  # best of results/long_context/tuning/
EXACT = dict(exact_last_blocks=EVERY, score_pooling="mean")  # every share is the true attention mass
# "adaptive" with one threshold for all lengths and tasks, calibrated at TRANSFER_LENGTH; the second one in chunks
TRANSFER_LENGTH, TRANSFER_CHUNK = 16_384, 4_096  # [tokens]
TRANSFERRED = {"adaptive, threshold of 16K": None, "adaptive, threshold of 16K, chunks of 4K": TRANSFER_CHUNK}
LAST_DENSE = ("stem", "uniform_topk", "xattention", "subblock", "flashprefill_v2", "adaptive")
VARIANTS = {  # name -> (method that it varies, fields of its config that differ)
    NO_VALUE: ("stem", dict(value_weight=0.0)),
    **{f"{name}, last block dense": (name, dict(dense_last_blocks=1)) for name in LAST_DENSE},
    "stem, means": ("stem", dict(dropped="mean")),
    "adaptive, cells alone": ("adaptive", dict(exact_last_blocks=0)),
    "adaptive, means": ("adaptive", dict(dropped="mean")),
    "adaptive, 4 query cells": ("adaptive", dict(score_query_cells=4)),
    "adaptive, lists of groups": ("adaptive", dict(lists="group")),
    "stem, lists of groups": ("stem", dict(lists="group")),
    "adaptive, cells": ("adaptive", dict(dropped="cells")),
    "adaptive, mean pooling": ("adaptive", dict(score_pooling="mean")),
    "adaptive, mean pooling, means": ("adaptive", dict(score_pooling="mean", dropped="mean")),
    TUNED: ("adaptive", LOW_DENSITY),
    ORACLE: ("adaptive", EXACT),
    TUNED_ORACLE: ("adaptive", LOW_DENSITY | EXACT),
    "flashprefill_v2, means": ("flashprefill_v2", dict(dropped="mean")),
}  # fmt: skip
ORACLES = {"adaptive": ORACLE, "adaptive, cells": TUNED_ORACLE, TUNED: TUNED_ORACLE}  # the same but for the shares
CONFIG_FORCED = ("stem", "uniform_topk", "random", "subblock")  # read the config's sink and local blocks
BLIND = (
    "sliding_window", "longformer", "bigbird", "sparse_transformer_strided", "sparse_transformer_fixed", "a_shape",
    "tri_shape", "random",
)  # fmt: skip  # patterns that depend on the shapes alone
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
    chunk: int | None = None  # tokens of a prefill's chunks; None is the whole prompt at once

    def chosen_share(self, length: int, density: float) -> float | None:
        """Share of the kept blocks that scores chose in the sparse layers, at the density that they computed."""
        return self.forced and self.forced.chosen_share(-(-length // self.block_size), density)


def candidates(name: str, density: float, block_size: int, length: int) -> list[Method]:
    """One method with every forced choice that leaves its scores at least `LEAST_CHOSEN` of the kept blocks.

    A method with a threshold counts as computing `REALISED` of the density.

    Args:
        name: A name of `all_names`. Patterns without forced blocks of their own choice have one candidate. "adaptive"
            and its variants get the preset's threshold, which the caller calibrates for the density.
        density, block_size, length: Asked for, in (0, 1]; of blocks; of the prompts [tokens].
    """
    if name in BLIND and name != "random":
        return [make(name, density, block_size, None)]
    found = [make(name, density, block_size, forced) for forced in _forced_choices(name, block_size)]
    realised = density * (REALISED if VARIANTS.get(name, (name,))[0] == "adaptive" else 1)
    return [each for each in found if each.chosen_share(length, realised) >= LEAST_CHOSEN]


def _forced_choices(name: str, block_size: int) -> list[Forced]:
    base, changes = VARIANTS.get(name, (name, {}))
    if base == "vertical_slash":  # MInference's 30 first tokens and 100 nearest offsets
        return [Forced(1, 1 + -(-99 // block_size))]
    if base in ("flexprefill", "blasst"):
        return [Forced(int(base == "flexprefill"), 1)]
    native = {} if base == "adaptive" else patterns.keywords(base)
    if not native.keys() & {"sink_blocks"} and base not in ("adaptive", *CONFIG_FORCED):
        return [Forced(1, 1)]
    dense = {0, native.get("dense_last_blocks", 0)}
    dense = {changes["dense_last_blocks"]} if "dense_last_blocks" in changes else dense
    return [Forced(*pair, last) for pair in GRID for last in sorted(dense)]


def make(name: str, density: float, block_size: int, forced: Forced | None) -> Method:
    """The method of a name of `all_names` with these forced blocks; None where it has no choice of them."""
    base, changes = VARIANTS.get(name, (name, {}))
    kept = {} if forced is None else dict(sink_blocks=forced.sink_blocks, local_blocks=forced.local_blocks)
    if base == "adaptive":
        fields = dict(dense_up_to=0) | kept | changes
        if "score_cells" in fields:
            fields["score_cells"] = min(fields["score_cells"], block_size)  # a cell has at least one token
        attention = StemConfig.preset("adaptive", block_size=block_size, **fields)
        return Method(name, attention, block_size, density, forced)
    config, native = StemConfig(block_size=block_size, density=density, **changes), {}
    if base in CONFIG_FORCED:
        config = config.replace(**kept)
    elif forced is not None:
        values = dict(
            sink_blocks=forced.sink_blocks,
            local_blocks=forced.local_blocks,
            window_blocks=forced.local_blocks,
            dense_last_blocks=forced.dense_last_blocks,
        )
        native = {key: value for key, value in values.items() if key in patterns.keywords(base)}
    attention = config if base == "stem" else _selector(base, config, native)
    return Method(name, attention, block_size, density, forced)


def _with_last_block_dense(name: str, config: StemConfig, native: dict[str, int]) -> hf.Selector:
    """A pattern whose last query block keeps every block, inside the density of the config."""

    def select(q: Tensor, k: Tensor, v: Tensor):
        blocks = -(-k.shape[2] // config.block_size)
        others = (config.density * causal_pairs(blocks) - blocks) / causal_pairs(blocks - 1)
        mask = patterns.select(name, q, k, v, config=config.replace(density=others), **native).to_mask()
        mask[:, :, -1] = True
        found = BlockSelection.from_mask(mask, config.block_size, q_len=q.shape[2], kv_len=k.shape[2])
        return replace(found, dropped=config.dropped)

    return select


def _selector(name: str, config: StemConfig, native: dict[str, int]) -> hf.Selector:
    """A pattern as a selector; a pattern of `BLIND` selects once for all layers of the same shapes."""
    if config.dense_last_blocks and "dense_last_blocks" not in native:
        return _with_last_block_dense(name, config, native)
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
    """All names that `candidates` takes: Stem, adaptive, the other patterns, their variants, and last the oracles."""
    others = [name for name in (*patterns.names(), *VARIANTS) if name not in ("stem", "dense", NO_VALUE)]
    others.sort(key=lambda name: (name.startswith("oracle"), name in BLIND, name in VARIANTS))
    return ("stem", NO_VALUE, "adaptive", *others)


def chosen_names(names: Iterable[str]) -> tuple[str, ...]:
    """The names that are in `all_names` or `TRANSFERRED`, in that order."""
    return tuple(name for name in (*all_names(), *TRANSFERRED) if name in set(names))


def window_control(block_size: int = 64) -> StemConfig:
    """The control that must fail: one sink block and the two most recent blocks, whatever the scores say (our choice).

    A measure on which the control does as well as dense attention cannot see a broken prefill.
    """
    return StemConfig(block_size=block_size, k_start=3, decay=1.0, sink_blocks=1, local_blocks=2)

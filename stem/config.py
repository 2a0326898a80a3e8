"""StemConfig: every knob of the method, in five sections, with unit, range, default and the paper's symbol."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from math import inf
from numbers import Integral
from typing import Literal, NamedTuple, get_args

from stem.validation import check_choice, check_integer, check_number

BlockSize = Literal[16, 32, 64, 128]
ValueNorm = Literal["log", "zscore", "zscore_padded"]
RoutingScale = Literal["mean", "raw"]
DecayFrom = Literal["first_row", "k_start"]
Forced = Literal["inside", "on_top"]
Allocation = Literal["position_decay", "uniform", "adaptive"]
Reduction = Literal["mean", "softmax"]
Pooling = Literal["mean", "rms"]

# (from this many key blocks on, share of the key blocks, blocks added)
Regimes = tuple[tuple[int, float, int], ...]

DEFAULT_DECAY = 0.7

SECTIONS = {
    "grid": ("block_size",),
    "budget": ("density", "k_start", "k_start_regimes", "min_blocks", "allocation", "threshold"),
    "decay": ("decay", "decay_from"),
    "always kept": (
        "sink_blocks", "local_blocks", "forced", "dense_first_blocks", "dense_last_blocks", "dense_up_to",
    ),
    "scores and cells": (
        "score_stride", "value_weight", "value_norm", "routing_scale", "reduction", "score_cells", "score_query_cells",
        "score_peak", "score_pooling", "exact_last_blocks",
    ),
}  # fmt: skip

PRESETS = {
    "paper": dict(k_start_regimes=((0, 0.2, 0), (129, 0.1, 0)), min_blocks=54),
    "angelslim": dict(
        score_stride=8,
        k_start_regimes=((0, 1.0, 0), (56, 0.2, 30), (160, 0.1, 30)),
        decay_from="k_start",
        value_norm="zscore",
        forced="on_top",
    ),
    "hpc_ops": dict(
        k_start_regimes=((0, 1.0, 0), (56, 0.2, 30), (160, 0.1, 30)),
        decay=1.0,
        decay_from="k_start",
        routing_scale="raw",
        value_norm="zscore_padded",
        value_weight=0.3,
        forced="on_top",
    ),
    "adaptive": dict(
        score_stride=1,
        reduction="softmax",
        score_cells=8,
        score_peak=0.3,
        score_pooling="rms",
        allocation="adaptive",
        threshold=0.005,
        value_weight=0.0,
        sink_blocks=1,
        local_blocks=2,
        exact_last_blocks=1,
        dense_up_to=5120,
    ),
}


class AlwaysKept(NamedTuple):
    """Blocks that a row keeps whatever the scores are."""

    sink_blocks: int
    local_blocks: int
    on_top: bool
    """Whether they are added to the budget."""

    @property
    def count(self) -> int:
        """Forced blocks of a row that is long enough [blocks]."""
        return self.sink_blocks + max(self.local_blocks, 1)


class ShareRules(NamedTuple):
    """Rules of `allocation="adaptive"` for a prompt."""

    threshold: float
    sink_blocks: int
    local_blocks: int
    dense_first_blocks: int
    dense_last_blocks: int


class ValueTerm(NamedTuple):
    """Value term of the scores."""

    norm: ValueNorm
    weight: float


@dataclass(frozen=True)
class StemConfig:
    """Settings of the method: the grid, the budget, its decay, the blocks that are always kept, scores and cells.

    SECTIONS lists the fields of each of these five sections. At most one of `density`, `k_start` and `k_start_regimes`
    sets the budget; with none of them, density is 0.25. `allocation="uniform"` is another name for `decay=1`.
    """

    block_size: int = 128
    """Tokens per query and key block, B in the paper: 16, 32, 64 or 128 [tokens]."""

    score_stride: int = 16
    """Tokens between antidiagonal samples, S in AngelSlim: a divisor of `block_size` [tokens]."""

    density: float | None = None
    """Share of the causal block pairs to compute, in (0, 1]; k_start is solved for. Our choice."""

    k_start: int | float | None = None
    """Budget of the first row: blocks if int (>= 1), share of the key blocks if float in (0, 1]. k_start in Eq. 3."""

    k_start_regimes: Regimes | None = None
    """k_start by length: (from this many key blocks, share of the key blocks, blocks added), as the presets use."""

    min_blocks: int = 0
    """Lower bound of k_start, 54 in the paper; where it binds, a `density` is exceeded [blocks]."""

    decay: float = DEFAULT_DECAY
    """k_end / k_start, mu in Eq. 3, in (0, 1]; 1 keeps the budget constant."""

    decay_from: DecayFrom = "first_row"
    """Row in which the decay starts: the first (Eq. 3) or row k_start (AngelSlim, hpc-ops)."""

    dense_first_blocks: int = 0
    """Query blocks at the start of the prompt that keep everything, the extreme of Token Position-Decay [blocks]. Our
    choice."""

    dense_last_blocks: int = 0
    """Query blocks at the end of the prompt that keep everything [blocks]. Our choice."""

    dense_up_to: int = 0
    """Prompts of at most this many tokens keep everything, because to choose would take longer than to attend to all of
    it [tokens]. Our choice."""

    sink_blocks: int = 4
    """First key blocks, always kept [blocks]."""

    local_blocks: int = 4
    """Most recent key blocks, always kept; they include the diagonal block, which is kept even at 0 [blocks]."""

    forced: Forced = "inside"
    """Whether sink and local blocks are inside the budget (paper, default) or added to it (AngelSlim, hpc-ops)."""

    value_weight: float = 0.2
    """Weight of the value term, beta in Eq. 7, >= 0; 0 leaves the routing term alone (score-aware metric)."""

    value_norm: ValueNorm = "log"
    """Value term: "log" of the block's largest norm (Eq. 7), or z-scored over the prompt as the public code does."""

    routing_scale: RoutingScale = "mean"
    """"mean" averages q.k * scale over the samples (paper, AngelSlim); "raw" drops the scale and 1/S (hpc-ops)."""

    reduction: Reduction = "mean"
    """Samples to block score: plain mean (the paper), or softmax over the row's cells before the block sum."""

    score_cells: int = 4
    """With reduction="softmax": cells per key block; block_size / score_cells is a multiple of score_stride."""

    score_query_cells: int | None = None
    """With reduction="softmax": cells per query block, as many as `score_cells` if None. Our choice."""

    score_peak: float = 0.0
    """With reduction="softmax": how far a cell is read from its mean (0) towards the largest and smallest value of each
    dimension (1), in [0, 1]; above 0, score_stride is 1. Our choice."""

    score_pooling: Pooling = "mean"
    """With reduction="softmax": a query block's share from its cells' shares, their mean or their root mean square
    ("rms"), in which a block that one cell looks for counts for more. Our choice."""

    exact_last_blocks: int = 0
    """With reduction="softmax": query blocks at the end of the prompt, where a question stands, whose shares are those
    of attention itself, from cells of one token; a last one that is less than half full does not count as one, but is
    [blocks]. Our choice."""

    allocation: Allocation = "position_decay"
    """Shape of the budget over rows: Eq. 3, or a threshold on each block's share ("adaptive"). "uniform" becomes
    "position_decay" with decay 1."""

    threshold: float | None = None
    """With allocation="adaptive": keep a block whose share of its row's mass exceeds this, in (0, 1]."""

    def __post_init__(self) -> None:
        check_choice("block_size", self.block_size, get_args(BlockSize))
        check_integer("block_size", self.block_size, 16)
        check_integer("score_stride", self.score_stride, 1)
        if self.block_size % self.score_stride:
            raise ValueError(
                f"score_stride must divide block_size={self.block_size}, got score_stride={self.score_stride}"
            )
        counts = ("min_blocks", "dense_first_blocks", "dense_last_blocks", "sink_blocks", "local_blocks")
        for name in (*counts, "exact_last_blocks", "dense_up_to"):
            check_integer(name, getattr(self, name), 0)
        self._check_budget()
        check_number("decay", self.decay, 0.0, 1.0, open_below=True)
        check_number("value_weight", self.value_weight, 0.0, inf)
        check_choice("decay_from", self.decay_from, get_args(DecayFrom))
        check_choice("forced", self.forced, get_args(Forced))
        check_choice("value_norm", self.value_norm, get_args(ValueNorm))
        check_choice("routing_scale", self.routing_scale, get_args(RoutingScale))
        check_choice("reduction", self.reduction, get_args(Reduction))
        check_choice("allocation", self.allocation, get_args(Allocation))
        self._merge_uniform()
        self._check_adaptive()
        if self.reduction == "softmax":
            self._check_cells("score_cells")
            if self.score_query_cells is not None:
                self._check_cells("score_query_cells")
        check_choice("score_pooling", self.score_pooling, get_args(Pooling))
        check_number("score_peak", self.score_peak, 0.0, 1.0)
        if self.score_peak and (self.reduction != "softmax" or self.score_stride != 1):
            raise ValueError(
                "score_peak > 0 needs reduction='softmax' and score_stride=1, got "
                f"score_peak={self.score_peak!r}, reduction={self.reduction!r}, score_stride={self.score_stride}"
            )

        if self.exact_last_blocks and self.reduction != "softmax":
            raise ValueError(
                "exact_last_blocks > 0 needs reduction='softmax', got "
                f"exact_last_blocks={self.exact_last_blocks}, reduction={self.reduction!r}"
            )

        for name in ("density", "decay", "value_weight", "score_peak", "threshold"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, float(getattr(self, name)))  # 1 and 1.0 are one config here
        # operators take the config as text; torch.compile can read an attribute but cannot serialise a config
        object.__setattr__(self, "as_json", json.dumps(asdict(self), default=lambda number: number.item()))

    def __eq__(self, other) -> bool:
        """Whether all settings are equal; k_start=1, a block, is not k_start=1.0, every block."""
        return self.as_json == other.as_json if isinstance(other, StemConfig) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.as_json)  # a text remembers its own; that of all fields takes some us a call

    @classmethod
    def preset(cls, name: str, **overrides) -> StemConfig:
        """The settings of a source, "paper" (v1), "angelslim" or "hpc_ops", or this repository's extension, "adaptive".

        Keyword arguments replace fields. Giving `density` or `k_start` replaces the preset's schedule and its floor;
        that of "adaptive", one threshold for all rows, heads and layers, becomes a constant budget at every length
        (`stem.calibrate` finds the threshold for a density instead). In blocks of 64, "adaptive" reads cells of 4
        tokens, which finds more; in blocks of 128 cells of 16, which is cheap at 128K tokens.

        Raises:
            ValueError: If the name is unknown.
            TypeError: If an override is no field of StemConfig.
        """
        check_choice("preset", name, tuple(PRESETS))
        unknown = set(overrides) - {field.name for field in fields(cls)}
        if unknown:
            known = "; ".join(f"{section}: {', '.join(names)}" for section, names in SECTIONS.items())
            raise TypeError(f"StemConfig has no field {', '.join(sorted(unknown))}; its fields are {known}")
        settings = dict(PRESETS[name])
        if name == "adaptive" and overrides.get("block_size") == 64:
            settings["score_cells"] = 16
        if overrides.get("density") is not None or overrides.get("k_start") is not None:
            settings.update(k_start_regimes=None, min_blocks=0, threshold=None)
            if name == "adaptive":
                settings.update(allocation="position_decay", decay=1.0, dense_up_to=0)
        return cls(**{**settings, **overrides})

    def replace(self, **changes) -> StemConfig:
        """A copy with some fields changed; validated like a new one."""
        return replace(self, **changes)

    @cached_property
    def always_kept(self) -> AlwaysKept:
        """Forced blocks and whether they are added to the budget."""
        return AlwaysKept(self.sink_blocks, self.local_blocks, self.forced == "on_top")

    @cached_property
    def value_term(self) -> ValueTerm:
        """Norm and weight of the value term."""
        return ValueTerm(self.value_norm, self.value_weight)

    def share_rules(self, num_kv_blocks: int) -> ShareRules:
        """Rules of `allocation="adaptive"` for a prompt of n key blocks."""
        dense = self.dense_blocks_of(num_kv_blocks), self.dense_last_blocks
        return ShareRules(self.threshold, self.sink_blocks, self.local_blocks, *dense)

    def dense_blocks_of(self, num_kv_blocks: int) -> int:
        """Query blocks at the start of a prompt of n key blocks that keep everything: all n up to `dense_up_to`."""
        return num_kv_blocks if num_kv_blocks * self.block_size <= self.dense_up_to else self.dense_first_blocks

    def _check_cells(self, name: str) -> None:
        cells = getattr(self, name)
        check_integer(name, cells, 1)
        if self.block_size % (cells * self.score_stride):
            raise ValueError(
                f"{name} * score_stride must divide block_size={self.block_size}, "
                f"got {name}={cells}, score_stride={self.score_stride}"
            )

    def _check_budget(self) -> None:
        given = [name for name in ("density", "k_start", "k_start_regimes") if getattr(self, name) is not None]
        if len(given) > 1:
            values = ", ".join(f"{name}={getattr(self, name)!r}" for name in given)
            raise ValueError(f"give at most one of density, k_start and k_start_regimes, got {values}")
        if self.density is not None:
            check_number("density", self.density, 0.0, 1.0, open_below=True)
        if isinstance(self.k_start, Integral) and not isinstance(self.k_start, bool):
            check_integer("k_start", self.k_start, 1)
        elif self.k_start is not None:
            check_number("k_start", self.k_start, 0.0, 1.0, open_below=True)
        if self.k_start_regimes is not None:
            self._check_regimes()

    def _check_regimes(self) -> None:
        try:
            regimes = tuple((start, share, extra) for start, share, extra in self.k_start_regimes)
        except (TypeError, ValueError):
            raise ValueError(
                "k_start_regimes must hold triples (from key blocks, share of the key blocks, blocks added), "
                f"got {self.k_start_regimes!r}"
            ) from None
        for start, share, extra in regimes:
            check_integer("k_start_regimes: from key blocks", start, 0)
            check_number("k_start_regimes: share of the key blocks", share, 0.0, 1.0)
            check_integer("k_start_regimes: blocks added", extra, 0)
        if not regimes or min(regimes)[0] != 0:
            raise ValueError(f"k_start_regimes must start at 0 key blocks, got {self.k_start_regimes!r}")
        object.__setattr__(self, "k_start_regimes", regimes)  # lists, as JSON gives them, become hashable

    def _merge_uniform(self) -> None:
        if self.allocation != "uniform":
            return
        if self.decay not in (1.0, DEFAULT_DECAY):
            raise ValueError(f"allocation='uniform' is decay=1, got decay={self.decay!r}; give one of the two")
        object.__setattr__(self, "allocation", "position_decay")
        object.__setattr__(self, "decay", 1.0)

    def _check_adaptive(self) -> None:
        if (self.allocation == "adaptive") != (self.threshold is not None):
            raise ValueError(
                "allocation='adaptive' and threshold go together, "
                f"got allocation={self.allocation!r}, threshold={self.threshold!r}; stem.calibrate solves the threshold"
            )
        if self.threshold is None:
            return
        check_number("threshold", self.threshold, 0.0, 1.0, open_below=True)
        given = [n for n in ("density", "k_start", "k_start_regimes") if getattr(self, n) is not None]
        if given:
            raise ValueError(f"allocation='adaptive' takes its budget from threshold, got {given[0]} as well")


def check_config(config: StemConfig) -> None:
    """Raise TypeError unless config is a StemConfig."""
    if not isinstance(config, StemConfig):
        raise TypeError(f"config must be a StemConfig, got {config!r}")

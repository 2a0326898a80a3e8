"""StemConfig: every knob of the method, in five sections, with unit, range, default and the paper's symbol."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from math import inf
from numbers import Integral
from typing import Literal, NamedTuple, get_args, get_origin, get_type_hints

from stem.validation import check_choice, check_integer, check_number

BlockSize = Literal[16, 32, 64, 128]

SECTIONS = {
    "grid": ("block_size", "compute"),
    "budget": ("density", "k_start", "k_start_regimes", "min_blocks", "allocation", "threshold", "lists", "dropped"),
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
        k_start_regimes=((0, 1.0, 0), (56, 0.2, 30), (160, 0.1, 30)), decay_from="k_start", forced="on_top",
        score_stride=8, value_norm="zscore",
    ),
    "hpc_ops": dict(
        k_start_regimes=((0, 1.0, 0), (56, 0.2, 30), (160, 0.1, 30)), decay=1.0, decay_from="k_start", forced="on_top",
        routing_scale="raw", value_norm="zscore_padded", value_weight=0.3,
    ),
    "adaptive": dict(
        allocation="adaptive", threshold=0.005, sink_blocks=1, local_blocks=2, dense_up_to=4096,
        score_stride=1, reduction="softmax", score_cells=8, score_peak=0.3, score_pooling="rms", value_weight=0.0,
        exact_last_blocks=1,
    ),
}  # fmt: skip


class AlwaysKept(NamedTuple):
    """Blocks that a row keeps whatever the scores are; `on_top` adds them to the budget."""

    sink_blocks: int
    local_blocks: int
    on_top: bool

    @property
    def count(self) -> int:
        """Forced blocks of a row that is long enough [blocks]."""
        return self.sink_blocks + max(self.local_blocks, 1)

    @property
    def added(self) -> int:
        """Forced blocks that a row may keep beside its budget [blocks]."""
        return self.count if self.on_top else 0


class ShareRules(NamedTuple):
    """Rules of `allocation="adaptive"` for a prompt."""

    threshold: float
    sink_blocks: int
    local_blocks: int
    dense_first_blocks: int
    dense_last_blocks: int


class ValueTerm(NamedTuple):
    norm: str
    weight: float


@dataclass(frozen=True)
class StemConfig:
    """Settings of the method in five sections, which SECTIONS lists too.

    Grid
        block_size: Tokens per query and key block, B in the paper: 16, 32, 64 or 128 [tokens].
        compute: dtype of the attention's products: that of the "input", or "fp8" (e4m3, sm_90, inference). Our choice.
    Budget, from at most one of density, k_start and k_start_regimes; with none of them, density is 0.25
        density: Share of the causal block pairs to compute, in (0, 1]; k_start is solved for. Our choice.
        k_start: Budget of the first row: blocks if int (>= 1), share of the key blocks if float in (0, 1]. Eq. 3.
        k_start_regimes: k_start by length: triples (from this many key blocks, share of the key blocks, blocks added).
        min_blocks: Lower bound of k_start, 54 in the paper. A binding bound exceeds `density` [blocks].
        allocation: "position_decay" (Eq. 3), "uniform" (the same with decay=1) or "adaptive" (threshold, no budget).
        threshold: With "adaptive", a block is kept if its share of its row's mass exceeds this, in (0, 1].
        lists: One for each query "head", or for a "group" with one key-value head, by its pooled queries. Our choice.
        dropped: "skip" ignores dropped blocks; "mean" keeps a token of mean key, mean value and logit + ln(block_size)
            for each one before the diagonal, "cells" one for every 16 tokens (FlashPrefill V2, arXiv 2608.19758). They
            cost 1 / block_size or 1 / 16 of dense attention; densities do not count them.
    Decay
        decay: k_end / k_start, mu in Eq. 3, in (0, 1]; 1 keeps the budget constant.
        decay_from: Row in which the decay starts: "first_row" (Eq. 3) or row "k_start" (AngelSlim, hpc-ops).
    Always kept
        sink_blocks: First key blocks [blocks].
        local_blocks: Most recent key blocks; they include the diagonal block, which is kept even at 0 [blocks].
        forced: Sink and local blocks are "inside" the budget (paper) or "on_top" of it (AngelSlim, hpc-ops).
        dense_first_blocks, dense_last_blocks: First and last query blocks that keep every block [blocks]. Our choice.
        dense_up_to: Prompts up to this length keep every block, which is faster than choosing [tokens]. Our choice.
    Scores and cells; the fields from score_cells on need reduction="softmax"
        score_stride: Tokens between antidiagonal samples, S in AngelSlim: a divisor of block_size [tokens].
        value_weight: Weight of the value term, beta in Eq. 7, >= 0; 0 leaves the routing term alone.
        value_norm: "log" of the largest norm (Eq. 7); z-scored logs: "zscore" (AngelSlim), "zscore_padded" (hpc-ops).
        routing_scale: "mean" averages q.k * scale over the samples (paper); "raw" drops the scale and 1/S (hpc-ops).
        reduction: Samples to block score: "mean" (paper), or "softmax" over the row's cells before the block sum.
        score_cells: Cells per key block; block_size / score_cells is a multiple of score_stride.
        score_query_cells: Cells per query block, as many as score_cells if None. Our choice.
        score_peak: Shift of a cell from mean (0) to extremes (1), in [0, 1]; above 0, score_stride is 1. Our choice.
        score_pooling: A query block's share is the "mean" or the root mean square ("rms") over its cells. Our choice.
        exact_last_blocks: Last query blocks whose shares are exact, from cells of one token [blocks]. A last block less
            than half full is exact too and does not count. A question longer than a block or elsewhere needs more. A
            chunk without prompt_length, a second turn and assisted decoding use their own last block. Our choice.
    """

    block_size: BlockSize = 128
    score_stride: int = 16
    density: float | None = None
    k_start: int | float | None = None
    k_start_regimes: tuple[tuple[int, float, int], ...] | None = None
    min_blocks: int = 0
    decay: float = 0.7
    decay_from: Literal["first_row", "k_start"] = "first_row"
    dense_first_blocks: int = 0
    dense_last_blocks: int = 0
    dense_up_to: int = 0
    sink_blocks: int = 4
    local_blocks: int = 4
    forced: Literal["inside", "on_top"] = "inside"
    value_weight: float = 0.2
    value_norm: Literal["log", "zscore", "zscore_padded"] = "log"
    routing_scale: Literal["mean", "raw"] = "mean"
    reduction: Literal["mean", "softmax"] = "mean"
    score_cells: int = 4
    score_query_cells: int | None = None
    score_peak: float = 0.0
    score_pooling: Literal["mean", "rms"] = "mean"
    exact_last_blocks: int = 0
    allocation: Literal["position_decay", "uniform", "adaptive"] = "position_decay"
    threshold: float | None = None
    lists: Literal["head", "group"] = "head"
    dropped: Literal["skip", "mean", "cells"] = "skip"
    compute: Literal["input", "fp8"] = "input"

    def __post_init__(self) -> None:
        for name, accepted in CHOICES.items():
            check_choice(name, getattr(self, name), accepted)
        for name, low in INTEGERS.items():
            if self._is_given(name):
                check_integer(name, getattr(self, name), low)
        for name, (low, high, open_below) in NUMBERS.items():
            if self._is_given(name):
                check_number(name, getattr(self, name), low, high, open_below=open_below)
                self._set(name, float(getattr(self, name)))  # 1 and 1.0 are one config here
        self._check_budget()
        self._check_cells()
        if self.allocation == "uniform":
            message = "allocation='uniform' is decay=1; give one of the two"
            self._require(self.decay in (1.0, StemConfig.decay), message, "decay")
            self._set("allocation", "position_decay")
            self._set("decay", 1.0)
        # operators take the config as text; torch.compile can read an attribute but cannot serialise a config
        self._set("as_json", json.dumps(asdict(self), default=lambda number: number.item()))

    def __eq__(self, other) -> bool:
        """Whether all settings are equal; k_start=1, a block, is not k_start=1.0, every block."""
        return self.as_json == other.as_json if isinstance(other, StemConfig) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.as_json)  # a text remembers its hash; hashing all fields takes some us a call

    @classmethod
    def preset(cls, name: str, **overrides) -> StemConfig:
        """The settings of a source, "paper" (v1), "angelslim" or "hpc_ops", or this repository's extension, "adaptive".

        Keyword arguments replace fields. `density` or `k_start` replaces the preset's schedule and floor; "adaptive"
        then has a constant budget at every length (`stem.calibrate` finds the threshold for a density instead). Use
        block_size=64 up to 32K tokens, where cells of "adaptive" hold 4 tokens, and 128 above, where they hold 16.

        Raises ValueError for an unknown name and TypeError for an unknown field.
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
        return AlwaysKept(self.sink_blocks, self.local_blocks, self.forced == "on_top")

    @cached_property
    def value_term(self) -> ValueTerm:
        return ValueTerm(self.value_norm, self.value_weight)

    def pooled_heads(self, q_heads: int, kv_heads: int) -> int:
        """Number of query heads that share one list."""
        return q_heads // kv_heads if self.lists == "group" else 1

    def share_rules(self, num_kv_blocks: int) -> ShareRules:
        """Rules of `allocation="adaptive"` for a prompt of n key blocks."""
        dense = self.dense_blocks_of(num_kv_blocks), self.dense_last_blocks
        return ShareRules(self.threshold, self.sink_blocks, self.local_blocks, *dense)

    def dense_blocks_of(self, num_kv_blocks: int) -> int:
        """Query blocks at the start of a prompt of n key blocks that keep everything: all n up to `dense_up_to`."""
        return num_kv_blocks if num_kv_blocks * self.block_size <= self.dense_up_to else self.dense_first_blocks

    def _check_budget(self) -> None:
        given = [name for name in ("density", "k_start", "k_start_regimes") if self._is_given(name)]
        self._require(len(given) < 2, "give at most one of density, k_start and k_start_regimes", *given)
        if isinstance(self.k_start, Integral) and not isinstance(self.k_start, bool):
            check_integer("k_start", self.k_start, 1)
        elif self.k_start is not None:
            check_number("k_start", self.k_start, 0.0, 1.0, open_below=True)
        if self.k_start_regimes is not None:
            self._check_regimes()
        is_adaptive = self.allocation == "adaptive"
        message = "allocation='adaptive' and threshold go together (stem.calibrate solves the threshold)"
        self._require(is_adaptive == (self.threshold is not None), message, "allocation", "threshold")
        self._require(not (is_adaptive and given), "allocation='adaptive' takes its budget from threshold only", *given)

    def _check_regimes(self) -> None:
        try:
            regimes = tuple((start, share, extra) for start, share, extra in self.k_start_regimes)
        except (TypeError, ValueError):
            message = "k_start_regimes must hold triples (from key blocks, share of the key blocks, blocks added)"
            raise ValueError(f"{message}, got {self.k_start_regimes!r}") from None
        for start, share, extra in regimes:
            check_integer("k_start_regimes: from key blocks", start, 0)
            check_number("k_start_regimes: share of the key blocks", share, 0.0, 1.0)
            check_integer("k_start_regimes: blocks added", extra, 0)
        if not regimes or min(regimes)[0] != 0:
            raise ValueError(f"k_start_regimes must start at 0 key blocks, got {self.k_start_regimes!r}")
        self._set("k_start_regimes", regimes)  # lists, as JSON gives them, become hashable

    def _check_cells(self) -> None:
        is_softmax = self.reduction == "softmax"
        divides = self.block_size % self.score_stride == 0
        self._require(divides, "score_stride must divide block_size", "block_size", "score_stride")
        for name in ("score_cells", "score_query_cells"):
            if is_softmax and self._is_given(name):
                divides = self.block_size % (getattr(self, name) * self.score_stride) == 0
                names = "block_size", name, "score_stride"
                self._require(divides, f"{name} * score_stride must divide block_size", *names)
        is_met = not self.score_peak or (is_softmax and self.score_stride == 1)
        message = "score_peak > 0 needs reduction='softmax' and score_stride=1"
        self._require(is_met, message, "score_peak", "reduction", "score_stride")
        message = "exact_last_blocks > 0 needs reduction='softmax'"
        self._require(is_softmax or not self.exact_last_blocks, message, "exact_last_blocks", "reduction")

    def _is_given(self, name: str) -> bool:
        """Whether a field has a value; None is no value where it is the default."""
        return getattr(self, name) is not None or getattr(StemConfig, name) is not None

    def _require(self, is_met: bool, accepted: str, *names: str) -> None:
        if not is_met:
            raise ValueError(f"{accepted}, got {', '.join(f'{name}={getattr(self, name)!r}' for name in names)}")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen


CHOICES = {name: get_args(hint) for name, hint in get_type_hints(StemConfig).items() if get_origin(hint) is Literal}
INTEGERS = {  # lower bounds
    "block_size": 16, "score_stride": 1, "min_blocks": 0, "dense_first_blocks": 0, "dense_last_blocks": 0,
    "dense_up_to": 0, "sink_blocks": 0, "local_blocks": 0, "score_cells": 1, "score_query_cells": 1,
    "exact_last_blocks": 0,
}  # fmt: skip
NUMBERS = {  # lower bound, upper bound, whether the lower bound is excluded
    "density": (0.0, 1.0, True), "threshold": (0.0, 1.0, True), "decay": (0.0, 1.0, True),
    "value_weight": (0.0, inf, False), "score_peak": (0.0, 1.0, False),
}  # fmt: skip


def check_config(config: StemConfig) -> None:
    """Raise TypeError unless config is a StemConfig."""
    if not isinstance(config, StemConfig):
        raise TypeError(f"config must be a StemConfig, got {config!r}")

"""Token Position-Decay: how many key blocks each query block keeps, and what that costs."""

from __future__ import annotations

from functools import lru_cache
from numbers import Integral
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stem.cells import blocks_at_least_half_full
from stem.config import StemConfig, check_config
from stem.transforms import lasting_tensors
from stem.validation import check_integer

DEFAULT_DENSITY = 0.25


def block_budget(num_kv_blocks: int, config: StemConfig) -> Tensor:
    """Key blocks to keep in each query block of a whole prompt (Stem, Eq. 3).

    Args:
        num_kv_blocks: Number of key blocks n of the prompt, >= 1 [blocks]. A chunk of query blocks uses the last rows.
    Returns:
        int32 [num_kv_blocks] on the CPU, entry i in 1..i + 1. Sink, local and diagonal blocks are inside it, except
        with `forced="on_top"`, where `select_blocks` adds them. With `allocation="adaptive"` it is the bound i + 1.
    Raises:
        ValueError, TypeError: If num_kv_blocks is no int >= 1, or config no StemConfig.
    """
    check_integer("num_kv_blocks", num_kv_blocks, 1)
    check_config(config)
    return torch.tensor(_budget(num_kv_blocks, config), dtype=torch.int32, device="cpu")


class BlockRows(NamedTuple):
    """The query blocks of a call: rows first .. stop - 1 of a prompt; the keys end with block stop - 1."""

    first: int
    stop: int
    prompt: int  # blocks of the whole prompt, >= stop
    half_full: int  # blocks of the whole prompt without a last one that is less than half full

    @classmethod
    @lru_cache(maxsize=4096)
    def of(cls, q_len: int, kv_len: int, block_size: int, prompt_length: int | None = None) -> BlockRows:
        """Rows of the last q_len of kv_len positions of a prompt of prompt_length tokens (default kv_len)."""
        prompt = kv_len if prompt_length is None else prompt_length
        blocks = -(-prompt // block_size), blocks_at_least_half_full(prompt, block_size)
        return cls((kv_len - q_len) // block_size, -(-kv_len // block_size), *blocks)

    def budget(self, config: StemConfig) -> Tensor:
        """Budget of the whole prompt for the rows up to `stop`: int32 [stop], as `select_blocks` takes it."""
        return block_budget(self.prompt, config)[: self.stop]

    def of_these(self, config: StemConfig) -> tuple[int, ...]:
        """Budget of these rows only."""
        return _budget(self.prompt, config)[self.first : self.stop]

    def kept_by_row(self, config: StemConfig) -> tuple[int, ...]:
        """Kept key blocks of each of these rows in one head, where scores do not decide their number."""
        counts, least = range(self.first + 1, self.stop + 1), config.always_kept.added
        return tuple(min(n, max(kept, least)) for n, kept in zip(counts, self.of_these(config), strict=True))

    def at_the_end(self, config: StemConfig) -> StemConfig:
        """Config for a prompt that ends with these rows, giving them the blocks that the whole prompt gives them."""
        return config if self.prompt == self.stop else _fewer_last_blocks(self, config)


@lru_cache(maxsize=4096)
def full_rows(rows: BlockRows, config: StemConfig) -> int:
    """Count of these query blocks, from the first on, that keep all their causal blocks whatever the scores are."""
    if config.allocation == "adaptive":
        return max(0, min(rows.stop, config.dense_blocks_of(rows.prompt)) - rows.first)
    budget = rows.of_these(config)
    return next((row - rows.first for row, kept in enumerate(budget, rows.first) if kept <= row), len(budget))


def keeps_every_block(rows: BlockRows, config: StemConfig) -> bool:
    """Whether these query blocks keep all their causal blocks whatever the scores are (density 1)."""
    return full_rows(rows, config) == rows.stop - rows.first


@lru_cache(maxsize=4096)
def scored_rows(rows: BlockRows, config: StemConfig) -> range:
    """These query blocks, counted from 0, from the first to the last about which scores decide; empty if none is."""
    if config.allocation == "adaptive":
        return range(full_rows(rows, config), rows.stop - rows.first)
    forced = config.always_kept.count
    inside = forced - config.always_kept.added  # budget that goes to forced blocks
    budget = enumerate(rows.of_these(config), rows.first)
    open_rows = [row - rows.first for row, kept in budget if forced <= row and inside < kept <= row]
    return range(open_rows[0], open_rows[-1] + 1) if open_rows else range(0)


@lru_cache(maxsize=4096)
def kept_blocks(rows: BlockRows, config: StemConfig) -> int | None:
    """Key blocks that these query blocks keep in one head, the same for all finite inputs; None if scores decide it."""
    if not keeps_every_block(rows, config):
        if config.allocation == "adaptive" or (config.forced == "on_top" and scored_rows(rows, config)):
            return None
    return sum(rows.kept_by_row(config))


@lru_cache(maxsize=4096)
def device_budget(rows: BlockRows, config: StemConfig, device: torch.device) -> tuple[Tensor, int]:
    """The budget of these query blocks, int32 [nq] on a device, and the length of the longest list it can give.

    Cached: only the first call waits for the copy. A plan that a CUDA graph has recorded keeps its budget alive.
    """
    budget = rows.of_these(config)
    with lasting_tensors():
        on_device = torch.tensor(budget, dtype=torch.int32, device=device)
    return on_device, min(rows.stop, max(budget) + config.always_kept.added)


def causal_pairs(num_kv_blocks: int) -> int:
    """Block pairs (i, j), j <= i, of a whole prompt of n key blocks, which density 1 computes."""
    return num_kv_blocks * (num_kv_blocks + 1) // 2


@lru_cache(maxsize=256)
def _fewer_last_blocks(rows: BlockRows, config: StemConfig) -> StemConfig:
    last = max(0, config.dense_last_blocks - (rows.prompt - rows.stop))
    exact = max(0, config.exact_last_blocks - (rows.half_full - rows.stop))
    first = config.dense_blocks_of(rows.prompt)
    return config.replace(dense_up_to=0, dense_first_blocks=first, dense_last_blocks=last, exact_last_blocks=exact)


@lru_cache(maxsize=256)
def _budget(n: int, config: StemConfig) -> tuple[int, ...]:
    causal = np.arange(1, n + 1)
    if config.allocation == "adaptive" or n * config.block_size <= config.dense_up_to:
        budget = causal
    elif config.k_start is None and config.k_start_regimes is None:
        budget = _solve_density(n, config)
    else:
        budget = _rows(n, _k_start(n, config), config)
    return tuple(budget.tolist())


def _k_start(n: int, config: StemConfig) -> float:
    if config.k_start_regimes is not None:
        _, share, extra = max(regime for regime in config.k_start_regimes if regime[0] <= n)
        k_start = share * n + extra
    else:
        k_start = config.k_start if isinstance(config.k_start, Integral) else config.k_start * n
    k_start = max(k_start, config.min_blocks)
    return min(n, int(k_start) if config.decay_from == "k_start" else k_start)


def _rows(n: int, k_start: float, config: StemConfig) -> np.ndarray:
    """The schedule for a given k_start: int64 [n], row i in 1..i + 1."""
    row = np.arange(1, n + 1)
    if config.decay_from == "first_row":
        budget = np.floor(k_start - (k_start * (1 - config.decay) / n) * row)
    else:
        first = min(n, int(k_start))
        budget = np.full(n, float(first))
        budget[first:] = np.floor(np.linspace(k_start, config.decay * k_start, n - first))
    is_dense = (row <= config.dense_first_blocks) | (row > n - config.dense_last_blocks)
    return np.where(is_dense, row, np.clip(budget, 1, row).astype(np.int64))


def _solve_density(n: int, config: StemConfig) -> np.ndarray:
    """Largest schedule of at most `density` of the causal pairs; the earliest open rows get the remaining blocks."""
    row = np.arange(1, n + 1)
    target = round((DEFAULT_DENSITY if config.density is None else config.density) * causal_pairs(n))
    high = n / config.decay + 1  # every row is full
    low = min(max(1.0, config.min_blocks), high)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _rows(n, middle, config).sum() <= target else (low, middle)
    budget = _rows(n, low, config)
    open_rows = np.flatnonzero(budget < row)
    budget[open_rows[: max(0, target - budget.sum())]] += 1
    return budget

"""Bounds of a speed-up, from the times of one prompt at several densities and from the clock."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

LAYERS, HEADS, HEAD_DIM = 8, 32, 128  # of the model of first_token.large_model
MULTIPROCESSORS, OPERATIONS = 132, 4096  # of an H200, and bf16 operations of one of them in a clock


def largest_speedup(dense_ms: float, outside_ms: float) -> float:
    """Speed-up of a model whose attention cost nothing: all its time over the time outside attention."""
    return dense_ms / outside_ms


def parts(ms: Mapping[float, float]) -> tuple[float, float]:
    """Time outside attention and of attention to all blocks [ms], on a line through the times at densities 0.25, 0.1.

    Time that does not depend on the density, such as that of scores, counts as outside.
    """
    attention = (ms[0.25] - ms[0.1]) / 0.15
    return ms[0.1] - 0.1 * attention, attention


def operations(tokens: int) -> int:
    """Operations of dense causal attention in the model: two products of two operations each."""
    return LAYERS * 2 * 2 * HEADS * HEAD_DIM * tokens**2 // 2


def peak(clock_mhz: float) -> float:
    """bf16 operations of the GPU in a millisecond, with no idle clock."""
    return MULTIPROCESSORS * OPERATIONS * clock_mhz * 1e3


def perfect_speedups(rows: pd.DataFrame) -> dict[float, float]:
    """Speed-up over vLLM by density, were attention to kept blocks computed at the peak, and all else as it is.

    Args:
        rows: One for each density, as index, 1.0 of vLLM, with first_token_ms, clock_mhz and tokens. A perfect kernel
            runs at the clock of Stem's row.
    """
    ms = rows.first_token_ms
    outside, _ = parts(ms)
    perfect = {x: outside + x * operations(int(rows.tokens[x])) / peak(rows.clock_mhz[x]) for x in rows.index if x < 1}
    return {density: largest_speedup(ms[1.0], time) for density, time in perfect.items()}

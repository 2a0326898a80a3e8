"""Bounds of a speed-up from the times at two densities, and from the clock."""

import pandas as pd
import pytest

from stem.experiments.serving import bounds, first_token
from stem.experiments.serving.first_token import large_model


def test_speedup_of_attention_for_nothing():
    assert bounds.largest_speedup(2400.0, 750.0) == 3.2


def test_times_lie_on_a_line():
    assert bounds.parts({0.25: 100 + 0.25 * 400, 0.1: 100 + 0.1 * 400}) == pytest.approx((100, 400))


def test_operations_of_the_model(monkeypatch):
    shapes = []
    monkeypatch.setattr(
        first_token,
        "engine",
        lambda folder, *args, **options: shapes.append(pd.read_json(f"{folder}/config.json", typ="series")),
    )
    with large_model() as start:
        start(None, 1024, None)
    (shape,) = shapes
    heads, width = shape.num_attention_heads, shape.hidden_size
    assert (bounds.LAYERS, bounds.HEADS, bounds.HEAD_DIM) == (shape.num_hidden_layers, heads, width // heads)
    pairs = 100 * 100 // 2  # about those of causal attention
    assert bounds.operations(100) == shape.num_hidden_layers * 2 * pairs * 2 * width


def test_a_perfect_kernel_runs_at_the_peak():
    dense = bounds.operations(131072)  # in a ms at 1,000 MHz the GPU does 132 * 4096 * 1e6
    ms = {1.0: 3000.0, 0.25: 500 + 0.25 * 1200, 0.1: 500 + 0.1 * 1200}
    rows = pd.DataFrame(dict(first_token_ms=ms, tokens=131072, clock_mhz={1.0: 1600.0, 0.25: 1000.0, 0.1: 2000.0}))
    found = bounds.perfect_speedups(rows)
    assert found.keys() == {0.25, 0.1}
    assert found[0.25] == pytest.approx(3000 / (500 + 0.25 * dense / (132 * 4096 * 1e6)))
    assert found[0.1] == pytest.approx(3000 / (500 + 0.1 * dense / (132 * 4096 * 2e6)))

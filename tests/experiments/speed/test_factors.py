"""Factors of a speed-up, and configs that choose nothing."""

import pandas as pd
import pytest

import stem
from stem.experiments.speed import factors


def test_factors_multiply_to_the_speed_up():
    timed = [("attention", "sdpa_cudnn", "dense", 8.0, 100.0), ("attention", "sdpa_flash", "dense", 16.0, 100.0)]
    timed += [("attention", "stem_hopper", "default", 2.5, 25.0), ("attention", "stem_triton", "default", 5.0, 25.0)]
    timed += [("operator", "stem", "default", 4.0, 25.0), ("attention", "fa3_fp8", "dense", 1.0, 100.0)]
    columns = ["operation", "provider", "config", "latency_ms", "flop"]
    rows = pd.DataFrame(timed, columns=columns).assign(tokens=4096)
    found = factors.factors(rows.assign(tflops=rows.flop / rows.latency_ms), "default")
    assert found.index.tolist() == [4096] and found.dense.item() == "cuDNN"
    assert found[["pairs", "rate", "share", "operator"]].iloc[0].tolist() == pytest.approx([4, 0.8, 0.625, 2.0])


@pytest.mark.parametrize(
    ("options", "tokens", "expected"),
    [
        (dict(density=1.0), 4096, factors.EVERY_BLOCK),
        (dict(density=0.25), 4096, factors.WINDOW),
        (dict(density=0.25), 32768, factors.CHOSEN),
    ],
)
def test_configs_that_choose_nothing_are_named(options, tokens, expected):
    assert factors.kept_by(stem.StemConfig(**options), tokens) == expected


def test_presets_that_are_dense_on_short_prompts():
    table = factors.kinds(["released", "adaptive", "default"], [2048, 16384])
    assert table.loc[2048].tolist() == [factors.EVERY_BLOCK, factors.EVERY_BLOCK, factors.WINDOW]
    assert table.loc[16384].tolist() == [factors.CHOSEN] * 3


def test_table_shows_the_factors_and_marks_what_has_no_choice(monkeypatch):
    timed = [("attention", "sdpa_cudnn", "dense", 8.0, 100.0), ("attention", "stem_hopper", "default", 2.5, 25.0)]
    timed += [("operator", "stem", "default", 4.0, 25.0)]
    rows = pd.DataFrame(timed, columns=["operation", "provider", "config", "latency_ms", "flop"])
    rows = rows.assign(tokens=4096, device="a GPU", profile="full", tflops=rows.flop / rows.latency_ms)
    monkeypatch.setattr(factors, "full_rows", lambda experiment: rows)
    line = factors.table().splitlines()[-1]
    assert line == "| 4K | density 0.25 | 4× | 0.8× | 62% | 2× (cuDNN) | sinks and window |"

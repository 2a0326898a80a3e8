"""stem.experiments.speed.coverage: what is tried is what its name says, and errors are told."""

import pandas as pd
import pytest

import stem
from stem.experiments.speed import coverage

RIGHT = 1e-6  # relative error in fp32


@pytest.fixture
def calls(monkeypatch):
    """Arguments and selections of the operator's calls."""
    found, original = [], stem.stem_attention

    def attention(q, k, v, config, **options):
        out, selection = original(q, k, v, config, **options)
        found.append((q, config, options, selection))
        return out, selection

    monkeypatch.setattr(stem, "stem_attention", attention)
    return found


def test_features_are_tried_on_prompts_that_drop_blocks(calls):
    kept = {}
    for feature, (config, more) in coverage.FEATURES.items():
        if config.compute == "fp8":
            continue
        assert coverage.attend(config, "torch", "cpu", **more) < RIGHT
        kept[feature] = calls[-1][3].density()
    dropped = kept.keys() - {"`adaptive`", "decode"}  # random normal keys share all weight; one row has few blocks
    assert all(kept[feature] < 0.8 for feature in dropped), kept
    of = dict(zip(kept, calls, strict=True))
    assert of["blocks of 64"][3].block_size == of["groups, blocks of 64"][3].block_size == 64
    assert of["groups, blocks of 64"][3].to_mask()[:, 0].equal(of["groups, blocks of 64"][3].to_mask()[:, 1])
    assert of['means (`dropped="mean"`)'][3].stand_in_tokens == 128
    assert of["sinks"][2]["sinks"].shape == (4,) and of["decode"][0].shape[2] == 1 and of["chunks"][0].shape[2] == 300
    assert of["gradients"][0].requires_grad


@pytest.mark.parametrize("feature", coverage.FEATURES)
def test_a_wrong_result_has_a_large_error(monkeypatch, feature):
    config, more = coverage.FEATURES[feature]
    original = stem.stem_attention

    def wrong(q, k, v, *args, **options):
        out, selection = original(q, k, v.flip(2), *args, **options)
        return out, selection

    monkeypatch.setattr(stem, "stem_attention", wrong)
    if config.compute != "fp8":
        assert coverage.attend(config, "torch", "cpu", **more) > 0.1


def test_rows_and_table(monkeypatch, tmp_path):
    monkeypatch.setattr(coverage, "IMPLS", ("torch", "hopper"))
    monkeypatch.setenv("STEM_RESULTS", str(tmp_path))
    monkeypatch.setattr(coverage.records, "repository_root", lambda: tmp_path)  # no rows but those of this test
    monkeypatch.setattr(
        coverage, "FEATURES", {"sinks": coverage.FEATURES["sinks"], "FP8": (stem.StemConfig(compute="fp8"), {})}
    )
    coverage.main(["--profile", "full", "--device", "cpu"])
    (file,) = (tmp_path / "speed" / "coverage").iterdir()
    rows = pd.read_csv(file)
    assert list(rows.error.notna()) == [True, False, False, False] and rows.error[0] < RIGHT
    lines = coverage.table().splitlines()
    torch_line, hopper_line = (line for line in lines if line.startswith("| `"))
    assert (
        torch_line == f"| `torch` | {rows.error[0]:.1e} | error 1 |"
        and hopper_line == "| `hopper` | error 2 | error 3 |"
    )
    assert "1. `ValueError: impl='torch' does not compute in FP8" in coverage.table()
    assert "2. `ValueError: impl='hopper' does not cover device cpu" in coverage.table()

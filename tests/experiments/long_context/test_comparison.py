"""Comparisons: rows hold pairs on equal samples, and a study takes the measurements that it holds."""

import pytest
import torch

import stem
from stem.experiments import documents
from stem.experiments.long_context import comparison, measures, methods, samples
from stem.experiments.long_context.study import Study

SPARSE = stem.StemConfig(density=0.4, block_size=16, sink_blocks=1, local_blocks=1)


def test_rows_hold_the_difference_to_dense_on_the_same_samples(ruler_rows, tokenizer, model):
    small = comparison.Comparison(model, tokenizer, "tiny")
    prompts = samples.exact_prompts("niah_multikey_1", tokenizer, 256, 4)
    method = methods.Method("stem", SPARSE, 16, 0.4)
    windows = {kind: torch.randint(1000, (2, 64)) for kind in "ab"}
    for of in (methods.Method("dense"), method):
        small.answers(of, prompts)
        small.loss(of, windows)
    dense, sparse = ([row for row in small.rows if row["method"] == name] for name in ("dense", "stem"))
    assert len(dense) == len(sparse) == 2 + 2 + 4
    assert all(row["difference"] == row["low"] == row["high"] == 0 and row["density"] == 1 for row in dense)
    for ours, theirs in zip(sparse, dense, strict=True):
        assert ours["dense"] == theirs["value"]
        assert ours["difference"] == pytest.approx(ours["value"] - ours["dense"], rel=1e-2, abs=1e-3)
        assert ours["low"] <= ours["difference"] <= ours["high"] and 0.3 < ours["density"] < 0.5
    answer = sparse[0]
    with stem.hf.stem_prefill(model, SPARSE):
        logp, _ = measures.answer_scores(model, prompts)
    assert answer["value"] == pytest.approx(float(logp.mean()), rel=1e-4) and answer["count"] == 4
    assert [(row["start"], row["stop"]) for row in sparse[2:6]] == [(0, 16), (16, 32), (32, 48), (48, 64)]
    assert sparse[7]["task"] == "b" and sparse[7]["start"] == 32
    losses = measures.document_losses(model, windows["b"])[:, 32:].mean()
    assert sparse[7]["dense"] == pytest.approx(float(losses), rel=1e-4)
    mine = [row for row in small.samples if row["method"] == "stem" and row["measure"] == "answer"]
    assert [row["value"] for row in mine] == pytest.approx(logp.tolist()) and {row["ms"] > 0 for row in mine} == {True}
    small.loss(method, {kind: ids + 1 for kind, ids in windows.items()})
    assert small.rows[-1]["dense"] != sparse[7]["dense"]  # other documents, so dense was measured again


def test_a_small_study_runs_and_stops_at_its_limit(ruler_rows, tokenizer, model, monkeypatch):
    monkeypatch.setattr(documents, "KINDS", {"prose": lambda: documents.prose()[:9000]})
    monkeypatch.setattr(samples, "_KIND_TOKENS", {})
    monkeypatch.setattr(samples.document_windows, "__defaults__", (("prose",),))
    options = dict(windows=1, names=("stem", "random"), densities=(0.5,), block_sizes=(32,), asked_at=(0.5, 32))
    study = Study((256,), 1, ("niah_multikey_2",), generates="niah_multikey_2", **options)
    told, saved = [], []
    found = comparison.run(study, model, tokenizer, "tiny", show=told.append, save=saved.append)
    measures = {(row["method"], row["measure"]) for row in found}
    every = {"answer", "right", "loss", "generated", "time"}
    assert measures == {(method, of) for method in ("dense", "window", "stem", "random") for of in every}
    assert saved[-1] == found and all(row["value"] > 0 for row in found if row["measure"] == "time")
    assert comparison.run(study, model, tokenizer, "tiny", show=told.append, limit_s=-1) == []
    assert told[-1] == "16 measurements left out after -1 s"
    times, *others = (comparison.run(study, model, tokenizer, "tiny", part=(i, 2), show=told.append) for i in range(3))
    others = sum(others, [])
    assert {row["measure"] for row in times} == {"time"} and len(times) + len(others) == len(found)
    key = ("method", "measure", "task", "start", "value", "dense", "low", "high")
    whole = {tuple(row.get(name) for name in key) for row in found if row["measure"] != "time"}
    assert {tuple(row.get(name) for name in key) for row in others} == whole


def test_the_adaptive_preset_is_calibrated_when_it_is_first_used(ruler_rows, tokenizer, model, monkeypatch):
    asked = []

    def calibrated(model, tokenizer, length, density, config, show):
        asked.append((length, density))
        return config.replace(threshold=0.9) if density > 0.3 else None

    monkeypatch.setattr(comparison, "calibrated", calibrated)
    monkeypatch.setattr(comparison, "document_windows", lambda *_: {"prose": torch.randint(1000, (1, 64))})
    options = dict(names=tuple(methods.ADAPTIVE), densities=(0.2, 0.5), block_sizes=(32,), asked_at=(0.5, 32))
    study = Study((256,), 1, ("niah_multikey_2",), generates=None, **options)
    found = comparison.run(study, model, tokenizer, "tiny", show=lambda line: None)
    adaptive, cells_alone, dense_end, window = (
        {(row["asked"], row["density"]) for row in found if row["method"] == name and row["measure"] == "answer"}
        for name in (*methods.ADAPTIVE, "window")
    )
    assert sorted(asked) == [(256, 0.2)] * 3 + [(256, 0.5)] * 3
    assert window == {(None, 0.5833)} and adaptive == cells_alone == {(0.5, 0.5833)}  # the forced blocks
    assert dense_end == {(0.5, 0.7222)}  # 26 of 36 pairs: those 21, and all 8 of the last row


def test_a_measurement_that_fails_is_raised_after_the_others(ruler_rows, tokenizer, model, monkeypatch):
    def fail(q, k, v):
        raise RuntimeError("no blocks today")

    bad = methods.Method("random", fail, 32, 0.5)
    monkeypatch.setattr(
        comparison, "methods", lambda *_: [bad, methods.Method("window", methods.window_control(32), 32)]
    )
    options = dict(names=("random",), densities=(0.5,), block_sizes=(32,), asked_at=(0.5, 32), generates=None)
    monkeypatch.setattr(comparison, "document_windows", lambda *_: {"prose": torch.randint(1000, (1, 64))})
    saved = []
    with pytest.raises(ExceptionGroup, match="3 of 9 measurements of tiny failed") as raised:
        study = Study((256,), 1, ("niah_multikey_2",), **options)
        comparison.run(study, model, tokenizer, "tiny", show=lambda line: None, save=saved.append)
    assert {row["method"] for row in saved[-1]} == {"dense", "window"}
    assert "method='random'" in raised.value.exceptions[0].__notes__[0]

"""Comparisons: rows hold pairs on equal samples, forced blocks are chosen elsewhere, and a study runs to its limit."""

import argparse
import traceback
from collections import Counter
from dataclasses import replace

import pytest
import torch

import stem
from stem.experiments import documents, records
from stem.experiments.long_context import answers, choice, comparison, loss, measures, methods, samples
from stem.experiments.long_context.comparison import Study

SPARSE = stem.StemConfig(density=0.4, block_size=16, sink_blocks=1, local_blocks=1)
METHOD = methods.Method("stem", SPARSE, 16, 0.4, methods.Forced(1, 1))


def test_rows_hold_the_difference_to_dense_on_the_same_samples(ruler_rows, tokenizer, model):
    small = comparison.Comparison(model, tokenizer, "tiny")
    prompts = samples.exact_prompts("niah_multikey_1", tokenizer, 256, 4)
    windows = {kind: torch.randint(1000, (2, 64)) for kind in "ab"}
    for of in (methods.Method("dense"), METHOD):
        small.answers(of, prompts)
        small.loss(of, windows)
    dense, sparse = ([row for row in small.rows if row["method"] == name] for name in ("dense", "stem"))
    assert len(dense) == len(sparse) == 2 + 4 + 2 * 2
    assert all(row["difference"] == row["low"] == row["high"] == 0 and row["density"] == 1 for row in dense)
    assert dense[0]["chosen"] is None and "sink_blocks" not in dense[0]
    for ours, theirs in zip(sparse, dense, strict=True):
        assert ours["dense"] == theirs["value"]
        assert ours["difference"] == pytest.approx(ours["value"] - ours["dense"], rel=1e-2, abs=1e-3)
        assert ours["low"] <= ours["difference"] <= ours["high"] and 0.3 < ours["density"] < 0.5
        assert (ours["sink_blocks"], ours["local_blocks"], ours["dense_last_blocks"]) == (1, 1, 0)
    answer = sparse[0]
    with stem.hf.stem_prefill(model, SPARSE):
        logp, _ = measures.answer_scores(model, prompts)
    assert answer["value"] == pytest.approx(float(logp.mean()), rel=1e-4) and answer["count"] == 4
    assert [float(x) for x in answer["values"].split()] == pytest.approx(logp.tolist(), rel=1e-4)
    forced = 1 + 2 * 15  # of 16 blocks: the diagonal, and block 0 from the second row on
    assert answer["chosen"] == pytest.approx(1 - forced / (answer["density"] * 136), abs=2e-4)
    assert [(row["start"], row["stop"]) for row in sparse[2:6]] == [(0, 16), (16, 32), (32, 48), (48, 64)]
    assert [(row["task"], row["start"]) for row in sparse[6:]] == [("a", 0), ("a", 32), ("b", 0), ("b", 32)]
    losses = measures.document_losses(model, windows["b"])
    assert sparse[8]["dense"] == pytest.approx(float(losses.mean()), rel=1e-4)
    assert sparse[9]["dense"] == pytest.approx(float(losses[:, 32:].mean()), rel=1e-4)
    mine = [row for row in small.samples if row["method"] == "stem" and row["measure"] == "answer"]
    assert [row["value"] for row in mine] == pytest.approx(logp.tolist())
    small.loss(METHOD, {kind: ids + 1 for kind, ids in windows.items()})
    assert small.rows[-1]["dense"] != sparse[9]["dense"]  # other documents, so dense was measured again


def test_dense_layers_stay_dense_and_do_not_count_as_chosen(ruler_rows, tokenizer, model):
    small = comparison.Comparison(model, tokenizer, "tiny")
    one_dense = methods.Method("stem, 1 dense layer", SPARSE, 16, None, methods.Forced(1, 1), dense_layers=1)
    windows = {"a": torch.randint(1000, (1, 256))}
    for of in (METHOD, one_dense):
        small.loss(of, windows)
    every, half = small.rows[0], small.rows[-1]
    assert half["density"] == pytest.approx((1 + every["density"]) / 2, abs=1e-4)
    assert half["chosen"] == pytest.approx(every["chosen"], abs=1e-3)


@pytest.fixture
def windows(monkeypatch):
    monkeypatch.setattr(comparison.samples, "document_windows", lambda *_, **__: {"prose": torch.randint(99, (8, 64))})
    monkeypatch.setattr(comparison.samples, "calibration_windows", lambda *_: [torch.randint(99, (1, 256))])


STUDY = Study((256,), ("niah_multikey_2", "documents"), ("stem", "random", "a_shape"), (0.6,), (32,), samples=2)


def test_a_small_study_runs_and_stops_at_its_limit(ruler_rows, tokenizer, model, windows, monkeypatch):
    monkeypatch.setattr(methods, "DENSE_LAYERS", 1)  # of the tiny model's two
    told, saved = [], []
    study = Study(**{**vars(STUDY), "generates": True, "presets": True, "samples": 1})
    found = comparison.run(study, model, tokenizer, "tiny", show=told.append, save=saved.append)
    seen = {(row["method"], row["measure"]) for row in found}
    names = {"dense", "window", "stem", "random", "a_shape", *(method.name for method in methods.presets())}
    assert seen == {(method, of) for method in names for of in ("answer", "right", "loss", "generated")}
    assert saved[-1] == found
    assert {row["chosen"] for row in found if row["method"] == "a_shape"} == {None}
    assert all(
        row["chosen"] >= methods.LEAST_CHOSEN
        for row in found
        if row["asked"] == 0.6 and row["measure"] == "answer" and row["method"] != "a_shape"
    )
    assert comparison.run(study, model, tokenizer, "tiny", show=told.append, limit_s=-1) == []
    assert told[-1] == "18 of 18 measurements left out after -1 s"


def test_dense_attention_and_presets_are_measured_once_for_all_block_sizes(
    ruler_rows, tokenizer, model, windows, monkeypatch
):
    monkeypatch.setattr(methods, "DENSE_LAYERS", 1)
    changes = dict(tasks=("niah_multikey_2",), names=("random",), block_sizes=(16, 32), presets=True)
    found = comparison.run(Study(**{**vars(STUDY), **changes}), model, tokenizer, "tiny", show=lambda _: None)
    rows = [tuple(row.get(name) for name in comparison.SAME) for row in found]
    assert len(rows) == len(set(rows))
    count = Counter(row["method"] for row in found)
    assert count["dense"] == count["stem, paper"] == 2 and count["window"] == count["random"] == 4  # answer, right


def test_methods_that_have_nothing_to_choose_have_no_row(ruler_rows, tokenizer, model, windows):
    told = []
    study = Study((256,), ("niah_multikey_2",), ("stem", "vertical_slash"), (0.45,), (32,), samples=1)
    found = comparison.run(study, model, tokenizer, "tiny", show=told.append)
    assert {row["method"] for row in found} == {"dense", "window"}  # 15 of 36 pairs are forced at least
    assert "stem at density 0.45 has nothing to choose at 256 tokens, blocks of 32" in told


def test_forced_blocks_are_those_that_lose_least_on_calibration_samples(tokenizer, model, monkeypatch):
    lost, asked = {(1, 1): 3.0, (1, 2): 1.0, (2, 4): 2.0, (4, 4): 9.0}, []

    def loss_of(self, method, length, of_documents):
        asked.append((method.forced.sink_blocks, method.forced.local_blocks, of_documents))
        return lost[asked[-1][:2]] * (1 if of_documents else -1)

    monkeypatch.setattr(comparison.ForcedChoice, "_loss", loss_of)
    choice = comparison.ForcedChoice(model, tokenizer)
    best = choice.best("xattention", 0.25, 64, 8192, True)
    assert (best.forced.sink_blocks, best.forced.local_blocks) == (1, 2)
    assert best.attention.keywords["local_blocks"] == 2 and best.attention.keywords["config"].density == 0.25
    assert choice.best("xattention", 0.25, 64, 8192, False).forced == methods.Forced(4, 4)
    assert asked == [(*pair, of) for of in (True, False) for pair in methods.GRID]
    assert choice.best("stem", 0.25, 64, 8192, True).attention.local_blocks == 2
    count = len(asked)
    assert choice.best("xattention", 0.25, 64, 8192, True) is best and len(asked) == count  # measured once
    few = choice.best("xattention", 0.1, 128, 8192, True)  # 63 blocks of 128: (1, 1) alone leaves a fifth
    assert few.forced == methods.Forced(1, 1) and len(asked) == count


def test_calibration_samples_are_not_reported_and_measure_what_they_are_for(ruler_rows, tokenizer, model, monkeypatch):
    drawn = []

    def prompts(task, tokenizer, length, samples, seed=0):
        drawn.append((task, samples, seed))
        return real(task, tokenizer, length, samples, seed)

    real = samples.exact_prompts
    monkeypatch.setattr(samples, "exact_prompts", prompts)
    monkeypatch.setattr(samples, "calibration_windows", lambda *_: [torch.arange(256)[None] % 99])
    choice = comparison.ForcedChoice(model, tokenizer)
    calibration = choice.prompts(256)
    assert drawn == [("niah_multikey_1", 4, comparison.CALIBRATION_SEED)]
    with stem.hf.stem_prefill(model, SPARSE):
        needles = -measures.answer_scores(model, calibration)[0].mean().item()
        text = measures.document_losses(model, choice.windows(256)).mean().item()
    assert choice._loss(METHOD, 256, False) == pytest.approx(needles, rel=1e-5)
    assert choice._loss(METHOD, 256, True) == pytest.approx(text, rel=1e-5) and needles != pytest.approx(text)


def test_the_adaptive_preset_is_calibrated_for_each_density(ruler_rows, tokenizer, model, windows, monkeypatch):
    asked = []

    def calibrate(model, prompts, density, config, tolerance):
        asked.append((density, config.sink_blocks, config.local_blocks))
        assert tolerance == comparison.TOLERANCE * density
        if density > 0.6:
            raise ValueError("no threshold fits")
        return stem.hf.calibration.Calibration(config.replace(threshold=0.9), density)

    monkeypatch.setattr(stem, "calibrate", calibrate)
    told = []
    study = Study((256,), ("niah_multikey_2",), ("adaptive",), (0.6, 0.7), (32,), samples=1)
    found = comparison.run(study, model, tokenizer, "tiny", show=told.append)
    rows = [row for row in found if row["method"] == "adaptive"]
    assert {row["asked"] for row in rows} == {0.6} and asked[0] == (0.6, 1, 1)
    assert {row["threshold"] for row in rows} == {0.9}
    assert {row["density"] for row in rows} == {0.4167}  # a threshold of 0.9 leaves the forced blocks
    assert any("adaptive at density 0.7, 256 tokens is left out: no threshold fits" in line for line in told)


def test_one_threshold_serves_every_length_and_chunks(tokenizer, model, monkeypatch):
    calibrated = []

    def calibrate(model, prompts, density, config, tolerance):
        calibrated.append(prompts[0].shape[1])
        return stem.hf.calibration.Calibration(config.replace(threshold=0.03), density)

    monkeypatch.setattr(stem, "calibrate", calibrate)
    monkeypatch.setattr(comparison.ForcedChoice, "_loss", lambda self, method, *_: method.forced.local_blocks)
    monkeypatch.setattr(samples, "calibration_windows", lambda _, length, count: [torch.ones(1, length)])
    choice = comparison.ForcedChoice(model, tokenizer)
    whole, chunks = (choice.best(name, 0.5, 64, 8192, False) for name in methods.TRANSFERRED)
    assert whole.attention == chunks.attention == choice.best("adaptive", 0.5, 64, 16384, True).attention
    assert set(calibrated) == {methods.TRANSFER_LENGTH} and (whole.chunk, chunks.chunk) == (None, 4096)
    assert [of.name for of in (whole, chunks)] == list(methods.TRANSFERRED)


def test_prompts_in_chunks_get_the_losses_of_whole_prompts_and_the_density_of_chunks(tokenizer, model):
    config = stem.StemConfig.preset("adaptive", block_size=16, score_cells=4, dense_up_to=0, threshold=0.08)
    ids, found = torch.randint(999, (2, 256)), []
    for chunk in (None, 64):
        small = comparison.Comparison(model, tokenizer, "tiny")
        small.loss(methods.Method("adaptive", config, 16, None, methods.Forced(1, 2), chunk=chunk), {"a": ids})
        found.append(small.rows[-1])
    with stem.hf.stem_prefill(model, config, prompt_length=256) as report:
        losses = measures.document_losses(measures.InChunks(model, 64), ids)
    assert found[1]["value"] == pytest.approx(float(losses[:, 128:].mean()), rel=1e-4)
    assert found[1]["density"] == round(report.density(), 4)
    assert torch.allclose(
        measures.document_losses(measures.InChunks(model, 100), ids), measures.document_losses(model, ids), atol=1e-4
    )
    assert 0.2 < found[0]["density"] < 0.95 and found[1]["dense"] == pytest.approx(found[0]["dense"], rel=1e-4)


def test_a_measurement_that_fails_is_raised_after_the_others(ruler_rows, tokenizer, model, windows, monkeypatch):
    def fail(q, k, v):
        raise RuntimeError("no blocks today")

    bad = methods.Method("random", fail, 32, 0.5, methods.Forced(1, 1))
    monkeypatch.setattr(methods, "candidates", lambda *_: [bad])
    saved = []
    study = Study((256,), ("niah_multikey_2",), ("random",), (0.5,), (32,), samples=1)
    with pytest.raises(ExceptionGroup, match="1 of 3 measurements of tiny failed") as raised:
        comparison.run(study, model, tokenizer, "tiny", show=lambda line: None, save=saved.append)
    assert {row["method"] for row in saved[-1]} == {"dense", "window"}
    assert "measuring random on niah_multikey_2" in raised.value.exceptions[0].__notes__[0]
    frames = list(traceback.walk_tb(raised.value.exceptions[0].__traceback__))
    assert len(frames) > 1
    assert not any(frame.f_locals for frame, _ in frames[1:])  # tensors of a failed measurement are free


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    comparison.add_arguments(parser)
    parsed = parser.parse_args(words)
    parsed.profile = "full"
    return parsed


def test_every_option_replaces_the_studys_value():
    words = "--methods xattention --lengths 512 --densities 0.2 --block-sizes 64 --tasks ruler_vt --kinds prose".split()
    study = comparison.with_options(STUDY, options(*words))
    assert study == Study((512,), ("ruler_vt",), ("xattention",), (0.2,), (64,), samples=2, kinds=("prose",))
    assert comparison.with_options(STUDY, options()) == STUDY
    assert comparison.with_options(STUDY, options("--samples", "5")) == replace(STUDY, samples=5)
    with pytest.raises(ValueError, match="samples must be >= 1, got 0"):
        comparison.with_options(STUDY, options("--samples", "0"))
    with pytest.raises(ValueError, match=r"densities must be in \(0, 1\], got 1.7"):
        comparison.with_options(STUDY, options("--densities", "0.5", "1.7"))


def test_a_run_of_some_methods_leaves_the_rows_of_the_others(monkeypatch, made_up_machine):
    def run(study, model, tokenizer, name, seed, *, save, **options):
        save(
            [
                dict(method=of, measure="answer", task=task, length=512, seed=seed, model=name, block_size=64)
                for of in study.names
                for task in study.tasks
            ]
        )

    monkeypatch.setattr(comparison, "run", run)
    monkeypatch.setattr(measures, "load", lambda name: (None, None, name))
    answers.main(options("--methods", "stem", "adaptive", "--seed", "1"))
    answers.main(options("--methods", "adaptive", "--seed", "2", "--tasks", "ruler_vt"))
    seeds = records.read_rows("long_context/answers").set_index(["method", "task"]).seed
    assert len(seeds) == 2 * len(answers.TASKS)
    assert seeds["adaptive", "ruler_vt"] == 2 and seeds.drop(("adaptive", "ruler_vt")).eq(1).all()
    loss.main(options("--methods", "stem"))
    assert records.read_rows("long_context/loss").task.tolist() == ["documents"]


@pytest.mark.parametrize("part", [answers, loss])
def test_full_studies_hold_eight_windows_and_every_method(part):
    study = part.STUDIES["full"]
    assert study.windows >= 8 and study.samples >= 16 and study.names == () and study.kinds is None
    assert len(documents.KINDS) == 5


def test_a_study_that_calibrates_reads_calibration_texts_as_documents(tokenizer, monkeypatch):
    monkeypatch.setattr(samples, "calibration_windows", lambda _, length, count: [torch.ones(count, length)] * 2)
    monkeypatch.setattr(samples, "document_windows", lambda *_: pytest.fail("these documents are reported"))
    found = comparison._inputs(tokenizer, choice.STUDIES["full"], choice.SEED, comparison.DOCUMENTS, 64)
    assert {kind: tuple(of.shape) for kind, of in found.items()} == {f"calibration text {i}": (1, 64) for i in (1, 2)}

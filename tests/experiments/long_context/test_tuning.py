"""Search for settings of `adaptive`: every row is measured as told, and the best setting goes on."""

import pytest
import torch

import stem
from stem import hf
from stem.experiments.long_context import measures, samples, thresholds, tuning


@pytest.fixture(scope="module")
def search(model):
    return lambda prompts: tuning.Search(model, prompts, torch.arange(256)[None] % 97, 0.5, 32)


def test_rows_are_losses_of_the_settings_that_they_name(ruler_rows, tokenizer, model, search):
    prompts, others = (samples.exact_prompts("niah_multikey_1", tokenizer, 256, 2, seed) for seed in (0, 1))
    made, reported = search(prompts), search(others)
    rows = list(tuning.rows(made, reported, made, changes=[dict(exact_last_blocks=2)], show=lambda told: None))
    own = [row for row in rows if row["samples"] == "tuning"]
    best = min(reversed(own[1:3]), key=lambda row: row["score"])["changes"]  # of the start and the one change
    names = ["dense_last_blocks=0 dropped=skip", "dense_last_blocks=0 dropped=cells"]
    assert {row["changes"] for row in own[:3]} == {*names, names[1] + " exact_last_blocks=2"}
    assert [(row["changes"], row["anchors"]) for row in own[3:5]] == [(best, 2), (best, 3)]
    where = [(row["changes"] == best, row["thresholds"]) for row in rows if row["samples"] == "reported"]
    layers = where[4][1]
    assert layers.startswith("layers=") and layers.count(",") == model.config.num_hidden_layers - 1
    assert where == [(is_best, of) for of in ("", "last=0.25", layers, f"last=0.25 {layers}") for is_best in (1, 0)]
    assert all("exact_last_blocks=1048576" in row["changes"] for row in rows[-1:])

    row = next(row for row in rows if row["changes"] == names[0])
    fields = dict(dense_up_to=0, sink_blocks=1, local_blocks=1, dense_last_blocks=0, dropped="skip")
    config = stem.StemConfig.preset("adaptive", block_size=32, threshold=row["threshold"], **fields)
    dense, lost = measured(model, prompts, made, config)
    assert row["needles"] == pytest.approx(float(lost[0].mean() - dense[0].mean()), abs=1e-4) and row["count"] == 2
    assert row["documents"] == pytest.approx(float(lost[1].mean() - dense[1].mean()), abs=1e-5)
    assert row["low"] <= row["needles"] <= row["high"]
    assert row["divergence"] > 0 and row["density_documents"] == pytest.approx(0.5, abs=0.02)


def measured(model, prompts, search, attention):
    dense = measures.answer_scores(model, prompts)[0], measures.document_losses(model, search.documents)
    with hf.stem_prefill(model, attention):
        return dense, (measures.answer_scores(model, prompts)[0], measures.document_losses(model, search.documents))


def test_samples_that_are_reported_do_not_change_the_threshold(ruler_rows, tokenizer, model):
    """The density of the windows counts, whatever the documents compute."""
    prompts = samples.exact_prompts("niah_multikey_1", tokenizer, 256, 1)
    windows = torch.arange(256)[None] % 97
    documents = torch.full((1, 256), 5)
    made = tuning.Search(model, prompts, documents, 0.5, 32, windows)
    config = made.config(tuning.START)
    with hf.stem_prefill(model, config) as report:
        model(windows)
    assert report.density() == pytest.approx(0.5, rel=0.021)


def test_the_error_of_one_layer_is_that_of_the_model_with_this_layer_sparse(ruler_rows, tokenizer, model, search):
    prompts = samples.exact_prompts("niah_multikey_1", tokenizer, 256, 2)
    made = search(prompts)
    config = made.config(tuning.START)
    found = made.one_layer(config, 1)
    assert len(found) == len(thresholds.MULTIPLES)
    assert [density for density, _ in found] == sorted((density for density, _ in found), reverse=True)
    attention = {1: config.replace(threshold=min(1.0, config.threshold * thresholds.MULTIPLES[2]))}
    dense = measures.answer_distributions(model, prompts)
    with hf.stem_prefill(model, attention):
        answers = measures.answer_distributions(model, prompts)
    each = [float((a.exp() * (a - b)).sum()) for a, b in zip(dense, answers, strict=True)]
    before, (_, after) = measured(model, prompts, made, attention)
    expected = sum(each) / 2 / 0.25 + float((after - before[1]).square().mean()) / 2 / 0.005
    assert found[2][1] == pytest.approx(expected, rel=1e-3) and expected > 0


def test_a_density_below_what_is_always_kept_gives_no_row(ruler_rows, tokenizer, search):
    made = search(samples.exact_prompts("niah_multikey_1", tokenizer, 256, 1))
    made.density = 0.01
    assert made.score(tuning.START) == float("inf")


def test_known_multiples_need_no_search(ruler_rows, tokenizer, model, search):
    made = search(samples.exact_prompts("niah_multikey_1", tokenizer, 256, 1))
    layers = thresholds.Thresholds((0.5, 2.0))
    first, both = (list(rows) for rows in tuning.known(made, layers))
    assert [("exact_last_blocks=1048576" in row["changes"]) for row in both] == [True, False] and first == both[:1]
    assert {(row["thresholds"], row["samples"], row["asked"]) for row in both} == {("layers=0.5,2", "reported", 0.5)}
    assert all("dropped=cells" in row["changes"] and "score_cells=32" in row["changes"] for row in both)

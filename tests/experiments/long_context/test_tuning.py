"""Search for settings of `adaptive`: every row is measured as told, and the best setting goes on."""

import pytest
import torch

import stem
from stem import hf
from stem.experiments.long_context import measures, samples, tuning


@pytest.fixture(scope="module")
def search(model):
    return lambda prompts: tuning.Search(model, prompts, torch.arange(256)[None] % 97, 0.5, 32)


def test_rows_are_losses_of_the_settings_that_they_name(ruler_rows, tokenizer, model, search):
    prompts = samples.exact_prompts("niah_multikey_1", tokenizer, 256, 2)
    made = search(prompts)
    rows = list(tuning.rows(made, changes=[dict(exact_last_blocks=2)], show=lambda told: None))
    best = min(reversed(rows[1:3]), key=lambda row: row["score"])["changes"]  # of the start and the one change
    names = ["dense_last_blocks=0 dropped=skip", "dense_last_blocks=0 dropped=cells"]
    assert {row["changes"] for row in rows[:3]} == {*names, names[1] + " exact_last_blocks=2"}
    assert [(row["changes"], row["anchors"]) for row in rows[-2:]] == [(best, 2), (best, 3)]
    oracle = rows[-3]
    assert "exact_last_blocks=1048576" in oracle["changes"] and oracle["anchors"] == 1

    row = next(row for row in rows if row["changes"] == names[0])
    fields = dict(dense_up_to=0, sink_blocks=1, local_blocks=1, dense_last_blocks=0, dropped="skip")
    config = stem.StemConfig.preset("adaptive", block_size=32, threshold=row["threshold"], **fields)
    dense = measures.answer_scores(model, prompts)[0]
    with hf.stem_prefill(model, config):
        lost = measures.answer_scores(model, prompts)[0] - dense
    assert row["needles"] == pytest.approx(float(lost.mean()), abs=1e-4) and row["count"] == 2
    assert row["low"] <= row["needles"] <= row["high"]
    assert row["divergence"] > 0 and row["density_documents"] == pytest.approx(0.5, abs=0.1)


def test_a_density_below_what_is_always_kept_gives_no_row(ruler_rows, tokenizer, search):
    made = search(samples.exact_prompts("niah_multikey_1", tokenizer, 256, 1))
    made.density = 0.01
    assert made.score(tuning.START) == float("inf")

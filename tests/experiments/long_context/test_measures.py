"""Measures: scores and losses as all logits say, intervals, compiled layers, the last row of blocks."""

import pytest
import torch
import torch.nn.functional as F

import stem
from stem.experiments.long_context import measures, samples

SPARSE = stem.StemConfig(density=0.4, block_size=16, sink_blocks=1, local_blocks=1)


def test_answers_are_scored_as_all_logits_say_whatever_the_batch(ruler_rows, tokenizer, model, monkeypatch):
    monkeypatch.setitem(measures.NUMBERS_PER_BATCH, "cpu", 2 * 256 * model.config.hidden_size)
    prompts = samples.exact_prompts("niah_multikey_1", tokenizer, 256, 3)
    logp, right = measures.answer_scores(model, prompts)
    with torch.no_grad():
        logits = model(prompts.ids).logits
    for i, count in enumerate(prompts.answer_tokens):
        losses = F.cross_entropy(logits[i, -count - 1 : -1], prompts.ids[i, -count:], reduction="none")
        assert float(logp[i]) == pytest.approx(-losses.sum().item(), rel=1e-4)
        assert bool(right[i]) == bool((logits[i, -count - 1 : -1].argmax(-1) == prompts.ids[i, -count:]).all())


def test_the_divergence_of_answers_is_that_of_all_logits(ruler_rows, tokenizer, model):
    prompts = samples.exact_prompts("niah_multikey_1", tokenizer, 128, 2)
    with torch.no_grad():
        logp = model(prompts.ids).logits.log_softmax(-1)
    expected = [logp[i, -count - 1 : -1] for i, count in enumerate(prompts.answer_tokens)]
    found = measures.answer_distributions(model, prompts)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(expected, found, strict=True))
    other = [(2 * of).log_softmax(-1) for of in found]
    by_hand = sum(float((a.exp() * (a - b)).sum()) for a, b in zip(found, other, strict=True)) / 2
    assert measures.divergence(found, other) == pytest.approx(by_hand, rel=1e-3)
    assert measures.divergence(found, found) == pytest.approx(0, abs=1e-5)


def test_document_losses_are_those_of_all_logits(model):
    ids = torch.randint(1000, (2, 96))
    losses = measures.document_losses(model, ids)
    with torch.no_grad():
        logits = model(ids).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(2, 95)
    assert torch.allclose(losses, expected, atol=1e-4)


def test_the_interval_covers_the_mean_and_shrinks_with_samples():
    draws = torch.randn(400) + 3
    low, high = measures.interval(draws)
    assert low < float(draws.mean()) < high and high - low == pytest.approx(4 / 20, rel=0.25)
    assert measures.interval(torch.ones(5)) == (1.0, 1.0)


def test_the_ends_of_an_interval_hardly_depend_on_the_draws():
    differences = torch.tensor([1.7, 0.1, 0, -0.4, 0.6, 3.6, -0.1, 2.1, 0, 0.8, -1.3, 0.1, 0.8, 0.3, -0.5, -0.1])
    ends = torch.tensor([measures.interval(differences, seed) for seed in range(6)])
    assert (ends.amax(0) - ends.amin(0)).max() < 0.03  # with 2,000 draws up to 0.05


def test_the_last_row_shows_what_was_seen_scored_and_kept(ruler_rows, tokenizer, model):
    prompts = samples.exact_prompts("niah_multikey_1", tokenizer, 250, 1)
    row = measures.last_row(model, prompts.ids, SPARSE)
    assert row.mass.shape == row.rank.shape == row.kept.shape == (2, 3, 16)
    assert torch.allclose(row.mass.sum(-1), torch.ones(2, 3), atol=1e-5)
    assert (row.kept.sum(-1) == stem.block_budget(16, SPARSE)[-1]).all()
    assert (row.rank.sort(-1).values == torch.arange(16)).all()
    chosen = row.kept.clone()
    chosen[..., [0, 15]] = False  # sink and diagonal are kept whatever their rank
    assert row.rank[chosen].max() < stem.block_budget(16, SPARSE)[-1] + 2
    block = samples.needle_block(prompts, 0, 16)
    assert "one" in tokenizer.decode(prompts.ids[0, block * 16 : block * 16 + 20])

"""Errors of the logits: as all logits say, nothing travels backwards, and the rows are paired by window."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stem import hf
from stem.experiments.long_context import logits
from stem.experiments.theory.evidence import value_effect
from stem.experiments.theory.flow import captures


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(vocab_size=99, num_key_value_heads=1, initializer_range=0.4, **sizes)).eval()


@pytest.fixture(scope="module")
def found(model):
    ids = torch.randint(99, (2, 512), generator=torch.Generator().manual_seed(0))
    return list(logits.rows(model, "tiny", {"a": ids[:1], "b": ids[1:]}, 16, 0.3, 0.25, show=lambda line: None)), ids


def test_errors_are_those_of_all_logits(model, monkeypatch):
    monkeypatch.setattr(logits, "POSITIONS", 100)
    ids = torch.randint(99, (1, 512), generator=torch.Generator().manual_seed(0))
    attentions = logits.table_1(0.3, 16)
    with torch.no_grad():
        dense = model(ids).logits
        for name, (error, error_last, density) in logits.errors(model, ids, attentions).items():
            with hf.stem_prefill(model, attentions[name]):
                squares = (model(ids).logits - dense).square().mean(-1)[0]
            assert error == pytest.approx(squares.mean().item(), rel=1e-4)
            assert error_last == pytest.approx(squares[384:].mean().item(), rel=1e-4)
            assert density == pytest.approx(0.3, abs=0.02)


def test_both_metrics_have_one_budget_and_differ_in_the_value_term():
    without, with_it = logits.table_1(0.125, 128).values()
    assert with_it.replace(value_weight=0.0) == without != with_it


def test_each_window_has_a_row_for_every_metric_and_quarter(found):
    rows, _ = found
    quarters = [f"quarter {i}" for i in (1, 2, 3, 4)]
    assert [row["method"] for row in rows] == ["score-aware", "output-aware", *quarters] * 2
    assert [(row["text"], row["sample"]) for row in rows[::6]] == [("a", 0), ("b", 0)]
    assert all(row["error"] > 0 for row in rows)


def test_each_window_has_a_row_of_the_value_term_over_all_layers(model, found):
    _, ids = found
    (row,) = logits.value_rows(model, "tiny", {"a": ids[:1]}, 16, 0.3)
    effects = value_effect(captures(model, ids[:1], range(2)), logits.table_1(0.3, 16)["output-aware"])
    assert (row["text"], row["sample"], row["tokens"], row["asked"]) == ("a", 0, 512, 0.3)
    assert row["spread"] == pytest.approx(effects.spread.mean(), rel=1e-4)  # the median of two
    assert row["changed"] == pytest.approx(effects.changed.mean(), rel=1e-4) and 0 < row["spread"] <= row["spread_most"]
    assert row["changed_most"] == pytest.approx(effects.changed.max(), rel=1e-4)


def test_a_pruned_quarter_changes_nothing_before_it(model, found):
    _, ids = found
    selections = logits.figure_3(0.25, 16, 32)
    with torch.no_grad():
        dense = model(ids[:1]).logits
        for number, attention in enumerate(selections.values()):
            with hf.stem_prefill(model, attention):
                change = (model(ids[:1]).logits - dense).abs().amax(-1)[0].view(4, 128).amax(-1)
            assert change[:number].max() < 1e-4 if number else True
            assert change[number] > 1e-3

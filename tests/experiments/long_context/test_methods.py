"""Methods of a comparison: names, controls, calibrated thresholds, patterns that do not look at the tensors."""

from functools import partial

import pytest
import torch

import stem
from stem.experiments import documents
from stem.experiments.long_context import methods, samples

SPARSE = stem.StemConfig(density=0.4, block_size=16, sink_blocks=1, local_blocks=1)


def test_every_name_becomes_a_method_and_each_block_size_has_its_control():
    found = methods.methods(methods.all_names(), (0.1, 0.5), (64, 128))
    assert len(found) == 2 * (1 + 2 * (len(methods.all_names()) - 1))
    controls = [method for method in found if method.name == "window"]
    assert [method.block_size for method in controls] == [64, 128]
    adaptive, cells_alone, dense_end = (
        next(method.attention for method in found if method.name == name) for name in methods.ADAPTIVE
    )
    assert adaptive.reduction == "softmax" and adaptive.threshold is not None
    assert adaptive.exact_last_blocks == 1 and cells_alone == adaptive.replace(exact_last_blocks=0)
    assert dense_end == cells_alone.replace(dense_last_blocks=1)
    budget = stem.block_budget(20, methods.window_control(64))
    assert budget.tolist()[:4] == [1, 2, 3, 3] and budget[-1] == 3


def test_thresholds_are_solved_unless_the_forced_blocks_cost_more(tokenizer, model, monkeypatch):
    monkeypatch.setattr(samples, "calibration_texts", lambda: [documents.prose()[:4000], documents.prose()[9000:13000]])
    told = []
    solve = partial(methods.calibrated, model, tokenizer, 256, show=told.append)
    config = stem.StemConfig.preset("adaptive", dense_up_to=0, block_size=16)
    assert solve(0.1, config) is None
    solved = solve(0.5, config)
    assert solved.allocation == "adaptive" and 0 < solved.threshold < 1 and told == []
    monkeypatch.setattr(stem, "calibrate", lambda *_, **__: stem.hf.calibration.calibrate(model, [], 0.5))
    assert solve(0.5, config) is None and "is left out: prompts must be tensors" in told[0]


@pytest.mark.parametrize("name", methods.BLIND)
def test_blind_patterns_do_not_look_at_the_tensors(name):
    q, k = torch.randn(2, 3, 160, 16), torch.randn(2, 1, 160, 16)
    first, second = (stem.patterns.select(name, q * x, k * x, k, SPARSE).to_mask() for x in (1, -2))
    assert torch.equal(first, second)
    (method,) = (of for of in methods.methods([name], (0.4,), (16,)) if of.name == name)
    assert method.attention(q, k, k) is method.attention(q + 1, k, k)
    assert torch.equal(
        method.attention(q, k, k).to_mask(),
        stem.patterns.select(name, q, k, k, SPARSE.replace(local_blocks=2)).to_mask(),
    )

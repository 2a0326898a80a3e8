"""stem.hf.report: realised density and the attention that runs, layer by layer."""

from functools import partial

import pandas as pd
import pytest
import torch
from tiny_models import FIXED, MOE, SPARSE, build, logits, tokens

import stem
from stem import hf


def test_the_report_counts_what_was_computed():
    model, ids = build(), tokens(160, batch=2)
    with hf.stem_prefill(model, {0: FIXED, 2: SPARSE}) as report:
        assert [row["density"] for row in report] == [None, 1.0, None]
        model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
        during = list(report)
    assert list(report) == during and len(report) == 3 and report[-1] == during[-1]
    assert during[0]["density"] == pytest.approx((1 + 2 + 3 * 8) / 55)
    assert during[0]["head_density"] == pytest.approx([during[0]["density"]] * 4)
    assert report.density() == pytest.approx(sum(row["density"] for row in during) / 3)
    assert list(pd.DataFrame(list(report)).columns) == ["layer", "attention", "density", "head_density"]
    with pytest.raises(ValueError, match="stem.hf.enable"):
        hf.density(model)


def test_rows_by_layer_in_a_hybrid_model():
    linear = dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16)
    sizes = dict(num_hidden_layers=8, head_dim=16, shared_expert_intermediate_size=32, **MOE, **linear)
    model = build("Qwen3Next", **sizes)
    with hf.stem_prefill(model, {7: SPARSE}) as report:
        logits(model, tokens(100))
    assert len(report) == 2 and report[1]["layer"] == 7
    assert report.layer(7) == report[1] and report.layer(7)["attention"] == "stem"
    assert report.layer(3) == report[0] and report.layer(3)["attention"] == "dense"
    for index in (1, 8, -1, "3"):
        with pytest.raises(ValueError, match=rf"index must be an attention layer .* \[3, 7\], got {index!r}"):
            report.layer(index)


def test_prompts_with_gaps_count_as_dense():
    model, ids = build(), tokens(96, batch=3)
    mask = torch.ones_like(ids)
    mask[1, 40:50] = 0
    for config in (FIXED, partial(stem.patterns.select, "stem", config=FIXED)):
        with hf.stem_prefill(model, config) as report:
            logits(model, ids, attention_mask=mask)
        name = "stem" if config is FIXED else "selector"
        assert report[0]["attention"] == f"{name}; prompts dense because of gaps in their padding: 1"
        size = 16 if config is FIXED else 128
        dense = 21 if size == 16 else 1  # causal block pairs of 96 tokens
        assert report[0]["density"] == pytest.approx((2 * (1 + 2 + 3 * 4) + dense) / (2 * 21 + dense))
        assert report[0]["head_density"] == pytest.approx([report[0]["density"]] * 4)

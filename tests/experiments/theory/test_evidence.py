"""Recall by density, and the order of the ways to spend a budget."""

import pandas as pd
import pytest
import torch

import stem
from stem import metrics, patterns
from stem.experiments.theory import evidence

CONFIG = stem.StemConfig(block_size=16, score_stride=4, sink_blocks=1, local_blocks=1)


def test_recall_by_density():
    q, k, v = 2 * torch.randn(1, 4, 320, 16), torch.randn(1, 2, 320, 16), torch.randn(1, 2, 320, 16)
    peaks = CONFIG.replace(reduction="softmax", allocation="uniform")
    rows = evidence.recall_by_density(q, k, v, {"oracle": "oracle_mass", "cells": peaks}, (0.2, 0.5), CONFIG)
    assert rows.method.tolist() == ["oracle", "oracle", "cells", "cells"] and rows.density.tolist() == [0.2, 0.5] * 2
    kept = patterns.select("stem", q, k, v, peaks.replace(density=0.5))
    assert rows.recall[3] == pytest.approx(float(metrics.attention_recall(q, k, kept).mean()))
    kept = patterns.select("oracle_mass", q, k, v, CONFIG.replace(density=0.2))
    assert rows.recall[0] == pytest.approx(float(metrics.attention_recall(q, k, kept).mean()))


def test_lost_by_allocation_on_two_heads():
    """Head 0 needs one block a row, head 1 spreads: a shared budget gives head 1 what head 0 does not need."""
    settled = torch.eye(4)
    spread = torch.ones(4, 4).tril() / torch.arange(1, 5)[:, None]
    rows = evidence.lost_by_allocation(torch.stack([settled, spread])[None], [0.7]).set_index("allocation")
    per_row = stem.block_budget(4, stem.StemConfig(density=0.7, allocation="uniform")).tolist()  # 7 of 10 pairs
    assert per_row == [1, 2, 2, 2]
    assert rows.lost["a budget per row"] == pytest.approx((0 + 0 + 0 + 1 / 3 + 2 / 4) / 8)
    assert rows.lost["a threshold per head"] == pytest.approx(3 / 4 / 8)
    assert rows.lost["one threshold"] == pytest.approx(0, abs=1e-6)
    assert (rows.lowest["one threshold"], rows.highest["one threshold"]) == (0.4, 1.0)


def test_more_freedom_never_loses_more():
    q, k = 3 * torch.randn(1, 4, 320, 16), torch.randn(1, 2, 320, 16)
    mass = torch.stack([metrics.block_attention_mass(x * q, k, 16)[0] for x in (0.2, 1.0)])
    lost = evidence.lost_by_allocation(mass, [0.1, 0.3, 0.6]).pivot(
        index="density", columns="allocation", values="lost"
    )
    assert (lost["one threshold"] < lost["a threshold per head"]).all()
    assert (lost["a threshold per head"] < lost["a budget per row"]).all()


def test_claims_are_rows():
    claim = evidence.Claims("toy")
    claim("Eq. 1", "1", "2", "not reproduced")
    claim("Eq. 2", "1", "1", "reproduced", "paper")
    assert [row["on"] for row in claim.rows] == ["toy", "paper"]
    assert [row["verdict"] for row in claim.rows] == ["not reproduced", "reproduced"]


def test_effect_needs_two_standard_errors():
    starts = range(4)
    losses = {"old": [1.0, 2.0, 3.0, 4.0], "better": [0.8, 1.7, 2.8, 3.7], "noisy": [0.5, 2.4, 2.6, 4.4]}
    rows = pd.DataFrame(
        [dict(document="a", start=s, method=name, loss=loss[s]) for name, loss in losses.items() for s in starts]
    )
    assert evidence.effect(rows, "better", "old") == "helps (-0.250 ± 0.058 nats)"
    assert evidence.effect(rows, "old", "better").startswith("hurts (+0.250")
    assert evidence.effect(rows, "noisy", "old").startswith("makes no clear difference")


def test_the_value_term_matters_where_norms_differ():
    """Equal norms leave every choice as it is; one block of large norms is kept by every row that may choose it."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 128, 16), torch.randn(1, 1, 128, 16)
    equal = torch.nn.functional.normalize(torch.randn(1, 1, 128, 16), dim=-1) * 3
    large = equal.clone()
    large[:, :, 32:48] *= 1e4
    config = CONFIG.replace(density=0.5, value_weight=1.0)
    rows = evidence.value_effect({3: (q, k, equal), 4: (q, k, large)}, config)
    assert rows.layer.tolist() == [3, 4] and rows.changed[0] == 0 < rows.changed[1]
    routing, both = (stem.block_scores(q, k, large, config.replace(value_weight=weight))[0] for weight in (0.0, 1.0))
    stds = [[of[i, : i + 1].std(correction=0) for of in head for i in range(8)] for head in (both - routing, routing)]
    assert rows.spread[1] == pytest.approx(float(torch.stack(stds[0]).mean() / torch.stack(stds[1]).mean()))
    assert rows.spread[0] == pytest.approx(0, abs=1e-5)


def test_the_value_term_is_not_judged_where_one_block_is_free():
    assert evidence.value_verdict(-0.2, 1) == "not testable at this length: scores choose 1 block of a late row"
    assert [evidence.value_verdict(change, 4) for change in (-0.05, -0.02, 0.1)] == [
        "reproduced", "not reproduced", "not reproduced",
    ]  # fmt: skip

"""Influence of tokens, pruning of row spans, and what a model's layers see."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import stem
from stem.experiments.theory import flow
from stem.reference import dense_attention

CONFIG = stem.StemConfig(block_size=16, density=0.3, score_stride=8, sink_blocks=1, local_blocks=1)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=3, vocab_size=50)
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(50, (1, 128), generator=torch.Generator().manual_seed(1))


def test_influence_of_uniform_attention():
    uniform = torch.ones(3, 3, dtype=torch.float64).tril() / torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
    once = torch.tensor([1 + 1 / 2 + 1 / 3, 1 / 2 + 1 / 3, 1 / 3], dtype=torch.float64) / 3
    torch.testing.assert_close(flow.influence(uniform, 1), once)
    deep = flow.influence(uniform, 50)
    torch.testing.assert_close(deep, torch.tensor([1.0, 0, 0], dtype=torch.float64), atol=1e-6, rtol=0)


def test_influence_needs_a_layer():
    with pytest.raises(ValueError, match="layers must be >= 1, got 0"):
        flow.influence(torch.eye(2), 0)


def test_select_in_rows_prunes_only_the_span():
    q, k, v = torch.randn(1, 4, 128, 8), torch.randn(1, 2, 128, 8), torch.randn(1, 2, 128, 8)
    selection = flow.select_in_rows(q, k, v, config=CONFIG, keep=0.5, first_row=4, last_row=6)
    assert selection.kv_num_blocks[0, 0].tolist() == [1, 2, 3, 4, 3, 3, 7, 8]


def test_trace_is_zero_error_when_nothing_is_dropped(model, ids):
    dense = flow.trace(model, ids)
    full = flow.trace(model, ids, CONFIG.replace(density=1.0))
    assert full.density == 1.0 and max(full.errors(dense)) < 1e-9
    assert len(full.errors(dense)) == 4


def test_pruning_leaves_earlier_positions_alone(model, ids):
    dense = flow.trace(model, ids)
    pruned = flow.trace(model, ids, lambda q, k, v: flow.select_in_rows(
        q, k, v, config=CONFIG, keep=0.2, first_row=4, last_row=6))  # fmt: skip
    assert max(pruned.errors(dense, slice(0, 64))) < 1e-9
    assert min(pruned.errors(dense, slice(64, 96))) > 1e-9
    assert pruned.errors(dense, slice(96, 128))[0] < 1e-9 < pruned.errors(dense, slice(96, 128))[1]


def test_prune_spans_has_a_row_per_span_and_layer(model, ids):
    rows = flow.prune_spans(model, ids, CONFIG, spans=4, keep=0.25)
    assert [(row["span"], row["layer"]) for row in rows] == [(s, layer) for s in range(4) for layer in range(4)]
    assert [row["first_token"] for row in rows[::4]] == [0, 32, 64, 96]
    assert rows[12]["mse_last_span"] > rows[8]["mse_last_span"] == pytest.approx(0, abs=1e-12)


def test_capture_returns_what_the_layer_attends_to(model, ids):
    q, k, v = flow.capture(model, ids, layer=1)
    assert q.shape == (1, 4, 128, 16) and k.shape == v.shape == (1, 2, 128, 16)
    out = dense_attention(q, k, v).transpose(1, 2).flatten(2)
    seen = []
    hook = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(ids)
    hook.remove()
    torch.testing.assert_close(out, seen[0], rtol=1e-4, atol=1e-5)


def test_rollout_multiplies_the_attention_of_all_layers(model, ids):
    rolled = flow.rollout(model, ids[:, :40])
    layers = flow.captures(model, ids[:, :40], range(3))
    mixed = torch.eye(40, dtype=torch.float64)
    for layer in range(3):
        q, k, _ = (x.double() for x in layers[layer])
        logits = q @ k.repeat_interleave(2, 1).mT / 4
        mixed = (
            logits.masked_fill(~torch.ones(40, 40, dtype=torch.bool).tril(), -torch.inf).softmax(-1)[0].mean(0) @ mixed
        )
        torch.testing.assert_close(rolled[layer], mixed.mean(0), rtol=1e-4, atol=1e-6)
    own = flow.rollout(model, ids[:, :40], residual=0.9)
    assert own[-1, -1] > rolled[-1, -1] and own[-1].sum() == pytest.approx(1)
    with pytest.raises(ValueError, match=r"residual must be in \[0, 1\), got 1"):
        flow.rollout(model, ids, residual=1)

"""Adaptation: the same windows dense and sparse, a model that is left as it came, text that was not trained on."""

import contextlib
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

import stem
from stem.experiments.documents import LONG_MODULES
from stem.experiments.losses import token_losses
from stem.experiments.training import adapt

CONFIG = stem.StemConfig(block_size=16, score_stride=4, density=0.3, sink_blocks=1, local_blocks=1)
SETTINGS = adapt.AdaptConfig(stem_config=CONFIG, steps=3, length=96, read=128, bucket=64, lr=1e-2)


@pytest.fixture
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    return LlamaForCausalLM(LlamaConfig(vocab_size=128, max_position_embeddings=512, **size)).eval()


def tokenizer(text, return_tensors=None, verbose=True):
    """ASCII codes of one text or of several."""
    ids = [[min(ord(letter), 127) for letter in one] for one in ([text] if isinstance(text, str) else text)]
    return SimpleNamespace(input_ids=torch.tensor(ids) if return_tensors else ids)


def test_both_kinds_of_attention_learn_from_the_same_windows(model):
    tokens, before = torch.randint(0, 128, (1000,)), {name: w.clone() for name, w in model.state_dict().items()}
    curves = {}
    for sparse in (False, True, True):
        model.load_state_dict(before)
        rows = adapt.fine_tune(model, tokens, SETTINGS, sparse=sparse)
        curves.setdefault(sparse, []).append([row["loss"] for row in rows])
        assert model.config._attn_implementation == "sdpa", "left as it came"
        assert any(not torch.equal(w, before[name]) for name, w in model.state_dict().items())
    assert curves[True][0] == curves[True][1] != curves[False][0], "seeded, and the attention matters"
    assert curves[True][0][0] == pytest.approx(curves[False][0][0], abs=0.1), "the same first window"


def test_stem_follows_autocast_as_sdpa_does(model):
    """Rotary positions leave q and k in fp32 where autocast made v bfloat16."""
    ids = torch.randint(0, 128, (1, 97))
    whole = CONFIG.replace(density=1.0)
    losses = []
    for prefill in (contextlib.nullcontext(), stem.hf.stem_prefill(model, whole)):
        with prefill, torch.autocast("cpu", torch.bfloat16):
            losses.append(token_losses(model, ids[:, :-1], ids[:, 1:]))
    torch.testing.assert_close(*losses, rtol=2e-2, atol=2e-2)
    losses[1].mean().backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters() if weight.grad is not None)


def test_held_out_text_is_read_dense_and_sparse_and_never_trained_on(model):
    rows = pd.DataFrame(adapt.held_out_rows(model, tokenizer, SETTINGS))
    assert set(rows.task) == {f"held_out_{name}" for name in LONG_MODULES}
    assert len(rows) == len(LONG_MODULES) * 2 * 2 and set(rows.start) == {0, 64}
    dense, sparse = (rows[rows.inferred == name] for name in ("dense", "stem"))
    assert (dense.density == 1).all() and (sparse.density < 0.5).all()
    assert not torch.equal(torch.tensor(dense.value.values), torch.tensor(sparse.value.values))
    text = bytes(adapt.training_tokens(tokenizer).tolist())
    assert b"class Fraction(" in text
    assert b"class ArgumentParser(" not in text and b"class TarFile(" not in text


def test_rows_of_an_arm(model, monkeypatch):
    monkeypatch.setattr(adapt.pretrained, "load", lambda name: (model, tokenizer))
    rows = pd.DataFrame(adapt.run_arm(SETTINGS, "dense", 0))
    assert set(rows.trained) == {"pretrained", "adapt_dense"} and set(rows.seed) == {0}
    assert len(rows[rows.task == "adaptation"]) == 2 * SETTINGS.steps
    rows = pd.DataFrame(adapt.run_arm(SETTINGS, "stem", 1))
    assert set(rows.trained) == {"adapt_stem"} and set(rows[rows.task != "adaptation"].inferred) == {"dense", "stem"}

"""Cost of FP8 in answers: differences of log-probabilities, which an engine computes for a whole prompt."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stem.experiments.serving import accuracy


def test_differences_are_from_bf16_at_the_same_density(monkeypatch):
    told = iter([-1.0, -1.1, -2.0, -2.2, -2.5, -2.7, -3.0, -3.3, -3.6, -4.0])  # of each way, whole and in chunks
    ways = []

    def log_probabilities(folder, way, ids, chunk):
        ways.append((way and (way["density"], way["compute"]), len(ids), chunk))
        return np.full(5, next(told)) + [0, 0, 0, 0, 0 if way is None else -0.5]

    tokenizer = SimpleNamespace(from_pretrained=lambda folder: lambda *a, **k: SimpleNamespace(input_ids=[1] * 20000))
    monkeypatch.setattr(accuracy, "log_probabilities", log_probabilities)
    monkeypatch.setattr(accuracy, "AutoTokenizer", tokenizer)
    monkeypatch.setattr(accuracy, "resolve", lambda name: f"/cache/{name}")
    rows = list(accuracy.accuracy_rows("tiny"))
    settings = [None, *((density, way) for density in (0.25, 0.1) for way in ("input", "fp8"))]
    assert ways == [(way, 16384, chunk) for way in settings for chunk in (None, 4096)]
    assert [(row["density"], row["compute"]) for row in rows[::2]] == [(1.0, "input"), *settings[1:]]
    assert [row["chunk"] for row in rows] == [0, 4096] * 5 and {row["model"] for row in rows} == {"tiny"}
    assert [row["loss"] for row in rows[:3]] == pytest.approx([1.0, 1.1, 2.1])
    assert [row["difference"] for row in rows] == pytest.approx([0, 0.1, 0, 0.2, 0.5, 0.7, 0, 0.3, 0.6, 1.0])
    assert [row["from_dense"] for row in rows[:4]] == pytest.approx([0, 0.1, 1.1, 1.3])
    assert rows[2]["largest_difference"] == 0 and rows[5]["largest_difference"] == pytest.approx(0.7)


def test_an_engine_gives_the_log_probabilities_of_its_prompt(tmp_path, monkeypatch):
    import serving_engine as tools  # skips without vLLM
    from tiny_models import build

    from stem.hf import stem_prefill

    monkeypatch.setattr("gc.collect", lambda *generation: 0)  # takes long over all that vLLM imports
    sizes = dict(hidden_size=128, num_attention_heads=4, max_position_embeddings=2048, vocab_size=tools.VOCABULARY)
    model, ids = build("Llama", **sizes, eos_token_id=None, bos_token_id=None), tools.prompt(600)
    model.save_pretrained(tmp_path)
    with stem_prefill(model, tools.sparse()), torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    wanted = logits.log_softmax(-1).gather(1, torch.tensor(ids)[1:, None])[:, 0]
    found = accuracy.log_probabilities(str(tmp_path), tools.SETTINGS, ids, 256, "float32")
    assert np.abs(found - wanted.numpy()).max() < 1e-4

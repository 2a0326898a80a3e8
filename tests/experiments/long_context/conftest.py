"""Fixtures of the comparisons: a tokenizer, a tiny model, and RULER samples made without lm-eval."""

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from stem import pretrained
from stem.experiments import documents
from stem.experiments.long_context import ruler


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(pretrained.resolve("smollm2"))


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(1)
    sizes = dict(hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=3)
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, initializer_range=0.3, **sizes)
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def ruler_rows(monkeypatch):
    """RULER's samples without lm-eval: questions of different lengths, with answers of one or of two words."""

    def samples(task, tokenizer, length, samples, seed=0):
        text = " ".join(documents.words(documents.prose())[: length // 3])
        return [
            {"input": f"{text} two {'five ' * i}one?", "gen_prefix": "They are", "outputs": ["one", "two"][: 1 + i % 2]}
            for i in range(samples)
        ]

    monkeypatch.setattr(ruler, "stored_samples", samples)

"""Loss on long documents by position: the rows, and the models that are refused."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import stem
from stem import pretrained
from stem.experiments import documents
from stem.experiments.theory import evidence

SPARSE = stem.StemConfig(density=0.4, block_size=16, sink_blocks=1, local_blocks=1)


@pytest.fixture(scope="module")
def tiny_pair():
    """A random two-layer Llama and the embedded model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(pretrained.resolve("smollm2"))
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval(), tokenizer


def test_document_loss_is_the_cross_entropy_of_all_logits(tiny_pair):
    model, tokenizer = tiny_pair
    texts = documents.stdlib_documents(["argparse"])
    rows = evidence.document_losses(*tiny_pair, {"dense": None, "stem": SPARSE}, texts, 256, 64).to_dict("records")
    ids = tokenizer(texts["argparse"], return_tensors="pt").input_ids[:, :257]
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits[0]
    expected = F.cross_entropy(logits, ids[0, 1:], reduction="none").unflatten(0, (4, 64)).mean(1)
    found = [row["loss"] for row in rows if row["method"] == "dense"]
    assert found == pytest.approx(expected.tolist(), abs=1e-4)
    sparse = [row["loss"] for row in rows if row["method"] == "stem"]
    assert sparse[-1] != found[-1]
    assert [row["start"] for row in rows[:4]] == [0, 64, 128, 192]


def test_bad_document_arguments_are_named(tiny_pair):
    with pytest.raises(ValueError, match="bucket"):
        evidence.document_losses(*tiny_pair, {"dense": None}, {"a": "b"}, 100, 64)
    with pytest.raises(ValueError, match="texts\\['a'\\]"):
        evidence.document_losses(*tiny_pair, {"dense": None}, {"a": "b"}, 128, 64)
    with pytest.raises(ValueError, match="no_such_module"):
        documents.stdlib_documents(["no_such_module"])
    with pytest.raises(ValueError, match="min_chars"):
        documents.stdlib_documents(["argparse"], min_chars=10**9)

"""lm-eval on a file in LongBench's format: its own class and `stem` answer alike, and a sparse prefill does not."""

import json

import pytest
import tiny_models
import torch
from transformers import AutoTokenizer

import stem
from stem import pretrained

pytest.importorskip("lm_eval")
from stem.experiments.long_context import harness, signatures  # noqa: E402


def test_lm_eval_reads_the_file_with_its_own_class_and_with_stem(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(pretrained.resolve("smollm2"))
    sizes = dict(vocab_size=len(tokenizer), max_position_embeddings=2048, initializer_range=0.3)
    model = tiny_models.build("Llama", **sizes)
    path = harness.write_file(tmp_path, tokenizer, 600, 2)
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert found == signatures.records(tokenizer, 600, 2) and len(found) == 2
    sparse = dict(density=0.3, block_size=16, sink_blocks=1, local_blocks=1, score_stride=4)
    own, score, density = harness.evaluate("hf", model, tokenizer, tmp_path)
    ids = tokenizer(signatures.TEMPLATE.format_map(found[0]) + "\nAnswer: def", return_tensors="pt").input_ids
    with torch.no_grad():
        first = model(ids).logits[0, -1].argmax()
    assert density is None and score == 0 and own[0].startswith(tokenizer.decode(first).strip()[:1])
    dense, thin = (harness.evaluate("stem", model, tokenizer, tmp_path, **x) for x in (dict(density=1.0), sparse))
    assert dense == (own, 0.0, 1.0) and thin[0] != own and thin[2] == pytest.approx(0.3, abs=0.05)
    with pytest.raises(ValueError, match="does not use Stem"):
        stem.hf.density(model)

"""Chunks of a prompt: where they end, and what the next token's log-probabilities lose."""

import pytest
from tiny_models import SPARSE, build, logits, tokens

from stem.experiments.serving.chunks import aligned_ends, differences, next_token
from stem.hf import stem_prefill


@pytest.mark.parametrize(
    "length, budget, page, ends",
    [
        (1000, 512, 128, [512, 1000]),
        (1000, 500, 128, [384, 768, 1000]),
        (100, 500, 128, [100]),
        (256, 128, 128, [128, 256]),
    ],
)
def test_ends(length, budget, page, ends):
    assert aligned_ends(length, budget, page) == ends


def test_a_page_must_fit():
    with pytest.raises(ValueError, match="at least a page of 128 tokens, got 100"):
        aligned_ends(1000, 100, 128)


def test_only_blocks_and_the_length_keep_the_answer():
    model, ids = build(), tokens(400)
    with stem_prefill(model, SPARSE):
        whole = logits(model, ids)[0, -1].log_softmax(-1)
    assert (next_token(model, ids, SPARSE, [400], None) - whole).abs().max() < 1e-5
    found = differences(model, ids, SPARSE, budget=100)
    assert found["chunks end between blocks"] < 1e-4
    others = [name for name in found if name != "chunks end between blocks"]
    assert len(others) == 3 and all(found[name] > 1e-2 for name in others)

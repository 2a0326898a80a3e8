"""Reuse of selections between layers."""

from functools import partial

import pytest
import torch
from pattern_inputs import CONFIG, draw
from transformers import LlamaConfig, LlamaForCausalLM

from stem import BlockSelection, hf, patterns

SELECT = partial(patterns.select, "oracle_mass", config=CONFIG)


def masks(selectors, *inputs):
    return [[selector(*x).to_mask() for x in inputs] for selector in selectors]


def test_layers_up_to_the_next_anchor_take_its_selection():
    selectors = patterns.reuse(SELECT, anchors=(0, 3, 5), num_layers=6)
    layers = [draw() for _ in range(6)]
    found = [selector(*x).to_mask() for selector, x in zip(selectors, layers, strict=True)]
    for layer, anchor in enumerate((0, 0, 0, 3, 3, 5)):
        assert torch.equal(found[layer], SELECT(*layers[anchor]).to_mask())
    assert not torch.equal(found[0], found[3])


def test_several_calls_of_a_forward_pass_keep_their_order():
    """A padded batch calls a layer once for each length; the next pass may have fewer calls."""
    selectors = patterns.reuse(SELECT, anchors=(0,), num_layers=3)
    for passes in ((draw(), draw(), draw()), (draw(), draw()), (draw(75, 187),)):
        first, *others = masks(selectors, *passes)
        for other in others:
            assert all(torch.equal(x, y) for x, y in zip(first, other, strict=True))
    again = masks(selectors[1:2], *passes)  # as activation checkpointing does
    assert torch.equal(again[0][0], first[0])


def test_a_head_map():
    selectors = patterns.reuse(SELECT, anchors=(0,), num_layers=3, head_maps={2: [3, 0, 0, 1]})
    (kept,), (same,), (mapped,) = masks(selectors, draw())
    assert torch.equal(same, kept) and torch.equal(mapped, kept[:, [3, 0, 0, 1]])


def test_a_model_whose_layers_share_selections():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=3, vocab_size=50)
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)).eval()
    ids, calls = torch.randint(50, (1, 250)), []

    def select(q, k, v) -> BlockSelection:
        calls.append(q.shape)
        return SELECT(q, k, v)

    with torch.no_grad(), hf.stem_prefill(model, patterns.reuse(select, (0,), 3)) as report:
        shared = model(ids).logits
        kept = [row["head_density"] for row in report]
    with torch.no_grad(), hf.stem_prefill(model, SELECT):
        own = model(ids).logits
    assert len(calls) == 1 and kept[0] == kept[1] == kept[2] and not torch.equal(shared, own)


@pytest.mark.parametrize(
    ("anchors", "maps", "words"),
    [
        ((1,), {}, "anchors must hold layer 0, got \\[1\\]"),
        ((0, 9), {}, "anchors must name layers in 0..3, got \\[9\\]"),
        ((0, 2), {2: [0]}, "got the anchors \\[2\\]"),
        ((0,), {4: [0]}, "head_maps must name layers in 0..3, got \\[4\\]"),
    ],
)
def test_bad_layers(anchors, maps, words):
    with pytest.raises(ValueError, match=words):
        patterns.reuse(SELECT, anchors, 4, maps)

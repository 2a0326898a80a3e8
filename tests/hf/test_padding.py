"""stem.hf.padding: spans say what SDPA's token mask says, in three numbers a row."""

import re

import pytest
import torch
from tiny_models import SPARSE, build, logits, tokens
from transformers.masking_utils import sdpa_mask

from stem import hf
from stem.hf import padding


def sizes(mask, q_length, q_offset=0, kv_length=None):
    kv_length = q_offset + q_length if kv_length is None else kv_length
    return dict(
        batch_size=mask.shape[0], q_length=q_length, kv_length=kv_length, q_offset=q_offset, attention_mask=mask
    )


def padded(length, *places):
    mask = torch.zeros(len(places), length, dtype=torch.bool)
    for row, place in enumerate(places):
        mask[row, place] = True
    return mask


@pytest.mark.parametrize(
    "q_offset, q_length, kv_length", [(0, 12, 12), (0, 12, 20), (5, 7, 12), (5, 7, 20), (9, 3, 12)]
)
def test_spans_become_the_token_mask_of_sdpa(q_offset, q_length, kv_length):
    mask = padded(12, slice(3, 12), slice(0, 8), slice(4, 10), slice(0, 0), slice(0, 12))
    arguments = sizes(mask, q_length, q_offset, kv_length)
    spans = padding.stem_mask(**arguments)
    assert spans.shape == (5, 1, 1, 3) and spans.device.type == "cpu"
    query, key = torch.empty(5, 1, q_length, 8), torch.empty(5, 1, kv_length, 8)
    assert torch.equal(padding.token_mask(spans, query, key), sdpa_mask(**arguments))


def test_a_prompt_without_padding_needs_no_mask():
    mask = padded(12, slice(0, 12), slice(0, 12))
    assert padding.stem_mask(2, 12, 12) is padding.stem_mask(**sizes(mask, 12)) is None
    assert padding.stem_mask(2, 12, 30) is None  # an empty static cache of 30
    assert padding.stem_mask(2, 4, 12, q_offset=8).tolist() == [[[[0, 12, 8]]]] * 2
    assert padding.stem_mask(2, 4, 30, q_offset=torch.tensor(8)).tolist() == [[[[0, 12, 8]]]] * 2


def test_rows_of_one_span_go_together():
    mask = padded(12, slice(3, 12), slice(0, 12), slice(3, 12))
    rows = padding.rows_by_span(padding.stem_mask(**sizes(mask, 12)), torch.empty(3, 1, 12, 8))
    assert rows == {(3, 12, 0): [0, 2], (0, 12, 0): [1]}
    assert padding.rows_by_span(None, torch.empty(3, 1, 12, 8)) == {(0, 12, 0): [0, 1, 2]}


def block_diagonal(*lengths, offset=0):
    """Token mask [1, 1, N, offset + N] of sequences packed one after the other, the first of them begun in a cache."""
    ones = [torch.ones(n, n + (offset if i == 0 else 0)).tril(offset if i == 0 else 0) for i, n in enumerate(lengths)]
    return torch.block_diag(*ones).bool()[None, None]


@pytest.mark.parametrize("dtype", [torch.bool, torch.float16, torch.float32])
def test_packed_sequences_have_a_span_each(dtype):
    minimum = torch.finfo(dtype).min if dtype.is_floating_point else None
    spans = {
        block_diagonal(12): [(0, 12, 0)],
        block_diagonal(5, 1, 6): [(0, 5, 0), (5, 6, 0), (6, 12, 0)],
        block_diagonal(5, 3, offset=4): [(0, 9, 4), (9, 12, 4)],
        sdpa_mask(**sizes(padded(12, slice(3, 10)), 12)): [(3, 10, 0)],
        sdpa_mask(**sizes(padded(12, slice(0, 0)), 12)): [],
    }
    for mask, expected in spans.items():
        mask = mask if dtype == torch.bool else torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, minimum)
        query = torch.empty(2, 3, mask.shape[2], 8)
        assert padding.rows_by_span(mask, query) == {span: [0, 1] for span in expected}


def test_a_mask_that_says_something_else_is_refused():
    masks = [
        torch.ones(1, 1, 12, 12).tril().triu(-3).bool(),  # a sliding window
        torch.ones(1, 1, 12, 12).bool(),
        torch.ones(1, 1, 12, 12).triu().bool(),
        torch.ones(1, 1, 12, 12).tril().long(),
        torch.ones(1, 1, 12, 12).tril().log() - torch.arange(12.0),  # a bias of position
        torch.ones(1, 2, 12, 12).tril().bool(),
    ]
    query = torch.empty(1, 2, 12, 8)
    for mask in masks:
        assert padding.token_mask(mask, query, query) is mask
        with pytest.raises(ValueError, match="attention_mask"):
            padding.rows_by_span(mask, query)


@pytest.mark.parametrize("shape", [(40,), (2, 40, 40), (2, 1, 1, 40, 40)])
def test_masks_of_other_dimensions_are_named(shape):
    model = build()
    hf.enable(model, SPARSE)
    with pytest.raises(ValueError, match=re.escape(f"or a token mask of four dimensions, got shape {shape}")):
        model(tokens()[:, :40].expand(2, -1), attention_mask=torch.ones(shape, dtype=torch.int64))


@pytest.mark.parametrize("q_offset, kv_length", [(0, 12), (4, 12), (4, 20)])
def test_rows_whose_padding_has_gaps_are_marked(q_offset, kv_length):
    mask = padded(12, slice(0, 12), slice(2, 11), slice(0, 4), slice(4, 12))
    mask[0, 5] = mask[1, 3:6] = False
    mask = padding.stem_mask(**sizes(mask, 12 - q_offset, q_offset, kv_length))
    rows = padding.rows_by_span(mask, torch.empty(4, 1, 12 - q_offset, 8))
    own = {(0, 4, 0): [2]} if q_offset == 0 else {}  # a row that ended before these queries
    offset = q_offset
    assert rows == {(0, 12, offset, True): [0], (2, 11, offset, True): [1], **own, (4, 12, offset): [3]}


def test_ends_of_packed_sequences_are_spans():
    query, ends = torch.empty(1, 2, 12, 8), torch.tensor([0, 5, 6, 12], dtype=torch.int32)
    spans = padding.packed_mask(None, ends, ends.clone(), query, query)
    assert padding.rows_by_span(spans, query) == {(0, 5, 0): [0], (5, 6, 0): [0], (6, 12, 0): [0]}
    assert torch.equal(padding.token_mask(spans, query, query), block_diagonal(5, 1, 6))
    window = torch.ones(1, 1, 12, 12).tril().triu(-3).bool()
    assert torch.equal(padding.packed_mask(window, ends, ends, query, query), window & block_diagonal(5, 1, 6))
    spans = padding.stem_mask(**sizes(padded(12, slice(3, 12)), 12))
    assert padding.packed_mask(spans, ends, ends, query, query) is spans
    for keys, ends_k in ((torch.empty(1, 2, 20, 8), ends), (query, ends[:3]), (torch.empty(2, 2, 12, 8), ends)):
        rows = query.expand(keys.shape[0], -1, -1, -1)
        assert padding.packed_mask(window, ends, ends_k, rows, keys) is window
        with pytest.raises(ValueError, match="cu_seq_lens_q: .* one row without a cache"):
            padding.packed_mask(None, ends, ends_k, rows, keys)


def test_decode_gets_the_mask_of_sdpa():
    mask = padded(12, slice(3, 12))
    arguments = sizes(mask, 1, 11)
    assert torch.equal(padding.stem_mask(**arguments), sdpa_mask(**arguments))


def test_padding_is_looked_at_once_in_a_forward_pass(monkeypatch):
    model, ids, looks = build(), tokens(90, batch=2), []
    monkeypatch.setattr(hf.forward, "rows_by_span", lambda *args: looks.append(args) or padding.rows_by_span(*args))
    hf.enable(model, SPARSE)
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    for passes in (1, 2):
        logits(model, ids, attention_mask=mask)
        assert len(looks) == passes
    token_mask = torch.ones(1, 1, 90, 90).tril().bool()
    expected = logits(model, ids)
    looks.clear()
    assert torch.equal(logits(model, ids, attention_mask=token_mask), expected) and len(looks) == 1
    token_mask[..., :20] = False  # the same tensor with other values
    with torch.inference_mode():  # where torch counts no versions
        padded = model(ids, attention_mask=token_mask, position_ids=(torch.arange(90) - 20).clamp_min(0)[None]).logits
    assert len(looks) == 2
    torch.testing.assert_close(padded[:, 20:], logits(model, ids[:, 20:]), atol=2e-5, rtol=1e-4)


def test_a_compiled_model_looks_at_padding_once(monkeypatch):
    model, ids, looks = build(num_hidden_layers=2), tokens(90, batch=2), []
    monkeypatch.setattr(hf.forward, "rows_by_span", lambda *args: looks.append(args) or padding.rows_by_span(*args))
    hf.enable(model, SPARSE)
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for passes in (1, 2):
        found = logits(compiled, ids, attention_mask=mask)
        assert len(looks) == passes
    torch.testing.assert_close(found, logits(model, ids, attention_mask=mask))


def test_ends_of_packed_sequences_are_looked_at_once(monkeypatch):
    model, ids, looks = build(), tokens(90), []
    monkeypatch.setattr(hf.forward, "packed_mask", lambda *args: looks.append(args) or padding.packed_mask(*args))
    hf.enable(model, SPARSE)
    ends = torch.tensor([0, 40, 90], dtype=torch.int32)
    first = logits(model, ids, cu_seq_lens_q=ends, cu_seq_lens_k=ends)
    assert len(looks) == 1
    torch.testing.assert_close(first[:, :40], logits(model, ids[:, :40]), atol=2e-5, rtol=1e-4)
    ends[1] = 50
    second = logits(model, ids, cu_seq_lens_q=ends, cu_seq_lens_k=ends)
    assert len(looks) == 2 and not torch.allclose(first, second, atol=1e-3)


def test_what_was_seen_is_remembered_until_the_same_layer_asks_again():
    answers, mask = iter(range(9)), torch.ones(1)
    asked = [(1, 2), (2, 2), (3, 2), (1, 2), (2, 2), (2, 2), (3, 4), (1, 4), (1, 4)]
    found = [padding.once(handle, mask, about, lambda: next(answers)) for handle, about in asked]
    assert found == [0, 0, 0, 1, 1, 2, 3, 3, 4]
    before = len(padding.LOOKED_AT)
    del mask
    assert len(padding.LOOKED_AT) == before - 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_mask_that_is_rewritten_between_two_models(mode):
    models, ids = [build(), build(seed=1)], tokens(100, batch=2)
    with mode():  # a mask made in inference mode counts no versions
        mask = torch.ones(100, 100, dtype=torch.bool).tril().expand(2, 1, 100, 100).clone()
        other = mask.clone()
        other[1, :, :, :30] = False
    for model in models:
        hf.enable(model, SPARSE)
    expected = logits(models[1], ids, attention_mask=other.clone())[:, 30:]
    logits(models[0], ids, attention_mask=mask)
    with mode():
        mask.copy_(other)
    assert torch.equal(logits(models[1], ids, attention_mask=mask)[:, 30:], expected)

"""stem.padding: spans say what SDPA's token mask says, in three numbers a row."""

import pytest
import torch
from transformers.masking_utils import sdpa_mask

from stem import padding


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


def test_what_is_more_than_padding_stays_a_token_mask_and_is_refused():
    gap = padded(12, slice(0, 12))
    gap[0, 5] = False
    masks = [
        padding.stem_mask(**sizes(gap, 12)),
        padding.stem_mask(1, 12, 12, local_size=4),
        padding.stem_mask(1, 12, 12, allow_is_causal_skip=False),
        torch.ones(1, 1, 12, 12, dtype=torch.int64),
    ]
    query = torch.empty(1, 1, 12, 8)
    for mask in masks:
        assert mask.shape == (1, 1, 12, 12)
        assert padding.token_mask(mask, query, query) is mask
        with pytest.raises(ValueError, match="attention_mask"):
            padding.rows_by_span(mask, query)


def test_decode_gets_the_mask_of_sdpa():
    mask = padded(12, slice(3, 12))
    arguments = sizes(mask, 1, 11)
    assert torch.equal(padding.stem_mask(**arguments), sdpa_mask(**arguments))

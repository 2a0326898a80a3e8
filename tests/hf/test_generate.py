"""Sparse prefill and dense decode in generate: caches, chunks, batches, sampling."""

import copy

import pytest
import torch
from tiny_models import FIXED, SPARSE, build, logits, tokens
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import QuantizedLayer

import stem
from stem import hf


@pytest.mark.parametrize("family", ["Llama", "Gemma3Text", "Qwen3", "GptOss"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_prefills_sparsely_and_decodes_densely(family, cache):
    model, ids = build(family), tokens(70)
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0, cache_implementation=cache)
    assert_generates_as_by_hand(model, ids, options)


def assert_generates_as_by_hand(model, ids, options):
    hf.enable(model, SPARSE)
    generated = model.generate(ids, **options)
    with torch.no_grad():
        out = model(ids, past_key_values=DynamicCache(config=model.config))
        hf.disable(model)  # the rest is dense by definition
        for position in range(ids.shape[1], generated.shape[1]):
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            assert torch.equal(token, generated[:, position : position + 1])
            out = model(token, past_key_values=out.past_key_values)


def test_batched_generation_equals_one_by_one():
    model = build()
    hf.enable(model, SPARSE)
    rows = [tokens(length, seed=length) for length in (90, 60)]
    ids = torch.cat([rows[0], torch.nn.functional.pad(rows[1], (30, 0))])
    options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
    batched = model.generate(ids, attention_mask=(ids > 0).long(), **options)
    for i, row in enumerate(rows):
        assert torch.equal(batched[i, 90:], model.generate(row, **options)[0, row.shape[1] :])


@pytest.mark.parametrize("family", ["Llama", "Gemma3Text", "GptOss"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", [0, 22])
def test_chunks_equal_the_whole_prompt(family, cache, padding):
    model, ids = build(family), tokens(150, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    hf.enable(model, FIXED)
    whole = logits(model, ids, attention_mask=mask)
    static = cache == "static"
    past = StaticCache(config=model.config, max_cache_len=200) if static else DynamicCache(config=model.config)
    parts = []
    for start in range(0, 150, 64):  # 22 left-padding tokens also end on no block boundary
        stop = min(start + 64, 150)
        chunk_mask = mask[:, :stop] if padding else None
        parts.append(logits(model, ids[:, start:stop], attention_mask=chunk_mask, past_key_values=past))
    chunked = torch.cat(parts, 1)
    first = 0 if not padding else 1  # the padded row's blocks start at its first token, so its chunks are not of blocks
    torch.testing.assert_close(chunked[first:], whole[first:], atol=2e-5, rtol=1e-4)
    assert chunked.isfinite().all()


@pytest.mark.parametrize("padding", [0, 32])
def test_chunks_that_know_the_length_of_the_prompt(padding):
    """The budget of SPARSE, and the last blocks of the preset, are those of the whole prompt."""
    model, ids = build(), tokens(150, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    real = mask.bool()
    for config in (SPARSE, stem.StemConfig.preset("adaptive", dense_up_to=0, block_size=16, threshold=0.1)):
        hf.enable(model, config)
        whole = logits(model, ids, attention_mask=mask)
        found = []
        for length in (150, None):
            hf.enable(model, config, prompt_length=length)
            past, parts = DynamicCache(config=model.config), []
            for start in range(0, 150, 32):
                stop = min(start + 32, 150)
                options = dict(attention_mask=mask[:, :stop], past_key_values=past)
                parts.append(logits(model, ids[:, start:stop], **options))
            found.append(torch.cat(parts, 1))
        known, unknown = found
        torch.testing.assert_close(known[real], whole[real], atol=2e-5, rtol=1e-4)
        assert not torch.allclose(unknown[real], whole[real], atol=1e-3)


def test_what_comes_after_a_prompt_is_its_end():
    """A second turn, longer than the prompt that was announced."""
    model, ids = build(), tokens(100)
    hf.enable(model, FIXED, prompt_length=64)
    past = DynamicCache(config=model.config)
    parts = [logits(model, part, past_key_values=past) for part in ids.split((64, 36), 1)]
    hf.enable(model, FIXED)
    torch.testing.assert_close(torch.cat(parts, 1), logits(model, ids), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_prefill_chunk_size_of_generate(cache):
    model, ids = build(), tokens(100)
    hf.enable(model, FIXED)
    options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, cache_implementation=cache)
    whole = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, prefill_chunk_size=32, **options), whole)


class EightBitLayer(QuantizedLayer):
    """A quantised cache without the packages that transformers takes for one."""

    def _quantize(self, tensor, axis):
        step = tensor.abs().amax() / 127
        return (tensor / step).round().to(torch.int8), step

    def _dequantize(self, quantized):
        return quantized[0] * quantized[1]


def test_a_quantised_cache():
    model, ids = build(), tokens(70)
    past = [Cache(layers=[EightBitLayer(residual_length=2) for _ in range(3)]) for _ in range(2)]
    hf.enable(model, SPARSE)
    prefill = logits(model, ids)[:, -1]
    torch.testing.assert_close(logits(model, ids, past_key_values=past[0])[:, -1], prefill)
    generated = model.generate(ids, past_key_values=past[1], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert generated.shape == (1, 74) and generated[0, 70] == prefill.argmax()
    with pytest.raises(ImportError, match="quanto"):
        model.generate(ids, cache_implementation="quantized", max_new_tokens=2, pad_token_id=0)


@pytest.mark.parametrize("options", [dict(do_sample=True), dict(num_beams=3), dict(do_sample=True, num_beams=2)])
def test_sampling_and_beams(options):
    model, ids = build(), tokens(70)
    hf.enable(model, SPARSE)
    generated = []
    for cache in ("dynamic", "static"):
        torch.manual_seed(0)
        generated.append(model.generate(ids, max_new_tokens=4, pad_token_id=0, cache_implementation=cache, **options))
    assert torch.equal(*generated)
    assert hf.density(model).density() < 0.5


def test_a_reused_prefix_equals_the_whole_prompt():
    model, ids = build(), tokens(144)
    hf.enable(model, FIXED)
    past = DynamicCache(config=model.config)
    logits(model, ids[:, :96], past_key_values=past)
    for seed in (1, 5):
        prompt = torch.cat([ids[:, :96], tokens(48, seed=seed)], 1)
        tail = logits(model, prompt[:, 96:], past_key_values=copy.deepcopy(past))
        torch.testing.assert_close(tail, logits(model, prompt)[:, 96:], atol=2e-5, rtol=1e-4)

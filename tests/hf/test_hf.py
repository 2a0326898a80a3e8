"""stem.hf: any causal transformers model, sparse in prefill, dense in decode, itself again after disable."""

import copy
import math
import os
import subprocess
import sys
from functools import partial

import pandas as pd
import pytest
import torch
import transformers
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache, StaticCache
from transformers.cache_utils import QuantizedLayer
from transformers.masking_utils import sdpa_mask

import stem
from stem import hf

SIZES = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=0,
)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
SLIDING = dict(sliding_window=24)
GEMMA3 = dict(
    head_dim=256, num_key_value_heads=1, layer_types=["sliding_attention"] * 2 + ["full_attention"], **SLIDING
)
FAMILIES = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": dict(head_dim=32),
    "Qwen3Moe": dict(head_dim=16, **MOE),
    "Mistral": dict(sliding_window=None),
    "Gemma3Text": GEMMA3,
    "Phi3": {},
    "GPTNeoX": dict(num_key_value_heads=4),
    "Olmo2": {},
    "SmolLM3": {},
    "Phi": dict(num_key_value_heads=4),
    "Starcoder2": dict(sliding_window=None),
    "Cohere": dict(logit_scale=1.0),
    "Mixtral": dict(sliding_window=None, num_local_experts=4, num_experts_per_tok=2),
    "Glm": dict(head_dim=16),
    "Ernie4_5": dict(head_dim=16),
    "GPT2": dict(n_positions=512, n_embd=64, n_layer=3, n_head=4),
    "Gemma": dict(head_dim=40, num_key_value_heads=1),
    "Granite": dict(attention_multiplier=0.1),
}
SPARSE = stem.StemConfig(density=0.4, block_size=16, score_stride=4, sink_blocks=1, local_blocks=1)
FIXED = SPARSE.replace(density=None, k_start=3, decay=1.0)  # the budget of a row does not depend on the prompt's length
DENSE = SPARSE.replace(density=1.0)


def build(family="Llama", seed=0, **overrides):
    """A small random model in eval mode; the same seed gives the same weights."""
    torch.manual_seed(seed)
    settings = {**SIZES, **FAMILIES.get(family, {}), **overrides}
    config = getattr(transformers, f"{family}Config")(**settings)
    classes = {"Gemma3Text": "Gemma3ForCausalLM", "GPT2": "GPT2LMHeadModel"}
    model = getattr(transformers, classes.get(family, f"{family}ForCausalLM"))(config).eval()
    for parameter in model.parameters():  # far from the tiny initial values, so that attention is far from uniform
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=1.2 / math.sqrt(parameter.shape[1]))
    return model


def tokens(length=150, batch=1, seed=1):
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


def masked_forward(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """The same attention through a token mask, in fp64: what a sparse layer is compared with."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    token_mask, value_dim = attention_mask, value.shape[3]
    value = nn.functional.pad(value, (0, query.shape[3] - value_dim))
    if getattr(module, "sliding_window", None) is None:
        scores = stem.block_scores(query, key, value, SPARSE, scale=scale)
        budget = stem.block_budget(scores.shape[-1], SPARSE)
        selection = stem.select_blocks(scores, budget, SPARSE, q_len=query.shape[2], kv_len=key.shape[2])
        token_mask = selection.to_token_mask()
    if token_mask is None:
        token_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
    token_mask = token_mask.expand(query.shape[0], query.shape[1], -1, -1)
    out = stem.reference.masked_attention(query.double(), key.double(), value.double(), token_mask, scale)
    return out[..., :value_dim].to(query.dtype).transpose(1, 2).contiguous(), None


AttentionInterface.register("masked_for_tests", masked_forward)
AttentionMaskInterface.register("masked_for_tests", sdpa_mask)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_density_is_sdpa_and_less_is_a_token_mask(family):
    model, ids = build(family), tokens(110, batch=2)
    sdpa = logits(model, ids)
    with hf.stem_prefill(model, DENSE):
        torch.testing.assert_close(logits(model, ids), sdpa, atol=2e-5, rtol=1e-4)
    with hf.stem_prefill(model, SPARSE) as report:
        sparse = logits(model, ids)
    model.set_attn_implementation("masked_for_tests")
    torch.testing.assert_close(sparse, logits(model, ids), atol=2e-5, rtol=1e-4)
    assert (sparse - sdpa).abs().max() > 1e-2
    assert report.density() < 0.8


def test_values_narrower_than_keys_and_hybrid_models():
    experts = dict(n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=32)
    latent = dict(kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16)
    deepseek = dict(num_key_value_heads=4, first_k_dense_replace=1, **experts, **latent)
    linear = dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16)
    qwen = dict(num_hidden_layers=4, head_dim=16, shared_expert_intermediate_size=32, **MOE, **linear)
    for family, settings, layers in (("DeepseekV3", deepseek, [0, 1, 2]), ("Qwen3Next", qwen, [3])):
        model, ids = build(family, **settings), tokens(100)
        expected = logits(model, ids)
        hf.enable(model, DENSE)
        torch.testing.assert_close(logits(model, ids), expected, atol=2e-5, rtol=1e-4)
        assert [row["layer"] for row in hf.density(model)] == layers
        hf.enable(model, SPARSE)
        sparse = logits(model, ids)
        hf.disable(model)
        model.set_attn_implementation("masked_for_tests")
        torch.testing.assert_close(sparse, logits(model, ids), atol=2e-5, rtol=1e-4)
        assert (sparse - expected).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["Llama", "Gemma3Text", "Qwen3"])
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


@pytest.mark.parametrize("family", ["Llama", "Gemma3Text", "GPTNeoX"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_unpadded_rows(family, side):
    model, lengths, width = build(family), (150, 97, 33, 1), 150
    ids, mask = torch.zeros(4, width, dtype=torch.long), torch.zeros(4, width, dtype=torch.long)
    rows = [tokens(length, seed=length) for length in lengths]
    places = [slice(width - n, width) if side == "left" else slice(0, n) for n in lengths]
    for i, (row, place) in enumerate(zip(rows, places, strict=True)):
        ids[i, place], mask[i, place] = row[0], 1
    hf.enable(model, SPARSE)
    position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
    padded = logits(model, ids, attention_mask=mask, position_ids=position_ids)
    assert padded.isfinite().all()
    for i, (row, place) in enumerate(zip(rows, places, strict=True)):
        torch.testing.assert_close(padded[i : i + 1, place], logits(model, row), atol=2e-5, rtol=1e-4)


def test_padding_queries_are_zero_and_padding_values_are_never_read():
    model = build()
    hf.enable(model, SPARSE)
    attention = model.model.layers[0].self_attn
    q, k, v = (torch.randn(2, heads, 40, 16) for heads in (4, 2, 2))
    mask = torch.tensor([[0] * 40, [0] * 7 + [1] * 30 + [0] * 3]).bool()
    for x in (q, k, v):
        x.transpose(1, 2)[~mask] = torch.nan
    spans = hf.stem_mask(2, 40, 40, attention_mask=mask)
    out, _ = hf.stem_attention_forward(attention, q, k, v, spans)
    assert out.isfinite().all()
    assert (out[~mask] == 0).all() and (out[mask] != 0).any(-1).all()


def test_causal_masks_of_tokens_and_packed_sequences_are_understood():
    model, ids, lengths = build(), tokens(150), (70, 33, 47)
    hf.enable(model, SPARSE)
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = logits(model, ids, position_ids=position_ids, use_cache=False)
    for row, part in zip(ids.split(lengths, 1), packed.split(lengths, 1), strict=True):
        torch.testing.assert_close(part, logits(model, row), atol=2e-5, rtol=1e-4)
    causal = torch.ones(1, 1, 150, 150).tril()
    for mask in (causal.bool(), causal.log()):
        assert torch.equal(logits(model, ids, attention_mask=mask), logits(model, ids))


def test_batched_generation_equals_one_by_one():
    model = build()
    hf.enable(model, SPARSE)
    rows = [tokens(length, seed=length) for length in (90, 60)]
    ids = torch.cat([rows[0], torch.nn.functional.pad(rows[1], (30, 0))])
    options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
    batched = model.generate(ids, attention_mask=(ids > 0).long(), **options)
    for i, row in enumerate(rows):
        assert torch.equal(batched[i, 90:], model.generate(row, **options)[0, row.shape[1] :])


@pytest.mark.parametrize("family", ["Llama", "Gemma3Text"])
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


def test_a_selector_cannot_know_the_length_of_the_prompt():
    selector = partial(stem.patterns.select, "xattention", config=SPARSE)
    with pytest.raises(ValueError, match="prompt_length=100.*Selector"):
        hf.enable(build(), selector, prompt_length=100)
    with pytest.raises(TypeError, match="prompt_length.*'100'"):
        hf.enable(build(), SPARSE, prompt_length="100")


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


def test_configs_by_layer():
    model, ids = build(), tokens()
    sdpa = logits(model, ids)
    hf.enable(model, [None, None, None])
    assert torch.equal(logits(model, ids), sdpa)
    assert [row["attention"] for row in hf.density(model)] == ["dense"] * 3
    hf.enable(model, [None, SPARSE, DENSE])
    by_sequence = logits(model, ids)
    rows = list(hf.density(model))
    assert [row["attention"] for row in rows] == ["dense", "stem", "stem"]
    assert rows[0]["density"] == rows[2]["density"] == 1.0 and rows[1]["density"] < 0.7
    hf.enable(model, {1: SPARSE, 2: DENSE})
    assert torch.equal(logits(model, ids), by_sequence)
    assert (by_sequence - sdpa).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["Llama", "Granite"])
def test_a_function_can_choose_the_blocks(family):
    model, ids = build(family), tokens()
    with hf.stem_prefill(model, SPARSE):
        expected = logits(model, ids)
    with hf.stem_prefill(model, partial(stem.patterns.select, "stem", config=SPARSE)) as report:
        torch.testing.assert_close(logits(model, ids), expected, atol=2e-5, rtol=1e-4)
    assert [row["attention"] for row in report] == ["selector"] * 3 and report.density() < 0.7


def test_sliding_window_layers_keep_their_attention():
    mistral, ids = build("Mistral", **SLIDING), tokens()
    sdpa = logits(mistral, ids)
    hf.enable(mistral, SPARSE)
    assert torch.equal(logits(mistral, ids), sdpa)
    assert [row["attention"] for row in hf.density(mistral)] == ["sliding_attention"] * 3
    assert math.isnan(hf.density(mistral).density())
    gemma = build("Gemma3Text")
    hf.enable(gemma, SPARSE)
    logits(gemma, ids)
    assert [row["density"] is not None for row in hf.density(gemma)] == [False, False, True]


def test_a_window_wider_than_the_model_is_no_window():
    model, ids = build("Phi3", sliding_window=512), tokens()
    hf.enable(model, SPARSE)
    sparse = logits(model, ids)
    plain = build("Phi3")
    hf.enable(plain, SPARSE)
    assert torch.equal(sparse, logits(plain, ids))


def test_the_report_counts_what_was_computed():
    model, ids = build(), tokens(160, batch=2)
    with hf.stem_prefill(model, {0: FIXED, 2: SPARSE}) as report:
        assert [row["density"] for row in report] == [None, 1.0, None]
        model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
        during = list(report)
    assert list(report) == during and len(report) == 3 and report[-1] == during[-1]
    assert during[0]["density"] == pytest.approx((1 + 2 + 3 * 8) / 55)
    assert during[0]["head_density"] == pytest.approx([during[0]["density"]] * 4)
    assert report.density() == pytest.approx(sum(row["density"] for row in during) / 3)
    assert list(pd.DataFrame(list(report)).columns) == ["layer", "attention", "density", "head_density"]
    with pytest.raises(ValueError, match="stem.hf.enable"):
        hf.density(model)


@pytest.mark.parametrize("before", ["sdpa", "eager", "masked_for_tests"])
def test_disable_restores_what_was_there(before):
    model, ids = build(), tokens()
    model.set_attn_implementation(before)
    expected, attributes = logits(model, ids), set(vars(model.model.layers[0].self_attn))
    hf.enable(model, SPARSE)
    hf.enable(model, FIXED)
    assert model.config._attn_implementation == "stem"
    assert not torch.equal(logits(model, ids), expected)
    hf.disable(model)
    hf.disable(model)
    assert model.config._attn_implementation == before
    assert torch.equal(logits(model, ids), expected)
    assert set(vars(model.model.layers[0].self_attn)) == attributes


def test_the_context_gives_back_an_earlier_config_also_after_an_error():
    model, ids = build(), tokens()
    hf.enable(model, SPARSE)
    sparse = logits(model, ids)
    with pytest.raises(KeyError), hf.stem_prefill(model, DENSE):
        raise KeyError
    assert torch.equal(logits(model, ids), sparse)


def test_models_that_share_a_config_object_do_not_disturb_each_other():
    model = build()
    other, ids = type(model)(model.config).eval(), tokens()
    expected = logits(other, ids)
    hf.enable(model, SPARSE)
    assert torch.equal(logits(other, ids), expected)
    assert torch.equal(logits(other, ids, attention_mask=torch.ones_like(ids)), expected)


@pytest.mark.parametrize("impl", [None, "reference", "torch", "triton"])
def test_impl_is_passed_on(impl, monkeypatch):
    device = "cuda" if stem.TRITON_MODE == "compile" else "cpu"
    seen, model, ids = [], build().to(device), tokens(40).to(device)
    original = hf.forward.stem_attention
    monkeypatch.setattr(
        hf.forward, "stem_attention", lambda *args, **kw: seen.append(kw["impl"]) or original(*args, **kw)
    )
    hf.enable(model, SPARSE)
    expected = logits(model, ids)
    hf.enable(model, SPARSE, impl=impl)
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-4, rtol=1e-4)
    assert seen == [None] * 3 + [impl] * 3


def test_a_compiled_prefill_is_one_graph_and_counts():
    model = build(num_hidden_layers=2)
    ids, mask = tokens(100, batch=2), torch.ones(2, 100, dtype=torch.long)
    mask[0, :30] = 0
    hf.enable(model, SPARSE)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for arguments in ({}, {"attention_mask": mask}):
        torch.testing.assert_close(logits(compiled, ids, **arguments), logits(model, ids, **arguments))
    with hf.stem_prefill(model, FIXED) as report:  # the graph is made anew for another config
        torch.testing.assert_close(logits(compiled, ids), logits(model, ids))
    assert report.density() == pytest.approx((1 + 2 + 3 * 5) / 28)


def test_gradients_reach_the_weights():
    model, ids = build().train(), tokens(64)
    hf.enable(model, DENSE)
    model(ids, labels=ids).loss.backward()
    sparse = model.model.layers[0].self_attn.q_proj.weight.grad.clone()
    hf.disable(model)
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    torch.testing.assert_close(sparse, model.model.layers[0].self_attn.q_proj.weight.grad, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    "name, value",
    [("s_aux", torch.zeros(4)), ("softcap", 30.0), ("position_bias", torch.zeros(1)), ("cache", object())],
)
@pytest.mark.parametrize("q_len", [1, 40])
def test_arguments_that_are_not_implemented_are_named(name, value, q_len):
    model = build()
    hf.enable(model, SPARSE)
    q, k = torch.randn(1, 4, q_len, 16), torch.randn(1, 2, 40, 16)
    with pytest.raises(ValueError, match=name):
        hf.stem_attention_forward(model.model.layers[0].self_attn, q, k, k, None, **{name: value})


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    ids, gradients = tokens(64), []
    for checkpointing in (False, True):
        model = build().train()
        hf.enable(model, SPARSE)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad)
        assert hf.density(model).density() == pytest.approx(0.4)
    torch.testing.assert_close(*gradients)


def test_lora():
    peft = pytest.importorskip("peft")
    ids, lora = tokens(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(build(), lora).eval()
    dense = logits(model, ids)
    hf.enable(model, DENSE)
    torch.testing.assert_close(logits(model, ids), dense, atol=2e-5, rtol=1e-4)
    hf.enable(model, SPARSE)
    with model.disable_adapter():
        sparse, plain = logits(model, ids), build()
    hf.enable(plain, SPARSE)
    assert torch.equal(sparse, logits(plain, ids))
    model(ids, labels=ids).loss.backward()
    assert sum(parameter.grad is not None for parameter in model.parameters()) == 3 * 2 * 2
    hf.disable(model)
    assert torch.equal(logits(model, ids), dense)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 0.2), (torch.bfloat16, 0.2), (torch.float64, 1e-5)])
def test_other_dtypes(dtype, tolerance):
    model, ids = build(), tokens()
    dense = logits(model, ids)
    with hf.stem_prefill(model, SPARSE):
        sparse = logits(model, ids)
    model.to(dtype)
    sdpa = logits(model, ids)
    with hf.stem_prefill(model, DENSE):
        torch.testing.assert_close(logits(model, ids), sdpa)
    with hf.stem_prefill(model, SPARSE):  # rounding may turn the choice between two blocks
        assert (logits(model, ids) - sparse).norm() < tolerance * (dense - sparse).norm()


def test_a_saved_model_knows_nothing_of_stem_and_a_pickled_one_does(tmp_path):
    model, ids = build(), tokens()
    dense = logits(model, ids)
    hf.enable(model, SPARSE)
    sparse = logits(model, ids)
    model.save_pretrained(tmp_path)
    assert "stem" not in (tmp_path / "config.json").read_text()
    torch.save(model, tmp_path / "model.pt")
    twin = torch.load(tmp_path / "model.pt", weights_only=False)
    hf.disable(model)
    assert torch.equal(logits(twin, ids), sparse)
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval(), ids), dense)


def test_layers_on_several_devices(tmp_path, monkeypatch):
    model, ids, seen = build(), tokens(), []
    expected = logits(model, ids)
    model.save_pretrained(tmp_path / "model")
    places = dict.fromkeys(["model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm", "lm_head"], "cpu")
    places |= dict.fromkeys(["model.layers.1", "model.layers.2"], "disk")
    options = dict(device_map=places, offload_folder=tmp_path / "offloaded")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", **options).eval()
    assert model.hf_device_map["model.layers.2"] == "disk"
    device_of = torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: seen.append(tensor.device) or device_of(tensor))
    hf.enable(model, DENSE)
    torch.testing.assert_close(logits(model, ids), expected, atol=2e-5, rtol=1e-4)
    assert seen == [torch.device("cpu")] * 3  # around the kernels of every layer


def test_attention_weights_sinks_dropout_and_custom_masks_are_refused():
    model, ids = build(), tokens(40)
    hf.enable(model, SPARSE)
    with pytest.raises(ValueError, match="output_attentions"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions"):
        model.generate(ids, output_attentions=True, return_dict_in_generate=True, max_new_tokens=2, pad_token_id=0)
    with pytest.raises(ValueError, match="attention_mask.*4-dimensional"):
        model(ids, attention_mask=torch.ones(1, 1, 40, 40).bool())
    with pytest.raises(ValueError, match="is_causal"):
        model(ids, is_causal=False)
    model.model.layers[0].self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match="dropout=0.1"):
        model.train()(ids)


def test_sinks_of_gpt_oss_and_soft_caps_of_gemma2_are_refused():
    experts = dict(num_local_experts=2, num_experts_per_tok=1, layer_types=["full_attention"] * 3, head_dim=16)
    for family, overrides, match in (("GptOss", experts, "sinks"), ("Gemma2", dict(head_dim=16), "softcapping")):
        model = build(family, **overrides)
        with pytest.raises(ValueError, match=f"{family}ForCausalLM cannot use Stem attention: .*{match}"):
            hf.enable(model, SPARSE)
    model = build("Gemma2", head_dim=16, attn_logit_softcapping=None)
    expected = logits(model, tokens())
    hf.enable(model, DENSE)
    torch.testing.assert_close(logits(model, tokens()), expected, atol=2e-5, rtol=1e-4)


def test_models_without_causal_attention_of_the_interface_are_refused():
    small = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    bert = transformers.BertModel(transformers.BertConfig(intermediate_size=32, **small))
    falcon = transformers.FalconForCausalLM(transformers.FalconConfig(**small))
    t5 = transformers.T5Model(
        transformers.T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
    )
    for model in (bert, falcon, t5, nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="cannot use Stem attention"):
            hf.enable(model, SPARSE)
    with pytest.raises(ValueError, match="output_attentions"):
        hf.enable(build(output_attentions=True, attn_implementation="eager"), SPARSE)


@pytest.mark.parametrize(
    "config, error, match",
    [
        ([SPARSE], ValueError, "each of the 3 layers, got 1"),
        ({3: SPARSE}, ValueError, r"layers \[3\] do not exist"),
        ({0: 0.5}, TypeError, "layer 0 .* got 0.5"),
        (0.25, TypeError, "StemConfig.* got 0.25"),
        ("paper", TypeError, "StemConfig.* got 'paper'"),
    ],
)
def test_a_config_that_does_not_fit_is_named_and_changes_nothing(config, error, match):
    model = build()
    with pytest.raises(error, match=match):
        hf.enable(model, config)
    assert model.config._attn_implementation == "sdpa"


def test_wrong_model_and_impl_are_named():
    with pytest.raises(TypeError, match="model must be a transformers model, got str"):
        hf.enable("smollm2", SPARSE)
    with pytest.raises(ValueError, match="impl must be None or one of .* got 'cuda'"):
        hf.enable(build(), SPARSE, impl="cuda")


def test_a_copy_of_an_enabled_model_is_enabled_on_its_own():
    model, ids = build(), tokens()
    hf.enable(model, SPARSE)
    twin = copy.deepcopy(model)
    sparse = logits(model, ids)
    hf.disable(model)
    assert torch.equal(logits(twin, ids), sparse)


TWO_LINES = """
from transformers import LlamaConfig, LlamaForCausalLM
sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
model = LlamaForCausalLM(LlamaConfig(**sizes))
import stem, torch
stem.hf.enable(model)
assert model(torch.arange(90)[None]).logits.isfinite().all()
x = torch.randn(1, 1, 128, 16)
try:
    stem.stem_attention(x, x, x, impl="triton")
except RuntimeError as error:
    assert "Restart Python" in str(error)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton needs no interpreter on CUDA")
def test_stem_may_be_imported_after_the_model_was_made():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", TWO_LINES], check=True, env=environment)

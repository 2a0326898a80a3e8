"""stem.hf.forward: sparse prefill of padded and packed batches, gradients, dtypes, compilation."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
import transformers
from tiny_models import DENSE, FIXED, SPARSE, build, logits, tokens
from transformers import DynamicCache

import stem
from stem import hf

CLOSE = dict(atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["Llama", "Gemma3Text", "GPTNeoX", "GptOss"])
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


@pytest.mark.parametrize("family", ["Llama", "Granite"])
def test_a_function_can_choose_the_blocks(family):
    model, ids = build(family), tokens()
    with hf.stem_prefill(model, SPARSE):
        expected = logits(model, ids)
    with hf.stem_prefill(model, partial(stem.patterns.select, "stem", config=SPARSE)) as report:
        torch.testing.assert_close(logits(model, ids), expected, atol=2e-5, rtol=1e-4)
    assert [row["attention"] for row in report] == ["selector"] * 3 and report.density() < 0.7


@pytest.mark.parametrize("family", ["Llama", "Gemma3Text", "GPTNeoX"])
def test_rows_whose_padding_has_gaps_are_dense_and_the_others_stay_sparse(family):
    """Prompt tuning with left padding, a row that ended earlier, and one without padding."""
    model, ids = build(family), tokens(110, batch=4)
    mask = torch.ones_like(ids)
    mask[0, 8:30] = mask[1, 50:70] = mask[2, :20] = 0
    position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
    options = dict(attention_mask=mask, position_ids=position_ids)
    dense = logits(model, ids, **options)
    hf.enable(model, SPARSE)
    out = logits(model, ids, **options)
    for row in (0, 1):
        torch.testing.assert_close(out[row][mask[row] > 0], dense[row][mask[row] > 0], atol=2e-5, rtol=1e-4)
    for row, start in ((2, 20), (3, 0)):
        torch.testing.assert_close(out[row : row + 1, start:], logits(model, ids[row : row + 1, start:]), **CLOSE)
        assert (out[row, start:] - dense[row, start:]).abs().max() > 1e-2


def test_a_second_turn_after_a_row_that_ended_earlier():
    model, ids = build(), tokens(120, batch=2)
    mask = torch.ones_like(ids)
    mask[0, 50:64] = 0
    position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
    turns = [(slice(0, 64), DENSE), (slice(64, 120), SPARSE)]
    found = []
    for stem_on in (False, True):
        past = DynamicCache(config=model.config)
        for turn, config in turns:
            if stem_on:
                hf.enable(model, config)
            options = dict(attention_mask=mask[:, : turn.stop], position_ids=position_ids[:, turn])
            out = logits(model, ids[:, turn], past_key_values=past, **options)
        found.append(out)
    dense, sparse = found
    torch.testing.assert_close(sparse[0], dense[0], **CLOSE)
    assert (sparse[1] - dense[1]).abs().max() > 1e-2
    assert "gaps in their padding: 1" in hf.density(model)[0]["attention"]


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_virtual_tokens_before_left_padding(kind):
    peft = pytest.importorskip("peft")
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=8)
    model, ids = peft.get_peft_model(build(), config).eval(), tokens(80, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :30] = 0
    dense = logits(model, ids, attention_mask=mask)
    hf.enable(model, SPARSE)
    out = logits(model, ids, attention_mask=mask)
    torch.testing.assert_close(out[0, -50:], dense[0, -50:], **CLOSE)
    assert (out[1] - dense[1]).abs().max() > 1e-2
    assert model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, pad_token_id=0).shape == (2, 83)


def test_gradients_reach_rows_with_gaps():
    model, ids = build().train(), tokens(64, batch=2)
    mask = torch.ones_like(ids)
    mask[0, 20:30] = 0
    gradients = []
    for config in (None, DENSE):
        if config:
            hf.enable(model, config)
        model.zero_grad()
        model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("family", ["Llama", "Gemma3Text"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_flattened_batches_equal_separate_sequences(family, use_cache):
    model, rows = build(family), [tokens(length, seed=length)[0] for length in (70, 33, 47)]
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_tensors="pt")
    batch = collate([{"input_ids": row.tolist()} for row in rows])
    del batch["labels"]
    hf.enable(model, SPARSE)
    packed = logits(model, batch.pop("input_ids"), **batch, use_cache=use_cache)
    for row, part in zip(rows, packed.split([len(row) for row in rows], 1), strict=True):
        torch.testing.assert_close(part, logits(model, row[None]), **CLOSE)


def test_a_compiled_flattened_batch():
    model, ids = build(num_hidden_layers=1), tokens(100)
    ends = torch.tensor([0, 60, 100], dtype=torch.int32)
    options = dict(cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=60, max_length_k=60, use_cache=False)
    hf.enable(model, SPARSE)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled, ids, **options), logits(model, ids, **options))
    assert not torch.allclose(logits(model, ids, **options), logits(model, ids), atol=1e-2)


def test_an_empty_batch_gives_an_empty_output():
    model = build()
    hf.enable(model, SPARSE)
    q, k = torch.randn(0, 4, 40, 16), torch.randn(0, 2, 40, 16)
    for mask in (None, hf.stem_mask(0, 40, 40, attention_mask=torch.ones(0, 40).bool())):
        out, _ = hf.stem_attention_forward(model.model.layers[0].self_attn, q, k, k, mask)
        assert out.shape == (0, 40, 4, 16)
    assert hf.density(model)[0]["density"] is None


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float32, torch.float32)])
def test_autocast_casts_queries_keys_and_values_as_sdpa_does(dtypes):
    model = build()
    hf.enable(model, DENSE)
    q, k, v = (torch.randn(2, heads, 60, 16).to(dtypes[heads == 2]) for heads in (4, 4, 2))
    k = k[:, :2]
    attention = model.model.layers[0].self_attn
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = hf.stem_attention_forward(attention, q, k, v, None)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert out.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(out.transpose(1, 2), expected)


def test_autocast_through_a_model():
    model, ids = build(), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits(model, ids)
        hf.enable(model, DENSE)
        torch.testing.assert_close(logits(model, ids), expected, atol=0.1, rtol=0.05)
        hf.enable(model, SPARSE)
        assert logits(model, ids).isfinite().all() and hf.density(model).density() < 0.7


def test_continuous_batching_is_refused_by_name():
    model = build()
    hf.enable(model, SPARSE)
    with pytest.raises(ValueError, match=r"stem\W+is not supported"):
        model.generate_batch([tokens(40)[0].tolist()], max_new_tokens=2)
    q = torch.randn(1, 4, 40, 16)
    with pytest.raises(ValueError, match=r"cache: .*generate_batch \(continuous batching\)"):
        hf.stem_attention_forward(model.model.layers[0].self_attn, q, q[:, :2], q[:, :2], None, cache=object())


@pytest.mark.parametrize("impl", [None, "reference", "torch", "triton"])
def test_impl_is_passed_on(impl, monkeypatch):
    device = "cuda" if stem.TRITON_MODE == "compile" else "cpu"
    seen, model, ids = [], build().to(device), tokens(40).to(device)
    original = hf.forward.plan_for
    monkeypatch.setattr(hf.forward, "plan_for", lambda *args, **kw: seen.append(args[5]) or original(*args, **kw))
    hf.enable(model, SPARSE)
    expected = logits(model, ids)
    hf.enable(model, SPARSE, impl=impl)
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-4, rtol=1e-4)
    assert seen == [None, impl]  # all layers share a plan


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
    [("sinks", torch.zeros(4)), ("softcap", 30.0), ("position_bias", torch.zeros(1)), ("cache", object())],
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


def test_layers_on_several_devices(tmp_path, monkeypatch):
    model, ids, seen = build(), tokens(), []
    expected = logits(model, ids)
    model.save_pretrained(tmp_path / "model")
    places = dict.fromkeys(["model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm", "lm_head"], "cpu")
    places |= dict.fromkeys(["model.layers.1", "model.layers.2"], "disk")
    options = dict(device_map=places, offload_folder=tmp_path / "offloaded")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", **options).eval()
    assert model.hf_device_map["model.layers.2"] == "disk"
    monkeypatch.setattr(hf.forward, "on_device_of", lambda tensor: seen.append(tensor.device) or nullcontext())
    hf.enable(model, DENSE)
    torch.testing.assert_close(logits(model, ids), expected, atol=2e-5, rtol=1e-4)
    assert seen == [torch.device("cpu")] * 3  # around the kernels of every layer


def test_attention_weights_dropout_and_custom_masks_are_refused():
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

"""Attention sinks in models (gpt-oss): sparse, dense and sliding layers against transformers' eager attention."""

import pytest
import torch
from tiny_models import DENSE, SPARSE, build, logits, tokens
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

import stem
from stem import hf
from stem.hf.sinks import with_sink_key
from stem.impl.coverage import IMPLS

CLOSE = dict(atol=2e-5, rtol=1e-4)
LAYERS = dict(layer_types=["full_attention", "sliding_attention", "full_attention"])


def gpt_oss():
    model = build("GptOss", **LAYERS)
    assert model.config._attn_implementation == "eager"  # SDPA ignores sinks, so transformers does not choose it
    return model


def test_sliding_layers_and_layers_without_a_config_are_the_models_own():
    model, ids = gpt_oss(), tokens()
    eager = logits(model, ids)
    hf.enable(model, {0: DENSE})
    torch.testing.assert_close(logits(model, ids), eager, **CLOSE)
    assert [row["attention"] for row in hf.density(model)] == ["stem", "sliding_attention", "dense"]
    hf.enable(model, SPARSE)
    assert [row["attention"] for row in hf.density(model)] == ["stem", "sliding_attention", "stem"]
    assert (logits(model, ids) - eager).abs().max() > 1e-2
    hf.disable(model)
    assert torch.equal(logits(model, ids), eager)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("density", [0.4, 1.0])
def test_every_implementation_gives_eager_attention_through_a_mask(density, impl):
    on_hopper = impl.startswith("hopper")
    if on_hopper and not (torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)):
        pytest.skip("needs a Hopper GPU")
    device = "cuda" if torch.cuda.is_available() and impl not in ("reference", "torch") else "cpu"
    dtype, size, dim = (torch.bfloat16, 128, 64) if on_hopper else (torch.float32, 16, 16)
    model = build("GptOss", head_dim=dim, **LAYERS).to(device, dtype)
    module, tokens = model.model.layers[0].self_attn, 5 * size + 3
    q, k, v = (torch.randn(2, heads, tokens, dim, dtype=dtype, device=device) for heads in (4, 2, 2))
    config = SPARSE.replace(density=density, block_size=size)
    hf.enable(model, config, impl)
    with torch.no_grad():
        out, _ = hf.stem_attention_forward(module, q, k, v, None, s_aux=module.sinks)
        selection = stem.stem_attention(q, k, v, config, impl=impl, return_selection=True)[1]
        additive = torch.where(selection.to_token_mask(), 0.0, -torch.inf).double()
        exact, _ = eager_attention_forward(module.double(), q.double(), k.double(), v.double(), additive, dim**-0.5)
    assert selection.density() == density == 1 or selection.density() < 0.8
    allowed = {"hopper": 5e-3, "hopper_fp8": 0.08}.get(impl, 1e-5)
    assert (out.double() - exact).norm() < allowed * exact.norm()


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_every_layer_reads_its_sinks(layer):
    model, ids = gpt_oss(), tokens()
    hf.enable(model, {0: SPARSE})  # sparse, sliding, dense
    before = logits(model, ids)
    with torch.no_grad():
        model.model.layers[layer].self_attn.sinks.add_(3.0)
    after = logits(model, ids)
    assert ((after - before)[:, 8:].abs().amax(-1) > 1e-4).all()
    hf.enable(model, DENSE)
    dense = logits(model, ids)
    hf.disable(model)
    torch.testing.assert_close(dense, logits(model, ids), **CLOSE)


def test_decode_equals_eager():
    model, ids = gpt_oss(), tokens(60)
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True)
    expected = model.generate(ids, **options)
    hf.enable(model, DENSE)
    found = model.generate(ids, **options)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), **CLOSE)


def test_padding_with_gaps():
    model, ids = gpt_oss(), tokens(110, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :20] = mask[0, 50:55] = 0
    expected = logits(model, ids, attention_mask=mask)
    hf.enable(model, DENSE)
    torch.testing.assert_close(logits(model, ids, attention_mask=mask)[mask > 0], expected[mask > 0], **CLOSE)


def test_gradients_reach_the_sinks_of_every_layer():
    model, ids, found = gpt_oss().train(), tokens(64), []
    for config in (None, {0: DENSE}):
        if config:
            hf.enable(model, config)
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        found.append([layer.self_attn.sinks.grad.clone() for layer in model.model.layers])
    for one, other in zip(*found, strict=True):
        assert one.abs().min() > 0
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-3)


def test_a_compiled_prefill():
    model, ids = build("GptOss", num_hidden_layers=2, experts_implementation="eager"), tokens(100)
    hf.enable(model, SPARSE)
    attention = model.model.layers[1].self_attn
    q, k, v = (torch.randn(2, heads, 100, 16) for heads in (4, 2, 2))

    def prefill(q, k, v, sinks):
        return hf.stem_attention_forward(attention, q, k, v, None, s_aux=sinks)[0]

    compiled = torch.compile(prefill, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(q, k, v, attention.sinks), prefill(q, k, v, attention.sinks))
    assert logits(model, ids).isfinite().all()


def test_selectors_keep_the_sinks():
    model, ids = gpt_oss(), tokens()

    def every_block(q, k, v):
        return stem.BlockSelection.every_block(*q.shape[:3], k.shape[2], 16, q.device)

    eager = logits(model, ids)
    hf.enable(model, every_block)
    torch.testing.assert_close(logits(model, ids), eager, **CLOSE)


@pytest.mark.parametrize("q_len, masked", [(1, False), (40, False), (40, True)])
def test_sixteen_bits_keep_the_sinks_of_dense_layers_exact(q_len, masked):
    module = gpt_oss().model.layers[2].self_attn
    module.sinks = torch.nn.Parameter(torch.tensor([5.01, 6.013, 7.017, 8.03]))  # bf16 would round them by 0.01
    q, k, v = (torch.randn(2, heads, n, 16).bfloat16() for heads, n in ((4, q_len), (2, 40), (2, 40)))
    q *= 0.1  # so that the sinks decide, not the rounding of q and k
    mask = torch.ones(q_len, 40, dtype=torch.bool).tril(40 - q_len)[None, None]
    additive = torch.where(mask, 0.0, -torch.inf).double()
    exact, _ = eager_attention_forward(module.double(), q.double(), k.double(), v.double(), additive, 0.25)
    module.sinks.data = module.sinks.data.float()
    out, _ = hf.stem_attention_forward(module, q, k, v, mask if masked else None, scaling=0.25, s_aux=module.sinks)
    assert out.shape == exact.shape and out.dtype == torch.bfloat16
    assert (out.double() - exact).norm() < 3e-3 * exact.norm()


def test_the_sink_key_leaves_scores_of_tokens_as_they_are():
    q, k, v, sinks = torch.randn(1, 4, 5, 16), torch.randn(1, 2, 7, 16), torch.randn(1, 2, 7, 12), torch.randn(4)
    mask = torch.ones(1, 1, 5, 7, dtype=torch.bool).tril(2)
    wide, keys, values, wide_mask, scale = with_sink_key(q, k, v, mask, 0.3, sinks)
    logits = wide @ keys.repeat_interleave(2, 1).mT * scale
    torch.testing.assert_close(logits[..., 1:], q @ k.repeat_interleave(2, 1).mT * 0.3)
    torch.testing.assert_close(logits[..., 0], sinks[None, :, None].expand(1, 4, 5))
    assert torch.equal(values[:, :, 1:, :12], v) and not values[:, :, 0].any() and not values[..., 12:].any()
    assert wide_mask[..., 0].all() and torch.equal(wide_mask[..., 1:], mask)
    assert not with_sink_key(q, k, v, mask.float().log(), 0.3, sinks)[3][..., 0].any()

"""stem.hf.models: which models and layers become sparse, which stay dense, and which are refused by name."""

import math
from functools import partial

import pytest
import torch
import transformers
from tiny_models import DENSE, FAMILIES, MOE, SIZES, SLIDING, SPARSE, build, logits, tokens
from torch import nn

import stem
from stem import hf


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
    mimo = dict(num_key_value_heads=1, head_dim=16, v_head_dim=8, **SLIDING, **experts)  # sinks in sliding layers only
    families = ("DeepseekV3", deepseek, [0, 1, 2]), ("Qwen3Next", qwen, [3]), ("MiMoV2Flash", mimo, [0, 1, 2])
    for family, settings, layers in families:
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


def test_a_selector_cannot_know_the_length_of_the_prompt():
    selector = partial(stem.patterns.select, "xattention", config=SPARSE)
    with pytest.raises(ValueError, match="prompt_length=100.*Selector"):
        hf.enable(build(), selector, prompt_length=100)
    with pytest.raises(TypeError, match="prompt_length.*'100'"):
        hf.enable(build(), SPARSE, prompt_length="100")


def test_an_implementation_is_asked_for_the_blocks_that_its_kernels_see(monkeypatch):
    """Blocks of 64 that an even number of heads share run in pairs of heads, so impl="hopper" covers them."""
    monkeypatch.setattr("stem.kernels.hopper_forward.is_sm90", lambda device: True)
    shared, device = stem.StemConfig(block_size=64, lists="group"), torch.device("cpu")
    model, odd = (build(head_dim=64, hidden_size=96, num_attention_heads=heads).bfloat16() for heads in (4, 6))
    hf.enable(model, shared, "hopper")
    assert not stem.warming._runs_torch((4, 2, 64), shared, "hopper", torch.bfloat16, device)
    alone = shared.replace(lists="head")
    for refused, config, impl in ((model, alone, "hopper"), (model, shared, "hopper_fp8"), (odd, shared, "hopper")):
        with pytest.raises(ValueError, match=f"impl='{impl}' does not cover block_size 64"):
            hf.enable(refused, config, impl)
    with pytest.raises(ValueError, match="impl='hopper' does not compute in FP8"):
        stem.warm_up((4, 2, 64), shared.replace(compute="fp8"), [300], impl="hopper", device="cpu")


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


def test_soft_caps_of_gemma2_are_refused():
    with pytest.raises(ValueError, match="Gemma2ForCausalLM cannot use Stem attention: .*softcapping"):
        hf.enable(build("Gemma2", head_dim=16), SPARSE)
    model = build("Gemma2", head_dim=16, attn_logit_softcapping=None)
    expected = logits(model, tokens())
    hf.enable(model, DENSE)
    torch.testing.assert_close(logits(model, tokens()), expected, atol=2e-5, rtol=1e-4)


GEMMA4 = dict(num_hidden_layers=6, head_dim=32, vocab_size_per_layer_input=97, hidden_size_per_layer_input=0)
LATENT = dict(kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16)
EXPERTS = dict(n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=32)


def gemma4(**overrides):
    settings = {**SIZES, **GEMMA4, "num_kv_shared_layers": 0, **overrides}
    torch.manual_seed(0)
    return transformers.Gemma4ForCausalLM(transformers.Gemma4TextConfig(**settings)).eval()


def test_layers_with_heads_that_are_too_large_stay_dense():
    model, ids = gemma4(global_head_dim=512, sliding_window=512), tokens(100)
    expected = logits(model, ids)
    hf.enable(model, DENSE)
    torch.testing.assert_close(logits(model, ids), expected, atol=2e-5, rtol=1e-4)
    hf.enable(model, SPARSE)
    assert (logits(model, ids) - expected).abs().max() > 1e-2
    rows = list(hf.density(model))
    assert [row["attention"] for row in rows] == ["stem"] * 5 + ["dense: head_dim 512"]
    assert [row["density"] < 0.7 for row in rows] == [True] * 5 + [False] and rows[5]["density"] == 1.0


def test_a_model_of_which_every_layer_would_stay_dense_is_refused():
    for model, config in (
        (gemma4(global_head_dim=512, sliding_window=24), SPARSE),
        (gemma4(global_head_dim=512, sliding_window=512), {5: SPARSE}),
        (build(head_dim=320), SPARSE),
    ):
        with pytest.raises(ValueError, match="cannot use Stem attention: every layer would stay dense .*head_dim"):
            hf.enable(model, config)
        assert model.config._attn_implementation == "sdpa" and model(tokens(100)).logits.isfinite().all()
    hf.enable(build(head_dim=320), {})


@pytest.mark.parametrize(
    "family, overrides, match",
    [
        ("DeepseekV32", LATENT | EXPERTS | dict(num_key_value_heads=4, index_head_dim=16, index_topk=16), "indexer"),
        ("VaultGemma", dict(head_dim=16), "softcap=self.attn_logit_softcapping .*soft-capped scores"),
    ],
)
def test_special_attention_is_refused_before_the_first_prompt(family, overrides, match):
    with pytest.raises(ValueError, match=f"cannot use Stem attention: .*{match}"):
        hf.enable(build(family, **overrides), SPARSE)


def test_compressed_keys_are_refused_before_the_first_prompt():
    with torch.device("meta"):
        model = transformers.DeepseekV4ForCausalLM(transformers.DeepseekV4Config(num_hidden_layers=1))
    with pytest.raises(ValueError, match="DeepseekV4ForCausalLM cannot use Stem attention: .*compressed keys"):
        hf.enable(model, SPARSE)


def test_position_biases_are_refused_before_the_first_prompt():
    with torch.device("meta"):
        model = transformers.InklingForCausalLM(transformers.InklingTextConfig(num_hidden_layers=2))
    with pytest.raises(ValueError, match="cannot use Stem attention: .*position_bias.* an additive position bias"):
        hf.enable(model, SPARSE)


def test_a_model_that_generates_attention_weights_is_refused():
    model = build()
    model.generation_config.output_attentions = True
    with pytest.raises(ValueError, match="cannot use Stem attention: its config says output_attentions=True"):
        hf.enable(model, SPARSE)


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
        ({True: SPARSE}, ValueError, r"layers \[True\] do not exist"),
        ({0: SPARSE, 1.0: SPARSE}, ValueError, r"layers \[1.0\] do not exist"),
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
    for function in (hf.density, hf.disable):
        with pytest.raises(TypeError, match="model must be a transformers model, got int"):
            function(3)
    with pytest.raises(ValueError, match="impl must be one of None, 'reference', .* got 'cuda'"):
        hf.enable(build(), SPARSE, impl="cuda")

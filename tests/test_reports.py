"""Inputs on which public reports of neighbouring projects found faults, beside those of each module's own tests."""

import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

import stem
from stem import BlockSelection, StemConfig, patterns

SMALL = StemConfig(block_size=16, score_stride=8, sink_blocks=1, local_blocks=1, density=0.5)
ADAPTIVE = StemConfig.preset("adaptive")


def in_threads(function, count=4):
    """Results of a function in several threads at once."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda _: function(), range(count)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled FlexAttention takes no blocks of 16")
def test_flex_in_threads_leaves_the_filters_of_warnings_alone():
    q, before = torch.randn(1, 2, 96, 16), list(warnings.filters)
    expected = stem.stem_attention(q, q, q, SMALL, impl="reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for out in in_threads(lambda: stem.stem_attention(q, q, q, SMALL, impl="flex")):
            torch.testing.assert_close(out, expected)
    assert list(warnings.filters) == before


def test_one_model_in_threads_gives_the_logits_of_one_thread():
    model, ids = tiny(), torch.randint(50, (2, 100))
    stem.hf.enable(model, SMALL)
    with torch.inference_mode():
        expected = model(ids).logits
        for logits in in_threads(lambda: model(ids).logits.clone()):
            assert torch.equal(logits, expected)


def layouts():
    """q, k and v of which one or all have a last dimension that is not contiguous in memory."""
    q, k, v = torch.randn(3, 1, 2, 50, 16).unbind(0)
    yield [x.mT.contiguous().mT for x in (q, k, v)]
    yield [q.mT.contiguous().mT, k, v]
    yield [q, torch.randn(1, 2, 50, 32)[..., ::2], v]
    yield [q, k, v[..., :1].expand(1, 2, 50, 16)]
    yield [q, k[:, :1].expand(1, 2, 50, 16), v]


@pytest.mark.parametrize(
    "config", [StemConfig(), StemConfig(density=1.0), ADAPTIVE], ids=["default", "dense", "adaptive"]
)
@pytest.mark.parametrize("number", range(5))
def test_any_layout_in_memory_gives_the_output_of_sdpa(number, config):
    q, k, v = [*layouts()][number]
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(stem.stem_attention(q, k, v, config), expected, rtol=1e-4, atol=1e-5)
    out, lse = stem.stem_attention(q, k, v, config, return_lse=True)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert lse.isfinite().all()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_selection_made_in_inference_mode_serves_training(impl):
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    q, k, v = (torch.randn(1, heads, 96, 16, device=device) for heads in (4, 2, 2))
    with torch.inference_mode():
        selections = [
            patterns.select("xattention", q, k, v, SMALL),
            BlockSelection.every_block(1, 4, 96, 96, 16, q.device),
            stem.stem_attention(q, k, v, SMALL, impl=impl, return_selection=True)[1],
        ]
    for selection in selections:
        x = q.clone().requires_grad_()
        stem.block_sparse_attention(x, k, v, selection, impl=impl).sum().backward()
        assert x.grad.abs().max() > 0


def test_an_empty_batch_gives_empty_gradients_to_every_input():
    q, k, v = (torch.randn(0, heads, 32, 16).requires_grad_() for heads in (4, 2, 2))
    out, lse = stem.stem_attention(q, k, v, SMALL, return_lse=True)
    (out.sum() + lse.sum()).backward()
    assert all(x.grad.shape == x.shape for x in (q, k, v))
    only_k = torch.randn(0, 2, 32, 16).requires_grad_()
    stem.stem_attention(q.detach(), only_k, v.detach(), SMALL).sum().backward()
    assert only_k.grad.shape == only_k.shape


def test_an_empty_selection_has_no_density_and_its_implementation_is_checked():
    selection = BlockSelection.every_block(0, 4, 32, 32, 16, torch.device("cpu"))
    assert selection.density() != selection.density()  # NaN
    q = torch.randn(0, 4, 32, 16)
    with pytest.raises(ValueError, match="impl must be None or one of"):
        stem.block_sparse_attention(q, q, q, selection, impl="x")
    assert selection == selection and selection != BlockSelection.every_block(0, 4, 32, 32, 16, torch.device("cpu"))


def tiny(family="Llama", **sizes):
    import transformers

    config = dict(vocab_size=50, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
    model = getattr(transformers, f"{family}ForCausalLM")
    return model(model.config_class(**config | sizes)).eval()


def test_values_wider_than_keys_stay_dense_and_are_reported():
    sizes = dict(qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=32, q_lora_rank=16, kv_lora_rank=16)
    model = tiny("DeepseekV3", first_k_dense_replace=2, **sizes)
    with pytest.raises(ValueError, match="every layer would stay dense .*values of 32 dimensions, keys of 16"):
        stem.hf.enable(model, SMALL)


def test_a_model_is_asked_for_an_implementation_that_its_device_has():
    if torch.cuda.is_available():
        pytest.skip("the model of this test is on a CPU, where hopper is refused whatever else there is")
    with pytest.raises(ValueError, match="impl='hopper' does not cover device cpu"):
        stem.hf.enable(tiny(), SMALL, "hopper")


def test_a_class_is_no_selector():
    with pytest.raises(TypeError, match="config must be a StemConfig"):
        stem.hf.enable(tiny(), StemConfig)
    with pytest.raises(TypeError, match="config of layer 1 must be a StemConfig"):
        stem.hf.enable(tiny(), {1: StemConfig})


@pytest.mark.parametrize("least", [-1e9, -1e4, torch.finfo(torch.float32).min])
def test_masks_in_other_spellings_are_the_same_mask(least):
    model, ids = tiny(), torch.randint(50, (2, 60))
    keep = torch.ones(60, 60, dtype=torch.bool).tril().expand(2, 1, 60, 60).clone()
    keep[1, :, :, :9] = False
    stem.hf.enable(model, SMALL)
    with torch.no_grad():
        expected = model(ids, attention_mask=keep).logits[:, 9:]
        additive = torch.zeros(2, 1, 60, 60).masked_fill(~keep, least)
        for mask in (additive, keep.expand(2, 4, 60, 60)):
            assert torch.equal(model(ids, attention_mask=mask).logits[:, 9:], expected)


def test_calibration_without_anything_to_calibrate_is_named():
    with pytest.raises(TypeError, match="model must be a transformers model, got NoneType"):
        stem.calibrate(None, [torch.arange(40)], 0.5, SMALL)
    with pytest.raises(ValueError, match="no layer of LlamaForCausalLM computed sparse attention"):
        stem.calibrate(tiny(), [torch.arange(1)], 0.5, SMALL)
    with pytest.raises(ValueError, match="no layer of MistralForCausalLM computed sparse attention"):
        stem.calibrate(tiny("Mistral", num_key_value_heads=2, sliding_window=24), [torch.arange(40)], 0.5, SMALL)


def test_sequence_lengths_that_repeat_the_rows_are_ignored():
    model, ids = tiny(), torch.randint(50, (2, 60))
    stem.hf.enable(model, SMALL)
    with torch.no_grad():
        expected = model(ids).logits
        for ends in (torch.tensor([0, 60, 120]), torch.tensor([0, 60, 120], dtype=torch.int32)):
            assert torch.equal(model(ids, cu_seq_lens_q=ends, cu_seq_lens_k=ends).logits, expected)
        with pytest.raises(ValueError, match="cu_seq_lens_q: Stem attention takes sequences packed into one row"):
            model(ids, cu_seq_lens_q=torch.tensor([0, 30, 120]), cu_seq_lens_k=torch.tensor([0, 30, 120]))

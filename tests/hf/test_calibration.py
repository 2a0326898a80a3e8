"""stem.calibrate: the threshold gives the wanted density on the prompts, and bad requests are named."""

import pytest
import torch
from transformers import BatchEncoding, LlamaConfig, LlamaForCausalLM

import stem
from stem import hf

BASE = stem.StemConfig(block_size=16, score_stride=4, sink_blocks=1, local_blocks=1)


@pytest.fixture
def model():
    sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def prompts():
    return [torch.randint(50, (length,)) for length in (256, 200)]


@pytest.mark.parametrize("density", [0.3, 0.6])
def test_the_threshold_gives_the_density_that_was_asked_for(model, prompts, density):
    config, realised = stem.calibrate(model, prompts, density, BASE)
    assert realised == pytest.approx(density, abs=0.005)
    assert config.allocation == "adaptive" and 0 < config.threshold < 1
    assert config.replace(allocation="position_decay", threshold=None) == BASE
    with hf.stem_prefill(model, config) as report, torch.no_grad():
        for prompt in prompts:
            model(prompt[None])
    assert report.density() == realised
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_calibration_in_a_mode_gives_the_density_of_that_mode(model, prompts, mode):
    with mode():
        config, realised = stem.calibrate(model, prompts, 0.4, BASE)
        with hf.stem_prefill(model, config) as report, torch.no_grad():
            for prompt in prompts:
                model(prompt[None])
    assert report.density() == realised == pytest.approx(0.4, abs=0.005)
    hf.enable(model, config)
    model(prompts[0][None], labels=prompts[0][None]).loss.backward()  # the next step may train
    assert all(x.grad.isfinite().all() for x in model.parameters())


def test_a_larger_density_needs_a_smaller_threshold(model, prompts):
    sparse, dense = (stem.calibrate(model, prompts, density, BASE).config.threshold for density in (0.3, 0.7))
    assert dense < sparse


def test_one_tensor_is_one_prompt(model, prompts):
    assert stem.calibrate(model, prompts[0], 0.5, BASE) == stem.calibrate(model, prompts[:1], 0.5, BASE)
    assert stem.calibrate(model, prompts[0][None], 0.5, BASE) == stem.calibrate(model, prompts[:1], 0.5, BASE)


@pytest.mark.parametrize(
    "prompts, error, match",
    [
        ("some text", TypeError, "got str 'some text'"),
        (["some text"], TypeError, "got one of str 'some text'"),
        ([1, 2, 3], TypeError, "got one of int '1'"),
        ([[1, 2, 3], [4, 5]], TypeError, "got one of list"),
        (BatchEncoding({"input_ids": torch.ones(1, 9).long()}), TypeError, "got BatchEncoding"),
        ([BatchEncoding({"input_ids": torch.ones(1, 9).long()})], TypeError, "got one of BatchEncoding"),
        (torch.rand(1, 9), TypeError, "got one of torch.float32"),
        ([torch.ones(1, 2, 9).long()], ValueError, r"got one of shape \(1, 2, 9\)"),
        ([torch.ones(0).long()], ValueError, r"got one of shape \(0,\)"),
        (7, TypeError, "got int '7'"),
    ],
)
def test_prompts_that_are_no_token_ids_are_named(model, prompts, error, match):
    with pytest.raises(error, match=f"prompts must be tensors of token ids.*{match}"):
        stem.calibrate(model, prompts, 0.5, BASE)


@pytest.mark.parametrize(
    "arguments, match",
    [
        (dict(density="0.3"), "density must be a number .* got '0.3'"),
        (dict(density=True), "density must be a number .* got True"),
        (dict(density=0.3, tolerance="0.1"), "tolerance must be a number .* got '0.1'"),
        (dict(density=0.3, config=0.25), "config must be a StemConfig, got 0.25"),
    ],
)
def test_arguments_of_another_type_are_named(model, prompts, arguments, match):
    with pytest.raises(TypeError, match=match):
        stem.calibrate(model, prompts, **arguments)
    with pytest.raises(ValueError, match="tolerance must be in .* got -1"):
        stem.calibrate(model, prompts, 0.3, BASE, tolerance=-1)


def test_a_budget_in_the_given_config_is_replaced(model, prompts):
    config, _ = stem.calibrate(model, prompts, 0.5, BASE.replace(k_start=3))
    assert config.k_start is None and config.density is None


def test_requests_that_cannot_be_met_are_named(model, prompts, monkeypatch):
    for density in (0.0, 1.0, -1.0):
        with pytest.raises(ValueError, match=f"density must be in .* got {density}"):
            stem.calibrate(model, prompts, density, BASE)
    with pytest.raises(ValueError, match="at least that of the sink and local blocks, .* got 0.1"):
        stem.calibrate(model, prompts, 0.1, BASE)
    with pytest.raises(ValueError, match="prompts"):
        stem.calibrate(model, [], 0.5, BASE)
    shortest = min(prompt.shape[-1] for prompt in prompts)
    with pytest.raises(ValueError, match=f"longer than config.dense_up_to={shortest} tokens.* got one of {shortest}"):
        stem.calibrate(model, prompts, 0.5, BASE.replace(dense_up_to=shortest))
    monkeypatch.setattr(stem.hf.calibration, "ROUNDS", 2)
    with pytest.raises(ValueError, match="density=0.5 was not reached within tolerance=1e-09"):
        stem.calibrate(model, prompts, 0.5, BASE, tolerance=1e-9)

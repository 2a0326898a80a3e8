"""stem.hf.switch: enable, disable and stem_prefill, on models that share configs, copies and user choices included."""

import contextlib
import copy
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
import transformers
from tiny_models import DENSE, FIXED, SIZES, SPARSE, build, logits, tokens

import stem
from stem import hf


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


def twins(implementation="sdpa"):
    """Two models made from one config object, and their logits without Stem."""
    first = build(attn_implementation=implementation)
    second = type(first)(first.config).eval()
    second.load_state_dict(build(seed=1).state_dict())
    return first, second, [logits(model, tokens()) for model in (first, second)]


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "masked_for_tests"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_disabling_one_of_two_models_with_one_config_leaves_the_other(implementation, order):
    *models, dense = twins(implementation)
    for model in models:
        hf.enable(model, SPARSE)
    sparse = [logits(model, tokens()) for model in models]
    for each in order:
        hf.disable(models[each])
        assert torch.equal(logits(models[each], tokens()), dense[each])
        assert models[each].config._attn_implementation == implementation
        if each == order[0]:
            other = 1 - each
            assert torch.equal(logits(models[other], tokens()), sparse[other])
            assert hf.density(models[other])[0]["attention"] == "stem"


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "masked_for_tests"])
def test_a_block_with_one_of_two_models_leaves_the_other(implementation):
    first, second, (dense_first, dense_second) = twins(implementation)
    with hf.stem_prefill(first, SPARSE):
        assert torch.equal(logits(second, tokens()), dense_second)
    hf.enable(first, SPARSE)
    sparse = logits(first, tokens())
    for _ in range(2):
        with hf.stem_prefill(second, SPARSE) as report:
            assert not torch.equal(logits(second, tokens()), dense_second)
        assert report.density() < 0.7 and torch.equal(logits(second, tokens()), dense_second)
        assert torch.equal(logits(first, tokens()), sparse)
    hf.disable(first)
    assert torch.equal(logits(first, tokens()), dense_first)


def test_a_model_made_from_the_config_of_an_enabled_model():
    first = build()
    dense = logits(first, tokens())
    hf.enable(first, SPARSE)
    sparse = logits(first, tokens())
    second = type(first)(first.config).eval()
    second.load_state_dict(first.state_dict())
    assert torch.equal(logits(second, tokens()), dense)
    hf.enable(second, SPARSE)
    hf.disable(first)
    assert torch.equal(logits(first, tokens()), dense) and torch.equal(logits(second, tokens()), sparse)
    hf.disable(second)
    assert torch.equal(logits(second, tokens()), dense) and second.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("block", [False, True])
def test_a_config_that_replaces_the_models_own_while_enabled(block):
    model, around = build(), contextlib.nullcontext()
    dense = logits(model, tokens())
    if block:
        around = hf.stem_prefill(model, SPARSE)
    else:
        hf.enable(model, SPARSE)
    with around:
        model.config = copy.deepcopy(model.config)
        assert not torch.equal(logits(model, tokens()), dense)
    hf.disable(model)
    assert torch.equal(logits(model, tokens()), dense) and model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("chosen", ["eager", "masked_for_tests"])
def test_an_attention_chosen_while_enabled_runs_is_reported_and_stays(chosen):
    model, ids = build(), tokens()
    model.set_attn_implementation(chosen)
    expected = logits(model, ids)
    model.set_attn_implementation("sdpa")
    hf.enable(model, SPARSE)
    sparse = logits(model, ids)
    model.set_attn_implementation(chosen)
    assert [row["attention"] for row in hf.density(model)] == [chosen] * 3
    assert torch.equal(logits(model, ids), expected)
    model.set_attn_implementation("stem")
    assert [row["attention"] for row in hf.density(model)] == ["stem"] * 3
    assert torch.equal(logits(model, ids), sparse)
    model.config._attn_implementation = chosen
    report = hf.density(model)
    hf.disable(model)
    assert model.config._attn_implementation == chosen and torch.equal(logits(model, ids), expected)
    model.set_attn_implementation("sdpa")
    assert report[0]["attention"] == chosen  # what ran until `disable`
    model.set_attn_implementation(chosen)
    hf.enable(model, SPARSE)
    assert torch.equal(logits(model, ids), sparse)
    hf.disable(model)
    assert model.config._attn_implementation == chosen


@pytest.mark.parametrize("error", [None, KeyError])
def test_blocks_within_blocks(error):
    model, ids = build(), tokens()
    dense = logits(model, ids)
    with hf.stem_prefill(model, SPARSE) as outer:
        sparse = logits(model, ids)
        try:
            with hf.stem_prefill(model, FIXED) as inner:
                assert not torch.equal(logits(model, ids), sparse)
                if error:
                    raise error
        except KeyError:
            pass
        assert torch.equal(logits(model, ids), sparse) and model.config._attn_implementation == "stem"
        counted = inner.density()
        with hf.stem_prefill(model, SPARSE):
            model.set_attn_implementation("eager")
        assert model.config._attn_implementation == "eager" and outer[0]["attention"] == "eager"
        with hf.stem_prefill(model, SPARSE):
            assert torch.equal(logits(model, ids), sparse)
        assert model.config._attn_implementation == "eager"  # chosen before the block
        model.set_attn_implementation("stem")
        assert torch.equal(logits(model, ids), sparse) and outer[0]["attention"] == "stem"
    assert model.config._attn_implementation == "sdpa" and torch.equal(logits(model, ids), dense)
    assert inner.density() == counted and [row["attention"] for row in (*inner, *outer)] == ["stem"] * 6


def entered(*arguments):
    """The context and the report of an open block of stem_prefill."""
    context = hf.stem_prefill(*arguments)
    return context, context.__enter__()


def exit_of(context):
    context.__exit__(None, None, None)


@pytest.mark.parametrize("before", [None, DENSE, "eager"])
def test_blocks_that_overlap_without_nesting(before):
    model, ids = build(), tokens()
    if before == "eager":
        model.set_attn_implementation("eager")
    elif before is not None:
        hf.enable(model, before)
    implementation, first = model.config._attn_implementation, logits(model, ids)
    with hf.stem_prefill(model, SPARSE):
        sparse = logits(model, ids)
    with hf.stem_prefill(model, FIXED):
        fixed = logits(model, ids)
    (a, report_a), (b, _), (c, report_c) = (entered(model, config) for config in (FIXED, FIXED, SPARSE))
    assert torch.equal(logits(model, ids), sparse)
    exit_of(a)
    assert torch.equal(logits(model, ids), sparse) and report_a[0]["attention"] == "stem"
    exit_of(c)
    assert torch.equal(logits(model, ids), fixed)
    exit_of(b)
    assert torch.equal(logits(model, ids), first) and model.config._attn_implementation == implementation
    assert report_c.density() < 0.7 and report_a.density() != report_a.density()  # NaN: never run
    layers = [module.stem_layer.config for module in model.modules() if hasattr(module, "stem_layer")]
    assert layers == ([DENSE] * 3 if before == DENSE else [])
    hf.disable(model)
    assert model.config._attn_implementation == ("eager" if before == "eager" else "sdpa")


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_overlapping_blocks_with_two_models_of_one_config(order):
    first, second, dense = twins()
    contexts = [entered(model, SPARSE)[0] for model in (first, second)]
    for i in order:
        exit_of(contexts[i])
        assert torch.equal(logits((first, second)[i], tokens()), dense[i])
    for model in (first, second):
        assert model.config._attn_implementation == "sdpa"
        assert not any(hasattr(module, "stem_layer") for module in model.modules())


def test_overlapping_blocks_with_a_model_and_a_part_of_it():
    model, ids = build(), tokens()
    dense = logits(model, ids)
    for parts in ((model, model.model), (model.model, model)):
        a, b = (entered(part, SPARSE)[0] for part in parts)
        exit_of(a)
        assert not torch.equal(logits(model, ids), dense)
        exit_of(b)
        assert torch.equal(logits(model, ids), dense) and model.config._attn_implementation == "sdpa"
        assert not any(hasattr(module, "stem_layer") for module in model.modules())


def test_a_copy_and_its_model_are_switched_separately():
    model, ids = build(), tokens()
    dense = logits(model, ids)
    hf.enable(model, SPARSE)
    sparse, twin = logits(model, ids), copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    assert hf.density(model)[0]["attention"] == "stem" and hf.density(twin)[0]["attention"] == "eager"
    assert torch.equal(logits(model, ids), sparse)
    twin.set_attn_implementation("stem")
    hf.disable(twin)
    assert torch.equal(logits(model, ids), sparse) and torch.equal(logits(twin, ids), dense)


def test_a_part_of_a_model_can_be_enabled():
    model, ids = build(), tokens()
    dense = logits(model, ids)
    hf.enable(model.model, SPARSE)
    sparse = logits(model, ids)
    assert not torch.equal(sparse, dense) and len(hf.density(model)) == 3
    model.model.set_attn_implementation("eager")  # before 5.23, the outer model's does not reach another config
    assert [row["attention"] for row in hf.density(model.model)] == ["eager"] * 3
    model.model.set_attn_implementation("stem")
    assert torch.equal(logits(model, ids), sparse)
    hf.disable(model)
    assert torch.equal(logits(model, ids), dense)


def test_a_model_with_several_configs():
    vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**SIZES), vision_config=transformers.CLIPVisionConfig(**vision)
    )
    model, ids = transformers.LlavaForConditionalGeneration(config).eval(), tokens()
    model.set_attn_implementation({"vision_config": "eager"})
    dense = logits(model, ids)
    hf.enable(model, DENSE)
    torch.testing.assert_close(logits(model, ids), dense, atol=2e-5, rtol=1e-4)
    assert hf.density(model).density() == 1.0
    assert model.config.text_config is model.model.language_model.config is model.model.config.text_config
    assert model.config.text_config._attn_implementation == "stem"
    assert model.config.vision_config._attn_implementation == "eager"
    model.set_attn_implementation({"text_config": "eager"})
    assert [row["attention"] for row in hf.density(model)] == ["eager"] * 3
    model.set_attn_implementation({"text_config": "stem"})
    hf.disable(model)
    assert torch.equal(logits(model, ids), dense)
    implementations = [c._attn_implementation for c in (model.config, model.config.text_config)]
    assert implementations == ["sdpa"] * 2 and model.config.vision_config._attn_implementation == "eager"


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


def test_the_implementation_is_checked_for_every_sparse_layer_before_anything_changes():
    model = build().double()
    with pytest.raises(TypeError, match="impl='triton' takes float16, bfloat16 or float32, got torch.float64"):
        hf.enable(model, SPARSE, "triton")
    with pytest.raises(ValueError, match="impl='hopper_fp8' does not cover"):
        hf.enable(model, SPARSE.replace(compute="fp8"))
    assert model.config._attn_implementation == "sdpa"
    hf.enable(model, [None] * 3, "triton")  # nothing to compute


def test_the_checked_problem_is_that_of_the_prompts(monkeypatch):
    model, seen = build().bfloat16(), []
    monkeypatch.setattr("stem.hf.models.resolve_impl", lambda *problem: seen.append(problem))
    planned = lambda p: seen.append((p.impl, p.device, p.dtype, p.head_dim, p.config.block_size))  # noqa: E731
    monkeypatch.setattr("stem.hf.models.Plan", planned)
    selector = partial(stem.patterns.select, "xattention", config=SPARSE)
    hf.enable(model, {0: SPARSE, 1: selector, 2: lambda q, k, v: None}, "hopper")
    problem = "hopper", torch.device("cpu"), torch.bfloat16, model.model.layers[0].self_attn.head_dim
    assert seen == [(*problem, SPARSE.block_size), (*problem, SPARSE.block_size), (*problem, 128)]
    seen.clear()
    with torch.autocast("cpu", torch.float16):
        hf.enable(model, SPARSE, "hopper")
    assert {x[2] for x in seen} == {torch.float16}


@pytest.mark.parametrize("wrong", [None, torch.ones(1, 4, 7, 7, dtype=torch.bool)], ids=["nothing", "a mask"])
def test_a_selector_that_returns_no_selection_is_named(wrong):
    model = build()
    with hf.stem_prefill(model, {1: lambda q, k, v: wrong}):
        with pytest.raises(TypeError, match=f"layer 1: .* must return a BlockSelection, got {type(wrong).__name__}"):
            logits(model, tokens())


def test_a_model_on_the_device_meta_has_meta_logits():
    with torch.device("meta"):
        model = build()
    with hf.stem_prefill(model, SPARSE):
        assert model(torch.zeros(1, 100, dtype=torch.long, device="meta")).logits.shape == (1, 100, 97)

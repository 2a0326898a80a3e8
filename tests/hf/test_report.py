"""stem.hf.report: realised density and the attention that runs, layer by layer."""

import copy
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import transformers
from tiny_models import FIXED, MOE, SPARSE, build, logits, tokens

import stem
from stem import hf


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


BUDGETS = {
    "budget": SPARSE,
    "every block": SPARSE.replace(density=1.0),
    "forced": SPARSE.replace(sink_blocks=9, local_blocks=9),
    "on top": SPARSE.replace(forced="on_top", sink_blocks=2),
    "adaptive": stem.StemConfig.preset("adaptive", block_size=16, dense_up_to=0, threshold=0.1, score_cells=4),
    "short prompts dense": SPARSE.replace(dense_up_to=140),
}


@pytest.mark.parametrize("config", BUDGETS.values(), ids=BUDGETS)
def test_the_densities_are_those_of_the_lists(config):
    """Also after more calls than a layer keeps counts of, and in batches with padding, which split the rows."""
    model, mask = build(), torch.ones(2, 150, dtype=torch.long)
    mask[0, :61] = 0
    found = []
    for attention in (config, partial(stem.patterns.select, "stem", config=config)):
        with hf.stem_prefill(model, attention) as report:
            for length in (150, 97, 130):
                logits(model, tokens(length))
            logits(model, tokens(150, batch=2), attention_mask=mask)
        found.append([row["head_density"] for row in report])
    assert found[0] == found[1]
    assert (found[0][0] == [1.0] * 4) == (config == BUDGETS["every block"])


def test_counts_that_the_data_decide_are_summed_now_and_then(monkeypatch):
    model, ids = build(), tokens(150)
    hf.enable(model, BUDGETS["adaptive"])
    logits(model, ids)
    once, layer = hf.density(model)[0]["head_density"], model.model.layers[0].self_attn.stem_layer
    assert len(layer.counts) == 1 and len(set(once)) > 1
    monkeypatch.setattr(hf.report, "MOST_COUNTS", 3 * 4 * 10)
    for _ in range(6):
        logits(model, ids)
        assert hf.density(model)[0]["head_density"] == pytest.approx(once) and len(layer.counts) <= 3
    with torch.inference_mode():
        model(ids)
    assert copy.deepcopy(model.model.layers[0].self_attn.stem_layer).kept().tolist() == layer.kept().tolist()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", BUDGETS)
def test_a_prefill_does_not_wait_for_the_device(name):
    model, ids = build().to("cuda", torch.bfloat16), tokens(150).cuda()
    with hf.stem_prefill(model, BUDGETS[name]) as report:
        logits(model, ids)  # compiles
        before = report.density()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):  # the third prefill is replayed
                logits(model, ids)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert report.density() == before


def test_no_lists_are_made_where_the_plan_is_dense(monkeypatch):
    model, ids = build(), tokens(150)
    expected = logits(model, ids)
    monkeypatch.setattr(stem.planning.Plan, "choose", lambda *args: pytest.fail("blocks were chosen"))
    with hf.stem_prefill(model, SPARSE.replace(dense_up_to=160)) as report:
        torch.testing.assert_close(logits(model, ids), expected, atol=2e-5, rtol=1e-4)
    assert report.density() == 1.0 and not model.model.layers[0].self_attn.__dict__.get("stem_layer")


def test_all_layers_share_one_plan(monkeypatch):
    model, ids, made = build(), tokens(143), []
    original = stem.planning.Plan.__post_init__
    monkeypatch.setattr(stem.planning.Plan, "__post_init__", lambda plan: made.append(plan) or original(plan))
    hf.enable(model, SPARSE)
    for _ in range(2):
        logits(model, ids)
    assert len(made) == 1 and made[0].problem.return_counts and not made[0].problem.return_selection


def test_layers_with_one_config_look_up_one_plan(monkeypatch):
    """A first call after `enable` then costs the host little more than a later one."""
    asked, original = [], hf.forward._plan
    monkeypatch.setattr(hf.forward, "_plan", lambda layer, *args: asked.append(layer.index) or original(layer, *args))
    model, ids = build(), tokens(143)
    hf.enable(model, {0: SPARSE, 1: SPARSE, 2: SPARSE.replace(density=1.0)})
    for _ in range(2):
        logits(model, ids)
    assert asked == [0, 2] and [row["density"] for row in hf.density(model)][2] == 1.0


def test_a_layer_remembers_plans_by_everything_that_decides_them(monkeypatch):
    asked, original = [], hf.forward._plan
    monkeypatch.setattr(hf.forward, "_plan", lambda *args: asked.append(original(*args)) or asked[-1])
    model, ids = build(), tokens(143)
    hf.enable(model, {0: SPARSE, 1: SPARSE, 2: None})
    layer = model.model.layers[0].self_attn.stem_layer
    expected, twin = logits(model, ids), build()
    assert len(asked) == 1 and torch.equal(logits(model, ids), expected)
    assert len(asked) == 1
    for each in (model, twin):  # with gradients after a call without them, and at once
        hf.enable(twin, {0: SPARSE, 1: SPARSE, 2: None}) if each is twin else None
        each.requires_grad_()(ids).logits.sum().backward()
    for here, there in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(here.grad, there.grad)
    assert [plan.problem.needs_grad for plan in asked] == [False, True, True]
    with torch.inference_mode():
        model(ids)
    assert len(asked) == 4
    logits(model, tokens(97))
    logits(model.to(torch.float64), ids)
    assert [plan.problem.dtype for plan in asked[3:]] == [torch.float32, torch.float32, torch.float64]
    assert copy.deepcopy(layer).plans == {} and len(layer.plans) == 2
    monkeypatch.setattr(hf.forward, "MOST_PLANS", 2)
    logits(model, tokens(98))
    assert len(layer.plans) == 1


@pytest.mark.parametrize("change", ["strides", "dtype", "gradient", "autocast", "inference mode", "vmap", "subclass"])
def test_a_known_plan_serves_only_tensors_that_it_fits(change):
    model, context = build(), nullcontext()
    hf.enable(model, SPARSE)
    module = model.model.layers[0].self_attn
    q, k, v = (torch.randn(1, heads, 143, 16) for heads in (4, 2, 2))
    attend = partial(hf.stem_attention_forward, module, attention_mask=None, scaling=0.25)
    attend(q, k, v)
    known = module.stem_layer.plans[0.25, q.shape]
    assert known.fits(q, k, v) and known.fits(q.clone(), k.clone(), v.clone())
    if change == "strides":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    elif change == "dtype":
        q, k, v = q.double(), k.double(), v.double()
    elif change == "gradient":
        q.requires_grad_()
    elif change == "subclass":
        q = q.as_subclass(torch.nn.Parameter)
    elif change == "autocast":
        context = torch.autocast("cpu", torch.bfloat16)
    elif change == "inference mode":
        context = torch.inference_mode()
    if change == "vmap":
        fits = torch.func.vmap(lambda q: torch.tensor(known.fits(q, k, v)))(q[None])
        assert not fits
        return
    with context:
        assert not known.fits(q, k, v)
        out, module.stem_layer.plans = attend(q, k, v)[0], {}
        torch.testing.assert_close(attend(q, k, v)[0], out, atol=0, rtol=0)
        assert out.dtype == (torch.bfloat16 if change == "autocast" else q.dtype)


def test_launches_that_are_replayed_take_the_place_of_dense_kernels(monkeypatch):
    """On Hopper GPUs, for calls without gradients; the operator itself prefers torch's kernels for short prompts."""
    asked, found = [], SimpleNamespace(path="dense", impl="hopper", problem=SimpleNamespace(needs_grad=False))

    def plan_for(q, k, v, config, scale, impl, prompt_length, **options):
        asked.append(impl)
        return found

    def choose() -> list:
        asked.clear()
        assert hf.forward._plan(SimpleNamespace(config=SPARSE, impl=None), *[None] * 3, 1.0, None, False) is found
        return asked

    monkeypatch.setattr(hf.forward, "plan_for", plan_for)
    assert choose() == [None, "hopper"]
    for changes in (dict(path="lists"), dict(impl="triton"), dict(problem=SimpleNamespace(needs_grad=True))):
        with monkeypatch.context() as patch:
            for name, value in changes.items():
                patch.setattr(found, name, value)
            assert choose() == [None]


def test_rows_by_layer_in_a_hybrid_model():
    linear = dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16)
    sizes = dict(num_hidden_layers=8, head_dim=16, shared_expert_intermediate_size=32, **MOE, **linear)
    model = build("Qwen3Next", **sizes)
    with hf.stem_prefill(model, {7: SPARSE}) as report:
        logits(model, tokens(100))
    assert len(report) == 2 and report[1]["layer"] == 7
    assert report.layer(7) == report[1] and report.layer(7)["attention"] == "stem"
    assert report.layer(3) == report[0] and report.layer(3)["attention"] == "dense"
    for index in (1, 8, -1, "3", True, 3.0):
        with pytest.raises(ValueError, match=rf"index must be an attention layer .* \[3, 7\], got {index!r}"):
            report.layer(index)


def test_prompts_with_gaps_count_as_dense():
    model, ids = build(), tokens(96, batch=3)
    mask = torch.ones_like(ids)
    mask[1, 40:50] = 0
    for config in (FIXED, partial(stem.patterns.select, "stem", config=FIXED)):
        with hf.stem_prefill(model, config) as report:
            logits(model, ids, attention_mask=mask)
        name = "stem" if config is FIXED else "selector"
        assert report[0]["attention"] == f"{name}; prompts dense because of gaps in their padding: 1"
        size = 16 if config is FIXED else 128
        dense = 21 if size == 16 else 1  # causal block pairs of 96 tokens
        assert report[0]["density"] == pytest.approx((2 * (1 + 2 + 3 * 4) + dense) / (2 * 21 + dense))
        assert report[0]["head_density"] == pytest.approx([report[0]["density"]] * 4)


def gaps(report):
    return (
        report[0]["attention"].removeprefix("stem").removeprefix("; prompts dense because of gaps in their padding: ")
    )


def test_a_prompt_with_gaps_counts_once_whatever_its_chunks():
    model, ids = build(), tokens(96, batch=3)
    mask = torch.ones_like(ids)
    mask[1, 40:50] = 0  # in the second of three chunks

    def read(chunks, mask=mask):
        cache = transformers.DynamicCache(config=model.config)
        for start, stop in zip([0, *chunks], chunks, strict=False):
            part = dict(input_ids=ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache)
            with torch.no_grad():
                model(**part)

    with hf.stem_prefill(model, FIXED) as report:
        read([32, 64, 96])
        assert gaps(report) == "1"
        read([96])
        assert gaps(report) == "2"
        read([60, 70, 71, 96])  # one of one token
        assert gaps(report) == "3"
        read([96], torch.ones_like(ids))
        read([32, 64, 96])
        assert gaps(report) == "4"
        mask[:2, 55:60] = 0
        read([32, 64, 96])
        assert gaps(report) == "6"
        read([96], torch.ones_like(ids).masked_fill(torch.arange(96) < 9, 0))  # left padding is no gap
        read([32, 64, 96])
        assert gaps(report) == "8"


def test_gradient_checkpointing_counts_a_prompt_once():
    model, ids = build(), tokens(96, batch=2)
    mask = torch.ones_like(ids)
    mask[1, 40:50] = 0
    model.train()
    model.gradient_checkpointing_enable()
    with hf.stem_prefill(model, FIXED) as report:
        model(ids, attention_mask=mask, use_cache=False).logits.sum().backward()
    assert gaps(report) == "1"

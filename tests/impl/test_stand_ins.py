"""Dropped blocks that stand in by means: every implementation against a brute force in float64, and where it counts."""

from functools import partial

import oracles
import pytest
import torch
from devices import on_its_device
from torch.func import grad
from transformers import LlamaConfig, LlamaForCausalLM

import stem
from stem import BlockSelection, StemConfig, hf, patterns
from stem.impl import stand_ins
from stem.planning import plan_for

block_sparse_attention = on_its_device(stem.block_sparse_attention)
stem_attention = on_its_device(stem.stem_attention)
IMPLS = ("reference", "torch", "triton", "flex")
LENGTHS = {  # Nq, Nkv, block
    "whole": (96, 96, 32), "ragged": (91, 91, 32), "chunk": (32, 96, 32), "unaligned": (43, 91, 32),
    "decode": (1, 91, 32), "small-blocks": (60, 90, 16), "large-blocks": (130, 200, 64), "one-block": (20, 20, 32),
}  # fmt: skip
CONFIG = StemConfig(block_size=32, score_stride=8, density=0.4, sink_blocks=1, local_blocks=1, dropped="mean")


def draw(q_len=123, kv_len=123, q_heads=2, kv_heads=1, head_dim=16, dtype=torch.float32, batch=1):
    q = 2 * torch.randn(batch, q_heads, q_len, head_dim)
    k, v = (torch.randn(batch, kv_heads, kv_len, head_dim) + 0.5 for _ in range(2))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def random_selection(q, k, block, keep=0.4):
    """Random blocks; some rows drop their diagonal, the first row of head 0 keeps nothing, the last row everything."""
    nk = -(-k.shape[2] // block)
    nq = nk - (k.shape[2] - q.shape[2]) // block
    mask = torch.rand(*q.shape[:2], nq, nk) < keep
    mask[:, 0, 0] = False
    mask[:, :, -1] |= nq > 1
    return BlockSelection.from_mask(mask.tril(nk - nq), block, q_len=q.shape[2], kv_len=k.shape[2])


def oracle(q, k, v, selection, dropped, scale=None):
    tokens = {"mean": selection.block_size, "cells": 16}[dropped]
    return oracles.attention_with_stand_ins(q, k, v, selection.to_mask(), selection.block_size, tokens, scale)


@pytest.mark.parametrize("dropped", ["mean", "cells"])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("impl", IMPLS)
def test_lengths(impl, lengths, dropped):
    q_len, kv_len, block = LENGTHS[lengths]
    q, k, v = draw(q_len, kv_len, *((4, 2, 16, torch.float32, 2) if impl != "triton" or lengths == "ragged" else ()))
    selection = random_selection(q, k, block)
    expected, expected_lse = oracle(q, k, v, selection, dropped)
    out, lse = block_sparse_attention(q, k, v, selection, impl=impl, return_lse=True, dropped=dropped)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    if lengths not in ("one-block", "decode"):
        skipped = block_sparse_attention(q, k, v, selection, impl=impl)
        assert (out - skipped).norm() > 0.05 * out.norm()


@pytest.mark.parametrize("impl", IMPLS)
def test_many_blocks_in_several_chunks(impl, monkeypatch):
    monkeypatch.setattr(stand_ins, "CHUNK_LOGITS", 5000)
    q, k, v = draw(550, 700, 1, 1) if impl == "triton" else draw(1100, 1400, 2, 1)
    selection = random_selection(q, k, 16, keep=0.1)
    expected, expected_lse = oracle(q, k, v, selection, "mean")
    out, lse = block_sparse_attention(q, k, v, selection, impl=impl, return_lse=True, dropped="mean")
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head_dim", [8, 40, 128])
@pytest.mark.parametrize("scale", [0.1, 0.5])
def test_head_dims_and_scales(head_dim, scale):
    q, k, v = draw(head_dim=head_dim)
    selection = random_selection(q, k, 32)
    expected, _ = oracle(q, k, v, selection, "cells", scale)
    for impl in IMPLS:
        out = block_sparse_attention(q, k, v, selection, scale, impl=impl, dropped="cells")
        torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("boost", [1e-3, 30.0])
@pytest.mark.parametrize("impl", IMPLS)
def test_stand_ins_far_below_and_above_the_kept_blocks(impl, boost):
    q, k, v = draw(192, 192, 2, 1)
    q += 1
    k[:, :, 32:64] = boost * torch.rand(1, 1, 32, 16)
    mask = torch.ones(1, 2, 6, 6, dtype=torch.bool).tril()
    mask[..., 2:, 1] = False
    selection = BlockSelection.from_mask(mask, 32)
    expected, expected_lse = oracle(q.double(), k, v, selection, "mean")
    out, lse = block_sparse_attention(q, k, v, selection, impl=impl, return_lse=True, dropped="mean")
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("impl", IMPLS)
def test_half_precision(impl, dtype):
    q, k, v = draw(dtype=dtype)
    selection = random_selection(q, k, 32)
    expected, expected_lse = oracle(q, k, v, selection, "mean")
    out, lse = block_sparse_attention(q, k, v, selection, impl=impl, return_lse=True, dropped="mean")
    assert out.dtype == dtype and lse.dtype == torch.float32
    eps = torch.finfo(dtype).eps
    assert (out.double() - expected).norm() < 2 * eps * expected.norm()
    finite = expected_lse.isfinite()  # rounded means shift a logit of about 10 by eps
    assert (lse.double() - expected_lse)[finite].abs().max() < 10 * eps


@pytest.mark.parametrize("dropped", ["mean", "cells"])
@pytest.mark.parametrize("lengths", ["ragged", "unaligned", "small-blocks"])
@pytest.mark.parametrize("impl", IMPLS)
def test_gradients(impl, lengths, dropped, monkeypatch):
    monkeypatch.setattr("stem.kernels.stand_ins.CHUNK_LOGITS", 10_000)
    q_len, kv_len, block = LENGTHS[lengths]
    q, k, v = (x.requires_grad_() for x in draw(q_len, kv_len))
    selection = random_selection(q, k, block)
    dout = torch.randn_like(q)
    expected, expected_lse = oracle(q, k, v, selection, dropped)
    dlse = torch.randn(expected_lse.shape) * expected_lse.isfinite()

    def gradients(out, lse):
        loss = (out * dout).sum() + (lse.masked_fill(~expected_lse.isfinite(), 0) * dlse).sum()
        return torch.autograd.grad(loss, (q, k, v))

    found = gradients(*block_sparse_attention(q, k, v, selection, impl=impl, return_lse=True, dropped=dropped))
    skipped = gradients(*block_sparse_attention(q, k, v, selection, impl=impl, return_lse=True))
    for one, other, without in zip(found, gradients(expected, expected_lse), skipped, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        assert (one - without).norm() > 0.05 * one.norm()


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_gradients_in_float64_of_second_order_and_of_torch_func(impl):
    q, k, v = (x.double().requires_grad_() for x in draw(20, 36, 2, 1, 2))
    selection = random_selection(q, k, 16)

    def attend(*qkv):
        return block_sparse_attention(*qkv, selection, impl=impl, dropped="mean")

    assert torch.autograd.gradcheck(attend, (q, k, v))
    assert torch.autograd.gradgradcheck(attend, (q, k, v), fast_mode=True)
    found = grad(lambda k: attend(q.detach(), k, v.detach()).sin().sum())(k.detach())
    torch.testing.assert_close(found, torch.autograd.grad(attend(q, k, v).sin().sum(), k)[0])


@pytest.mark.parametrize("impl", IMPLS)
def test_with_every_block_kept_nothing_changes(impl):
    q, k, v = draw()
    every = BlockSelection.every_block(1, 2, 123, 123, 32, q.device)
    one, other = (block_sparse_attention(q, k, v, every, impl=impl, dropped=x) for x in ("skip", "mean"))
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    full = CONFIG.replace(density=1.0)
    found, skipped = (stem_attention(q, k, v, full.replace(dropped=x), impl=impl) for x in ("mean", "skip"))
    torch.testing.assert_close(found, skipped, rtol=1e-6, atol=1e-6)


def test_equal_keys_and_values_inside_blocks_make_the_means_exact():
    q, k, v = draw(192, 192)
    k, v = (x.unflatten(2, (-1, 32))[:, :, :, :1].expand(-1, -1, -1, 32, -1).flatten(2, 3) for x in (k, v))
    nothing = BlockSelection.from_mask(torch.eye(6, dtype=torch.bool).expand(1, 2, 6, 6), 32)
    for impl in IMPLS:
        out = block_sparse_attention(q, k, v, nothing, impl=impl, dropped="mean")
        torch.testing.assert_close(out, stem.reference.dense_attention(q, k, v), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_option_of_the_config_is_that_of_the_selection(impl):
    q, k, v = draw()
    out, selection, lse = stem_attention(q, k, v, CONFIG, impl=impl, return_selection=True, return_lse=True)
    assert selection.dropped == "mean" and selection.density() < 0.6
    again, again_lse = block_sparse_attention(q, k, v, selection, impl=impl, return_lse=True)
    torch.testing.assert_close(out, again)
    torch.testing.assert_close(lse, again_lse)
    expected, _ = oracle(q, k, v, selection, "mean")
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    found = {x: stem_attention(q, k, v, CONFIG.replace(dropped=x), impl=impl) for x in ("skip", "mean", "cells")}
    assert torch.equal(block_sparse_attention(q, k, v, selection, impl=impl, dropped="skip"), found["skip"])
    errors = [float((x - stem.reference.dense_attention(q, k, v)).norm()) for x in found.values()]
    assert errors[0] > 1.1 * errors[1] > 1.1 * errors[2]  # finer means are nearer to dense attention here


@pytest.mark.parametrize("impl", IMPLS)
def test_chunks_give_the_rows_of_the_whole_prompt(impl):
    q, k, v = draw(224, 224)
    whole = stem_attention(q, k, v, CONFIG, impl=impl)
    for start, stop in ((0, 96), (96, 160), (160, 224)):
        qkv = q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop]
        chunk = stem_attention(*qkv, CONFIG, impl=impl, prompt_length=224)
        torch.testing.assert_close(chunk, whole[:, :, start:stop], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", ["adaptive", "angelslim"])
def test_every_allocation_takes_it(preset):
    options = {"adaptive": dict(threshold=0.2, dense_up_to=0)}.get(preset, dict(density=0.4, sink_blocks=1))
    config = StemConfig.preset(preset, block_size=16, dropped="mean", **options)
    if preset == "angelslim":
        config = config.replace(local_blocks=1)
    q, k, v = draw(240, 240)
    for impl in ("torch", "triton"):
        out, selection = stem_attention(q, k, v, config, impl=impl, return_selection=True)
        assert selection.density() < 0.9
        expected, _ = oracle(q, k, v, selection, "mean")
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_attention_sinks_beside_stand_ins(impl):
    q, k, v = draw()
    sinks = torch.tensor([3.0, -1.0])
    selection = random_selection(q, k, 32)
    out, lse = oracle(q, k, v, selection, "mean")
    sink = sinks.double()[:, None].exp()
    expected = out * (lse.exp() / (lse.exp() + sink))[..., None]
    options = dict(impl=impl, sinks=sinks, return_lse=True, dropped="mean")
    found, found_lse = block_sparse_attention(q, k, v, selection, **options)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found_lse.double(), (lse.exp() + sink).log(), rtol=1e-5, atol=1e-5)


def test_autocast():
    q, k, v = draw()
    with torch.autocast("cpu", torch.bfloat16):
        out = stem_attention(q, k, v, CONFIG, impl="torch")
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, stem_attention(*(x.bfloat16() for x in (q, k, v)), CONFIG, impl="torch"))


def test_patterns_and_models_take_the_option_of_the_config():
    q, k, v = draw()
    selections = [patterns.select("flashprefill_v2", q, k, v, CONFIG.replace(dropped=x)) for x in ("skip", "mean")]
    assert [x.dropped for x in selections] == ["skip", "mean"]
    assert patterns.skip_negligible(selections[1], q, k, 0.5).dropped == "mean"
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, vocab_size=50)
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)).eval()
    ids, found = torch.randint(50, (1, 250)), {}
    for dropped in ("skip", "mean"):
        config = CONFIG.replace(dropped=dropped)
        for name, attention in {"stem": config, "selector": partial(patterns.select, "stem", config=config)}.items():
            with torch.no_grad(), hf.stem_prefill(model, attention) as report:
                found[name, dropped] = model(ids).logits
                assert report.density() < 0.6
    for dropped in ("skip", "mean"):
        torch.testing.assert_close(found["stem", dropped], found["selector", dropped])
    assert not torch.allclose(found["stem", "skip"], found["stem", "mean"], atol=1e-6)


def test_plans():
    q, k, v = draw()
    plans = [plan_for(q, k, v, config) for config in (CONFIG, CONFIG.replace(dropped="skip"))]
    assert plans[0].kept_blocks == plans[1].kept_blocks
    assert [("stand in" in plan.explain()) for plan in plans] == [True, False]
    dense = plan_for(q, k, v, CONFIG.replace(density=1.0))
    assert dense.path == "dense" and "stand in" not in dense.explain()


def test_bad_values():
    q, k, v = draw()
    with pytest.raises(ValueError, match="dropped must be one of 'skip', 'mean', 'cells', got 'means'"):
        StemConfig(dropped="means")
    with pytest.raises(ValueError, match="dropped must be one of 'skip', 'mean', 'cells', got True"):
        stem.block_sparse_attention(q, k, v, random_selection(q, k, 32), dropped=True)

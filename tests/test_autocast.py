"""Autocast: q, k and v are cast once, as SDPA casts them, and products inside keep their own precision."""

import pytest
import torch
import torch.nn.functional as F

import stem
from stem import BlockSelection, StemConfig, metrics, patterns, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ["reference", "torch", "triton"]
if DEVICE == "cpu":  # compiled FlexAttention takes no blocks of 16
    IMPLS.append("flex")
CONFIG = StemConfig(block_size=16, score_stride=8, sink_blocks=1, local_blocks=1, density=0.5)
SHARES = StemConfig.preset("adaptive", block_size=16, score_cells=4, threshold=0.1, dense_up_to=0)


def draw(dtype=torch.bfloat16):
    return [(2 * torch.randn(1, heads, 160, 16, device=DEVICE)).to(dtype) for heads in (2, 1, 1)]


def everything():
    return BlockSelection.every_block(1, 2, 160, 160, 16, torch.device(DEVICE))


def mean_error(out, exact):
    return (out.double() - exact).abs().mean().item()


@pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl != "triton"])  # its interpreter truncates to bf16
def test_the_output_is_as_exact_as_that_of_sdpa(impl):
    q, k, v = draw()
    exact = reference.masked_attention(q.double(), k.double(), v.double(), everything().to_token_mask())
    with torch.autocast(DEVICE, torch.bfloat16):
        allowed = 1.3 * mean_error(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), exact)
        for out in (
            stem.block_sparse_attention(q, k, v, everything(), impl=impl),
            stem.stem_attention(q, k, v, CONFIG.replace(density=1.0), impl=impl),
        ):
            assert out.dtype == torch.bfloat16 and mean_error(out, exact) <= allowed


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_are_those_of_inputs_cast_by_hand(impl):
    def gradients(cast, autocast):
        inputs = [x.float().requires_grad_() for x in tensors]
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            out = stem.stem_attention(*(x.to(cast) for x in inputs), CONFIG, impl=impl)
        out.float().sin().sum().backward()
        return [out, *(x.grad for x in inputs)]

    tensors = draw()
    for found, expected in zip(gradients(torch.float32, True), gradients(torch.bfloat16, False), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dropped", ["skip", "mean"])
@pytest.mark.parametrize("forward", [False, True])
@pytest.mark.parametrize("impl", [None, *IMPLS])
def test_a_backward_pass_in_an_autocast_block_gives_the_gradients_of_one_outside(impl, forward, dropped):
    def gradients(backward):
        inputs = [x.clone().requires_grad_() for x in tensors]
        with torch.autocast(DEVICE, torch.bfloat16, enabled=forward):
            out, lse = stem.stem_attention(*inputs, CONFIG.replace(dropped=dropped), impl=impl, return_lse=True)
        loss = (out.float().sin() + lse[..., None].cos()).sum()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=backward):
            loss.backward()
        return [x.grad for x in inputs]

    tensors = draw(torch.float32)
    error = 0 if DEVICE == "cpu" else 1e-5  # the GPU adds gradients in any order
    for found, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(found, expected, rtol=error, atol=10 * error)


@pytest.mark.parametrize("impl", ["reference", "torch", "flex"] if "flex" in IMPLS else ["reference", "torch"])
def test_second_derivatives_do_not_know_autocast_either(impl):
    def second(autocast):
        q = tensors[0].clone().requires_grad_()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            out = stem.block_sparse_attention(q, *tensors[1:], everything(), impl=impl)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        return torch.autograd.grad(first.square().sum(), q)[0]

    tensors = draw(torch.float64)  # which autocast leaves alone in the forward pass
    torch.testing.assert_close(second(True), second(False), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 3, (torch.float32, torch.float32, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("impl", [None, *IMPLS])
def test_dtypes_are_those_of_sdpa(impl, dtypes):
    q, k, v = (x.to(dtype) for x, dtype in zip(draw(), dtypes, strict=True))
    with torch.autocast(DEVICE, torch.bfloat16):
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        out, selection, lse = stem.stem_attention(q, k, v, CONFIG, impl=impl, return_selection=True, return_lse=True)
        assert out.dtype == expected.dtype == torch.bfloat16 and lse.dtype == torch.float32
        assert stem.block_sparse_attention(q, k, v, selection, impl=impl).dtype == torch.bfloat16
        with torch.autocast(DEVICE, enabled=False):
            assert stem.stem_attention(q.float(), k.float(), v.float(), CONFIG, impl=impl).dtype == torch.float32


def test_fp64_stays_fp64():
    q, k, v = draw(torch.float64)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert stem.stem_attention(q, k, v, CONFIG).dtype == torch.float64


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("config", [CONFIG, SHARES], ids=["mean", "cells"])
def test_scores_stay_fp32_and_selections_are_those_of_cast_inputs(config, impl):
    q, k, v = draw(torch.float32)
    cast = [x.bfloat16() for x in (q, k, v)]
    scores = stem.block_scores(*cast, config, impl=impl)
    selected = stem.stem_attention(*cast, config, impl=impl, return_selection=True)[1]
    with torch.autocast(DEVICE, torch.bfloat16):
        found = stem.block_scores(q, k, v, config, impl=impl)
        assert found.dtype == torch.float32 and torch.equal(found, scores)
        again = stem.stem_attention(q, k, v, config, impl=impl, return_selection=True)[1]
    assert torch.equal(again.to_mask(), selected.to_mask())


@pytest.mark.parametrize("name", patterns.names())
def test_patterns_select_as_from_cast_inputs(name):
    q, k, v = draw(torch.float32)
    expected = patterns.select(name, *(x.bfloat16() for x in (q, k, v)), CONFIG)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(patterns.select(name, q, k, v, CONFIG).to_mask(), expected.to_mask())


def test_measures_keep_their_precision():
    q, k, v = draw()
    mass = metrics.block_attention_mass(q, k, 16)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(metrics.block_attention_mass(q, k, 16), mass)
        assert torch.equal(metrics.attention_recall(q, k, everything()), torch.ones(1, 2, device=DEVICE))

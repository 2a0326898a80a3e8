"""The kernels of stand-ins after both forward kernels; without a GPU they are interpreted."""

import oracles
import pytest
import torch
from sparse_inputs import inputs_with_late_maxima, lists_of, random_inputs, random_mask

import stem
from stem.planning import plan_for

BLOCK_SIZE = 128  # of the forward for sm_90
IS_SM90 = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
needs_sm90 = pytest.mark.skipif(not IS_SM90, reason="needs a GPU of compute capability 9.0")
pytestmark = pytest.mark.usefixtures("poisoned_empty")
IN_INTERPRETER = {  # q heads, KV heads, queries, keys, D, block, tokens, dtype
    "whole": (2, 1, 96, 96, 16, 32, 32, torch.float32),
    "odd-dimensions-and-front": (2, 1, 75, 187, 40, 32, 16, torch.float32),
    "fp16": (2, 2, 60, 90, 16, 16, 16, torch.float16),
    "one-block": (1, 1, 20, 20, 16, 32, 32, torch.float32),
}


def with_stand_ins(impl, q, k, v, kv_indices, kv_num_blocks, block_size, scale, tokens=0):
    from stem.kernels.stand_ins import add_stand_ins

    from stem.impl.coverage import sparse_kernel

    lists = kv_indices, kv_num_blocks, block_size
    if impl == "hopper":
        return sparse_kernel(impl)(q, k, v, *lists, scale, tokens)
    out, lse = sparse_kernel(impl)(q, k, v, *lists, scale)
    return add_stand_ins(out, lse, q, k, v, *lists, tokens, scale) if tokens else (out, lse)


def check(impl, q, k, v, mask, block_size, tokens, rtol):
    """Compare out and lse with the oracle; both are as they were with tokens=0."""
    expected, expected_lse = oracles.attention_with_stand_ins(
        *(x.cpu() for x in (q, k, v)), mask, block_size, tokens, 0.3
    )
    out, lse = (x.cpu().double() for x in with_stand_ins(impl, q, k, v, *lists_of(mask), block_size, 0.3, tokens))
    finite = expected_lse.isfinite()
    assert torch.equal(lse.isfinite(), finite) and out.isfinite().all()
    assert (out - expected).norm() <= rtol * expected.norm()
    torch.testing.assert_close(lse[finite], expected_lse[finite], rtol=0, atol=10 * rtol)
    if mask.shape[3] > 1:
        skipped = with_stand_ins(impl, q, k, v, *lists_of(mask), block_size, 0.3)[0].cpu().double()
        assert (skipped - expected).norm() > 2 * rtol * expected.norm()  # without stand-ins the check above fails


@pytest.mark.parametrize("tiles", [None, dict(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=1)])
@pytest.mark.parametrize("case", IN_INTERPRETER)
def test_after_the_triton_forward(case, tiles, monkeypatch):
    from stem.kernels import stand_ins

    if tiles:
        monkeypatch.setattr(stand_ins, "tile_sizes", lambda *kind: tiles)
    *sizes, block_size, tokens, dtype = IN_INTERPRETER[case]
    q, k, v = random_inputs(*sizes, dtype)
    mask = random_mask(1, *(sizes[i] for i in (0, 2, 3)), block_size, diagonal=False, keep=0.4)
    mask[:, 0, 0] = False
    check("triton", q, k, v, mask, block_size, tokens, 2e-6 if dtype == torch.float32 else 2e-3)


ON_SM90 = {  # q heads, KV heads, queries, keys, D, tokens
    "grouped": (4, 2, 1100, 1100, 128, 128),
    "cells": (4, 2, 1100, 1100, 128, 16),
    "narrow": (2, 2, 900, 900, 64, 128),
    "chunk": (4, 1, 700, 3001, 128, 128),
    "a-whole-tile": (1, 1, 300, 12_000, 128, 128),
    "a-whole-tile-and-a-half": (1, 1, 300, 20_000, 128, 128),
    "two-whole-tiles": (1, 1, 300, 32_000, 128, 128),
    "one-block": (2, 1, 100, 100, 128, 128),
}


@needs_sm90
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ON_SM90)
def test_inside_the_forward_for_sm90(case, dtype):
    *sizes, tokens = ON_SM90[case]
    mask = random_mask(1, *(sizes[i] for i in (0, 2, 3)), BLOCK_SIZE, diagonal=False, keep=0.2)
    mask[:, 0, 0] = False
    rtol = 1e-3 if dtype == torch.float16 else 6e-3
    check("hopper", *random_inputs(*sizes, dtype), mask, BLOCK_SIZE, tokens, rtol)


@needs_sm90
@pytest.mark.parametrize("tokens", [16, 128])
def test_merged_and_attended_stand_ins_agree(tokens):
    from stem.kernels.stand_ins import add_stand_ins

    q, k, v = random_inputs(4, 2, 700, 3001, 128, torch.bfloat16)
    lists = lists_of(random_mask(1, 4, 700, 3001, BLOCK_SIZE, diagonal=False, keep=0.1))
    inside = with_stand_ins("hopper", q, k, v, *lists, BLOCK_SIZE, 0.1, tokens)
    kept = with_stand_ins("hopper", q, k, v, *lists, BLOCK_SIZE, 0.1)
    after = add_stand_ins(*kept, q, k, v, *lists, BLOCK_SIZE, tokens, 0.1)
    for x, y in zip(inside, after, strict=True):
        assert (x.float() - y.float()).norm() < 6e-3 * y.float().norm()


@needs_sm90
@pytest.mark.parametrize("kv_heads", [2, 3])
def test_heads_in_turn_where_their_masks_exceed_the_buffer(kv_heads, monkeypatch):
    from stem.kernels import hopper_forward

    q, k, v = random_inputs(2 * kv_heads, kv_heads, 700, 3001, 128, torch.bfloat16, batch=2)
    lists = lists_of(random_mask(2, 2 * kv_heads, 700, 3001, BLOCK_SIZE, diagonal=False, keep=0.1))
    expected = with_stand_ins("hopper", q, k, v, *lists, BLOCK_SIZE, 0.1, 16)
    monkeypatch.setattr(hopper_forward, "BUFFER_BYTES", 1)
    found = with_stand_ins("hopper", q, k, v, *lists, BLOCK_SIZE, 0.1, 16)
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


@needs_sm90
@pytest.mark.parametrize("boost", [4.0, 25.0])
def test_stand_ins_far_above_the_first_tile(boost):
    q, k, v = inputs_with_late_maxima(1.0, 1024, 128, torch.bfloat16)
    q += 1
    k[:, :, 256:384] = boost * 0.5
    mask = torch.ones(1, 2, 8, 8, dtype=torch.bool).tril()
    mask[:, :, 3:, 2] = False
    check("hopper", q, k, v, mask, BLOCK_SIZE, 128, 6e-3)


@needs_sm90
@pytest.mark.parametrize("tokens, path", [(3000, "overlap"), (8192, "overlap"), (9000, "lists")])
def test_overlapped_and_replayed_calls(tokens, path):
    q, k, v = (torch.randn(1, heads, tokens, 128, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2))
    config = stem.StemConfig(density=0.3, sink_blocks=1, local_blocks=1, dropped="mean")
    assert plan_for(q, k, v, config, impl="hopper").path == path
    expected = stem.stem_attention(q, k, v, config, impl="triton").float()
    for _ in range(4):
        found = stem.stem_attention(q, k, v, config, impl="hopper").float()
        assert (found - expected).norm() < 1e-2 * expected.norm()

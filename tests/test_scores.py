"""Block scores against unfactorised float64 loops: presets, shapes, chunks, and what must not matter."""

import math

import oracles
import pytest
import torch
from devices import on_its_device

import stem
from stem import StemConfig
from stem.cells import cell_features
from stem.scores import group_sums, value_term

block_scores = on_its_device(stem.block_scores)

SHAPES = {  # B, Hq, Hkv, Nq, Nkv, D, block
    "whole": (1, 2, 2, 256, 256, 16, 64),
    "ragged-9/3": (1, 9, 3, 251, 251, 16, 64),
    "one-block": (1, 2, 1, 40, 40, 32, 64),
    "below-a-stride": (1, 1, 1, 19, 19, 16, 16),
    "chunk-aligned": (1, 4, 2, 100, 292, 24, 32),
    "chunk-unaligned": (2, 4, 1, 77, 333, 16, 64),
    "last-token": (1, 2, 1, 1, 130, 40, 32),
    "block-128": (1, 2, 1, 300, 300, 8, 128),
}
PRESETS = ("paper", "angelslim", "hpc_ops")


def draw(batch, q_heads, kv_heads, q_len, kv_len, head_dim, dtype=torch.float64):
    """q, k, v whose values differ in norm from token to token, so that the value term matters."""
    q = torch.randn(batch, q_heads, q_len, head_dim, dtype=dtype)
    k, v = (torch.randn(batch, kv_heads, kv_len, head_dim, dtype=dtype) for _ in range(2))
    return q, k, v * torch.rand(batch, kv_heads, kv_len, 1, dtype=dtype).exp()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_in_float64(preset, shape):
    *sizes, block = SHAPES[shape]
    q, k, v = draw(*sizes)
    scores = block_scores(q, k, v, StemConfig.preset(preset, block_size=block))
    assert scores.dtype == torch.float64
    torch.testing.assert_close(scores, oracles.preset_scores(preset, q, k, v, block), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", ["one-block", "chunk-aligned", "block-128"])
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_in_low_precision(preset, shape, dtype, impl):
    """The inputs are rounded, and everything after them is fp32, whatever the inputs: so is the error.

    Only impl="triton" keeps the sums of 16-bit inputs to 16 bits, 15 in the interpreter, which cuts bf16 off.
    """
    *sizes, block = SHAPES[shape]
    q, k, v = (x.to(dtype) for x in draw(*sizes))
    scores = block_scores(q, k, v, StemConfig.preset(preset, block_size=block), impl=impl)
    assert scores.dtype == torch.float32
    oracle = oracles.preset_scores(preset, q, k, v, block)
    causal = oracle.isfinite()
    assert torch.equal(scores.isneginf(), ~causal)
    tolerance = 1e-4 if impl == "triton" and dtype != torch.float32 else 1e-5
    scores, oracle = scores[causal].double(), oracle[causal]
    torch.testing.assert_close(scores, oracle, rtol=1e-5, atol=tolerance * oracle.std())


@pytest.mark.parametrize("stride", [1, 2, 8, 16, 64])
def test_factorised_sum_equals_the_unfactorised_one(stride):
    q, k, _ = draw(1, 2, 2, 190, 190, 12)
    factorised = group_sums(q, 64, stride, reverse=True) @ group_sums(k, 64, stride).mT
    torch.testing.assert_close(factorised, oracles.antidiagonal_sums(q, k, 64, stride), rtol=0, atol=1e-11)


def test_a_stride_of_one_averages_every_pair():
    q, k, v = draw(1, 1, 1, 64, 64, 8)
    config = StemConfig(block_size=32, score_stride=1, value_weight=0.0)
    expected = q[0, 0, 32:].mean(0) @ k[0, 0, :32].mean(0) / math.sqrt(8)
    assert block_scores(q, k, v, config)[0, 0, 1, 0] == pytest.approx(float(expected))


@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_block_sizes(block, impl):
    q, k, v = draw(1, 2, 1, 200, 264, 16, torch.float32)
    config = StemConfig(block_size=block, score_stride=8, value_weight=0.5)
    routing = oracles.antidiagonal_sums(q, k, block, 8) / 4 / (block * block / 8)
    oracle = oracles.hide_future(routing + 0.5 * oracles.log_value_term(v, block)[:, :, None])
    scores = block_scores(q, k, v, config, impl=impl)
    torch.testing.assert_close(scores.double(), oracle, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("head_dim", [16, 32, 40, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_head_dims(head_dim, impl):
    q, k, v = draw(1, 2, 1, 50, 50, head_dim, torch.float32)
    scores = block_scores(q, k, v, StemConfig.preset("paper", block_size=16), impl=impl)
    oracle = oracles.preset_scores("paper", q, k, v, 16)
    torch.testing.assert_close(scores.double(), oracle, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "cells, stride, peak, pooling",
    [
        ((2, 2), 8, 0.0, "mean"),
        ((8, 8), 1, 0.0, "rms"),
        ((4, 2), 4, 0.0, "rms"),
        ((4, 4), 1, 0.25, "mean"),
        ((8, 8), 1, 0.3, "rms"),
        ((8, 8), 1, 1.0, "mean"),
        ((16, 2), 1, 0.5, "rms"),
    ],
)
@pytest.mark.parametrize("shape", ["ragged-9/3", "chunk-unaligned"])
def test_softmax_over_cells(shape, cells, stride, peak, pooling):
    *sizes, block = SHAPES[shape]
    q, k, v = draw(*sizes)
    scoring = dict(score_query_cells=cells[0], score_cells=cells[1], score_stride=stride, score_peak=peak)
    scoring |= dict(reduction="softmax", score_pooling=pooling, value_weight=0.3)
    config = StemConfig(block_size=block, **scoring)
    oracle = oracles.softmax_scores(4 * q, k, v, block, stride, cells, 0.3, peak, ["mean", "rms"].index(pooling) + 1)
    torch.testing.assert_close(block_scores(4 * q, k, v, config), oracle, rtol=1e-9, atol=1e-9)
    kernel = block_scores(*(x.float() for x in (4 * q, k, v)), config, impl="triton")
    torch.testing.assert_close(kernel.double(), oracle, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("pooling", ["mean", "rms"])
@pytest.mark.parametrize("q_len, kv_len, blocks", [(75, 75, 1), (68, 68, 1), (70, 75, 2), (3, 75, 2), (75, 75, 99)])
def test_the_last_blocks_score_what_attention_gives_them(q_len, kv_len, blocks, pooling, impl):
    q, k, v = draw(1, 4, 2, q_len, kv_len, 16, torch.float32)
    config = StemConfig.preset(
        "adaptive", dense_up_to=0, block_size=16, score_pooling=pooling, exact_last_blocks=blocks
    )
    scores = block_scores(4 * q, k, v, config, impl=impl)
    cells_alone = block_scores(4 * q, k, v, config.replace(exact_last_blocks=0), impl=impl)
    positions = torch.arange(kv_len, device=q.device)
    logits = (4 * q).double() @ k.double().repeat_interleave(2, 1).mT / 4
    logits = logits.masked_fill(positions > positions[-q_len:, None], -torch.inf)
    in_block = torch.nn.functional.one_hot(positions // 16).double()
    mass = logits.softmax(-1) @ in_block  # [1, 4, q_len, 5]
    begin = kv_len - 16 * blocks - (kv_len % 16 if kv_len % 16 < 8 else kv_len % 16 - 16)  # 75 is more than half full
    exact = range(max(begin // 16, (kv_len - q_len) // 16), 5)
    for row in exact:
        of_row = mass[:, :, positions[-q_len:] // 16 == row]
        shares = of_row.mean(2) if pooling == "mean" else of_row.square().mean(2).sqrt()
        expected = (shares / shares.sum(-1, keepdim=True)).log()[..., : row + 1]
        found = scores[:, :, row - 5].double()
        torch.testing.assert_close(found[..., : row + 1], expected, rtol=1e-4, atol=1e-4)
        assert (found[..., row + 1 :] == -torch.inf).all()
        assert not torch.allclose(cells_alone[:, :, row - 5, : row + 1].double(), expected, rtol=1e-3) or row == 0
    torch.testing.assert_close(scores[:, :, : -len(exact)], cells_alone[:, :, : -len(exact)], rtol=1e-5, atol=1e-5)


def test_corners_of_single_queries_bound_every_key_of_a_cell():
    """Quest's bound: with one query a cell and corners all the way, no logit of a cell's keys exceeds the cell's."""
    q, k, _ = draw(1, 2, 1, 64, 64, 16)
    q_rows, k_rows = cell_features(q, 1, 1, 0, 64, 1.0, queries=True), cell_features(k, 8, 1, 0, 8, 1.0)
    bound, logits = q_rows @ k_rows.mT, q @ k.mT
    assert (bound >= logits.unflatten(-1, (8, 8)).amax(-1) - 1e-9).all()


def test_rms_pooling_notices_what_one_cell_looks_for():
    """One of four query cells puts all its mass on block 0, the others on block 1."""
    q, k = torch.zeros(1, 1, 64, 2), torch.zeros(1, 1, 64, 2)
    k[..., :32, 0] = k[..., 32:, 1] = 1.0
    q[..., 32:40, 0] = q[..., 40:, 1] = 100.0
    scores = [
        block_scores(q, k, k, StemConfig(block_size=32, score_stride=1, reduction="softmax", score_pooling=pooling))
        for pooling in ("mean", "rms")
    ]
    mean, rms = (score.exp()[0, 0, 1] for score in scores)
    torch.testing.assert_close(mean, torch.tensor([0.25, 0.75]), rtol=0, atol=1e-3)
    weights = torch.tensor([1.0, 3.0]).sqrt()
    torch.testing.assert_close(rms, weights / weights.sum(), rtol=0, atol=2e-3)


def test_softmax_scores_are_shares_of_a_row():
    q, k, v = draw(1, 2, 1, 128, 128, 16)
    scores = block_scores(q, k, v, StemConfig(block_size=32, score_stride=8, reduction="softmax"))
    torch.testing.assert_close(scores.exp().sum(-1), torch.ones(1, 2, 4, dtype=torch.float64))


def test_scale_multiplies_the_routing_term_only():
    q, k, v = draw(1, 2, 1, 96, 96, 16)
    config = StemConfig(block_size=32)
    value = block_scores(0 * q, k, v, config).tril()
    default, doubled = (block_scores(q, k, v, config, scale=scale).tril() for scale in (None, 0.5))
    causal = default.isfinite()
    torch.testing.assert_close((doubled - value)[causal], 2 * (default - value)[causal])


def test_raw_routing_ignores_the_scale():
    q, k, v = draw(1, 2, 1, 96, 96, 16)
    config = StemConfig(block_size=32, routing_scale="raw")
    assert torch.equal(block_scores(q, k, v, config), block_scores(q, k, v, config, scale=7.0))


def test_grouped_heads_equal_repeated_heads():
    q, k, v = draw(1, 6, 2, 100, 100, 16)
    config = StemConfig(block_size=32)
    repeated = [oracles.repeat_heads(x, 6) for x in (k, v)]
    torch.testing.assert_close(block_scores(q, k, v, config), block_scores(q, *repeated, config))


@pytest.mark.parametrize("reduction", ["mean", "softmax"])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_rows_of_an_aligned_chunk_are_those_of_the_whole_prompt(reduction, impl):
    q, k, v = draw(1, 2, 1, 192, 192, 16, torch.float32)
    config = StemConfig(block_size=32, score_stride=8, reduction=reduction)
    whole = block_scores(q, k, v, config, impl=impl)
    chunk = block_scores(q[:, :, 64:160], k[:, :, :160], v[:, :, :160], config, impl=impl)
    torch.testing.assert_close(chunk, whole[:, :, 2:5, :5])


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_block_never_sees_later_blocks(impl):
    q, k, v = draw(1, 2, 1, 128, 128, 16, torch.float32)
    config = StemConfig(block_size=32, score_stride=8)
    before = block_scores(q, k, v, config, impl=impl)
    for x in (q, k, v):
        x[:, :, 64:] *= -3
    after = block_scores(q, k, v, config, impl=impl)
    assert torch.equal(before[:, :, :2], after[:, :, :2]) and not torch.equal(before[:, :, 2:], after[:, :, 2:])


@pytest.mark.parametrize("preset", ["angelslim", "hpc_ops"])
def test_the_published_z_score_sees_the_future(preset):
    """Why the default is not the z-score: early rows change with later values."""
    q, k, v = draw(1, 2, 1, 128, 128, 16)
    config = StemConfig.preset(preset, block_size=32)
    before = block_scores(q, k, v, config)
    v[:, :, 64:] *= 30
    assert not torch.equal(before[:, :, :2], block_scores(q, k, v, config)[:, :, :2])


def test_log_value_term_is_absolute_and_the_z_score_is_relative():
    _, _, v = draw(1, 1, 1, 128, 128, 16)
    log, zscore = (StemConfig(block_size=32, value_norm=norm) for norm in ("log", "zscore"))
    torch.testing.assert_close(value_term(8 * v, log), value_term(v, log) + math.log(8))
    torch.testing.assert_close(value_term(8 * v, zscore), value_term(v, zscore), rtol=1e-4, atol=1e-4)
    assert not value_term(1e-3 * v, log).any()


def test_constant_values_have_no_z_score():
    v = torch.ones(1, 1, 64, 8)
    for norm in ("zscore", "zscore_padded"):
        assert not value_term(v, StemConfig(block_size=32, value_norm=norm)).any()


def test_non_contiguous_inputs():
    q, k, v = draw(1, 2, 1, 96, 96, 16, torch.float32)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    strided[1] = k.repeat_interleave(2, -1)[..., ::2]
    config = StemConfig(block_size=32)
    for impl in ("torch", "triton"):
        found = block_scores(*strided, config, impl=impl)
        torch.testing.assert_close(found, block_scores(q, k, v, config, impl=impl))


def test_scores_carry_no_gradient():
    q, k, v = (x.requires_grad_() for x in draw(1, 1, 1, 64, 64, 16))
    assert not block_scores(q, k, v, StemConfig(block_size=32)).requires_grad


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_non_finite_input_is_named(name, value):
    tensors = dict(zip("qkv", draw(1, 1, 1, 64, 64, 16), strict=True))
    tensors[name][0, 0, 3, 2] = value
    with pytest.raises(ValueError, match=f"{name} must be finite, got 1"):
        block_scores(**tensors, config=StemConfig(block_size=32))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (dict(config={"density": 0.5}), TypeError, "config.*StemConfig.*density"),
        (dict(config=None), TypeError, "config.*StemConfig.*None"),
        (dict(impl="cuda"), ValueError, "impl.*'torch', 'triton'.*'cuda'"),
        (dict(impl="flex"), ValueError, "impl.*'torch', 'triton'.*'flex'"),
        (dict(impl="triton"), TypeError, "triton.*float32.*float64"),
        (dict(scale=-1.0), ValueError, "scale must be in .0, inf., got -1.0"),
    ],
    ids=["dict", "none", "unknown-impl", "attention-impl", "fp64-triton", "scale"],
)
def test_bad_input(arguments, error, words):
    q, k, v = draw(1, 1, 1, 32, 32, 16)
    with pytest.raises(error, match=words):
        block_scores(q, k, v, **{"config": StemConfig(block_size=32), **arguments})


def test_a_peak_far_above_the_first_tile_stays_finite_in_the_kernels():
    config = StemConfig.preset("adaptive", block_size=16, dense_up_to=0, exact_last_blocks=2)
    q, k = torch.randn(2, 1, 2, 300, 8).abs()
    k[:, :, 160:176] *= 300  # block 10: hundreds of powers of two above the first tile of cells and of tokens
    kernel, expected = (block_scores(q, k, k, config, impl=impl) for impl in ("triton", "torch"))
    torch.testing.assert_close(kernel.exp().sum(-1), torch.ones_like(kernel[..., 0]))
    for scores in (kernel, expected):
        assert (scores[:, :, 10:].argmax(-1) == 10).all()


def test_sums_have_the_same_bits_in_every_memory_layout():
    x = torch.randn(1, 512, 2, 16).transpose(1, 2)
    whole = group_sums(x, 128, 16)
    assert torch.equal(whole, group_sums(x.contiguous(), 128, 16))
    assert torch.equal(whole[:, :, 1:3], group_sums(x[:, :, 128:384], 128, 16))

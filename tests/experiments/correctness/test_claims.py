"""The measurements of notebook 03: that they pass here, and that a mistake fails them."""

import pytest
import torch

import stem
from stem import StemConfig
from stem.experiments.correctness import claims, mutants
from stem.experiments.correctness.claims import Shape

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where Triton runs
SHAPES = (Shape(2, 1, 40, 72, 16, 32), Shape(1, 1, 1, 5, 256, 64))
STEADY = StemConfig(block_size=32, k_start=2, decay=1.0)
EVEN = STEADY.replace(k_start=None, density=0.5)
COLUMNS = {"claim", "case", "impl", "dtype", "error", "tolerance", "roundings", "most_roundings", "passed", "seed"}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

CLAIMS = {
    "oracle": lambda: claims.attention_errors(SHAPES, ("torch", "flex"), (torch.float32, torch.bfloat16), CPU),
    "dense": lambda: claims.dense_errors(SHAPES, ("torch", "reference"), (torch.float32,), CPU),
    "scores": lambda: claims.score_errors(SHAPES, DEVICE),
    "causality": lambda: claims.causality_errors(STEADY, ("torch", "reference", "hopper"), torch.float16, CPU),
    "unread": lambda: claims.unread_errors(Shape(1, 1, 70, 70, 16, 16), ("torch",), torch.float32, CPU),
    "chunks": lambda: claims.chunk_errors(STEADY, (64, 96, 120), ("torch",), CPU),
    "told": lambda: claims.chunk_errors(EVEN, (64, 96, 120), ("torch",), CPU, prompt_length=120),
    "gradients": lambda: claims.gradient_errors(SHAPES[:1], ("torch",), (torch.float32,), CPU),
    "presets": lambda: claims.chunk_errors(
        StemConfig.preset("paper", block_size=16, min_blocks=6), (64, 160, 250), ("torch",), CPU, 0, 250, "paper"
    ),
    "adaptive": lambda: claims.adaptive_errors([Shape(3, 1, 512, 512, 32, 32)], ("torch",), CPU),
    "triton": lambda: claims.gradient_errors(SHAPES[:1], ("triton",), (torch.float32,), DEVICE),
    "fuzz": lambda: claims.attention_errors(claims.fuzzed_shapes(30, 100), ("torch",), (torch.float32,), CPU),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_claims_hold(name):
    rows = CLAIMS[name]()
    assert rows and all(set(row) == COLUMNS for row in rows)
    assert all(row["passed"] is True and row["error"] <= row["tolerance"] for row in rows)
    exact = {row["tolerance"] == 0 for row in rows}
    assert {row["roundings"] is None for row in rows} == exact and len(exact) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [Shape(4, 2, 200, 200, 64, 32), Shape(2, 1, 50, 133, 40, 32)], ids=str)
def test_each_mistake_of_a_kernel_is_refused_in_every_precision(shape, dtype):
    right, *wrong = mutants.mutant_rows(shape, (dtype,), CPU)
    assert right["passed"] and right["case"] == "no mistake"
    assert [row["case"] for row in wrong] == list(mutants.MISTAKES)
    assert not any(row["passed"] for row in wrong)


def test_errors_are_a_norm_and_roundings_of_the_row():
    oracle = torch.tensor([[4.0, 1.0], [0.5, 0.25]], dtype=torch.float64)
    result = (oracle + torch.tensor([[0.02, 0.0], [0.0, 0.01]])).bfloat16()
    error, roundings = claims.errors_of(result, oracle)
    difference = result.double() - oracle
    assert error == pytest.approx(float(difference.norm() / oracle.norm()))
    rms, eps = float(oracle.square().mean().sqrt()), 2**-7
    assert roundings == pytest.approx(max(float(difference[0, 0]) / (4 * eps), float(difference[1, 1]) / (rms * eps)))


def test_the_bound_is_near_the_error_of_eager_code():
    q, k, v = claims.qkv(Shape(4, 2, 160, 160, 64, 64), torch.bfloat16, CPU, 0)
    selection = claims.random_blocks(q, k, v, 64)
    oracle, allowed = claims.oracle_and_bounds(q, k, v, selection, Shape(4, 2, 160, 160, 64, 64))
    eager = claims.errors_of(claims.eager_attention(q, k, v, selection.to_token_mask()), oracle)
    assert eager.error < allowed.error < 2 * eager.error and allowed.error < 0.006
    assert eager.roundings < allowed.roundings < 4


def test_another_threshold_or_a_missing_block_fails_the_selections_oracle(monkeypatch):
    shapes = [Shape(3, 1, 512, 512, 32, 32)]
    original = claims.select

    def other(q, k, v, config, scale, impl):
        return original(q, k, v, config.replace(threshold=1.1 * config.threshold), scale, impl)

    monkeypatch.setattr(claims, "select", other)
    assert not any(row["passed"] for row in claims.adaptive_errors(shapes, ("torch",), CPU))
    monkeypatch.setattr(
        claims, "select", lambda q, k, v, config, *of: original(q, k, v, config.replace(exact_last_blocks=0), *of)
    )
    assert not any(row["passed"] for row in claims.adaptive_errors(shapes, ("torch",), CPU))


def leave_out_a_key(q, k, v, selection, scale=None, impl=None):
    """The last key that a query sees never counts."""
    mask = selection.to_token_mask()
    mask[..., -1, -1] = False
    return stem.reference.masked_attention(q, k, v, mask, scale)


def test_a_wrong_attention_fails(monkeypatch):
    monkeypatch.setattr(claims, "block_sparse_attention", leave_out_a_key)
    for name in ("oracle", "fuzz", "gradients"):
        assert not all(row["passed"] for row in CLAIMS[name]())


def test_an_attention_that_multiplies_by_zero_fails(monkeypatch):
    def reference(q, k, v, selection, impl):
        return stem.block_sparse_attention(q, k, v, selection, impl="reference")

    monkeypatch.setattr(claims, "block_sparse_attention", reference)
    assert not any(row["passed"] for row in CLAIMS["unread"]())


def test_scores_that_forget_the_reversal_fail(monkeypatch):
    original = stem.scores.group_sums
    monkeypatch.setattr(stem.scores, "group_sums", lambda *args, reverse=False, **kwargs: original(*args, **kwargs))
    rows = claims.score_errors(SHAPES[:1], CPU, impls=("torch",))
    assert not any(row["passed"] for row in rows)


def test_influence_is_triangular_except_for_the_published_z_score():
    config = StemConfig(block_size=16, density=0.4, sink_blocks=1, local_blocks=1, value_weight=1.0)
    future = claims.influence(config, 12, CPU).triu(1)
    assert future.shape == (12, 12) and not future.any()
    assert claims.influence(config.replace(value_norm="zscore"), 12, CPU).triu(1).any()


def test_an_implementation_that_does_not_cover_a_shape_is_left_out():
    rows = claims.attention_errors(SHAPES[:1], ("torch", "hopper", "flex"), (torch.float16,), CPU)
    assert {row["impl"] for row in rows} == {"torch", "flex"}


def test_fuzzed_shapes_are_reproducible_and_valid():
    shapes = claims.fuzzed_shapes(100, 500, seed=3)
    assert shapes == claims.fuzzed_shapes(100, 500, seed=3) != claims.fuzzed_shapes(100, 500, seed=4)
    for shape in shapes:
        assert 1 <= shape.q_len <= shape.kv_len <= 500 and shape.q_heads % shape.kv_heads == 0
    assert {shape.block_size for shape in shapes} == set(claims.BLOCK_SIZES)

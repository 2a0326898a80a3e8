"""Where every block is kept whatever the scores are, impl=None attends densely; anywhere else it never does."""

import oracles
import pytest
import torch

import stem
from stem import StemConfig
from stem.budget import BlockRows, device_budget, keeps_every_block
from stem.impl.dense import dense_kernel, fused_attention

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp64": 1e-10, "fp32": 1e-5, "bf16": 2e-2}  # torch's kernels round the weights to the inputs' dtype
DENSE = {
    "density": StemConfig(block_size=16, density=1.0),
    "k_start": StemConfig(block_size=16, k_start=1.0, decay=1.0),
    "angelslim": StemConfig.preset("angelslim", block_size=16),
    "hpc_ops": StemConfig.preset("hpc_ops", block_size=16),
}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def draw(q_len, kv_len, dtype=torch.float32, heads=(4, 2), dim=16, device="cpu"):
    shapes = (heads[0], q_len), (heads[1], kv_len), (heads[1], kv_len)
    return [torch.randn(2, *shape, dim, device=device).to(dtype) for shape in shapes]


@pytest.fixture
def no_scores(monkeypatch, fresh_plans):
    """Scoring fails, so a test that passes did not score."""
    for name in ("choose_scores", "choose_topk", "choose_share"):
        monkeypatch.setattr(stem.choose, name, lambda *_, **__: pytest.fail("scores were computed"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [(1, 1), (100, 100), (50, 133), (1, 90)], ids=str)
@pytest.mark.parametrize("name", DENSE)
def test_it_is_dense_attention(name, lengths, dtype, no_scores):
    q, k, v = draw(*lengths, DTYPES[dtype])
    expected, expected_lse = oracles.attention(q, k, v, oracles.causal(*lengths))
    out, selection, lse = stem.stem_attention(q, k, v, DENSE[name], return_selection=True, return_lse=True)
    assert selection.density() == 1.0 and out.dtype == q.dtype and lse.shape == q.shape[:3]
    torch.testing.assert_close(out.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(stem.stem_attention(q, k, v, DENSE[name]), out)


@pytest.mark.parametrize("short_blocks", [64, 1])
@pytest.mark.parametrize("impl", [None, "torch"])
def test_the_selection_is_the_one_that_scores_would_give(impl, short_blocks, no_scores, monkeypatch):
    monkeypatch.setattr(stem.planning, "SHORT_BLOCKS", short_blocks)
    (q, k, v), config = draw(50, 133), DENSE["density"]
    _, found = stem.stem_attention(q, k, v, config, impl=impl, return_selection=True)
    scores, budget = stem.block_scores(q, k, v, config), stem.block_budget(9, config)
    expected = stem.select_blocks(scores, budget, config, q_len=50, kv_len=133)
    assert torch.equal(found.kv_indices, expected.kv_indices)
    assert torch.equal(found.kv_num_blocks, expected.kv_num_blocks)
    assert (found.q_len, found.kv_len, found.num_kv_blocks) == (50, 133, 9)


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("lengths", [(70, 70), (30, 70)], ids=str)
def test_gradients(lengths, return_lse, no_scores):
    def gradients(attend, *tensors):
        inputs = [x.clone().requires_grad_() for x in tensors]
        outputs = attend(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return torch.autograd.grad([x.sin().sum() for x in outputs[: 1 + return_lse]], inputs)

    tensors = draw(*lengths, torch.float64)
    found = gradients(lambda *x: stem.stem_attention(*x, DENSE["density"], return_lse=return_lse), *tensors)
    expected = gradients(lambda *x: oracles.attention(*x, oracles.causal(*lengths)), *tensors)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_an_explicit_implementation_still_chooses(monkeypatch, fresh_plans):
    q, k, v = draw(40, 40)
    calls = []
    original = stem.planning.Plan.choose
    monkeypatch.setattr(stem.planning.Plan, "choose", lambda *a: calls.append("choose") or original(*a))
    monkeypatch.setattr(stem.planning, "fused_attention", lambda *_: pytest.fail("dense kernel"))
    for config, impl in [(DENSE["density"], "torch"), (StemConfig(block_size=16, density=0.9), None)]:
        stem.stem_attention(q, k, v, config, impl=impl)
    assert calls == ["choose"] * 2


def test_scale_is_passed_on():
    q, k, v = draw(40, 40)
    out = stem.stem_attention(q, k, v, DENSE["density"], scale=0.7)
    expected, _ = oracles.attention(q, k, v, oracles.causal(40, 40), 0.7)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_non_finite_input_is_refused():
    q, k, v = draw(40, 40)
    v[0, 0, 3] = torch.nan
    with pytest.raises(ValueError, match="v must be finite"):
        stem.stem_attention(q, k, v, DENSE["density"])


def rows_of(num_kv_blocks, num_q_blocks):
    """The last query blocks of a whole prompt."""
    return BlockRows(num_kv_blocks - num_q_blocks, num_kv_blocks, num_kv_blocks, num_kv_blocks)


@pytest.mark.parametrize("preset", ["paper", "angelslim", "hpc_ops", None])
def test_it_keeps_every_block_where_the_budget_says_so(preset):
    configs = [StemConfig.preset(preset)] if preset else [StemConfig(density=1.0), StemConfig(k_start=3), StemConfig()]
    for config in configs:
        for n in (1, 3, 4, 5, 41, 42, 55, 56, 130):
            budget = stem.block_budget(n, config)
            for nq in {1, (n + 1) // 2, n}:
                kept = bool((budget[n - nq :] == torch.arange(n - nq + 1, n + 1)).all())
                assert keeps_every_block(rows_of(n, nq), config) == kept


def test_a_threshold_is_no_budget():
    assert not keeps_every_block(rows_of(4, 4), StemConfig(allocation="adaptive", threshold=0.01))


def test_k_start_in_blocks_and_as_a_share_are_told_apart():
    assert keeps_every_block(rows_of(5, 5), StemConfig(k_start=1.0, decay=1.0))
    assert not keeps_every_block(rows_of(5, 5), StemConfig(k_start=1, decay=1.0))
    whole, one = (device_budget(rows_of(5, 5), StemConfig(k_start=k, decay=1.0), torch.device("cpu")) for k in (1.0, 1))
    assert whole[0].tolist() == [1, 2, 3, 4, 5] and one[0].tolist() == [1] * 5


def test_the_budget_on_the_device():
    config = StemConfig(k_start=3, decay=1.0, sink_blocks=2, local_blocks=0)
    rows, longest = device_budget(rows_of(9, 4), config, torch.device("cpu"))
    assert rows.tolist() == [3] * 4 and rows.dtype == torch.int32 and longest == 3
    assert device_budget(rows_of(9, 4), config.replace(forced="on_top"), torch.device("cpu"))[1] == 6
    assert device_budget(rows_of(5, 4), config.replace(forced="on_top"), torch.device("cpu"))[1] == 5
    assert device_budget(rows_of(9, 4), config, torch.device("cpu"))[0] is rows


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 40, 256])
def test_kernels_of_torch_on_the_gpu(head_dim, dtype):
    q, k, v = draw(1000, 1000, dtype, (8, 2), head_dim, "cuda")
    kernel = dense_kernel(q, k, v, needs_grad=False, return_lse=True)
    assert (kernel is None) == (dtype == torch.float32)
    if kernel:
        found = fused_attention(q, k, v, 0.1, kernel, with_lse=True)
        expected, lse = oracles.attention(q, k, v, oracles.causal(1000, 1000).cuda(), 0.1)
        torch.testing.assert_close(found[0].double().cpu(), expected.cpu(), rtol=0, atol=0.02)
        torch.testing.assert_close(found[1].double(), lse, rtol=1e-4, atol=1e-4)
    out = stem.stem_attention(q, k, v, StemConfig(density=1.0), scale=0.1)
    torch.testing.assert_close(
        out, stem.stem_attention(q, k, v, StemConfig(density=1.0), scale=0.1, impl="triton"), rtol=0, atol=0.02
    )

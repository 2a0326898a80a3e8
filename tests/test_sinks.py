"""Attention sinks: one more logit for each query head in the softmax, against a float64 softmax that holds it."""

import math

import oracles
import pytest
import torch
from devices import on_its_device

import stem
from stem import BlockSelection, StemConfig, reference

stem_attention = on_its_device(stem.stem_attention)
block_sparse_attention = on_its_device(stem.block_sparse_attention)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ("reference", "torch", "triton", "flex")
CONFIG = StemConfig(block_size=16, density=0.4, sink_blocks=1, local_blocks=1)
every_impl = pytest.mark.parametrize("impl", IMPLS)


def draw(q_len=50, kv_len=83, dtype=torch.float32):
    q, k, v = (torch.randn(2, heads, n, 16).to(dtype) for heads, n in ((4, q_len), (2, kv_len), (2, kv_len)))
    return q, k, v, torch.tensor([-3.0, 0.5, 2.0, 6.0])


def brute_force(q, k, v, allowed, sinks, scale=None):
    """Output and log-sum-exp of a float64 softmax over the logits and a column of sinks."""
    q, k, v = q.double(), oracles.repeat_heads(k, q.shape[1]).double(), oracles.repeat_heads(v, q.shape[1]).double()
    logits = q @ k.mT * (q.shape[3] ** -0.5 if scale is None else scale)
    logits = logits.masked_fill(~allowed, -math.inf)
    column = sinks.double()[None, :, None, None].expand(*logits.shape[:3], 1)
    logits = torch.cat([logits, column], -1)
    return logits.softmax(-1)[..., :-1] @ v, logits.logsumexp(-1)


def random_selection(q, k, block=16):
    nk = -(-k.shape[2] // block)
    nq = nk - (k.shape[2] - q.shape[2]) // block
    mask = (torch.rand(*q.shape[:2], nq, nk) < 0.4).tril(nk - nq)
    mask[:, 1, 1] = False  # queries without a key
    return BlockSelection.from_mask(mask, block, q_len=q.shape[2], kv_len=k.shape[2])


def allowed_by(selection):
    return oracles.token_mask(selection.to_mask(), selection.block_size, selection.q_len, selection.kv_len)


@every_impl
@pytest.mark.parametrize("lengths", [(50, 83), (64, 64), (1, 40)], ids=str)
def test_output_and_log_sum_exp_over_a_selection(lengths, impl):
    q, k, v, sinks = draw(*lengths)
    selection = random_selection(q, k) if lengths[0] > 1 else BlockSelection.every_block(2, 4, 1, 40, 16, q.device)
    expected = brute_force(q, k, v, allowed_by(selection), sinks, 0.4)
    found = block_sparse_attention(q, k, v, selection, scale=0.4, impl=impl, return_lse=True, sinks=sinks)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
    out = block_sparse_attention(q, k, v, selection, scale=0.4, impl=impl, sinks=sinks)
    assert torch.equal(out, found[0])


@every_impl
def test_gradients_reach_q_k_v_and_the_sinks(impl):
    inputs = [x.requires_grad_() for x in draw()]
    selection = random_selection(*inputs[:2])
    weights = torch.randn(2, 4, 50, 16), torch.randn(2, 4, 50)

    def gradients(out, lse):
        loss = (out.double() * weights[0]).sum() + (lse.double() * weights[1]).sum()
        return torch.autograd.grad(loss, inputs)

    expected = gradients(*brute_force(*inputs[:3], allowed_by(selection), inputs[3]))
    found = gradients(*block_sparse_attention(*inputs[:3], selection, impl=impl, return_lse=True, sinks=inputs[3]))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@every_impl
def test_the_sinks_alone_can_be_trained(impl):
    q, k, v, sinks = draw()
    selection, sinks = random_selection(q, k), sinks.requires_grad_()
    expected = torch.autograd.grad(brute_force(q, k, v, allowed_by(selection), sinks)[0].sum(), sinks)[0]
    out = block_sparse_attention(q, k, v, selection, impl=impl, sinks=sinks)
    found = torch.autograd.grad(out.sum(), sinks)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_gradcheck():
    q, k, v, sinks = (x.double().requires_grad_() for x in draw(20, 37))
    selection = random_selection(q, k)

    def function(q, k, v, sinks):
        return block_sparse_attention(q, k, v, selection, impl="torch", return_lse=True, sinks=sinks)

    rows = allowed_by(selection).any(-1)  # a log-sum-exp of -inf has no difference quotient without the sink
    assert torch.autograd.gradcheck(lambda *x: (function(*x)[0], function(*x)[1][rows]), (q, k, v, sinks))


@pytest.mark.parametrize("impl", [None, *IMPLS])
@pytest.mark.parametrize("density", [0.4, 1.0])
def test_the_whole_operator(density, impl):
    q, k, v, sinks = draw(83, 83)
    config = CONFIG.replace(density=density)
    options = dict(sinks=sinks, impl=impl, return_lse=True, return_selection=True)
    with torch.no_grad():
        out, selection, lse = stem_attention(q, k, v, config, **options)
    plain = stem_attention(q, k, v, config, impl=impl, return_selection=True)[1]
    assert torch.equal(selection.to_mask(), plain.to_mask())  # sinks change no choice
    expected = brute_force(q, k, v, allowed_by(selection), sinks)
    torch.testing.assert_close(out.double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("density", [0.4, 1.0])
def test_gradients_of_the_whole_operator(density):
    inputs = [x.requires_grad_() for x in draw(83, 83)]
    config = CONFIG.replace(density=density)
    out, selection = stem.stem_attention(*inputs[:3], config, sinks=inputs[3], return_selection=True)
    expected = torch.autograd.grad(brute_force(*inputs[:3], allowed_by(selection), inputs[3])[0].sin().sum(), inputs)
    found = torch.autograd.grad(out.sin().sum(), inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", [None, "reference"])
def test_means_of_dropped_blocks_and_sinks_share_one_softmax(impl):
    q, k, v, sinks = draw(83, 83)
    config = CONFIG.replace(dropped="mean")
    plain, plain_lse = stem.stem_attention(q, k, v, config, impl=impl, return_lse=True)
    out, lse = stem.stem_attention(q, k, v, config, sinks=sinks, impl=impl, return_lse=True)
    total = plain_lse.exp() + sinks.exp()[:, None]  # weights of all keys and stand-ins, and of the sink
    torch.testing.assert_close(lse, total.log())
    torch.testing.assert_close(out, plain * (plain_lse.exp() / total)[..., None])


def test_chunks_equal_the_whole_prompt():
    q, k, v, sinks = draw(96, 96)
    whole = stem.stem_attention(q, k, v, CONFIG, sinks=sinks)
    options = dict(sinks=sinks, prompt_length=96)
    parts = [stem.stem_attention(q[:, :, i : i + 32], k[:, :, : i + 32], v[:, :, : i + 32], CONFIG, **options)
             for i in (0, 32, 64)]  # fmt: skip
    torch.testing.assert_close(torch.cat(parts, 2), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    q, k, v, sinks = draw(83, 83, dtype)
    exact = brute_force(q, k, v, oracles.causal(83, 83), sinks)[0]
    for impl in (None, "torch"):
        for kind in (torch.float32, dtype):
            out = stem.stem_attention(q, k, v, CONFIG.replace(density=1.0), sinks=sinks.to(kind), impl=impl)
            assert out.dtype == dtype
            torch.testing.assert_close(out.double(), exact, rtol=0, atol=4 * torch.finfo(dtype).eps + 1e-14)


def test_autocast_leaves_the_sinks_in_fp32():
    q, k, v, _ = draw(83, 83)
    sinks = torch.tensor([1.003, 2.003, 3.01, 4.01])  # bf16 would change each by 0.003 or more
    low = [x.bfloat16() for x in (q, k, v)]
    selection = BlockSelection.every_block(2, 4, 83, 83, 16, q.device)
    with torch.autocast("cpu", torch.bfloat16):
        _, lse = stem.stem_attention(q, k, v, CONFIG.replace(density=1.0), sinks=sinks, return_lse=True)
        _, other = stem.block_sparse_attention(q, k, v, selection, return_lse=True, sinks=sinks)
    expected = brute_force(*low, oracles.causal(83, 83), sinks)[1]
    torch.testing.assert_close(lse.double(), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(other.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("impl", [None, "torch", "triton"])
def test_compiled_attention_gives_what_eager_gives(impl):
    torch.compiler.reset()
    compiled = torch.compile(stem.stem_attention, fullgraph=True, backend="aot_eager")
    inputs = [x.to(DEVICE).requires_grad_() for x in draw(83, 83)]
    results = []
    for function in (stem.stem_attention, compiled):
        out, lse = function(*inputs[:3], CONFIG, sinks=inputs[3], impl=impl, return_lse=True)
        results.append((out, lse, *torch.autograd.grad(out.sin().sum() + lse.cos().sum(), inputs)))
    with torch.no_grad():
        results.append((compiled(*inputs[:3], CONFIG, sinks=inputs[3], impl=impl), *results[0][1:]))
    for other in results[1:]:
        for one, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(one, expected)


def test_func_grad_and_jvp():
    q, k, v, sinks = draw(83, 83)
    leaf = sinks.clone().requires_grad_()
    expected = torch.autograd.grad(stem.stem_attention(q, k, v, CONFIG, sinks=leaf).sin().sum(), leaf)[0]

    def loss(sinks):
        return stem.stem_attention(q, k, v, CONFIG, sinks=sinks).sin().sum()

    torch.testing.assert_close(torch.func.grad(loss)(sinks), expected)
    with torch.no_grad():
        slope = torch.func.jvp(loss, (sinks,), (torch.ones(4),))[1]
    torch.testing.assert_close(slope, expected.sum())


def test_inputs_are_never_written():
    tensors = draw(83, 83)
    before = [x.clone() for x in tensors]
    for config in (CONFIG, CONFIG.replace(density=1.0)):
        with torch.inference_mode():
            stem.stem_attention(*tensors[:3], config, sinks=tensors[3])
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))


def test_an_empty_batch():
    q, k, v, sinks = (x[:0] if x.ndim == 4 else x for x in draw(83, 83))
    out, lse = stem.stem_attention(q, k, v, CONFIG, sinks=sinks, return_lse=True)
    assert out.shape == q.shape and lse.shape == (0, 4, 83)


def test_the_reference_holds_the_column():
    q, k, v, sinks = draw()
    allowed = oracles.causal(50, 83)
    out, lse = reference.masked_attention(q, k, v, allowed, sinks=sinks, return_lse=True)
    probabilities, _ = reference.attention_probabilities(q, k, allowed, sinks=sinks)
    expected, expected_lse = brute_force(q, k, v, allowed, sinks)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(reference.dense_attention(q, k, v, sinks=sinks), out)
    share = (sinks.double()[:, None] - expected_lse).exp()  # of the sink
    torch.testing.assert_close(probabilities.sum(-1).double(), 1 - share, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "sinks, error, words",
    [
        ([0.0] * 4, TypeError, "sinks must be a torch.Tensor or None, got list"),
        (torch.zeros(4, dtype=torch.int32), TypeError, "sinks must be one of .*torch.float32.*got torch.int32"),
        (torch.zeros(2), ValueError, r"sinks must be \[4\], one for each head of q, got shape \(2,\)"),
        (torch.zeros(1, 4), ValueError, r"got shape \(1, 4\)"),
        (torch.zeros(4, device="meta"), ValueError, "sinks must be on q's device cpu, got meta"),
        (torch.full((4,), math.inf), ValueError, "sinks must be finite, got 4 NaN or infinite values"),
    ],
)
def test_bad_sinks(sinks, error, words):
    q, k, v, _ = draw()
    with pytest.raises(error, match=words):
        stem.stem_attention(q, k, v, CONFIG, sinks=sinks)
    with pytest.raises(error, match=words):
        stem.block_sparse_attention(q, k, v, random_selection(q, k), sinks=sinks)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("impl", [None, "triton"])
@pytest.mark.parametrize("density", [0.4, 1.0])
@pytest.mark.parametrize("tokens", [300, 1500])
def test_replayed_calls_take_the_sinks_of_their_call(tokens, density, impl):
    config = StemConfig(density=density)
    for seed in range(5):  # the third call is the first that is replayed
        torch.manual_seed(seed)
        q, k, v = (torch.randn(1, heads, tokens, 128, device=DEVICE).bfloat16() for heads in (4, 2, 2))
        sinks = 3 * torch.randn(4, device=DEVICE)
        with torch.inference_mode():
            out, lse = stem.stem_attention(q, k, v, config, sinks=sinks, impl=impl, return_lse=True)
            selection = stem.stem_attention(q, k, v, config, impl=impl, return_selection=True)[1]
            alone = stem.stem_attention(q, k, v, config, sinks=sinks, impl=impl)
        expected = brute_force(q, k, v, selection.to_token_mask(), sinks)
        assert (out - expected[0]).norm() < 5e-3 * expected[0].norm() and torch.equal(alone, out)
        torch.testing.assert_close(lse.double(), expected[1], rtol=1e-4, atol=1e-3)

"""torch.func transforms, forward-mode AD and second derivatives: right, or an error that names what to use instead."""

from contextlib import nullcontext

import pytest
import torch
from devices import to
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._device import _device_constructors

import stem
from stem import BlockSelection, StemConfig

SMALL = dict(block_size=16, score_stride=8, sink_blocks=1, local_blocks=1)
CONFIGS = {"sparse": StemConfig(**SMALL, density=0.4), "everything": StemConfig(**SMALL, density=1.0)}
RIGHT, REFUSED = (None, "torch", "reference"), ("triton", "flex")
REFUSAL = pytest.raises(NotImplementedError, match="impl='torch' or 'reference'; vmap .* these two, .* into the batch")


def draw(impl=None):
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    return [torch.randn(1, heads, 50, 16, dtype=torch.float64).float().to(device) for heads in (4, 2, 2)]


@pytest.fixture(params=["sparse", "everything", "selection"])
def attention(request, fresh_plans):
    """(q, k, v, impl) -> output of one of the two public functions."""
    if request.param != "selection":
        return lambda q, k, v, impl: stem.stem_attention(q, k, v, CONFIGS[request.param], impl=impl)
    chosen = stem.stem_attention(*draw(), CONFIGS["sparse"], return_selection=True)[1]
    return lambda q, k, v, impl: stem.block_sparse_attention(q, k, v, to(q.device, chosen), impl=impl)


def expected_gradients(attention, inputs, impl):
    leaves = [x.clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(attention(*leaves, impl).square().sum(), leaves)


def loss(attention, impl):
    return lambda q, k, v: attention(q, k, v, impl).square().sum()


@pytest.mark.parametrize("impl", RIGHT)
def test_func_grad_gives_autograds_gradients_whatever_was_planned_before(attention, impl):
    inputs = draw()
    expected = expected_gradients(attention, inputs, impl)
    found = torch.func.grad(loss(attention, impl), argnums=(0, 1, 2))(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(expected_gradients(attention, inputs, impl), expected)


@pytest.mark.parametrize("impl", RIGHT)
def test_jvp_and_dual_numbers_give_the_directional_derivative(attention, impl):
    inputs, tangents = draw(), draw()
    gradients = expected_gradients(attention, inputs, impl)
    slope = sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True))
    _, tangent = torch.func.jvp(loss(attention, impl), tuple(inputs), tuple(tangents))
    torch.testing.assert_close(tangent, slope, rtol=1e-4, atol=1e-4)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True)]
        tangent = forward_ad.unpack_dual(loss(attention, impl)(*duals)).tangent
    torch.testing.assert_close(tangent, slope, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_caches_filled_under_a_transform_serve_plain_calls(impl, fresh_plans):
    inputs = draw(impl)
    for config in (*CONFIGS.values(), StemConfig(**SMALL, k_start=2, decay=1.0)):  # the last one has forced lists
        stem.budget.device_budget.cache_clear()
        stem.choose.forced_lists.cache_clear()
        torch.func.grad(lambda q, *others, of: stem.stem_attention(q, *others, of).sum())(*inputs, of=config)
        expected = stem.stem_attention(*inputs, config, impl="reference")
        torch.testing.assert_close(stem.stem_attention(*inputs, config, impl=impl), expected, rtol=1e-4, atol=1e-5)


def second_derivative(attention, impl, x, *others):
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(attention, impl)(x, *others), x, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), x)[0]


@pytest.mark.parametrize("impl", ["torch", "flex"])
def test_second_derivatives_are_those_of_the_reference(attention, impl):
    inputs = draw()
    expected = second_derivative(attention, "reference", *inputs)
    torch.testing.assert_close(second_derivative(attention, impl, *inputs), expected, rtol=1e-3, atol=1e-3)
    assert expected.abs().max() > 0.1


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_func_grad_twice_is_the_second_derivative(attention, impl):
    inputs = draw()
    first = torch.func.grad(loss(attention, impl))
    found = torch.func.grad(lambda q: first(q, *inputs[1:]).square().sum())(inputs[0])
    torch.testing.assert_close(found, second_derivative(attention, "reference", *inputs), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("impl", REFUSED)
def test_other_implementations_refuse_by_name(attention, impl):
    q, k, v = draw(impl)
    attention(q, k, v, impl)  # its plan must not serve a transformed call
    with REFUSAL:
        torch.func.grad(loss(attention, impl))(q, k, v)
    with REFUSAL:
        torch.func.jvp(lambda v: attention(q, k, v, impl), (v,), (v,))
    with forward_ad.dual_level(), REFUSAL:
        attention(q, k, forward_ad.make_dual(v, torch.ones_like(v)), impl)
    with REFUSAL:
        torch.func.vmap(lambda v: attention(q, k, v, impl))(torch.stack([v, v]))


@pytest.mark.parametrize("impl", RIGHT)
def test_vmap_over_a_selection_is_right(impl):
    q, k, v = draw()
    chosen = stem.stem_attention(q, k, v, CONFIGS["sparse"], return_selection=True)[1]
    both = torch.stack([q, 2 * q])
    found = torch.func.vmap(lambda q: stem.block_sparse_attention(q, k, v, chosen, impl=impl))(both)
    expected = torch.stack([stem.block_sparse_attention(x, k, v, chosen, impl="reference") for x in both])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


CHOOSING = {
    "stem_attention": lambda q, k, v: stem.stem_attention(q, k, v, CONFIGS["sparse"]),
    "block_scores": lambda q, k, v: stem.block_scores(q, k, v, CONFIGS["sparse"]),
    "select_blocks": lambda q, k, v: (
        stem.select_blocks(q[..., :4, :4], stem.block_budget(4, CONFIGS["sparse"]), CONFIGS["sparse"]).kv_indices
    ),
} | {
    f"patterns.select {name}": lambda q, k, v, name=name: (
        stem.patterns.select(name, q, k, v, CONFIGS["sparse"]).kv_indices
    )
    for name in stem.patterns.names()
}


@pytest.mark.parametrize("name", CHOOSING)
def test_vmap_and_tracing_of_what_looks_at_data_are_refused_by_name(name):
    inputs, public = draw(), name.split()[0]
    with pytest.raises(
        NotImplementedError, match=f"^{public} under torch.func .* put the mapped dimension into the bat"
    ):
        torch.func.vmap(CHOOSING[name])(*(torch.stack([x, 2 * x]) for x in inputs))
    with pytest.raises(NotImplementedError, match=f"^{public} under torch.jit.trace: .* use torch.compile"):
        torch.jit.trace(CHOOSING[name], tuple(inputs))


def test_tracing_of_a_given_selection_is_refused_by_name():
    selection = BlockSelection.every_block(1, 4, 50, 50, 16, torch.device("cpu"))
    with pytest.raises(NotImplementedError, match="block_sparse_attention under torch.jit.trace"):
        torch.jit.trace(lambda q, k, v: stem.block_sparse_attention(q, k, v, selection), tuple(draw()))


@pytest.mark.parametrize("impl", [None, "torch", "reference", "flex", "triton", "hopper"])
def test_meta_tensors_give_meta_results_like_those_of_sdpa(impl):
    q, k, v = (x.bfloat16().mT.contiguous().mT.requires_grad_() for x in draw())
    meta = [x.detach().to("meta").requires_grad_() for x in (q, k, v)]
    out, selection, lse = stem.stem_attention(
        *meta, CONFIGS["sparse"], impl=impl, return_selection=True, return_lse=True
    )
    again = stem.block_sparse_attention(*meta, selection, impl=impl)
    assert out.is_meta and again.is_meta and lse.is_meta and lse.dtype == torch.float32
    assert out.shape == again.shape == q.shape and out.dtype == again.dtype == q.dtype and lse.shape == q.shape[:3]
    (out.sum() + lse.sum()).backward()
    assert [x.grad.shape for x in meta] == [x.shape for x in (q, k, v)]
    with torch.autocast("cpu", torch.float16):  # of another device
        assert stem.stem_attention(*meta, CONFIGS["sparse"], impl=impl).dtype == torch.bfloat16


def test_meta_tensors_have_scores_and_no_blocks():
    meta = [x.to("meta") for x in draw()]
    scores = stem.block_scores(*meta, CONFIGS["sparse"])
    assert scores.is_meta and scores.shape == (1, 4, 4, 4)
    with pytest.raises(NotImplementedError, match="select_blocks needs the data of its tensors, got meta tensors"):
        stem.select_blocks(scores, stem.block_budget(4, CONFIGS["sparse"]), CONFIGS["sparse"])
    with pytest.raises(NotImplementedError, match="patterns.select needs the data of its tensors, got meta tensors"):
        stem.patterns.select("xattention", *meta, CONFIGS["sparse"])
    with pytest.raises(ValueError, match="k must be on q's device meta, got cpu"):
        stem.stem_attention(meta[0], *draw()[1:])


def test_triton_has_no_second_derivative():
    with pytest.raises(NotImplementedError, match="no second derivative: use impl='torch' or 'reference'"):
        second_derivative(
            lambda q, k, v, impl: stem.stem_attention(q, k, v, CONFIGS["sparse"], impl=impl), "triton", *draw("triton")
        )


def test_other_errors_stay_as_they_are():
    q, k, v = draw()
    with pytest.raises(ValueError, match="v must be finite"):
        torch.func.grad(lambda q: stem.stem_attention(q, k, v / 0, CONFIGS["sparse"]).sum())(q)
    with forward_ad.dual_level():  # of other tensors
        q, k, v = draw("triton")
        assert torch.equal(stem.stem_attention(q, k, v, impl="triton"), stem.stem_attention(q, k, v, impl="triton"))


def test_poisoned_buffers_leave_torch_device_alone(request):
    _device_constructors.cache_clear()
    request.getfixturevalue("poisoned_empty")
    with torch.device("meta"):
        assert torch.empty(2).is_meta


@pytest.mark.parametrize("kind", ["fake", "nested", "torch.sparse_coo"])
def test_tensors_whose_data_cannot_be_read_are_named(kind, attention):
    with FakeTensorMode() if kind == "fake" else nullcontext():
        tensors = draw()
        if kind == "nested":
            tensors = [torch.nested.nested_tensor([x[0]]) for x in tensors]
        if kind == "torch.sparse_coo":
            tensors = [x.to_sparse() for x in tensors]
        with pytest.raises(NotImplementedError, match=f"attention needs the data of its tensors, got {kind} tensors"):
            attention(*tensors, None)


def test_make_fx_is_named():
    with pytest.raises(NotImplementedError, match="stem_attention under make_fx: .*use torch.compile or torch.export"):
        make_fx(lambda q, k, v: stem.stem_attention(q, k, v, CONFIGS["sparse"]))(*draw())

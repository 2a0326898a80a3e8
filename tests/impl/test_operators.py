"""stem.impl.operators: operators that torch.compile can trace, with gradients by the kernels."""

import pytest
import torch

import stem
from stem import StemConfig
from stem.compiled import _from_json, select_op
from stem.impl import operators

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = StemConfig(block_size=16, density=0.5, sink_blocks=1, local_blocks=1)
IMPLS = ("torch", "triton")


@pytest.fixture(autouse=True)
def forget_compiled_graphs():
    torch.compiler.reset()


def draw(q_len=40, kv_len=56, head_dim=16, q_heads=2, kv_heads=1, dtype=torch.float32):
    shapes = (q_heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len)
    tensors = (torch.randn(1, tokens, heads, head_dim, dtype=dtype) for heads, tokens in shapes)
    return [x.transpose(1, 2).to(DEVICE).requires_grad_() for x in tensors]


def results(function, qkv, **options):
    """Output, log-sum-exp and their gradients."""
    out, lse = function(*qkv, return_lse=True, **options)
    return out, lse, *torch.autograd.grad(out.sin().sum() + lse.cos().sum(), qkv)


def compiled(function):
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def select(qkv, config=CONFIG):
    with torch.no_grad():
        return stem.stem_attention(*qkv, config, return_selection=True)[1]


@pytest.mark.parametrize("impl", IMPLS)
def test_operators_pass_the_checks_of_torch(impl):
    qkv = draw()
    selection = select(qkv)
    lists = selection.kv_indices, selection.kv_num_blocks
    torch.library.opcheck(operators.attention_op, (*qkv, *lists, 16, 0.25, impl))
    with torch.no_grad():
        q, k, v = (x.detach() for x in qkv)
        out, lse = operators.attention_op(q, k, v, *lists, 16, 0.25, impl)
        torch.library.opcheck(
            operators.attention_backward_op,
            (q, k, v, out, lse, out, lse, *lists, 16, 0.25, impl),
            test_utils=CHECKS,
        )
        for prompt_length in (None, 500):
            torch.library.opcheck(select_op, (q, k, v, CONFIG.as_json, 0.25, impl, prompt_length))


def test_the_operator_of_stand_ins_passes_the_checks_of_torch():
    from stem.kernels.stand_ins import stand_ins_op

    qkv = draw()
    selection = select(qkv)
    out, lse = stem.block_sparse_attention(*(x.detach() for x in qkv), selection, return_lse=True, impl="torch")
    arguments = (out.requires_grad_(), lse.requires_grad_(), *qkv, selection.kv_indices, selection.kv_num_blocks)
    torch.library.opcheck(stand_ins_op, (*arguments, 16, 16, 0.25))


CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", ["no-unit-stride", "expanded", "sliced"])
def test_the_fake_operators_promise_the_strides_of_the_real_ones(layout, impl):
    q, k, v = (x.detach() for x in draw(q_heads=2, kv_heads=2))
    if layout == "no-unit-stride":
        q, k = (x.contiguous().mT.contiguous().mT for x in (q, k))
    elif layout == "expanded":
        q, k = (x[:, :1].expand(1, 2, -1, -1) for x in (q, k))
    else:
        q, k = (torch.cat([x, x], -1)[..., :16] for x in (q, k))
    selection = select((q, k, v))
    lists = selection.kv_indices, selection.kv_num_blocks
    torch.library.opcheck(operators.attention_op, (q, k, v, *lists, 16, 0.25, impl), test_utils="test_faketensor")
    out, lse = operators.attention_op(q, k, v, *lists, 16, 0.25, impl)
    arguments = (q, k, v, out, lse, out, lse, *lists, 16, 0.25, impl)
    torch.library.opcheck(operators.attention_backward_op, arguments, test_utils="test_faketensor")


@pytest.mark.parametrize("dropped", ["skip", "mean"])
@pytest.mark.parametrize("impl", [None, *IMPLS])
def test_compiled_attention_gives_what_eager_gives(impl, dropped):
    qkv, config = draw(), CONFIG.replace(dropped=dropped)
    eager = results(stem.stem_attention, qkv, config=config, impl=impl)
    found = results(compiled(stem.stem_attention), qkv, config=config, impl=impl)
    for one, other in zip(found, eager, strict=True):
        torch.testing.assert_close(one, other)


def test_compiled_attention_with_the_default_config():
    qkv = draw(200, 200)
    torch.testing.assert_close(compiled(stem.stem_attention)(*qkv), stem.stem_attention(*qkv))


@pytest.mark.parametrize("impl", [None, "triton", "reference"])
def test_compiled_attention_over_given_blocks(impl):
    qkv = draw()
    selection = select(qkv)
    eager = results(stem.block_sparse_attention, qkv, selection=selection, impl=impl)
    found = results(compiled(stem.block_sparse_attention), qkv, selection=selection, impl=impl)
    for one, other in zip(found, eager, strict=True):
        torch.testing.assert_close(one, other)


class Layer(torch.nn.Module):
    """Self-attention as a model would write it."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.qkv, self.out = torch.nn.Linear(32, 96), torch.nn.Linear(32, 32)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (2, 16)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return self.out(stem.stem_attention(q, k, v, self.config).transpose(1, 2).flatten(2))


def test_a_module_compiles_into_one_graph_and_follows_its_config_and_length():
    layer = Layer(CONFIG).to(DEVICE)
    graph = compiled(layer)
    for tokens, config in ((64, CONFIG), (100, CONFIG), (100, CONFIG.replace(density=1.0)), (33, CONFIG)):
        layer.config = config
        x = torch.randn(1, tokens, 32, device=DEVICE)
        parameters = list(layer.parameters())
        found = torch.autograd.grad(graph(x).square().sum(), parameters)
        expected = torch.autograd.grad(layer(x).square().sum(), parameters)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_model_of_transformers_compiles_into_one_graph():
    from stem import hf
    from stem.experiments.speed import first_token

    settings = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
    model = first_token.random_llama(first_token.TINY | settings | dict(head_dim=16), DEVICE, torch.float32)
    hf.enable(model, CONFIG)
    ids = torch.randint(64, (1, 70), device=DEVICE)
    graph = compiled(model)
    with torch.no_grad():
        torch.testing.assert_close(graph(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    assert hf.density(model).density() == pytest.approx(0.5, abs=0.1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled FlexAttention takes no blocks of 16")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_flex_compiles_into_one_graph(backend, needs_grad):
    qkv = [x.detach().requires_grad_(needs_grad) for x in draw()]
    selection = select(qkv)
    for attention in (
        lambda q, k, v: stem.stem_attention(q, k, v, CONFIG, impl="flex", return_lse=True),
        lambda q, k, v: stem.block_sparse_attention(q, k, v, selection, impl="flex", return_lse=True),
    ):
        found = torch.compile(attention, fullgraph=True, backend=backend)(*qkv)
        expected = attention(*qkv)
        torch.testing.assert_close(found, expected)
        if needs_grad:
            found, expected = (torch.autograd.grad([x.sum() for x in out], qkv) for out in (found, expected))
            torch.testing.assert_close(found, expected)


def test_a_graph_with_symbolic_lengths_serves_every_length():
    graph = torch.compile(stem.stem_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (50, 64, 97):
        qkv = draw(tokens, tokens)
        torch.testing.assert_close(graph(*qkv, CONFIG), stem.stem_attention(*qkv, CONFIG))


@pytest.mark.parametrize("preset", ["paper", "angelslim", "hpc_ops"])
def test_configs_survive_their_way_through_an_operator(preset):
    config = StemConfig.preset(preset)
    assert _from_json(config.as_json) == config
    for k_start in (1, 1.0):
        decoded = _from_json(StemConfig(k_start=k_start).as_json).k_start
        assert decoded == k_start and type(decoded) is type(k_start)


def test_a_second_derivative_is_refused():
    qkv = draw()
    (dq,) = torch.autograd.grad(stem.stem_attention(*qkv, CONFIG, impl="triton").sum(), qkv[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative.*impl='torch'"):
        torch.autograd.grad(dq.sum(), qkv[0])


def test_half_precision_gradients_are_half_precision():
    qkv = draw(dtype=torch.float16)
    found = torch.autograd.grad(stem.stem_attention(*qkv, CONFIG, impl="triton").sum(), qkv)
    assert all(x.dtype == torch.float16 for x in found)

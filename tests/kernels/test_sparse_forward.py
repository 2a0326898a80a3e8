"""Block-sparse attention, forward, against a token mask and an fp64 softmax."""

import math

import pytest
import torch
from sparse_inputs import (
    DEVICE,
    eager,
    inputs_with_late_maxima,
    lists_of,
    masked_logits,
    oracle,
    random_inputs,
    random_mask,
)
from stem.kernels import sparse_forward as module
from stem.kernels.sparse_forward import sparse_forward

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
pytestmark = pytest.mark.usefixtures("poisoned_empty")


@pytest.fixture
def check(assert_close_to_oracle):
    """Run the kernel on q, k, v and a block mask, and compare out and lse with the oracle."""

    def run(q, k, v, mask, block_size, scale=None):
        scale = q.shape[3] ** -0.5 if scale is None else scale
        out, lse = sparse_forward(q, k, v, *lists_of(mask), block_size, scale)
        expected_out, expected_lse = oracle(q, k, v, mask, block_size, scale)
        assert out.dtype == q.dtype and lse.dtype == torch.float32 and out.stride(-1) == 1
        assert_close_to_oracle(out, expected_out, eager(q, k, v, mask, block_size, scale), reduction=k.shape[2])
        torch.testing.assert_close(lse.cpu().double(), expected_lse, rtol=1e-5, atol=1e-4)

    return run


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 16, 32, 40, 64, 80, 96, 128, 256], ids=lambda d: f"D{d}")
def test_head_dimensions(check, head_dim, dtype):
    q, k, v = random_inputs(2, 1, 200, 200, head_dim, dtype)
    check(q, k, v, random_mask(1, 2, 200, 200, 64), 64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [16, 32, 64, 128], ids=lambda size: f"block{size}")
def test_block_sizes(check, block_size, dtype):
    q, k, v = random_inputs(1, 1, 300, 300, 64, dtype)
    check(q, k, v, random_mask(1, 1, 300, 300, block_size), block_size)


@pytest.mark.parametrize("num_tokens", [1, 63, 129, 1000], ids=lambda n: f"N{n}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_odd_lengths(check, num_tokens, dtype):
    q, k, v = random_inputs(2, 1, num_tokens, num_tokens, 32, dtype)
    check(q, k, v, random_mask(1, 2, num_tokens, num_tokens, 128), 128)


@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 300), (70, 333), (64, 256), (200, 201)])
def test_chunks_of_queries(check, num_queries, num_keys):
    q, k, v = random_inputs(2, 1, num_queries, num_keys, 32)
    check(q, k, v, random_mask(1, 2, num_queries, num_keys, 64), 64)


@pytest.mark.parametrize(("num_q_heads", "num_kv_heads"), [(9, 3), (4, 2), (1, 1)])
def test_grouped_heads_and_batches(check, num_q_heads, num_kv_heads):
    q, k, v = random_inputs(num_q_heads, num_kv_heads, 100, 100, 16, batch=2)
    check(q, k, v, random_mask(2, num_q_heads, 100, 100, 32), 32)


def test_rows_without_the_diagonal_and_without_any_block(check):
    q, k, v = random_inputs(2, 2, 160, 160, 32)
    mask = random_mask(1, 2, 160, 160, 32, diagonal=False, keep=0.4)
    mask[:, :, 3] = False
    assert not mask.diagonal(dim1=2, dim2=3).all() and mask.any()
    check(q, k, v, mask, 32)


def test_all_blocks_give_dense_causal_attention():
    q, k, v = (x.contiguous() for x in random_inputs(4, 2, 150, 150, 64))
    out, _ = sparse_forward(q, k, v, *lists_of(random_mask(1, 4, 150, 150, 64, keep=2)), 64, 64**-0.5)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, dense, rtol=0, atol=2e-6)


@pytest.mark.parametrize("scale", [0.01, 1.0, -0.3])
def test_scale(check, scale):
    q, k, v = random_inputs(1, 1, 90, 90, 32)
    check(q, k, v, random_mask(1, 1, 90, 90, 32), 32, scale)


def test_large_logits_do_not_overflow():
    q, k, v = random_inputs(1, 1, 90, 90, 32)
    q, k, mask = q * 40, k * 40, random_mask(1, 1, 90, 90, 32)
    out, lse = sparse_forward(q, k, v, *lists_of(mask), 32, 1.0)
    expected_out, expected_lse = oracle(q, k, v, mask, 32, 1.0)
    assert expected_lse.max() > 10_000  # where one fp32 rounding of a logit is about 1e-3
    torch.testing.assert_close(out.cpu().double(), expected_out, rtol=0, atol=1e-2)
    torch.testing.assert_close(lse.cpu().double(), expected_lse, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("boost", [8, 30, 100])
@pytest.mark.parametrize("head_dim", [64, 128])  # which differ in the order of the work, AHEAD
def test_rows_whose_maximum_comes_late(check, head_dim, boost, dtype):
    q, k, v = inputs_with_late_maxima(boost, 300, head_dim, dtype)
    mask = random_mask(1, 2, 300, 300, 32)
    logits = masked_logits(q.cpu().double(), k.cpu().double(), mask, 32, head_dim**-0.5)
    growth = (logits.amax(-1) - logits[..., :32].amax(-1)) / math.log(2)
    growth = growth[growth.isfinite()].max()
    assert growth < 60 if boost == 8 else growth > 70  # on either side of LARGEST_SUM = 2**64
    check(q, k, v, mask, 32)


def test_inputs_without_a_unit_stride(check):
    q, k, v = (x.contiguous().mT.contiguous().mT for x in random_inputs(2, 1, 70, 70, 24))
    assert q.stride(-1) != 1
    check(q, k, v, random_mask(1, 2, 70, 70, 32), 32)


def test_keys_and_values_of_different_strides(check):
    q, k, v = random_inputs(2, 2, 70, 70, 32, batch=2)
    check(q, k, v.contiguous(), random_mask(2, 2, 70, 70, 32), 32)


def test_expanded_heads(check):
    q, k, v = random_inputs(1, 1, 70, 70, 32)
    check(q.expand(1, 4, -1, -1), k.expand(1, 2, -1, -1), v.expand(1, 2, -1, -1), random_mask(1, 4, 70, 70, 32), 32)


def test_blocks_off_the_list_change_nothing():
    q, k, v = random_inputs(1, 1, 128, 128, 32)
    mask = random_mask(1, 1, 128, 128, 32)
    mask[..., 1] = False
    before = sparse_forward(q, k, v, *lists_of(mask), 32, 0.2)
    k[:, :, 32:64], v[:, :, 32:64] = float("nan"), float("nan")
    after = sparse_forward(q, k, v, *lists_of(mask), 32, 0.2)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


@pytest.mark.skipif(DEVICE == "cpu", reason="needs 15 GB of device memory")
def test_offsets_beyond_32_bits(check):
    storage = torch.zeros(3, 300, 2**23, dtype=torch.bfloat16, device=DEVICE)  # the last row starts past 2**31
    q, k, v = (x[None, None, :, :64].copy_(torch.randn(300, 64)) for x in storage)
    check(q, k, v, random_mask(1, 1, 300, 300, 128), 128)


@pytest.mark.parametrize(("num_queries", "num_keys"), [(70, 133), (150, 150)])
def test_tensor_descriptors_read_what_pointers_read(num_queries, num_keys):
    dtype = torch.float32 if DEVICE == "cpu" else torch.bfloat16
    q, k, v = random_inputs(2, 1, num_queries, num_keys, 32, dtype)
    if DEVICE == "cuda" and not module.can_describe(k):
        pytest.skip("needs a GPU of compute capability 9.0 or more")
    lists = lists_of(random_mask(1, 2, num_queries, num_keys, 32))
    tiles = module.tile_choices(32, 32, dtype)[0]
    by_pointer, by_descriptor = (module.sparse_forward(q, k, v, *lists, 32, 0.1, tiles, tma) for tma in (False, True))
    assert torch.equal(by_pointer[0], by_descriptor[0]) and torch.equal(by_pointer[1], by_descriptor[1])


@pytest.mark.parametrize("block_size", [16, 64, 128])
@pytest.mark.parametrize("head_dim", [40, 128, 256])
def test_every_choice_of_tiles_is_right(check, head_dim, block_size, monkeypatch):
    dtype = torch.bfloat16
    q, k, v = random_inputs(1, 1, 200, 200, head_dim, dtype)
    mask = random_mask(1, 1, 200, 200, block_size)
    choices = module.tile_choices(head_dim, block_size, dtype)
    assert len({tuple(tiles.items()) for tiles in choices}) == len(choices)
    for tiles in choices[1 if DEVICE == "cpu" else 0 :]:  # the interpreter knows neither warps nor stages
        monkeypatch.setattr(module, "tile_sizes", lambda *_, tiles=tiles: tiles)
        check(q, k, v, mask, block_size)


@pytest.mark.skipif(DEVICE == "cpu", reason="nothing is timed in the interpreter")
def test_tiles_are_timed_once_and_never_while_a_graph_is_captured(monkeypatch):
    device = torch.device("cuda", torch.cuda.current_device())
    kind = 64, 64, torch.bfloat16, device
    monkeypatch.setattr(module, "FASTEST", {})
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device=device)
        assert module.tile_sizes(*kind) == module.tile_choices(*kind[:3])[0]
    assert not module.FASTEST
    chosen = module.tile_sizes(*kind)
    monkeypatch.setattr(module, "launch", lambda *_: pytest.fail("timed again"))
    assert module.tile_sizes(*kind) == chosen and chosen in module.tile_choices(*kind[:3])


def test_a_graph_takes_the_tiles_that_eager_code_took(monkeypatch):
    """So that a replay gives what eager code gives, to the last bit."""
    choices = module.tile_choices(128, 128, torch.bfloat16)
    monkeypatch.setattr(module, "FASTEST", {})
    monkeypatch.setattr(module, "fastest_choice", lambda *kind: len(choices) - 1)
    for capturing, expected in ((True, 0), (False, -1), (True, -1)):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        assert module.tile_sizes(128, 128, torch.bfloat16, torch.device("cuda", 0)) == choices[expected]


def test_nothing_is_timed_while_launches_only_compile(monkeypatch):
    from stem.kernels.launch import compiling_together

    monkeypatch.setattr(module, "FASTEST", {})
    monkeypatch.setattr(module, "fastest_choice", lambda *kind: pytest.fail("timed launches that ran nothing"))
    with compiling_together():
        tiles = module.tile_sizes(128, 128, torch.bfloat16, torch.device("cuda", 0))
    assert tiles == module.tile_choices(128, 128, torch.bfloat16)[0] and not module.FASTEST

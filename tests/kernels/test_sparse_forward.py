"""Block-sparse attention, forward, against a token mask and an fp64 softmax."""

import math

import pytest
import torch
from stem.kernels import sparse_forward as module
from stem.kernels.sparse_forward import sparse_forward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
pytestmark = pytest.mark.usefixtures("poisoned_empty")


def random_inputs(num_q_heads, num_kv_heads, num_queries, num_keys, head_dim, dtype=torch.float32, batch=1):
    """q, k, v as strided views of NaN-filled memory, so that a read outside of them spoils the result."""

    def view(heads, tokens):
        storage = torch.full((batch, tokens + 140, heads, head_dim + 24), float("nan"), dtype=dtype, device=DEVICE)
        x = storage[:, 70 : 70 + tokens, :, :head_dim].transpose(1, 2)  # [B, H, N, D]
        return x.copy_(torch.randn(batch, heads, tokens, head_dim))

    return view(num_q_heads, num_queries), view(num_kv_heads, num_keys), view(num_kv_heads, num_keys)


def random_mask(batch, num_heads, num_queries, num_keys, block_size, diagonal=True, keep=0.5):
    """bool [B, H, nq, nk]: causal, about `keep` of the blocks; every row lists its diagonal, if asked to."""
    num_kv_blocks = -(-num_keys // block_size)
    q_blocks = torch.arange((num_keys - num_queries) // block_size, num_kv_blocks)[:, None]
    kv_blocks = torch.arange(num_kv_blocks)[None, :]
    mask = torch.rand(batch, num_heads, len(q_blocks), num_kv_blocks) < keep
    return (mask | (diagonal & (kv_blocks == q_blocks))) & (kv_blocks <= q_blocks)


def lists_of(mask):
    """kv_indices and kv_num_blocks of a block mask; entries past the count hold what must not be read."""
    counts = mask.sum(-1)
    indices = torch.full(mask.shape, 2**30)
    for row in mask.any(-1).nonzero().tolist():
        indices[tuple(row)][: counts[tuple(row)]] = mask[tuple(row)].nonzero().flatten()
    return indices.int().to(DEVICE), counts.int().to(DEVICE)


def masked_logits(q, k, mask, block_size, scale):
    """[B, Hq, Nq, Nkv] in the dtype of q, -inf where the token mask is False."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    positions = torch.arange(num_keys - num_queries, num_keys)[:, None]
    rows = (positions // block_size - (num_keys - num_queries) // block_size).flatten()
    token_mask = mask.repeat_interleave(block_size, 3)[:, :, rows, :num_keys] & (torch.arange(num_keys) <= positions)
    logits = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * scale
    return logits.masked_fill(~token_mask, float("-inf"))


def oracle(q, k, v, mask, block_size, scale):
    """fp64 out and log-sum-exp; an empty row gives 0 and -inf."""
    q, k, v = (x.cpu().double() for x in (q, k, v))
    logits = masked_logits(q, k, mask, block_size, scale)
    weights = logits.softmax(-1).nan_to_num(0.0)
    return weights @ v.repeat_interleave(q.shape[1] // v.shape[1], 1), logits.logsumexp(-1)


def eager(q, k, v, mask, block_size, scale):
    """Logits and softmax in fp32, the probabilities and the output rounded to the dtype of q."""
    weights = masked_logits(q.cpu().float(), k.cpu().float(), mask, block_size, scale).softmax(-1).nan_to_num(0.0)
    values = v.cpu().float().repeat_interleave(q.shape[1] // v.shape[1], 1)
    return (weights.to(q.dtype).float() @ values).to(q.dtype)


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


def inputs_with_late_maxima(boost, num_tokens, head_dim, dtype):
    """q, k, v whose keys in the middle have `boost` times the logits of the others, which are around 0."""
    q, k, v = random_inputs(2, 1, num_tokens, num_tokens, head_dim, dtype)
    k[:, :, num_tokens // 2 : num_tokens // 2 + 5] *= boost
    return q, k, v


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
    by_pointer, by_descriptor = (
        module.forward_with_tiles(q, k, v, *lists, 32, 0.1, tiles, tma) for tma in (False, True)
    )
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

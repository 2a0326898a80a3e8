"""Group sums, value norms and block scores against loops and fp64."""

import pytest
import torch
from stem.kernels import block_scores
from stem.kernels.block_scores import score_blocks
from stem.kernels.gathered import rows_in_order
from stem.kernels.score_inputs import block_sums, key_shapes, raw_inputs
from stem.kernels.value_norms import value_norms

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
pytestmark = pytest.mark.usefixtures("poisoned_empty")


def naive_block_sums(x, block_size, stride, reverse, offset):
    """fp64 [B, H, nb, stride * D], one row at a time."""
    first_block = offset // block_size
    num_blocks = (offset + x.shape[2] - 1) // block_size - first_block + 1
    sums = torch.zeros(*x.shape[:2], num_blocks, stride, x.shape[3], dtype=torch.float64)
    for row in range(x.shape[2]):
        block, position = divmod(offset + row - first_block * block_size, block_size)
        group = position % stride
        sums[:, :, block, stride - 1 - group if reverse else group] += x[:, :, row].double().cpu()
    return sums.flatten(3)


def naive_value_norms(v, block_size, group_size):
    """fp64 [B, H, nb, block_size / group_size], one group at a time."""
    num_blocks = -(-v.shape[2] // block_size)
    norms = torch.zeros(*v.shape[:2], num_blocks * block_size // group_size, dtype=torch.float64)
    for start in range(0, v.shape[2], group_size):
        norms[:, :, start // group_size] = v[:, :, start : start + group_size].double().cpu().norm(dim=-1).amax(-1)
    return norms.unflatten(2, (num_blocks, -1))


@pytest.mark.parametrize("reverse", [False, True], ids=["keys", "queries"])
@pytest.mark.parametrize(
    ("num_tokens", "offset", "head_dim", "block_size", "stride"),
    [(1, 0, 16, 16, 16), (63, 13, 40, 32, 8), (129, 0, 96, 64, 16), (100, 128, 80, 128, 128), (300, 200, 64, 128, 8)],
)
def test_block_sums(num_tokens, offset, head_dim, block_size, stride, reverse):
    x = torch.randn(2, 3, num_tokens, head_dim, device=DEVICE)
    sums = block_sums(x, block_size, stride, reverse=reverse, offset=offset)
    expected = naive_block_sums(x, block_size, stride, reverse, offset)
    assert sums.dtype == torch.float32 and sums.shape == expected.shape
    torch.testing.assert_close(sums.cpu().double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_block_sums_and_norms_accumulate_in_fp32(dtype):
    x = torch.randn(1, 2, 129, 128, device=DEVICE).to(dtype)
    sums = block_sums(x, 128, 16, reverse=False)
    whole = sums.cpu().double() if dtype == torch.float32 else sums.cpu().double().sum(3)  # high and low part
    assert sums.dtype == (torch.float32 if dtype == torch.float32 else torch.bfloat16)
    tolerance = 0 if dtype == torch.float32 else 2**-14  # the parts keep 16 bits, 15 where bf16 is cut off
    torch.testing.assert_close(whole, naive_block_sums(x, 128, 16, False, 0), rtol=tolerance, atol=1e-5)
    norms = value_norms(x, 128, 16)
    torch.testing.assert_close(norms.cpu().double(), naive_value_norms(x, 128, 16), rtol=1e-5, atol=0)


def test_block_sums_of_non_contiguous_tensors():
    x = torch.randn(2, 50, 3, 24, 2, device=DEVICE)[..., 0].transpose(1, 2)  # [2, 3, 50, 24], no unit stride
    assert torch.equal(block_sums(x, 32, 8, reverse=True), block_sums(x.contiguous(), 32, 8, reverse=True))
    norms, contiguous = value_norms(x, 32, 8), value_norms(x.contiguous(), 32, 8)
    torch.testing.assert_close(norms, contiguous, rtol=1e-6, atol=0)  # strides decide the order of the sum


def test_block_sums_of_a_chunk_are_those_of_the_whole():
    x = torch.randn(1, 2, 96, 16, device=DEVICE)
    whole, chunk = block_sums(x, 32, 8, reverse=True), block_sums(x[:, :, 32:], 32, 8, reverse=True, offset=32)
    assert torch.equal(whole[:, :, 1:], chunk)


@pytest.mark.parametrize(
    ("num_tokens", "head_dim", "block_size", "group_size"),
    [(1, 16, 16, 16), (63, 40, 32, 8), (129, 96, 64, 64), (300, 256, 128, 128), (200, 80, 128, 1)],
)
def test_value_norms(num_tokens, head_dim, block_size, group_size):
    v = torch.randn(2, 2, num_tokens, head_dim, device=DEVICE)
    expected = naive_value_norms(v, block_size, group_size)
    norms = value_norms(v, block_size, group_size)
    assert norms.dtype == torch.float32 and norms.shape == expected.shape
    torch.testing.assert_close(norms.cpu().double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("num_q_heads", "num_kv_heads"), [(9, 3), (4, 2), (1, 1)])
@pytest.mark.parametrize(
    ("num_q_blocks", "num_kv_blocks", "depth"), [(1, 1, 16), (3, 70, 40), (67, 67, 96), (65, 130, 32)]
)
def test_score_blocks(num_q_heads, num_kv_heads, num_q_blocks, num_kv_blocks, depth):
    q_sums = torch.randn(1, num_q_heads, num_q_blocks, depth, device=DEVICE)
    k_sums = torch.randn(1, num_kv_heads, num_kv_blocks, depth, device=DEVICE)
    value_bonus = torch.rand(1, num_kv_heads, num_kv_blocks, device=DEVICE)
    scores = score_blocks(q_sums, k_sums, value_bonus, 0.3)

    group = num_q_heads // num_kv_heads
    k_heads = k_sums.double().cpu().repeat_interleave(group, 1)
    expected = (
        0.3 * q_sums.double().cpu() @ k_heads.mT + value_bonus.double().cpu().repeat_interleave(group, 1)[:, :, None]
    )
    q_block = torch.arange(num_kv_blocks - num_q_blocks, num_kv_blocks)
    future = torch.arange(num_kv_blocks)[None, :] > q_block[:, None]
    assert scores.dtype == torch.float32 and scores.shape == expected.shape
    assert (scores.cpu()[..., future] == float("-inf")).all()
    torch.testing.assert_close(scores.cpu().double()[..., ~future], expected[..., ~future], rtol=0, atol=2e-5)


LARGE_OR_SMALL = [(9, 3, 32, True), (14, 2, 32, True), (12, 2, 16, True), (32, 8, 16, True), (32, 8, 32, False)]


@pytest.mark.parametrize("heads, num_kv_heads, num_tokens, expected", LARGE_OR_SMALL)  # the faster on an NVIDIA H200
def test_tiles_are_small_where_large_ones_are_few(monkeypatch, heads, num_kv_heads, num_tokens, expected):
    monkeypatch.setattr(block_scores, "num_multiprocessors", lambda device: 132)
    num_blocks = num_tokens * 1024 // 128
    sizes = heads // num_kv_heads * num_blocks, num_blocks, num_kv_heads
    assert block_scores.needs_small_tiles(*sizes, torch.device("cuda")) == expected


@pytest.mark.parametrize("num_rows", [1, block_scores.SHORT, block_scores.SHORT + 1, 4096])
@pytest.mark.parametrize("parts", [1, 2])
def test_only_rows_decide_in_which_parts_products_are_added(parts, num_rows):
    small, large = (block_scores.score_tiles(parts, num_rows, is_small) for is_small in (True, False))
    assert small["DEPTH_TILE"] == large["DEPTH_TILE"]


@pytest.mark.parametrize("offset", [0, 45])
def test_scores_equal_the_mean_over_antidiagonal_samples(offset):
    num_keys, head_dim, block_size, stride = 96 + offset, 16, 32, 8
    q = torch.randn(1, 2, num_keys - offset, head_dim, device=DEVICE)
    k = torch.randn(1, 1, num_keys, head_dim, device=DEVICE)
    q_sums = block_sums(q, block_size, stride, reverse=True, offset=offset)
    k_sums = block_sums(k, block_size, stride, reverse=False)
    no_bonus = torch.zeros(1, 1, k_sums.shape[2], device=DEVICE)
    scale = head_dim**-0.5 / (stride * (block_size // stride) ** 2)
    scores = score_blocks(q_sums, k_sums, no_bonus, scale).cpu()

    length = k_sums.shape[2] * block_size
    start = length - q_sums.shape[2] * block_size
    q_padded = torch.zeros(2, length, head_dim, dtype=torch.float64)
    q_padded[:, offset:num_keys] = q[0].double().cpu()
    k_padded = torch.zeros(length, head_dim, dtype=torch.float64)
    k_padded[:num_keys] = k[0, 0].double().cpu()
    logits = q_padded[:, start:] @ k_padded.T * head_dim**-0.5
    rows, columns = torch.arange(length - start)[:, None], torch.arange(length)[None, :]
    sampled = (rows % stride + columns % stride) == stride - 1
    cells = (logits * sampled).unflatten(2, (-1, block_size)).unflatten(1, (-1, block_size))
    expected = cells.sum((2, 4)) / sampled[:block_size, :block_size].sum()
    visible = scores[0] > float("-inf")
    torch.testing.assert_close(scores[0].double()[visible], expected[visible], rtol=0, atol=1e-6)


@pytest.mark.parametrize("value_norm", ["log", "zscore", "zscore_padded"])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(300, 300), (70, 333), (128, 512)])
def test_keys_and_values_are_read_from_pages(num_queries, num_keys, value_norm):
    size, pages = 64, torch.tensor([7, 2, 9, 0, 4, 11, 1, 5], dtype=torch.int32, device=DEVICE)
    q, k, v = (torch.randn(1, 2, n, 32, device=DEVICE) for n in (num_queries, num_keys, num_keys))
    pool = torch.full((1, 2, 12 * size, 64), float("nan"), device=DEVICE)  # rows hold a key and a value
    for start in range(0, num_keys, size):
        here, rows = int(pages[start // size]) * size, slice(start, min(start + size, num_keys))
        pool[:, :, here : here + rows.stop - start] = torch.cat([k[:, :, rows], v[:, :, rows]], -1)
    options = size, 16, value_norm, 0.5
    found = raw_inputs(q, pool[..., :32], pool[..., 32:], *options, pages=pages, num_keys=num_keys)
    assert all(map(torch.equal, found, raw_inputs(q, k, v, *options)))


def test_scores_of_query_blocks_that_are_not_consecutive():
    # whole numbers, whose sums of products are exact in every order: BLAS may add another row in another order
    q_sums, k_sums = (torch.randint(-4, 5, shape, device=DEVICE).float() for shape in ((2, 4, 13, 32), (2, 2, 17, 32)))
    bonus, rows = torch.rand(2, 2, 17, device=DEVICE), torch.tensor([0, 1, 5, 6, 7, 11, 12], device=DEVICE)
    whole = score_blocks(q_sums, k_sums, bonus, 0.3)  # of query blocks 4 to 16
    options = dict(num_tile_rows=13, q_blocks=(rows + 4).int())
    assert torch.equal(score_blocks(q_sums[:, :, rows], k_sums, bonus, 0.3, **options), whole[:, :, rows])


@pytest.mark.parametrize("value_norm", ["log", "zscore"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_summaries_of_keys_go_to_longer_memory(dtype, value_norm):
    q, k, v = (torch.randn(1, 2, 100, 32, device=DEVICE).to(dtype) for _ in range(3))
    shapes = key_shapes((1, 2, 6), 32, 32, 16, dtype, value_norm == "log")
    memory = [torch.full(shape, float("nan"), dtype=of, device=DEVICE) for shape, of in shapes]
    expected = raw_inputs(q, k, v, 32, 16, value_norm, 0.5)
    found = raw_inputs(q, k, v, 32, 16, value_norm, 0.5, of_keys=memory)
    assert torch.equal(found[0], expected[0])
    for x, place, short in zip(found[1:], memory, expected[1:], strict=True):
        assert x is place and torch.equal(x[:, :, :4], short) and not x[:, :, 4:].any()


@pytest.mark.parametrize(("row", "dtype"), [((), torch.float32), ((2, 600), torch.bfloat16), ((3, 5), torch.float32)])
def test_rows_in_order(row, dtype):
    blocks = torch.randn(2, 3, 10, *row, device=DEVICE).to(dtype)
    owned = [[9, 0, 4, 5], [1, 8], [2, 3, 6, 7]]
    memory = torch.full((3, 2 * 3 * 4 * blocks[0, 0, 0].numel() + 8), float("nan"), device=DEVICE).to(dtype)
    gathered = memory[:, 8:].unflatten(1, (2, 3, 4, *row))
    slots = torch.empty(10, dtype=torch.int64, device=DEVICE)
    for rank, mine in enumerate(owned):
        gathered[rank, :, :, : len(mine)] = blocks[:, :, mine]
        slots[mine] = 4 * rank + torch.arange(len(mine), device=DEVICE)
    assert torch.equal(rows_in_order(gathered, slots), blocks)

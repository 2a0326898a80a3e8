"""Keys and values in a GPU's pages: rows that are copied, and attention whose kernels read pages; no vLLM is needed."""

import pytest
import torch
from stem.kernels import fp8_quantize, score_inputs
from stem.kernels.common import LOG2_E

import stem
from stem.budget import BlockRows, kept_blocks
from stem.vllm import fp8
from stem.vllm.pages import all_rows, attend_to_pages, block_inputs, choose, gather, readable_rows

CONFIG = stem.StemConfig(density=0.4, block_size=32, sink_blocks=1, local_blocks=1)
HEAD_DIM = 16
interpreted = pytest.mark.skipif(stem.TRITON_MODE != "interpret", reason="compiled kernels do not run on a CPU")


def cache_of(k, v, pages, page, layout="NHD"):
    """A cache [pages, Hkv, page, 2 * D] that holds k and v [1, Hkv, N, D] in these pages and NaN elsewhere."""
    heads, tokens, head_dim = k.shape[1:]
    shape = (max(pages) + 2, heads, page, 2 * head_dim)
    if layout == "NHD":
        cache = torch.full((shape[0], page, heads, 2 * head_dim), float("nan")).transpose(1, 2)
    else:
        cache = torch.full(shape, float("nan"))
    for position in range(tokens):
        row = torch.cat([k[0, :, position], v[0, :, position]], -1)
        cache[pages[position // page], :, position % page] = row
    return cache


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_rows_are_copied_from_pages(layout):
    k, v = torch.randn(2, 1, 2, 300, HEAD_DIM)
    pages = [3, 1, 6, 4]
    found = gather(cache_of(k, v, pages, 128, layout), torch.tensor(pages, dtype=torch.int32), 290)
    assert torch.equal(found[0], k[:, :, :290]) and torch.equal(found[1], v[:, :, :290])


@pytest.mark.parametrize(("layout", "step"), [("NHD", 1), ("HND", 2)])
def test_all_rows_are_views(layout, step):
    k, v = torch.randn(2, 1, 2, 100, HEAD_DIM)
    pages = [2, 0, 1, 3]
    cache = cache_of(k, v, pages, 32, layout)
    keys, values, found = all_rows(cache)
    assert found == step and keys.data_ptr() == cache.data_ptr()
    for i, page in enumerate(pages):
        rows, here = slice(page * step * 32, page * step * 32 + min(32, 100 - 32 * i)), slice(32 * i, 32 * (i + 1))
        assert torch.equal(keys[:, :, rows], k[:, :, here]) and torch.equal(values[:, :, rows], v[:, :, here])
    last = keys[0, -1, -1].storage_offset() + 2 * HEAD_DIM
    assert last == cache.untyped_storage().nbytes() // 4  # the last row of the last head ends with the memory
    assert all_rows(torch.empty(4, 2, 33 * 2, HEAD_DIM)[:, :, ::2][:, :, :32]) is None


def test_only_kernels_for_sm90_read_pages():
    k, v = torch.randn(2, 1, 2, 100, HEAD_DIM)
    assert readable_rows(k, cache_of(k, v, [2, 0, 1, 3], 32), CONFIG, BlockRows.of(100, 100, 32)) is None


def attend_by_copies(monkeypatch, cache):
    """Let attend_to_pages attend on a CPU, to copied keys; scores still read pages."""

    def prepare(q, keys, values, scale, *, pages, num_keys, out):
        def attend(kv_indices, kv_num_blocks, full_rows):
            first_block, blocks = (num_keys - q.shape[2]) // 32, -(-num_keys // 32)
            assert kv_indices.shape[1] == q.shape[1]
            lists = stem.BlockSelection(kv_indices, kv_num_blocks, 32, blocks, q.shape[2], num_keys)
            mask = lists.to_mask()
            for row in range(full_rows):
                mask[:, :, row, : first_block + row + 1] = True
            selection = stem.BlockSelection.from_mask(mask, 32, q_len=q.shape[2], kv_len=num_keys)
            places = pages // all_rows(cache)[2]
            out.copy_(stem.block_sparse_attention(q, *gather(cache, places, num_keys), selection, scale, "torch"))

        return attend

    monkeypatch.setattr("stem.kernels.hopper_forward.prepare", prepare)


@interpreted
@pytest.mark.parametrize(
    ("first", "stop", "prompt_length", "layout", "lists"),
    [
        (0, 300, 700, "NHD", "head"),
        (128, 420, 500, "HND", "head"),
        (1056, 1100, 1100, "NHD", "head"),
        (0, 70, 70, "HND", "group"),
        (0, 300, 320, "NHD", "group"),
    ],
)
def test_pages_give_the_attention_of_the_prompt(first, stop, prompt_length, layout, lists, monkeypatch):
    config = CONFIG.replace(lists=lists)
    q, (k, v) = torch.randn(1, 4, stop - first, HEAD_DIM), torch.randn(2, 1, 2, stop, HEAD_DIM)
    pages = torch.randperm(2 * prompt_length // 32 + 2)[: -(-stop // 32)].int()
    cache = cache_of(k, v, pages.tolist(), 32, layout)
    attend_by_copies(monkeypatch, cache)
    out = torch.full_like(q, float("nan"))
    rows = BlockRows.of(stop - first, stop, 32, prompt_length)
    counts, _ = attend_to_pages(q, *all_rows(cache), pages, stop, config, rows, 0.3, out)
    expected = stem.stem_attention(q, k, v, config, scale=0.3, impl="torch", prompt_length=prompt_length)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    assert counts.sum() == 4 * kept_blocks(rows, config)


@interpreted
@pytest.mark.parametrize("value_norm", ["log", "zscore"])
@pytest.mark.parametrize("ends", [(480, 544, 600), (490, 500, 588)])
def test_chunks_score_only_their_own_blocks(ends, value_norm, monkeypatch):
    config = CONFIG.replace(value_norm=value_norm, value_weight=0.5)
    q, (k, v) = torch.randn(1, 2, ends[-1], HEAD_DIM), torch.randn(2, 1, 1, ends[-1], HEAD_DIM)
    pages = torch.randperm(60)[: -(-ends[-1] // 32)].int()
    cache, sums, read = cache_of(k, v, pages.tolist(), 32), None, []
    attend_by_copies(monkeypatch, cache)
    raw_inputs = score_inputs.raw_inputs
    monkeypatch.setattr(
        score_inputs, "raw_inputs", lambda *args, **paged: read.append(paged["num_keys"]) or raw_inputs(*args, **paged)
    )
    for first, stop in zip((0, *ends), ends, strict=False):
        out = torch.full_like(q[:, :, first:stop], float("nan"))
        rows = BlockRows.of(stop - first, stop, 32, ends[-1])
        args = q[:, :, first:stop], *all_rows(cache), pages, stop, config, rows, 0.3, out
        _, sums = attend_to_pages(*args, sums)
        options = dict(scale=0.3, impl="torch", prompt_length=ends[-1])
        expected = stem.stem_attention(q[:, :, first:stop], k[:, :, :stop], v[:, :, :stop], config, **options)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
        assert sums[0].shape[2] == sums[1].shape[2] == stop // 32
    aligned = [first // 32 // 4 * 4 * 32 for first in (0, *ends[:-1])]
    assert read == [stop - first for first, stop in zip(aligned, ends, strict=True)]


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value_norm", ["log", "zscore"])
def test_sums_of_chunks_are_those_of_the_prompt(dtype, value_norm):
    config, ends = CONFIG.replace(value_norm=value_norm), (480, 550, 600)
    q, (k, v) = torch.randn(1, 2, 600, HEAD_DIM, dtype=dtype), torch.randn(2, 1, 2, 600, HEAD_DIM, dtype=dtype)
    pages, sums = torch.randperm(30)[:19].int(), None
    k, v, _ = all_rows(cache_of(k, v, pages.tolist(), 32).to(dtype))
    for first, stop in zip((0, *ends), ends, strict=False):
        rows = BlockRows.of(stop - first, stop, 32, 600)
        inputs, sums, _ = block_inputs(q[:, :, first:stop], k, v, pages, stop, config, rows, sums)
    whole, *_ = block_inputs(q, k, v, pages, 600, config, BlockRows.of(600, 600, 32), None)
    assert torch.equal(inputs[1], whole[1]) and torch.equal(inputs[2], whole[2])


@interpreted
def test_a_chunk_is_scored_by_the_tiles_of_a_prompt(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "stem.kernels.block_scores.score_tiles",
        lambda parts, rows, _: (
            asked.append(rows) or dict(TILE_M=32, TILE_N=32, DEPTH_TILE=32, num_warps=4, num_stages=3)
        ),
    )
    q, (k, v) = torch.randn(1, 4, 64, HEAD_DIM), torch.randn(2, 1, 2, 1600, HEAD_DIM)
    rows, pages = BlockRows.of(64, 1600, 32, 1700), torch.arange(50).int()
    keys, values, _ = all_rows(cache_of(k, v, pages.tolist(), 32))
    inputs, *_ = block_inputs(q, keys, values, pages, 1600, CONFIG, rows, None)
    choose(inputs, CONFIG, rows, 4, 1.0)
    assert asked[0] == 50 * 2  # query blocks of two heads, as many as keys have


def attend_in_fp32(read):
    """A stand-in for fp8.launch_attention on a CPU: attention to what FP8 holds; `read` gets what it holds."""

    def attend(q8, q_scales, lse, past, kept, out):
        (_, _, num_queries, head_dim), stop, size = q8.shape, past.stop, past.values.shape[3]
        before = (stop - num_queries) % size  # of the first query's block
        scales = q_scales.repeat_interleave(size, -1)[:, :, before : before + num_queries, None]
        keys = past.keys[:, :, :stop].float() * past.key_scales.repeat_interleave(size, -1)[:, :, :stop, None]
        order = torch.arange(size).reshape(size // 16, 2, 4, 2).transpose(1, 2).flatten()  # see fp8_quantize
        values = torch.empty_like(past.values.float().unflatten(2, (-1, head_dim)).transpose(3, 4))
        values[:, :, :, order] = past.values.float().unflatten(2, (-1, head_dim)).transpose(3, 4)
        values = values.flatten(2, 3)[:, :, :stop] * past.value_scales[:, :, None]
        lists = stem.BlockSelection(*kept, size, -(-stop // size), num_queries, stop)
        q = q8.float() * scales / LOG2_E.value
        out.copy_(stem.block_sparse_attention(q, keys, values, lists, 1.0, "torch"))
        read.append((past, keys + past.mean_key[:, :, None], values))

    return attend


@interpreted
@pytest.mark.parametrize("ends", [(480, 544, 600), (490, 500, 588), (300,), (70, 600)])
def test_chunks_in_fp8_keep_earlier_ones(ends, monkeypatch):
    q, (k, v) = torch.randn(1, 4, ends[-1], HEAD_DIM), torch.randn(2, 1, 2, ends[-1], HEAD_DIM)
    k += 5 * torch.randn(HEAD_DIM)
    v[:, :, ends[0] :] *= 2  # within the room for later chunks
    pages = torch.randperm(60)[: -(-ends[-1] // 32)].int()
    cache, past, read, own = cache_of(k, v, pages.tolist(), 32, "HND"), None, [], []
    quantize = fp8_quantize.quantize
    monkeypatch.setattr(fp8_quantize, "quantize", lambda q, k, *rest: own.append(k.shape[2]) or quantize(q, k, *rest))
    monkeypatch.setattr(fp8, "launch_attention", attend_in_fp32(read))
    for first, stop in zip((0, *ends), ends, strict=False):
        rows, out = BlockRows.of(stop - first, stop, 32, ends[-1]), torch.full_like(q[:, :, first:stop], float("nan"))
        args = q[:, :, first:stop], cache, all_rows(cache), pages, stop, CONFIG, rows, 0.3, out, ends[-1]
        counts, past = fp8.attend_in_fp8(*args, past)
        assert counts.sum() == 4 * kept_blocks(rows, CONFIG)
        options = dict(scale=0.3, impl="torch", prompt_length=ends[-1])
        expected = stem.stem_attention(q[:, :, first:stop], k[:, :, :stop], v[:, :, :stop], CONFIG, **options)
        assert 0 < (out - expected).norm() < 0.2 * expected.norm()
        for x, wanted in zip(read[-1][1:], (k, v), strict=True):
            assert (x - wanted[:, :, :stop]).norm() < 0.1 * wanted[:, :, :stop].norm()
    assert own == [stop - first // 32 * 32 for first, stop in zip((0, *ends), ends, strict=False)]
    assert len({x[0].keys.data_ptr() for x in read}) == 1  # memory of the whole prompt

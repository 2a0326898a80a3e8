"""Keys and values in a GPU's pages: rows that are copied; no vLLM is needed."""

import pytest
import torch

from stem.vllm.pages import gather

HEAD_DIM = 16


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

"""Keys and values in the pages of a GPU's cache, copied row by row."""

from __future__ import annotations

from torch import Tensor


def gather(kv_cache: Tensor, pages: Tensor, stop: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a request's first `stop` positions, [1, Hkv, stop, D] each, copied.

    Args:
        kv_cache: [pages, Hkv, page, 2 * D], any strides; a row holds a key and then its value.
        pages: int [..], the request's pages in order.
    """
    page, width = kv_cache.shape[2:]
    rows = kv_cache[pages[: -(-stop // page)].long()].transpose(0, 1).flatten(1, 2)[None, :, :stop]
    return rows[..., : width // 2], rows[..., width // 2 :]

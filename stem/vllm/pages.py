"""Keys and values in the pages of a GPU's cache: copied row by row, or read where they are."""

from __future__ import annotations

from torch import Tensor

from stem.budget import BlockRows, device_budget, full_rows
from stem.choose import choose_topk
from stem.config import StemConfig


def gather(kv_cache: Tensor, pages: Tensor, stop: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a request's first `stop` positions, [1, Hkv, stop, D] each, copied.

    Args:
        kv_cache: [pages, Hkv, page, 2 * D], any strides; a row holds a key and then its value.
        pages: int [..], the request's pages in order.
    """
    page, width = kv_cache.shape[2:]
    rows = kv_cache[pages[: -(-stop // page)].long()].transpose(0, 1).flatten(1, 2)[None, :, :stop]
    return rows[..., : width // 2], rows[..., width // 2 :]


def all_rows(kv_cache: Tensor) -> tuple[Tensor, Tensor] | None:
    """Keys and values of all pages, views [1, Hkv, pages * page, D]; None if heads come before rows in memory."""
    x = kv_cache.transpose(0, 1)
    if x.stride(1) != x.shape[2] * x.stride(2):
        return None
    x = x.flatten(1, 2)[None]
    return x[..., : x.shape[3] // 2], x[..., x.shape[3] // 2 :]


def readable_rows(q: Tensor, kv_cache: Tensor, config: StemConfig) -> tuple[Tensor, Tensor] | None:
    """all_rows, if kernels for sm_90 can read them page by page for this config; else None."""
    from stem.kernels.common import is_aligned
    from stem.kernels.hopper_forward import unsupported

    is_covered = config.reduction == "mean" and config.allocation != "adaptive"
    if not is_covered or kv_cache.shape[2] != config.block_size:
        return None
    if kv_cache.dtype != q.dtype or unsupported(q.device, q.dtype, q.shape[3], config.block_size):
        return None
    rows = all_rows(kv_cache)
    return rows if rows and all(map(is_aligned, rows)) else None


def attend_to_pages(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pages: Tensor,
    stop: int,
    config: StemConfig,
    rows: BlockRows,
    scale: float,
    out: Tensor,
) -> None:
    """Store in `out` the Stem attention of queries [1, Hq, Nq, D], the last positions before `stop`.

    k, v: from readable_rows. pages: int32 [..], the request's pages in order, one block of the config each.
    """
    from stem.kernels.hopper_forward import prepare
    from stem.kernels.score_select import MAX_KV_BLOCKS

    paged = dict(pages=pages, num_keys=stop)
    start = prepare(q, k, v, scale, **paged, out=out)
    is_short = rows.stop <= MAX_KV_BLOCKS
    budget = device_budget(rows, config, q.device)
    lists = choose_topk(q, k, v, config, rows, scale, *budget, is_short, **paged)
    start(*lists, full_rows(rows, config) if is_short else 0)

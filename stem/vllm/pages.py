"""Keys and values in the pages of a GPU's cache: copied row by row, or read where they are by kernels for sm_90."""

from __future__ import annotations

import torch
from torch import Tensor

from stem.budget import BlockRows, device_budget, full_rows, scored_rows
from stem.choose import CHUNK_SCORES, forced_lists
from stem.config import StemConfig
from stem.planning import SHORT_BLOCKS
from stem.scores import routing_scale

Sums = tuple[Tensor, Tensor]  # of key blocks: group sums of keys, and value terms before z-scores; see raw_inputs
ALIGNED_PAGES = 4  # whose numbers, int32, fill the 16 bytes to which kernels want their arguments aligned


def gather(kv_cache: Tensor, pages: Tensor, stop: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a request's first `stop` positions, [1, Hkv, stop, D] each, copied.

    Args:
        kv_cache: [pages, Hkv, page, 2 * D], any strides; a row holds a key and then its value.
        pages: int [..], the request's pages in order.
    """
    page, width = kv_cache.shape[2:]
    rows = kv_cache[pages[: -(-stop // page)].long()].transpose(0, 1).flatten(1, 2)[None, :, :stop]
    return rows[..., : width // 2], rows[..., width // 2 :]


def all_rows(kv_cache: Tensor) -> tuple[Tensor, Tensor, int] | None:
    """Keys and values of all pages, views [1, Hkv, rows, D], and a step: page p begins at row p * step * page.

    The step is 1 where rows come before heads in memory, and Hkv where heads come first: the views of two heads then
    overlap. None for any other order.
    """
    pages, heads, page, width = kv_cache.shape
    page_stride, head_stride, row_stride, _ = kv_cache.stride()
    step, rest = divmod(page_stride, page * row_stride)
    if rest:
        return None
    shape = 1, heads, ((pages - 1) * step + 1) * page, width // 2
    strides = pages * page_stride, head_stride, row_stride, 1
    k, v = (x.as_strided(shape, strides) for x in kv_cache.split(width // 2, -1))
    return k, v, step


def readable_rows(
    q: Tensor, kv_cache: Tensor, config: StemConfig, rows: BlockRows
) -> tuple[Tensor, Tensor, int] | None:
    """all_rows, if kernels for sm_90 can read them page by page for these rows of the config; else None."""
    from stem.kernels.common import is_aligned
    from stem.kernels.hopper_forward import unsupported

    plain = (
        config.reduction == "mean",
        config.allocation != "adaptive",
        config.dropped == "skip",
    )
    if not all(plain) or kv_cache.shape[2] != config.block_size:
        return None
    if kv_cache.dtype != q.dtype or unsupported(q.device, q.dtype, q.shape[3], config.block_size):
        return None
    if q.shape[1] * (rows.stop - rows.first) * rows.stop > CHUNK_SCORES:
        return None
    views = all_rows(kv_cache)
    return views if views and all(map(is_aligned, views[:2])) else None


def attend_to_pages(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step: int,
    pages: Tensor,
    stop: int,
    config: StemConfig,
    rows: BlockRows,
    scale: float,
    out: Tensor,
    sums: Sums | None = None,
) -> tuple[Tensor, Sums | None]:
    """Store in `out` the Stem attention of queries [1, Hq, Nq, D], the last positions before `stop`.

    Args:
        k, v, step: From readable_rows.
        pages: int32 [..], the request's pages in order, one block of the config each; its address is aligned.
        sums: From the request's chunk before, for its first blocks, which are then not read for scores.
    Returns:
        Kept blocks of each row, int32 [1, Hq, nq], and sums of all whole blocks, None where no scores were needed.
    """
    from stem.kernels.hopper_forward import prepare

    pages = pages * step if step > 1 else pages
    start = prepare(q, k, v, scale, pages=pages, num_keys=stop, out=out)
    lists, sums, full = chosen(q, k, v, pages, stop, config, rows, scale, sums)
    start(*lists, full)
    return lists[1], sums


def chosen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pages: Tensor,
    stop: int,
    config: StemConfig,
    rows: BlockRows,
    scale: float,
    sums: Sums | None,
    leave_out: bool = True,
) -> tuple[tuple[Tensor, Tensor], Sums | None, int]:
    """Lists of blocks for all query heads, sums of all whole blocks, and the number of rows without a list.

    Arguments as in attend_to_pages; page p begins at row p * page. The first rows, which keep every block, have a list
    unless they may be left out.
    """
    if rows.stop <= SHORT_BLOCKS and not scored_rows(rows, config):
        return forced_lists(1, q.shape[1], config, rows, q.device), None, 0
    inputs, sums, full = block_inputs(q, k, v, pages, stop, config, rows, sums, leave_out)
    return choose(inputs, config, rows, q.shape[1], routing_scale(q.shape[3], config, scale)), sums, full


def block_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pages: Tensor,
    stop: int,
    config: StemConfig,
    rows: BlockRows,
    sums: Sums | None,
    leave_out: bool = True,
) -> tuple[tuple[Tensor, Tensor, Tensor], Sums, int]:
    """Inputs of score_blocks, sums of all whole blocks, and the number of rows left out, which keep every block.

    Only blocks without sums are read. Arguments as in `chosen`.
    """
    from stem.kernels.score_inputs import raw_inputs
    from stem.kernels.score_select import MAX_KV_BLOCKS
    from stem.kernels.value_norms import standardize

    size, stride = config.block_size, config.score_stride
    full = full_rows(rows, config) if leave_out and rows.stop <= MAX_KV_BLOCKS else 0  # a larger kernel scores all rows
    done = sums[0].shape[2] // ALIGNED_PAGES * ALIGNED_PAGES if sums else 0
    paged = dict(pages=pages[done:], num_keys=stop - done * size, heads=config.pooled_heads(q.shape[1], k.shape[1]))
    q_sums, *new = raw_inputs(q, k, v, size, stride, *config.value_term, full, **paged)
    if done:
        new = [_joined(old[:, :, :done], own) for old, own in zip(sums, new, strict=True)]
    k_sums, values = new
    bonus = standardize(values, stride, *config.value_term, stop)
    whole = stop // size
    return (q_sums, k_sums, bonus), (k_sums[:, :, :whole], values[:, :, :whole]), full


def choose(
    inputs: tuple[Tensor, Tensor, Tensor], config: StemConfig, rows: BlockRows, heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Lists of the best blocks by mean score for all query heads, as many as the budget says; see choose_topk."""
    from stem.kernels.block_scores import score_blocks
    from stem.kernels.block_select import empty_lists, for_all_heads, select_topk
    from stem.kernels.score_select import MAX_KV_BLOCKS, score_select

    device, choosing = inputs[0].device, inputs[0].shape[1]
    pooled = heads // choosing
    budget, width = device_budget(rows, config, device)
    lists = empty_lists(1, choosing, rows.stop - rows.first, width, device)
    if rows.stop <= MAX_KV_BLOCKS:
        lists = score_select(*inputs, scale / pooled, budget, *config.always_kept, lists)
    else:
        scores = score_blocks(*inputs, scale / pooled, num_tile_rows=rows.stop)  # a chunk has few rows, not few keys
        lists = select_topk(scores, budget, *config.always_kept, width, lists)
    return for_all_heads(lists, pooled)


def _joined(old: Tensor, new: Tensor) -> Tensor:
    """Both [1, Hkv, blocks, ..] along the blocks; torch is slow to join more than four dimensions."""
    return torch.cat([old.flatten(2), new.flatten(2)], 2).unflatten(2, (-1, *new.shape[3:]))

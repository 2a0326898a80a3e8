"""Lists of a rank's query blocks, chosen from summaries of all key blocks: to the last bit those of one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stem.cells import (
    blocks_at_least_half_full,
    cell_scores,
    group_sums,
    kernel_cells,
    pad_to_grid,
    pair_features,
    prompt_features,
)
from stem.choose import CHUNK_SCORES
from stem.config import StemConfig
from stem.distributed.exchange import Peers
from stem.distributed.repeated import repeated
from stem.distributed.shards import Fetch, Shard
from stem.planning import Plan
from stem.scores import group_value_norms, norms_term, pair_sums, routing_scale
from stem.selection import select_blocks
from stem.transforms import lasting_tensors

ALIGNMENT = 16  # bytes, of each of the summaries that travel together


def choose_rows(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, shard: Shard, peers: Peers
) -> Callable[[], tuple[Tensor, Tensor]]:
    """Begin to choose; the result gives the rank's lists, int32 [B, Hq, rows, max], and counts [B, Hq, rows].

    The summaries of key blocks are gathered, and with `exact_last_blocks` all keys travel to the ranks of the last
    blocks. impl="torch" pairs the rank's query blocks in products of the whole prompt's shape, in which the rows of
    other ranks are zero: the bits of a row of a product depend on the product's shape.
    """
    if plan.choice in ("all", "forced"):
        return partial(_known_rows, q, plan, shard)
    config = plan.rows.at_the_end(plan.problem.config)
    summaries = _summaries(q, k, v, plan, shard, peers, config)
    return lambda: _scored_rows(q, k, summaries(), plan, shard, peers, config)


def _known_rows(q: Tensor, plan: Plan, shard: Shard) -> tuple[Tensor, Tensor]:
    """Lists and counts that do not depend on the numbers in q, k and v."""
    mine = shard.on(q.device)[0]
    if plan.choice == "forced":
        return tuple(x.index_select(2, mine - plan.rows.first) for x in plan.forced)
    blocks, counts = torch.arange(plan.rows.stop, device=q.device), (mine + 1).int()
    lists = torch.where(blocks < counts[:, None], blocks, 0).int()
    return tuple(x.expand(*q.shape[:2], *x.shape) for x in (lists, counts))


def _scored_rows(
    q: Tensor, k: Tensor, summaries: tuple, plan: Plan, shard: Shard, peers: Peers, config: StemConfig
) -> tuple[Tensor, Tensor]:
    """Lists and counts from the results of `_summaries`."""
    q_features, k_features, bonus = summaries
    choose = {"topk": _topk, "share": _share, "scores": _scores}[plan.choice]
    choose = partial(choose, q_features, k_features, bonus, plan, shard, config)
    features = q_features, k_features, bonus
    lists, counts = repeated(choose, *features, of=("lists", plan, shard)) if plan.choice == "topk" else choose()
    exact = _exact_rows(plan, config)
    if exact < plan.rows.stop:
        keys = _keys_for_rows(k, exact, shard, peers)
        if keys is not None:
            mine = shard.on(q.device)[0]
            before = int((shard.q_blocks < exact).sum())
            last = _exact_lists(q, keys, bonus, exact, plan, shard, config)
            last = tuple(x[:, :, mine[before:] - exact] for x in last)
            lists, counts = _joined([(lists[:, :, :before], counts[:, :, :before]), last])
    heads = plan.problem.q_heads // lists.shape[1]  # that share a list
    return (lists, counts) if heads == 1 else tuple(x.repeat_interleave(heads, 1) for x in (lists, counts))


def _summaries(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, shard: Shard, peers: Peers, config: StemConfig
) -> Callable[[], tuple[Tensor, Tensor, Tensor | None]]:
    """Begin to gather summaries; the result gives features of the rank's query blocks and of all key blocks, and
    the value term of all key blocks.
    """
    p, size, stride = plan.problem, config.block_size, config.score_stride
    q, k, v = (x.detach() if x.shape[2] else x.new_zeros(*x.shape[:2], 1, x.shape[3]) for x in (q, k, v))
    softmax, triton = config.reduction == "softmax", plan.choose_impl == "triton"
    heads, num_blocks = config.pooled_heads(p.q_heads, p.kv_heads), len(shard.blocks)
    if triton:
        from stem.kernels.cell_features import cell_features
        from stem.kernels.score_inputs import key_shapes, raw_inputs
        from stem.kernels.value_norms import standardize, value_norms
    if triton and not softmax:
        shapes_of = partial(key_shapes, head_dim=p.head_dim, block_size=size, stride=stride, dtype=p.dtype)
        shapes, no_shapes = (
            shapes_of((p.batch, p.kv_heads, n), log_term=config.value_norm == "log") for n in (shard.slots[1], 0)
        )
        places = _places(shapes)[0]
        sums = partial(raw_inputs, q, k, v, size, stride, *config.value_term, heads=heads)

        def key_sums() -> tuple[Tensor]:
            memory = _Memory.of(shapes, k.device)
            sums(num_q_blocks=0, of_keys=memory.tensors)
            return (memory.bytes,)

        def query_sums() -> tuple[Tensor]:
            nothing = [torch.empty(shape, dtype=dtype, device=k.device) for shape, dtype in no_shapes]
            return sums(kv_blocks=range(0), of_keys=nothing)[:1]

        (packed,) = repeated(key_sums, q, k, v, of=("key sums", plan, shard))
    else:
        if not softmax:
            q_rows = group_sums(q, size, stride, reverse=True, offset=k.shape[2] - q.shape[2])
            q_rows, k_rows = q_rows.unflatten(1, (-1, heads)).mean(2), group_sums(k, size, stride)
        elif triton:
            q_rows, k_rows = cell_features(q, k, kernel_cells(q.shape[2], k.shape[2], config, heads), p.scale)
        else:
            q_rows, k_rows = prompt_features(q, k, config, p.scale)
        summaries = [k_rows.unflatten(2, (-1, config.score_cells)) if softmax else k_rows]
        if config.value_weight > 0 or not softmax:
            summaries.append((value_norms if triton else group_value_norms)(v, size, stride))
        shapes = tuple(((*x.shape[:2], shard.slots[1], *x.shape[3:]), x.dtype) for x in summaries)
        memory = _Memory.of(shapes, k.device)
        for place, x in zip(memory.tensors, summaries, strict=True):
            place[:, :, :num_blocks] = x[:, :, :num_blocks]
        packed, places = memory.bytes, memory.places
    finish = peers.gather(packed, "the exchange of block summaries")
    if triton and not softmax:  # while the summaries travel
        (q_rows,) = repeated(query_sums, q, k, v, of=("query sums", plan, shard))
    q_rows = q_rows if len(shard.q_blocks) else q_rows[:, :, :0]  # a rank without tokens has scored a dummy

    def result() -> tuple[Tensor, Tensor, Tensor | None]:
        found, slots = _of_ranks(finish(), places), shard.on(k.device)[1]
        if triton:
            from stem.kernels.gathered import rows_in_order

        if triton and not softmax:

            def in_order() -> tuple[Tensor, Tensor]:
                k_rows, values = (rows_in_order(x, slots) for x in found)
                return k_rows, standardize(values, stride, *config.value_term, p.kv_len)

            return q_rows, *repeated(in_order, *found, of=("in order", plan, shard))
        if triton:
            k_rows, *values = (rows_in_order(x, slots) for x in found)
        else:
            k_rows, *values = (x.movedim(0, 2).flatten(2, 3).index_select(2, slots) for x in found)
        k_rows = k_rows.flatten(2, 3) if softmax else k_rows
        return q_rows, k_rows, config.value_weight * norms_term(values[0], p.kv_len, config) if values else None

    return result


class _Memory(NamedTuple):
    """Tensors side by side in one buffer, which travels as one."""

    bytes: Tensor
    tensors: list[Tensor]
    places: list[tuple]

    @classmethod
    def of(cls, shapes: tuple, device: torch.device) -> _Memory:
        """Memory for tensors of the shapes and dtypes."""
        places, size = _places(shapes)
        memory = torch.empty(size, dtype=torch.uint8, device=device)
        return cls(memory, [memory.view(dtype).as_strided(*where) for dtype, *where in places], places)


def _of_ranks(gathered: Tensor, places: list[tuple]) -> list[Tensor]:
    """Tensors of a _Memory of all ranks, [ranks, ...], in their gathered bytes."""
    found = []
    for dtype, shape, strides, first in places:
        x = gathered.view(dtype)
        found.append(x.as_strided((len(x), *shape), (x.shape[1], *strides), first))
    return found


@lru_cache(maxsize=1024)
def _places(shapes: tuple[tuple[tuple[int, ...], torch.dtype], ...]) -> tuple[list[tuple], int]:
    """Dtype, shape, strides and first element of dense tensors side by side, and their bytes."""
    places, size = [], 0
    for shape, dtype in shapes:
        x = torch.empty(shape, dtype=dtype, device="meta")
        places.append((dtype, shape, x.stride(), size // x.itemsize))
        size += -(-x.nbytes // ALIGNMENT) * ALIGNMENT
    return places, size


def _topk(q_sums: Tensor, k_sums: Tensor, bonus: Tensor, plan: Plan, shard: Shard, config: StemConfig):
    """stem.choose.choose_topk for the rank's rows."""
    from stem.kernels.block_scores import score_blocks
    from stem.kernels.block_select import empty_lists, select_topk
    from stem.kernels.score_select import MAX_KV_BLOCKS, score_select

    p, rows, (budget, width) = plan.problem, plan.rows, plan.budget
    scale = routing_scale(p.head_dim, config, p.scale) / config.pooled_heads(p.q_heads, p.kv_heads)
    if rows.stop > MAX_KV_BLOCKS:
        here, q_blocks = _rank_rows(plan, shard)
        lists = empty_lists(*q_sums.shape[:3], width, q_sums.device)
        step = max(4, CHUNK_SCORES // (p.batch * p.q_heads * rows.stop) // 4 * 4)  # parts of q_blocks stay aligned
        for row in range(0, len(here), step):
            part = slice(row, row + step)
            options = dict(num_tile_rows=rows.stop - rows.first, q_blocks=q_blocks[part])
            scores = score_blocks(q_sums[:, :, part], k_sums, bonus, scale, **options)
            select_topk(scores, here, *config.always_kept, width, lists, row, q_blocks)
        return lists
    found = []
    for index, first, count in shard.runs:
        here = budget[first - rows.first :]  # down to the prompt's last row, from which the kernel counts
        sums = q_sums.new_zeros(*q_sums.shape[:2], len(here), *q_sums.shape[3:])
        sums[:, :, :count] = q_sums[:, :, index : index + count]
        lists = empty_lists(*sums.shape[:2], len(here), width, q_sums.device)
        lists = score_select(sums, k_sums, bonus, scale, here, *config.always_kept, lists)
        found.append(tuple(x[:, :, :count] for x in lists))
    return _joined(found or [_nothing(plan, q_sums)])


@lru_cache(maxsize=1024)
def _rank_rows(plan: Plan, shard: Shard) -> tuple[Tensor, Tensor]:
    """Budget and position of the rank's query blocks on the device, int32 [rows]."""
    q_blocks = shard.on(plan.problem.device)[0]
    with lasting_tensors():
        return plan.budget[0][q_blocks - plan.rows.first], q_blocks.int()


def _share(q_features: Tensor, k_features: Tensor, bonus: Tensor | None, plan: Plan, shard: Shard, config: StemConfig):
    """stem.choose.choose_share for the rank's rows."""
    from stem.kernels.share_select import pool_select

    p, size, found = plan.problem, config.block_size, []
    for index, first, count in shard.runs:
        pooled = config.pooled_heads(p.q_heads, p.kv_heads)
        cells = kernel_cells(p.kv_len - max(first * size, p.kv_len - p.q_len), p.kv_len, config, pooled)
        features = q_features[:, :, index * cells.query_cells : (index + count) * cells.query_cells].contiguous()
        rules = config.share_rules(cells.num_kv_blocks)
        lists = pool_select(features, None, bonus, cells, p.scale, *rules, 0, (features, k_features))
        found.append(tuple(x[:, :, :count] for x in lists))
    return _joined(found or [_nothing(plan, q_features)])


def _scores(q_features: Tensor, k_features: Tensor, bonus: Tensor | None, plan: Plan, shard: Shard, config: StemConfig):
    """stem.choose.choose_scores: scores of the whole prompt's shape, in which other ranks' rows mean nothing."""
    p, rows, softmax = plan.problem, plan.rows, config.reduction == "softmax"
    num_rows, cells = rows.stop - rows.first, (config.score_query_cells or config.score_cells) if softmax else 1
    mine = shard.on(q_features.device)[0] - rows.first
    q_rows = q_features.new_zeros(*q_features.shape[:2], num_rows, cells, *q_features.shape[3:])
    q_rows[:, :, mine] = q_features.unflatten(2, (-1, cells))
    q_rows = q_rows.flatten(2, 3)
    heads = config.pooled_heads(p.q_heads, p.kv_heads)
    scale = routing_scale(p.head_dim, config, p.scale)
    if plan.choose_impl == "triton":
        from stem.kernels.block_scores import score_blocks
        from stem.kernels.cell_scores import cell_scores as score_cells

        if softmax:
            whole = kernel_cells(p.q_len, p.kv_len, config, heads)
            scores = score_cells(q_rows, None, bonus, whole, p.scale, 0, (q_rows, k_features))
        else:
            scores = score_blocks(q_rows, k_features, bonus, scale / heads)
    elif softmax:
        scores = pair_features(q_rows, k_features, bonus, config, p.q_len, p.kv_len)
    else:
        scores = pair_sums(q_rows, k_features, bonus, scale)
    lengths = dict(q_len=p.q_len, kv_len=p.kv_len)
    selection = select_blocks(scores, rows.budget(p.config), config, impl=plan.choose_impl, **lengths)
    return selection.kv_indices[:, :, mine], selection.kv_num_blocks[:, :, mine]


def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Lists and counts of several runs of rows, side by side."""
    if len(parts) == 1:
        return parts[0]
    width = max(lists.shape[3] for lists, _ in parts)
    lists = [x if x.shape[3] == width else torch.nn.functional.pad(x, (0, width - x.shape[3])) for x, _ in parts]
    return torch.cat(lists, 2), torch.cat([counts for _, counts in parts], 2)


def _nothing(plan: Plan, x: Tensor) -> tuple[Tensor, Tensor]:
    empty = x.new_empty(x.shape[0], plan.problem.q_heads, 0, 1, dtype=torch.int32)
    return empty, empty[..., 0]


def _exact_rows(plan: Plan, config: StemConfig) -> int:
    """First of the query blocks that are scored by single tokens; the prompt's last block + 1 if none is."""
    if not config.exact_last_blocks:
        return plan.rows.stop
    half_full = blocks_at_least_half_full(plan.problem.kv_len, config.block_size)
    return max(plan.rows.first, half_full - config.exact_last_blocks)


def _keys_for_rows(k: Tensor, first: int, shard: Shard, peers: Peers) -> Tensor | None:
    """All keys, [B, Hkv, Nkv, D], on the ranks that have a query block from `first` on; None on the others."""
    owners, size = shard.layout.owners[:: shard.block_size], shard.block_size
    needed = np.zeros((peers.world_size, k.shape[0] * k.shape[1], len(owners)), dtype=bool)
    needed[np.unique(owners[first:])] = True
    fetch = Fetch(shard, peers, needed)
    found = fetch.start(k.detach())()[0].unflatten(2, (-1, size))
    if not needed[peers.rank].any():
        return None
    keys = k.new_empty(*k.shape[:2], len(owners), size, k.shape[3])
    others = np.flatnonzero(owners != peers.rank)
    keys[:, :, torch.from_numpy(others)] = found[:, :, torch.from_numpy(fetch.slots[0, others])]
    keys[:, :, torch.from_numpy(shard.blocks)] = pad_to_grid(k.detach(), size).unflatten(2, (-1, size))
    return keys.flatten(2, 3)[:, :, : shard.layout.num_tokens]


def _exact_lists(
    q: Tensor, keys: Tensor, bonus: Tensor | None, first: int, plan: Plan, shard: Shard, config: StemConfig
) -> tuple[Tensor, Tensor]:
    """Lists of the query blocks from `first` on, of which those of other ranks mean nothing."""
    p = plan.problem
    begin = max(first * config.block_size, p.kv_len - p.q_len)
    positions = torch.from_numpy(shard.layout.positions(shard.rank)).to(q.device)[-q.shape[2] :]
    last_q = q.new_zeros(*q.shape[:2], p.kv_len - begin, q.shape[3])
    late = positions >= begin
    last_q[:, :, positions[late] - begin] = q.detach()[:, :, late]
    if plan.choice == "share":
        from stem.kernels.share_select import pool_select

        cells = kernel_cells(last_q.shape[2], p.kv_len, config, config.pooled_heads(p.q_heads, p.kv_heads))
        rules = config.share_rules(cells.num_kv_blocks)
        return pool_select(last_q, keys, bonus, cells, p.scale, *rules, config.exact_last_blocks)
    scores = cell_scores(last_q, keys, bonus, config, p.scale, impl=plan.choose_impl)
    lengths = dict(q_len=last_q.shape[2], kv_len=p.kv_len)
    selection = select_blocks(scores, plan.rows.budget(p.config), config, impl=plan.choose_impl, **lengths)
    return selection.kv_indices, selection.kv_num_blocks

"""stem.stem_attention for prompts that several ranks share: choose, fetch, attend, merge."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from stem.attention import DEFAULT, block_sparse_attention
from stem.autocast import autocast_once
from stem.budget import BlockRows
from stem.config import StemConfig, check_config
from stem.distributed import shards
from stem.distributed.choose import choose_rows
from stem.distributed.exchange import Peers
from stem.distributed.layout import Layout
from stem.distributed.repeated import repeated
from stem.impl.attend import apply_sinks
from stem.planning import Plan, Problem
from stem.selection import BlockSelection
from stem.validation import check_finite, check_layouts, check_prompt_length, check_scale, compute_dtype

TIMEOUT = 120.0  # of each collective [s]
KEPT_OFTEN = 4  # times that a rank's lists keep a key block on average, from which all keys and values travel at once


class RowSelection(NamedTuple):
    """Kept key blocks of the query blocks that a rank attended from."""

    q_blocks: Tensor  # int64 [rows], query blocks of the prompt, ascending, on the CPU
    kv_indices: Tensor  # int32 [B, Hq, rows, max], key blocks of the prompt, ascending; 0 past the count
    kv_num_blocks: Tensor  # int32 [B, Hq, rows]
    head_kept: Tensor  # int64 [Hq], kept block pairs of each head on all ranks, on the CPU


@torch.compiler.disable
@autocast_once
def stem_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: StemConfig | None = None,
    *,
    mesh: DeviceMesh,
    layout: Layout | None = None,
    scale: float | None = None,
    sinks: Tensor | None = None,
    impl: str | None = None,
    return_selection: bool = False,
    return_lse: bool = False,
    prompt_length: int | None = None,
    timeout: float = TIMEOUT,
) -> Tensor | tuple:
    """stem.stem_attention of a prompt whose tokens are spread over the ranks of a mesh dimension; all ranks call it.

    Every rank chooses the blocks of its own query blocks from gathered summaries of all key blocks: the choice of one
    process, to the last bit. It fetches the keys and values of the blocks that its lists name, while it attends to the
    blocks that it has. If budgets let the lists name nearly all blocks, all keys and values travel while the blocks are
    chosen. Whole blocks move to other ranks first if a rank would compute 5 % more than the mean. Where dropped blocks
    stand in by means, every rank gets all keys and values.

    Args:
        q, k, v: [B, Hq, nq, D], [B, Hkv, nkv, D]: the tokens of this rank, in the layout's order. Or DTensors with
            Shard(2) in the mesh dimension, whose global order is that of the layout, rank after rank.
        config, scale, sinks, impl, prompt_length: As in stem.stem_attention, the same on every rank. The gradient of
            sinks is that of the rank's queries.
        mesh: One dimension, for example init_device_mesh("cuda", (2,)) or mesh["context"]. Other dimensions can share
            the heads.
        layout: Layout of the keys, default `Layout.zigzag(tokens, ranks, config.block_size)`, and `chunked()` for
            DTensors. Any layout works; `Layout.for_config` saves exchanges. Without one, the numbers of tokens are
            exchanged first, for which the host waits.
        return_selection, return_lse: Also return the RowSelection / the log-sum-exp, in this order.
        timeout: Of each collective [s]. With NCCL the host waits at the end of a call until everything has arrived,
            while the attention runs; should it hang elsewhere, the group's watchdog ends the process a minute later.
    Returns:
        [B, Hq, nq, D] like q, or a tuple; the log-sum-exp is sharded like q. Gradients flow once, as in stem_attention.
    Raises:
        PeerError: If another rank ends or does not answer; it names the rank.
        ValueError, TypeError: As stem.stem_attention, and for a mesh or layout that does not fit.
    """
    config = DEFAULT if config is None else config
    check_config(config)
    peers = Peers.of(mesh, timeout)
    wrap = None
    if isinstance(q, DTensor):
        wrap, (q, k, v), lengths = _local(mesh, q, k, v)
        layout = layout or Layout.zigzag(lengths[1], peers.world_size, config.block_size).chunked()
    elif layout is None:
        counts = torch.tensor([q.shape[2], k.shape[2]], device=q.device)
        counts = peers.to_host(peers.gather(counts, "the exchange of lengths")(), "the exchange of lengths").tolist()
        layout = Layout.zigzag(sum(count for _, count in counts), peers.world_size, config.block_size)
    if layout.world_size != peers.world_size:
        raise ValueError(f"layout must have the {peers.world_size} ranks of the mesh, got {layout.world_size} ranks")
    plan = plan_part(q, k, v, config, layout, peers.rank, scale, impl, prompt_length)
    call = _Call(plan, layout, peers)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    out, lse = _Differentiable.apply(q, k, v, call) if needs_grad else call.forward(q, k, v)
    peers.settle()
    selection = call.selection
    out, lse = apply_sinks(out, lse, sinks)
    if wrap:
        out, lse = wrap(out), wrap(lse)
    if not (return_selection or return_lse):
        return out
    return out, *((selection,) if return_selection else ()), *((lse,) if return_lse else ())


def plan_part(q, k, v, config, layout, rank, scale=None, impl=None, prompt_length=None) -> Plan:
    """Plan of the whole prompt; raises unless the tensors are a rank's part of one."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.ndim != 4:
            raise ValueError(f"{name} must be a tensor [batch, heads, tokens, head_dim], got {getattr(x, 'shape', x)}")
    tokens = layout.num_tokens_of(rank)
    if (q.shape[2], k.shape[2], v.shape[2]) != (*tokens, tokens[1]):
        raise ValueError(
            f"q, k and v must have the {tokens[0]}, {tokens[1]} and {tokens[1]} tokens that the layout gives rank "
            f"{rank}, got {q.shape[2]}, {k.shape[2]} and {v.shape[2]}"
        )
    kv_len, q_len = layout.num_tokens, layout.num_tokens - layout.start
    lengths = zip((q, k, v), (q_len, kv_len, kv_len), strict=True)
    check_layouts(*((torch.Size((*x.shape[:2], n, x.shape[3])), x.dtype, x.device) for x, n in lengths))
    check_prompt_length(prompt_length, kv_len)
    check_finite(q=q, k=k, v=v)
    sizes = q.shape[0], q.shape[1], k.shape[1], q_len, kv_len, q.shape[3]
    options = check_scale(scale, q.shape[3]), impl, prompt_length
    # needs_grad keeps out kernels that block_sparse_attention does not know
    return _cached_plan(Problem(*sizes, q.dtype, q.device, config, *options, needs_grad=True, is_plain=False))


_cached_plan = lru_cache(maxsize=1024)(Plan)


@lru_cache(maxsize=1024)
def _balanced(layout: Layout, rows: BlockRows, config: StemConfig) -> Layout:
    return layout.balanced(rows.kept_by_row(config), config.block_size)


@dataclass(eq=False)
class _Call:
    """One call on one rank; `forward` keeps what `backward` needs."""

    plan: Plan
    layout: Layout
    peers: Peers
    selection: RowSelection | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, needs_grad: bool = False) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of the rank's queries in the caller's layout."""
        size, peers = self.plan.problem.config.block_size, self.peers
        self.final = self.layout.aligned(size)
        if self.plan.kept_blocks is not None:
            self.final = _balanced(self.final, self.plan.rows, self.plan.problem.config)
        q, k, v = self._moved((q, k, v), self.layout, self.final)
        shard = shards.Shard.of(self.final, peers.rank, size)
        if not needs_grad and self._names_most():
            return self._returned(*self._at_once(q, k, v, shard))
        lists, counts = choose_rows(q, k, v, self.plan, shard, peers)()
        chosen = torch.from_numpy(shard.q_blocks), lists, counts
        if self.plan.kept_blocks is None:
            work, width = self._work(shard, lists, counts)
            lists = torch.nn.functional.pad(lists, (0, width - lists.shape[3]))
            before, self.final = self.final, self.final.balanced(work, size)
            rows = before.of_blocks(size), self.final.of_blocks(size)
            lists, counts = (peers.reshard(x, *rows, "the balance of lists") for x in (lists, counts))
            q, k, v = self._moved((q, k, v), before, self.final)
            shard = shards.Shard.of(self.final, peers.rank, size)
        needed, head_kept = self._needed(lists, counts)
        self.selection = RowSelection(*chosen, head_kept)
        self.fetch = shards.Fetch(shard, peers, needed | (self.plan.problem.config.dropped != "skip"))
        with torch.set_grad_enabled(needs_grad):
            self.leaves = [x.detach().requires_grad_(needs_grad) for x in (q, k, v)]
            attended = self._attended if self.plan.problem.config.dropped == "skip" else self._with_stand_ins
            out, lse = attended(*self.leaves, lists, counts, shard)
        if needs_grad:
            self.results = out, lse
        return self._returned(out.detach(), lse.detach())

    def _names_most(self) -> bool:
        """Whether known budgets let the lists of a rank keep each key block KEPT_OFTEN times on average."""
        p, kept = self.plan.problem, self.plan.kept_blocks
        if kept is None or self.plan.choice == "forced" or p.config.dropped != "skip":
            return False
        return kept * (p.q_heads // p.kv_heads) >= KEPT_OFTEN * self.plan.rows.stop * self.peers.world_size

    def _at_once(self, q: Tensor, k: Tensor, v: Tensor, shard: shards.Shard) -> tuple[Tensor, Tensor]:
        """Attention to all kept blocks in one go; all keys and values travel while the blocks are chosen."""
        p, start = self.plan.problem, shards.gather_all(k, v, shard, self.peers)
        choice = choose_rows(q, k, v, self.plan, shard, self.peers)
        finish = start()  # behind the summaries, which must not wait
        lists, counts = choice()
        results = attend_to_all(q, *finish(), lists, counts, self.plan, shard)
        head_kept = torch.full((p.q_heads,), p.batch * self.plan.kept_blocks, dtype=torch.int64)
        self.selection = RowSelection(torch.from_numpy(shard.q_blocks), lists, counts, head_kept)
        return results

    def backward(self, dout: Tensor, dlse: Tensor) -> tuple[Tensor, ...]:
        """Gradients of the rank's q, k and v."""
        layouts = self.layout.of_queries(), self.final.of_queries()
        gradients = [self.peers.reshard(x, *layouts, "the exchange of gradients") for x in (dout, dlse)]
        found = torch.autograd.grad(self.results, self.leaves, gradients, allow_unused=True)
        inputs = zip(self.leaves, found, strict=True)
        dq, dk, dv, *dfetched = (torch.zeros_like(x) if dx is None else dx for x, dx in inputs)
        if dfetched:
            others = self.fetch.back(*dfetched, self.leaves[1])
            dk, dv = ((dx + other).to(dx.dtype) for dx, other in zip((dk, dv), others, strict=True))
        results = self._moved((dq, dk, dv), self.final, self.layout)
        self.peers.settle()
        return results

    def _moved(self, qkv: tuple[Tensor, ...], source: Layout, target: Layout) -> tuple[Tensor, ...]:
        """q, k and v (or their gradients) in another layout."""
        q, kv = qkv[0], torch.cat(qkv[1:], 1) if source != target else None
        if kv is None:
            return qkv
        q = self.peers.reshard(q, source.of_queries(), target.of_queries(), "the balance of queries")
        kv = self.peers.reshard(kv, source, target, "the balance of keys and values")
        return q, *kv.chunk(2, 1)

    def _work(self, shard: shards.Shard, lists: Tensor, counts: Tensor) -> tuple[tuple[int, ...], int]:
        """Kept blocks of each query block of the prompt, all heads together, and the width of the widest lists."""
        what, rows = "the exchange of kept blocks", self.plan.rows
        sums = counts.new_zeros(rows.stop - rows.first + 1, dtype=torch.int64)
        sums[-1] = lists.shape[3]
        sums[torch.from_numpy(shard.q_blocks - rows.first).to(counts.device)] = counts.sum((0, 1))
        found = self.peers.to_host(self.peers.gather(sums, what)(), what).numpy()
        return tuple(found[:, :-1].sum(0).tolist()), int(found[:, -1].max())

    def _needed(self, lists: Tensor, counts: Tensor) -> tuple[np.ndarray, Tensor]:
        """Key blocks that the lists of each rank name, bool [world_size, B * Hkv, nk], and RowSelection.head_kept."""
        what, p, num_blocks = "the exchange of named blocks", self.plan.problem, self.plan.rows.stop
        unused = torch.arange(lists.shape[3], device=lists.device) >= counts[..., None]
        columns = lists.masked_fill(unused, num_blocks).flatten(2).long()
        named = columns.new_zeros(p.batch, p.q_heads, num_blocks + 1, dtype=torch.uint8).scatter_(2, columns, 1)
        named = named[..., :num_blocks].unflatten(1, (p.kv_heads, -1)).amax(2)
        kept = counts.sum((0, 2), dtype=torch.int64)
        found = self.peers.gather(torch.cat([named.flatten(), kept.view(torch.uint8)]), what)()
        found = self.peers.to_host(found, what)
        named, kept = found.split([named.numel(), kept.nbytes], 1)
        named = named.unflatten(1, (p.batch * p.kv_heads, num_blocks)).numpy().astype(bool)
        return named, kept.flatten().clone().view(torch.int64).view(self.peers.world_size, -1).sum(0)

    def _attended(
        self, q: Tensor, k: Tensor, v: Tensor, lists: Tensor, counts: Tensor, shard: shards.Shard
    ) -> tuple[Tensor, Tensor]:
        """Attention to the rank's own blocks while others travel, then to these, merged by their log-sum-exps."""
        p, fetch = self.plan.problem, self.fetch
        finish = None if fetch.is_empty else fetch.start(k.detach(), v.detach())
        table = torch.full((self.plan.rows.stop,), -1, device=q.device)
        table[torch.from_numpy(shard.blocks).to(q.device)] = torch.arange(len(shard.blocks), device=q.device)
        used, own = torch.arange(lists.shape[3], device=q.device) < counts[..., None], table[lists.long()]
        here = shard.selection(*_compact(own, used & (own >= 0)))
        out, lse = _attend(q, k, v, here, self.plan)
        if finish is None:
            return out, lse
        slots = torch.from_numpy(fetch.slots.copy()).to(q.device).unflatten(0, (p.batch, p.kv_heads))
        slots = slots.repeat_interleave(p.q_heads // p.kv_heads, 1)[:, :, None].expand(-1, -1, lists.shape[2], -1)
        there = _compact(slots.gather(3, lists.long()), used & (own < 0))
        fetched = finish().detach().requires_grad_(q.requires_grad)
        self.leaves.append(fetched)
        rest = shard.selection(*there, fetch.num_slots)
        far, far_lse = _attend(q, *fetched[:, :, :, : rest.kv_len], rest, self.plan)
        total = torch.logaddexp(lse, far_lse)
        parts = ((out, lse), (far, far_lse))
        merged = sum(x.to(total.dtype) * (part - total).exp()[..., None] for x, part in parts)
        return merged.to(q.dtype), total

    def _with_stand_ins(
        self, q: Tensor, k: Tensor, v: Tensor, lists: Tensor, counts: Tensor, shard: shards.Shard
    ) -> tuple[Tensor, Tensor]:
        """Attention to kept blocks and means of the others: to the whole prompt's keys, as chunks of it."""
        fetched = self.fetch.start(k.detach(), v.detach())().detach().requires_grad_(q.requires_grad)
        self.leaves.append(fetched)
        parts = []
        for part, selection in shard.chunks(lists, counts, self.plan.problem.config.dropped):
            keys, values = fetched[:, :, :, : selection.kv_len]
            parts.append(_attend(q[:, :, part], keys, values, selection, self.plan))
        return tuple(torch.cat(x, 2) for x in zip(*parts, strict=True)) if parts else _attend(q, k, v, None, self.plan)

    def _returned(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        layouts = self.final.of_queries(), self.layout.of_queries()
        return tuple(self.peers.reshard(x, *layouts, "the return of outputs") for x in (out, lse))


class _Differentiable(torch.autograd.Function):
    """A call with gradients; its collectives run in the same order on every rank."""

    @staticmethod
    def forward(ctx, q, k, v, call):
        ctx.call = call
        return call.forward(q, k, v, needs_grad=True)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        return *ctx.call.backward(dout, dlse), None


def attend_to_all(
    q: Tensor, keys: Tensor, values: Tensor, lists: Tensor, counts: Tensor, plan: Plan, shard: shards.Shard
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of a rank's queries, from what `gather_all` gathers, without gradients."""
    out = torch.empty_like(q)
    if plan.impl == "hopper" and q.shape[2]:  # reads keys and values where they are
        from stem.kernels.hopper_forward import prepare

        keys, values = (shards.as_pages(x) for x in (keys, values))

        def attend() -> tuple[Tensor]:
            pages = shard.pages(q.shape[0] * keys.shape[1], q.device)
            options = dict(pages=pages, num_keys=shard.end, out=out)
            return prepare(q, keys, values, plan.problem.scale, **options)(lists, counts)[1:]

        return out, *repeated(attend, q, keys, values, out, lists, counts, of=("attention", plan, shard))
    lse = q.new_empty(q.shape[:3], dtype=compute_dtype(q.dtype))
    keys, values = (shard.in_order(x) for x in (keys, values))
    for part, selection in shard.chunks(lists, counts, "skip"):
        seen = (x[:, :, : selection.kv_len] for x in (keys, values))
        out[:, :, part], lse[:, :, part] = _attend(q[:, :, part], *seen, selection, plan)
    return out, lse


def _attend(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection | None, plan: Plan) -> tuple[Tensor, Tensor]:
    if not q.shape[2]:
        return q * 1, q.sum(-1).to(compute_dtype(q.dtype))
    return block_sparse_attention(q, k, v, selection, plan.problem.scale, plan.impl, return_lse=True)


def _compact(values: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Entries to keep of lists [..., width], at the front and in their order, and their counts; int32."""
    width = values.shape[-1]
    places = (keep.cumsum(-1) - 1).masked_fill(~keep, width)
    lists = values.new_zeros(*values.shape[:-1], width + 1).scatter_(-1, places, values)[..., :width]
    return lists.int().contiguous(), keep.sum(-1, dtype=torch.int32)


def _local(mesh: DeviceMesh, *tensors: Tensor):
    """A function that gives results the placements of q, the local tensors, and the tokens of q and of k."""
    for name, x in zip("qkv", tensors, strict=True):
        dims = [i for i, placement in enumerate(getattr(x, "placements", ())) if placement == Shard(2)]
        if len(dims) != 1 or x.device_mesh.size(dims[0]) != mesh.size():
            raise ValueError(f"{name} must be a DTensor with Shard(2) in the mesh dimension, as q is, got {type(x)}")
    q = tensors[0]

    def wrap(x: Tensor) -> DTensor:
        shape = q.shape[: x.ndim]
        strides = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(x, q.device_mesh, q.placements, run_check=False, shape=shape, stride=strides)

    return wrap, [x.to_local() for x in tensors], [x.shape[2] for x in tensors[:2]]

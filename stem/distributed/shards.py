"""One rank's part of a prompt as a prompt of its own, and the key blocks that it fetches from other ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from stem.cells import pad_to_grid
from stem.distributed.exchange import Peers
from stem.distributed.landing import Landings
from stem.distributed.layout import Layout, slots_of
from stem.selection import BlockSelection
from stem.transforms import lasting_tensors
from stem.validation import compute_dtype

FETCH = "the exchange of keys and values"
GATHER_SHARE = 0.5  # of the key blocks of other ranks; where more are named, all travel, without being packed


@dataclass(frozen=True)
class Shard:
    """Blocks of a rank in a layout of whole blocks; side by side, they are a prompt whose last tokens are its queries.

    Causality among them is that of the whole prompt, because they ascend. Only the prompt's last block can be ragged.
    """

    layout: Layout
    rank: int
    block_size: int

    @classmethod
    @lru_cache(maxsize=1024)
    def of(cls, layout: Layout, rank: int, block_size: int) -> Shard:
        return cls(layout, rank, block_size)

    @property
    def blocks(self) -> np.ndarray:
        """Key blocks of the rank, ascending."""
        return self.all_blocks[self.rank]

    @cached_property
    def all_blocks(self) -> list[np.ndarray]:
        """Key blocks of every rank."""
        owners = self.layout.owners[:: self.block_size]
        return [np.flatnonzero(owners == rank) for rank in range(self.layout.world_size)]

    @cached_property
    def q_blocks(self) -> np.ndarray:
        """Query blocks of the rank, the last of its key blocks."""
        return self.blocks[self.blocks >= self.layout.start // self.block_size]

    @cached_property
    def slots(self) -> tuple[np.ndarray, int]:
        """Slot of each key block of the prompt where every rank has equally many, and that number."""
        return slots_of(self.all_blocks)

    @lru_cache(maxsize=1024)  # noqa: B019  a copy to the device waits for the work before it
    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """q_blocks and slots on a device."""
        with lasting_tensors():
            return torch.from_numpy(self.q_blocks).to(device), torch.from_numpy(self.slots[0]).to(device)

    @lru_cache(maxsize=1024)  # noqa: B019
    def pages(self, heads: int, device: torch.device) -> Tensor:
        """Place of each key block in `as_pages`, int32 [nk], where B * Hkv is `heads`."""
        slots, width = self.slots
        with lasting_tensors():
            return torch.from_numpy((slots // width * heads * width + slots % width).astype(np.int32)).to(device)

    def in_order(self, gathered: Tensor) -> Tensor:
        """Keys or values of `gather_all` in the prompt's order, [B, Hkv, Nkv, D]."""
        blocks = gathered.movedim(0, 2).unflatten(3, (self.slots[1], self.block_size)).flatten(2, 3)
        blocks = blocks.index_select(2, self.on(gathered.device)[1])
        return blocks.flatten(2, 3)[:, :, : self.layout.num_tokens]

    def chunks(self, lists: Tensor, counts: Tensor, dropped: str) -> list[tuple[slice, BlockSelection]]:
        """The rank's queries as chunks of the prompt that end with them: places, and their lists as a selection."""
        found, done = [], 0
        for row, first, count in self.runs:
            stop = min((first + count) * self.block_size, self.layout.num_tokens)
            part = slice(done, done := done + stop - max(first * self.block_size, self.layout.start))
            chosen = (x[:, :, row : row + count] for x in (lists, counts))
            sizes = self.block_size, first + count, part.stop - part.start, stop
            found.append((part, BlockSelection(*chosen, *sizes, dropped)))
        return found

    @cached_property
    def num_keys(self) -> int:
        return len(self.layout.positions(self.rank))

    @cached_property
    def num_queries(self) -> int:
        return int((self.layout.positions(self.rank) >= self.layout.start).sum())

    @cached_property
    def end(self) -> int:
        """Position behind the rank's queries if their blocks were the first of the prompt."""
        inside = self.layout.start if self.layout.start // self.block_size in self.q_blocks[:1] else 0
        return self.num_queries + inside % self.block_size

    @cached_property
    def runs(self) -> list[tuple[int, int, int]]:
        """Consecutive query blocks: index of the first in q_blocks, the first query block, and the count."""
        starts = np.flatnonzero(np.diff(self.q_blocks, prepend=-2) != 1)
        stops = [*starts[1:], len(self.q_blocks)][: len(starts)]
        return [(int(i), int(self.q_blocks[i]), int(j - i)) for i, j in zip(starts, stops, strict=True)]

    def selection(self, kv_indices: Tensor, kv_num_blocks: Tensor, fetched: int | None = None) -> BlockSelection:
        """Lists of the rank's rows as a selection of its own blocks, or of `fetched` blocks in front of its rows."""
        before = len(self.blocks) - len(self.q_blocks) if fetched is None else fetched
        keys = self.num_keys - (len(self.blocks) - len(self.q_blocks) - before) * self.block_size
        num_kv_blocks = before + len(self.q_blocks)
        return BlockSelection(kv_indices, kv_num_blocks, self.block_size, num_kv_blocks, self.num_queries, keys)


def gather_all(k: Tensor, v: Tensor, shard: Shard, peers: Peers) -> Callable[[], Callable[[], list[Tensor]]]:
    """Prepare to gather all keys and values; the result starts, and its result waits and gives both.

    They are [world_size, B, Hkv, rows, D]: every rank has `shard.slots[1]` blocks of rows, with zeros behind its own.
    Copy engines carry them where they can, see `Landings`, and the next call but one overwrites them.
    """
    missing = shard.slots[1] * shard.block_size - k.shape[2]
    tensors = [pad(x.detach(), (0, 0, 0, missing)) if missing else x.detach() for x in (k, v)]
    return Landings.of(peers).gather(tensors, FETCH) or partial(peers.gather_together, tensors, FETCH)


def as_pages(gathered: Tensor) -> Tensor:
    """Keys or values of `gather_all` as kernels read pages: [B, Hkv, rows, D], without a copy; see Shard.pages.

    The rows of a head go on into those of other heads, up to where the next rank's begin, and so on.
    """
    world, batch, heads, rows, dim = gathered.shape
    return gathered.as_strided((batch, heads, (world - 1) * batch * heads * rows + rows, dim), gathered.stride()[1:])


class Fetch:
    """Key and value blocks that lists of all ranks name, on their way from their owners; gradients go the way back."""

    def __init__(self, shard: Shard, peers: Peers, needed: np.ndarray) -> None:
        """`needed`: bool [world_size, B * Hkv, nk], the blocks that each rank names; the same on every rank."""
        owners = shard.layout.owners[:: shard.block_size]
        self.shard, self.peers = shard, peers
        remote = needed & (owners != np.arange(peers.world_size)[:, None])[:, None]
        heads, num_blocks = needed.shape[1:]
        self.is_empty = not remote.any()
        self.gathers_all = needed.all() or remote.sum() > GATHER_SHARE * heads * num_blocks * (peers.world_size - 1)
        mine = remote[peers.rank]
        self.slots = np.broadcast_to(np.arange(num_blocks), mine.shape) if self.gathers_all else mine.cumsum(1) - 1
        self.num_slots = num_blocks if self.gathers_all else int(mine.sum(1).max(initial=0))
        sent, places = [], []
        for rank in range(peers.world_size):
            head, block = remote[rank][:, shard.blocks].nonzero()
            sent.append(head * len(shard.blocks) + block)
            head, block = (mine & (owners == rank)).nonzero()
            places.append(np.stack([head, self.slots[head, block]]))
        self.send_counts, self.receive_counts = [len(x) for x in sent], [x.shape[1] for x in places]
        self.sent, self.places = torch.from_numpy(np.concatenate(sent)), torch.from_numpy(np.concatenate(places, 1))

    def start(self, *tensors: Tensor) -> Callable[[], Tensor]:
        """Begin to fetch blocks of k and v (or of k); the result waits and gives [2, B, Hkv, slots and rows, D].

        The rows are zeros behind the slots, as many as the rank's own queries: every slot is in the past of these.
        """
        k, size = tensors[0], self.shard.block_size
        heads = k.shape[0] * k.shape[1]
        rows = torch.stack([_blocks(x, size) for x in tensors], 1)  # [B * Hkv * blocks, 2, size, D]
        if self.gathers_all:
            blocks = rows.unflatten(0, (heads, -1)).movedim(1, 0)
            finish = self.peers.collect(blocks, self.shard.slots[1], self.shard.on(k.device)[1], FETCH)
        else:
            finish = self.peers.exchange(rows[self.sent.to(k.device)], self.send_counts, self.receive_counts, FETCH)
        fetched = k.new_zeros(len(tensors), heads, self.num_slots + len(self.shard.q_blocks), size, k.shape[3])

        def result() -> Tensor:
            if self.gathers_all:
                fetched[:, :, : self.num_slots] = finish().movedim((2, 0), (0, 2))
            else:
                fetched[:, *self.places.to(k.device)] = finish().movedim(1, 0)
            return fetched.unflatten(1, k.shape[:2]).flatten(3, 4)

        return result

    def back(self, gradients: Tensor, k: Tensor) -> Tensor:
        """Gradients of the rank's own tokens, fp32 or fp64, from those of all ranks' results of `start`."""
        size, heads = self.shard.block_size, k.shape[0] * k.shape[1]
        blocks = gradients.flatten(1, 2).unflatten(2, (-1, size))
        rows = blocks[:, *self.places.to(k.device)].movedim(0, 1)
        found = self.peers.exchange(rows, self.receive_counts, self.send_counts, "the exchange of gradients")()
        total = found.new_zeros(heads * len(self.shard.blocks), *rows.shape[1:], dtype=compute_dtype(k.dtype))
        total.index_add_(0, self.sent.to(k.device), found.to(total.dtype))
        if self.gathers_all:  # the rank's own blocks, too, which count where it attends to them here
            total += blocks[:, :, torch.from_numpy(self.shard.blocks)].flatten(1, 2).movedim(0, 1)
        return total.movedim(1, 0).unflatten(1, (*k.shape[:2], -1)).flatten(3, 4)[:, :, :, : k.shape[2]]


def _blocks(x: Tensor, size: int) -> Tensor:
    """Blocks of x [B, H, N, D], padded with zeros: [B * H * blocks, size, D]."""
    return pad_to_grid(x, size).unflatten(2, (-1, size)).flatten(0, 2)

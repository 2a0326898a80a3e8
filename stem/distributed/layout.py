"""Layout: the token ranges of a prompt that each rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stem.budget import BlockRows, kept_blocks
from stem.config import StemConfig
from stem.validation import check_integer

IMBALANCE = 1.05  # largest over mean work of a rank, above which blocks move to other ranks; our choice
MOST_GROUPS, GROUP_BLOCKS = 16, 64  # most groups of a long prompt, and fewest blocks of one; our choice


@dataclass(frozen=True)
class Layout:
    """Token ranges of each rank, in the order in which the rank stores them.

    A layout is a load balancer for torch.distributed.tensor.experimental, too: `_context_parallel_shard` and
    `context_parallel_unshard` call its `_generate_indices`. Their shards have the layout `chunked()`.

    Attributes:
        pieces: Ranges (start, stop) of positions for each rank; every position belongs to one rank.
        start: Position of the first query; all later positions are queries too.
    """

    pieces: tuple[tuple[tuple[int, int], ...], ...]
    start: int = 0

    def __post_init__(self) -> None:
        ends = sorted(piece for pieces in self.pieces for piece in pieces)
        if not ends or [first for first, _ in ends] != [0, *(stop for _, stop in ends[:-1])]:
            raise ValueError(f"pieces must cover the positions from 0 on, each once, got {self.pieces}")
        if not 0 <= self.start < ends[-1][1]:
            raise ValueError(f"start must be a position of the prompt, in 0..{ends[-1][1] - 1}, got {self.start}")

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.pieces, self.start))  # once: a layout is part of many keys

    @classmethod
    def zigzag(cls, num_tokens: int, world_size: int, block_size: int = 128) -> Layout:
        """Two pieces of whole blocks for each rank, one early and one late, so that causal work is even.

        These are the shards of torch's `context_parallel` where num_tokens is a multiple of 2 * world_size * block_size
        (block_size=1 gives them for every length that it takes). With few blocks, a rank can be empty.
        """
        check_integer("world_size", world_size, 1)
        check_integer("num_tokens", num_tokens, 1)
        check_integer("block_size", block_size, 1)
        return cls(_zigzag(0, num_tokens, world_size, block_size))

    @classmethod
    def for_config(cls, config: StemConfig, num_tokens: int, world_size: int) -> Layout:
        """Whole blocks, for each rank equally many (but for one) and about the same work of a config.

        No block moves before the attention then. Long prompts are shared group by group, so that early and late rows,
        whose blocks take different times, are spread evenly, too. With `allocation="adaptive"` the data decide how many
        blocks a row keeps, and this is the zigzag.
        """
        zigzag = cls.zigzag(num_tokens, world_size, config.block_size)
        rows, size = BlockRows.of(num_tokens, num_tokens, config.block_size), config.block_size
        if kept_blocks(rows, config) is None:
            return zigzag
        work = rows.kept_by_row(config)
        groups = min(MOST_GROUPS, max(1, len(work) // GROUP_BLOCKS))
        of_group = -(-len(work) // (groups * world_size)) * world_size  # blocks, a multiple of the ranks
        parts = np.split(np.array(work), range(of_group, len(work), of_group))
        owners = np.concatenate([_even_owners(part, world_size) for part in parts])
        return of_owners(np.repeat(owners, size)[:num_tokens], world_size).balanced(work, size)

    def extended(self, num_tokens: int, block_size: int = 128) -> Layout:
        """Layout after the next chunk of num_tokens queries: each rank keeps its tokens and gets two more pieces."""
        check_integer("num_tokens", num_tokens, 1)
        chunk = _zigzag(self.num_tokens, self.num_tokens + num_tokens, self.world_size, block_size)
        pieces = (_ranges(_positions(a + b)) for a, b in zip(self.pieces, chunk, strict=True))
        return Layout(tuple(pieces), self.num_tokens)

    def chunked(self) -> Layout:
        """Layout of a DTensor whose global order is this one's, rank after rank: shards of torch.chunk's sizes."""
        order = np.concatenate([self.positions(rank) for rank in range(self.world_size)])
        size = -(-self.num_tokens // self.world_size)
        return Layout(tuple(_ranges(order[rank * size :][:size]) for rank in range(self.world_size)), self.start)

    @property
    def world_size(self) -> int:
        return len(self.pieces)

    @cached_property
    def num_tokens(self) -> int:
        """Keys of all ranks."""
        return max(stop for pieces in self.pieces for _, stop in pieces)

    def positions(self, rank: int) -> np.ndarray:
        """Positions of a rank's tokens in the order in which it stores them, int64 [n]."""
        return _positions(self.pieces[rank])

    @lru_cache(maxsize=1024)  # noqa: B019
    def num_tokens_of(self, rank: int) -> tuple[int, int]:
        """Queries and keys of a rank."""
        positions = self.positions(rank)
        return int((positions >= self.start).sum()), len(positions)

    def shard(self, x: Tensor, rank: int, dim: int = 2) -> Tensor:
        """Tokens of a rank from the tensor of the whole prompt, or of its queries, along a dimension."""
        positions = self.positions(rank)
        if x.shape[dim] == self.num_tokens - self.start < self.num_tokens:
            positions = positions[positions >= self.start] - self.start
        elif x.shape[dim] != self.num_tokens:
            raise ValueError(f"x must have {self.num_tokens} tokens in dimension {dim}, got {x.shape[dim]}")
        return x.index_select(dim, torch.from_numpy(positions).to(x.device))

    def _generate_indices(self, restore: bool = False) -> Tensor:
        order = np.concatenate([self.positions(rank) for rank in range(self.world_size)])
        return torch.from_numpy(order.argsort() if restore else order)[None]

    @cached_property
    def owners(self) -> np.ndarray:
        """Rank of each position, int64 [N]."""
        owners = np.empty(self.num_tokens, dtype=np.int64)
        for rank in range(self.world_size):
            owners[self.positions(rank)] = rank
        return owners

    def of_queries(self) -> Layout:
        """Layout of the queries alone, whose positions count from `start`."""
        if not self.start:
            return self
        pieces = (self.positions(rank) - self.start for rank in range(self.world_size))
        return Layout(tuple(_ranges(x[x >= 0]) for x in pieces))

    def of_blocks(self, block_size: int) -> Layout:
        """Layout of the query blocks of a layout of whole blocks, counted from the one that holds `start`."""
        first = self.start // block_size
        return of_owners(self.owners[::block_size][first:], self.world_size)

    @lru_cache(maxsize=1024)  # noqa: B019  layouts are few
    def aligned(self, block_size: int) -> Layout:
        """Nearest layout of whole blocks in ascending order; a block stays with its first token."""
        owners = self.owners[::block_size].repeat(block_size)[: self.num_tokens]
        return of_owners(owners, self.world_size, self.start)

    @lru_cache(maxsize=1024)  # noqa: B019
    def balanced(self, work: tuple[int, ...], block_size: int, imbalance: float | None = None) -> Layout:
        """A layout of whole blocks in which ranks have about the same work; self if no rank has 5 % above the mean.

        Args:
            work: Kept key blocks of each query block, all heads together; the queries begin at `start`.
            imbalance: Largest over mean work up to which self is returned, default IMBALANCE.
        """
        owners, first = self.owners[::block_size].tolist(), self.start // block_size
        loads = np.bincount(owners[first:], work, self.world_size).tolist()
        mean = sum(loads) / len(loads)
        if max(loads) <= (imbalance or IMBALANCE) * mean:
            return self
        for row in reversed(range(len(work))):
            giver, taker = owners[first + row], loads.index(min(loads))
            if loads[giver] > mean and loads[taker] + work[row] < loads[giver]:
                owners[first + row] = taker
                loads[giver], loads[taker] = loads[giver] - work[row], loads[taker] + work[row]
        return of_owners(np.repeat(owners, block_size)[: self.num_tokens], self.world_size, self.start)


def _even_owners(work: np.ndarray, world_size: int) -> np.ndarray:
    """Rank of each block, int64 [n], so that all ranks have equally many (but for one) and about the same work.

    One rank after the other takes consecutive blocks of those that are left, the first of which follows the last, whose
    work is nearest to an even share. One choice comes near: the mean over all of them is an even share, and from one to
    the next the work changes little.
    """
    owners, left = np.empty(len(work), dtype=np.int64), np.arange(len(work))
    for rank in range(world_size):
        count = len(left) // (world_size - rank)
        sums = np.r_[0, work[np.r_[left, left[:count]]]].cumsum()
        loads = sums[count:][: len(left)] - sums[: len(left)]
        first = abs(loads - work[left].sum() / (world_size - rank)).argmin() if len(left) else 0
        taken = np.arange(first, first + count) % max(1, len(left))
        owners[left[taken]] = rank
        left = np.delete(left, taken)
    return owners


def of_owners(owners: np.ndarray, world_size: int, start: int = 0) -> Layout:
    """Layout in ascending order from the rank of each position."""
    return Layout(tuple(_ranges(np.flatnonzero(owners == rank)) for rank in range(world_size)), start)


def slots_of(places: Sequence[np.ndarray]) -> tuple[np.ndarray, int]:
    """Slot of each place where every rank has as many as the largest, rank after rank, and that number.

    `places` are those of each rank, together 0 .. n - 1; the slots are int64 [n].
    """
    width, slots = max(map(len, places)), np.empty(sum(map(len, places)), dtype=np.int64)
    for rank, mine in enumerate(places):
        slots[mine] = rank * width + np.arange(len(mine))
    return slots, width


class Moves(NamedTuple):
    """Tokens of a rank that change their place between two layouts: indices of its tokens before and after."""

    stay: tuple[np.ndarray, np.ndarray]  # indices before and after
    sent: np.ndarray  # in the order of the receivers
    send_counts: list[int]  # tokens for each rank
    received: np.ndarray  # in the order of the senders
    receive_counts: list[int]


@lru_cache(maxsize=1024)
def moves(source: Layout, target: Layout, rank: int) -> Moves:
    """Moves of a rank's tokens from one layout to another."""

    def by_peer(mine: Layout, other: Layout) -> list[np.ndarray]:
        positions = mine.positions(rank)
        order, peers = positions.argsort(kind="stable"), other.owners[positions]
        return [order[peers[order] == peer] for peer in range(mine.world_size)]

    sent, received = by_peer(source, target), by_peer(target, source)
    stay, nothing = (sent[rank], received[rank]), np.arange(0)
    sent[rank] = received[rank] = nothing
    parts = (([len(part) for part in parts], np.concatenate(parts)) for parts in (sent, received))
    (send_counts, sent), (receive_counts, received) = parts
    return Moves(stay, sent, send_counts, received, receive_counts)


def _zigzag(first: int, stop: int, world_size: int, block_size: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Ranges of each rank for positions first .. stop - 1, cut at multiples of block_size."""
    begin, end, halves = first // block_size, -(-stop // block_size), 2 * world_size
    edges = [min(max(first, (begin + (end - begin) * i // halves) * block_size), stop) for i in range(halves + 1)]
    pairs = list(zip(edges[:-1], edges[1:], strict=True))
    return tuple(_ranges(np.r_[slice(*pairs[rank]), slice(*pairs[-1 - rank])]) for rank in range(world_size))


def _positions(ranges: Sequence[tuple[int, int]]) -> np.ndarray:
    return np.concatenate([np.arange(0), *(np.arange(*one) for one in ranges)])


def _ranges(positions: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Runs of consecutive positions as ranges (start, stop)."""
    runs = np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1)
    return tuple((int(run[0]), int(run[-1]) + 1) for run in runs if len(run))

"""Collectives of the ranks that share a prompt: each has a time-out, and an error names the rank that is missing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import AllgatherOptions

from stem.distributed.layout import Layout, moves

PATIENCE = 5.0  # seconds in which the other ranks must notice a failure, too; those that do not are named
GRACE = 60.0  # seconds after a time-out in which the host can name a rank, before NCCL's watchdog ends the process
CHANNELS = 32  # of NCCL, each a program on the GPU: faster for keys and values than its own choice
_PEERS: dict[tuple[dist.ProcessGroup, float], Peers] = {}


class PeerError(RuntimeError):
    """A rank ended, raised an error or was busy for longer than the time-out; `ranks` are the missing global ranks."""

    def __init__(self, message: str, ranks: list[int]) -> None:
        super().__init__(message)
        self.ranks = ranks


class Peers:
    """The ranks of a mesh dimension.

    Attributes:
        rank, world_size: Of this process in the mesh dimension.
        received: Bytes that came from other ranks so far.
    """

    def __init__(self, mesh: DeviceMesh, timeout: float) -> None:
        self.rank, self.world_size, self.timeout = mesh.get_local_rank(), mesh.size(), timeout
        self.device_type = mesh.device_type
        self.ranks = dist.get_process_group_ranks(mesh.get_group())
        self.received, self.name = 0, f"stem-{mesh.get_group().group_name}"
        with self._named("the first call"):
            limit, backend, options = timedelta(seconds=timeout), dist.get_backend(mesh.get_group()), None
            if backend == "gloo":  # whose connections tell at once if a rank has ended
                dist.barrier(mesh.get_group(), async_op=True).wait(limit)
            else:
                limit += timedelta(seconds=GRACE)
            if backend == "nccl":
                options = dist.ProcessGroupNCCL.Options()
                options._timeout = limit  # as new_group sets it, which warns of another one
                options.config.min_ctas = options.config.max_ctas = CHANNELS
            self.group = dist.new_group(self.ranks, timeout=limit, use_local_synchronization=True, pg_options=options)
        self.arrived, self.last = torch.cuda.Event() if self.device_type == "cuda" else None, ""

    @classmethod
    def of(cls, mesh: DeviceMesh, timeout: float) -> Peers:
        """Peers of a one-dimensional mesh, made once; raises unless it is one and timeout is a positive number."""
        if not isinstance(mesh, DeviceMesh) or mesh.ndim != 1:
            raise TypeError(f"mesh must be a DeviceMesh of one dimension, for example mesh['context'], got {mesh!r}")
        if not timeout > 0:
            raise ValueError(f"timeout must be positive [s], got {timeout!r}")
        key = mesh.get_group(), float(timeout)
        if key not in _PEERS:
            _PEERS[key] = cls(mesh, float(timeout))
        return _PEERS[key]

    def gather(self, x: Tensor, what: str) -> Callable[[], Tensor]:
        """Start to gather tensors of one shape; the result waits and gives them, [world_size, *x.shape]."""
        finish = self.gather_together([x], what)
        return lambda: finish()[0]

    def gather_together(self, tensors: list[Tensor], what: str) -> Callable[[], list[Tensor]]:
        """Start to gather several tensors as `gather` does, in one launch with NCCL."""
        out, tensors = [x.new_empty(self.world_size, *x.shape) for x in tensors], [x.contiguous() for x in tensors]
        self.received += sum(x.nbytes for x in tensors) * (self.world_size - 1)

        def start() -> list[dist.Work]:
            if tensors[0].is_cuda:  # without the Python of torch.distributed, which takes longer than the launch
                options = AllgatherOptions()
                options.asyncOp = True
                return [self.group.allgather_into_tensor_coalesced(out, tensors, options)]
            gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # before torch 2.13
            pairs = zip(map(_bytes, out), map(_bytes, tensors), strict=True)  # gloo does not know all dtypes
            return [gather(*pair, group=self.group, async_op=True) for pair in pairs]

        return self._started(start, out, what)

    def collect(self, rows: Tensor, width: int, slots: Tensor, what: str) -> Callable[[], Tensor]:
        """Start to gather rows [n, ...], n <= width; the result waits and gives rows `slots` of all, rank after rank.

        Slots count `width` rows for each rank.
        """
        if len(rows) < width:
            rows = torch.cat([rows, rows.new_zeros(width - len(rows), *rows.shape[1:])])
        finish = self.gather(rows, what)
        return lambda: finish().flatten(0, 1)[slots]

    def exchange(
        self, rows: Tensor, send_counts: list[int], receive_counts: list[int], what: str
    ) -> Callable[[], Tensor]:
        """Start to send rows [n, ...], ordered by receiver; the result waits and gives those received, by sender."""
        rows = rows.contiguous()
        out = rows.new_empty(sum(receive_counts), *rows.shape[1:])
        size = rows[:1].nbytes if len(rows) else out[:1].nbytes
        splits = ([count * size for count in counts] for counts in (receive_counts, send_counts))
        tensors = _bytes(out), _bytes(rows)
        self.received += out.nbytes
        start = lambda: [dist.all_to_all_single(*tensors, *splits, group=self.group, async_op=True)]  # noqa: E731
        return self._started(start, out, what)

    def reshard(self, x: Tensor, source: Layout, target: Layout, what: str) -> Tensor:
        """Move tokens (dimension 2 of x) from one layout to another; x itself if no rank has a token to move."""
        if source == target:
            return x
        move = moves(source, target, self.rank)
        stay, place, sent, received = (
            torch.from_numpy(index).to(x.device) for index in (*move.stay, move.sent, move.received)
        )
        rows = x.movedim(2, 0)
        out = rows.new_empty(len(place) + len(received), *rows.shape[1:])
        finish = self.exchange(rows[sent], move.send_counts, move.receive_counts, what)
        out[place] = rows[stay]
        out[received] = finish()
        return out.movedim(0, 2).contiguous()

    def to_host(self, x: Tensor, what: str) -> Tensor:
        """Copy to the CPU, with the time-out for the collectives that x depends on."""
        if not x.is_cuda:
            return x
        copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        self._until(done.query, what)
        return copy

    def settle(self) -> None:
        """Wait on the host until the collectives so far have ended, with the time-out; those of gloo have."""
        if self.last and not torch.cuda.is_current_stream_capturing():
            self._until(self.arrived.query, self.last)

    def _until(self, is_done: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + self.timeout
        with self._named(what):
            while not is_done():
                if time.monotonic() > deadline:
                    raise RuntimeError("time-out")

    def _started(self, start: Callable[[], list[dist.Work]], out: Any, what: str) -> Callable[[], Any]:
        """Start a collective; the result waits for it and gives `out`. With gloo the host waits, up to the time-out.

        With NCCL the stream waits. Then to_host and settle have the time-out, and later the group's watchdog.
        """
        with self._named(what):
            works = start()

        def finish() -> Any:
            with self._named(what):
                for work in works:
                    work.wait(*(() if self.arrived else (timedelta(seconds=self.timeout),)))
                if self.arrived:
                    self.arrived.record()
                    self.last = what
            return out

        return finish

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """Turn the failure of a collective into a PeerError that names the ranks that did not notice it, too."""
        try:
            yield
        except RuntimeError as error:
            missing = self._missing()
            who = f"rank {', '.join(map(str, missing))}" if missing else "a rank"
            raise PeerError(
                f"{who} did not take part in {what}: it ended, raised an error, or was busy for {self.timeout:g} s "
                f"(seen by rank {self.ranks[self.rank]}; {error})",
                missing,
            ) from error

    def _missing(self) -> list[int]:
        """Global ranks that do not say within PATIENCE that they are waiting, too."""
        keys, missing = {rank: f"{self.name}/waiting/{rank}" for rank in self.ranks}, [0]
        try:
            store = dist.distributed_c10d._get_default_store()
            store.set(keys[self.ranks[self.rank]], "1")
            deadline = time.monotonic() + PATIENCE
            while (missing := [r for r in keys if not store.check([keys[r]])]) and time.monotonic() < deadline:
                time.sleep(0.05)
        except RuntimeError:  # the process that holds the store has ended: rank 0, unless a launcher holds it
            pass
        return missing


def _bytes(x: Tensor) -> Tensor:
    """Memory of a contiguous tensor as bytes."""
    return x.view(-1).view(torch.uint8)

"""Landings: memory of a GPU that the copy engines of the other GPUs of its host write.

NCCL's gathers are kernels. They take multiprocessors from selection and attention, whose kernels fill all of them. Here
every rank copies its keys and values into the landings of the others, which takes none. Then all gather a few bytes
with NCCL, on a stream that waits for the copies: when these bytes have arrived, so has all else, with the time-outs of
any collective.
"""

from __future__ import annotations

import os
import socket
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial

import torch
import torch.distributed as dist
from torch import Tensor

from stem.distributed.exchange import Peers
from stem.transforms import lasting_tensors

SIZES = 1 << 28, 1 << 30  # least and most bytes of a landing: below, launching copies takes longer than they save
NO_MULTICAST = "TORCH_SYMM_MEM_DISABLE_MULTICAST"  # which no copy needs
WHAT = "the sharing of memory"


class Landings:
    """The landings of all ranks as one rank sees them: two of each, which take turns.

    A rank writes one while slower ranks still read the other: a call's last bytes arrive when all ranks have begun it,
    after all that they launched before.
    """

    def __init__(self, peers: Peers) -> None:
        self.peers, self.size, self.turn, self.places = peers, 0, 0, {}
        self.memory: list[Tensor] = []  # of each rank, [2, size]
        self.is_usable = dist.get_backend(peers.group) == "nccl" and peers.world_size > 1
        if self.is_usable:
            self.away, self.home = torch.cuda.Stream(priority=-1), torch.cuda.Stream(priority=-1)
            self.caller = torch.cuda.current_stream()
            with lasting_tensors():
                self.token = torch.zeros(16, dtype=torch.uint8, device=peers.device_type)

    @classmethod
    @cache
    def of(cls, peers: Peers) -> Landings:
        """Landings of peers, made once."""
        return cls(peers)

    def gather(self, tensors: list[Tensor], what: str) -> Callable[[], Callable[[], list[Tensor]]] | None:
        """Prepare to gather tensors as Peers.gather_together does; the result starts. None if NCCL has to do it.

        The tensors count as they are now, whatever is launched until the start.
        """
        size = sum(x.nbytes for x in tensors) * self.peers.world_size
        if not (self.is_usable and SIZES[0] <= size <= SIZES[1]) or torch.cuda.is_current_stream_capturing():
            return None
        if size > self.size and not self._made(1 << (size - 1).bit_length()):
            return None
        if self.caller != torch.cuda.current_stream():
            for stream in (self.away, self.home):
                stream.wait_stream(self.caller)  # which may still read
            self.caller = torch.cuda.current_stream()
        tensors, ready = [x.contiguous() for x in tensors], torch.cuda.Event()
        ready.record()
        return partial(self._started, tensors, ready, what)

    def _started(self, tensors: list[Tensor], ready: torch.cuda.Event, what: str) -> Callable[[], list[Tensor]]:
        self.turn ^= 1
        gathered, targets = self._places(self.turn, tuple((x.shape, x.dtype) for x in tensors))
        self.peers.received += sum(x.nbytes for x in tensors) * (self.peers.world_size - 1)
        for stream, copies in ((self.home, [x[self.peers.rank] for x in gathered]), (self.away, targets)):
            stream.wait_event(ready)
            with torch.cuda.stream(stream):
                for i, target in enumerate(copies):
                    target.copy_(tensors[i % len(tensors)], non_blocking=True)
        self.away.wait_stream(self.home)
        with torch.cuda.stream(self.away):
            arrived = self.peers.gather(self.token, what)

        def finish() -> list[Tensor]:
            arrived()
            tensors.clear()  # until here, nothing else may take their memory
            return gathered

        return finish

    def _places(self, turn: int, kinds: tuple) -> tuple[list[Tensor], list[Tensor]]:
        """Tensors of all ranks [world_size, *shape] in the rank's landing, and its places in those of the others."""
        key = turn, *kinds
        if key not in self.places:
            rank, world, found, first = self.peers.rank, self.peers.world_size, [], 0
            with lasting_tensors():
                for shape, dtype in kinds:
                    stop = first + world * shape.numel() * dtype.itemsize
                    found.append([x[turn, first:stop].view(dtype).view(world, *shape) for x in self.memory])
                    first = stop
            others = [(rank + step) % world for step in range(1, world)]
            self.places[key] = [x[rank] for x in found], [x[other][rank] for other in others for x in found]
        return self.places[key]

    def _made(self, size: int) -> bool:
        """Make landings of a size on all ranks, or else on none, for good."""
        import torch.distributed._symmetric_memory as symmetric

        where = f"{socket.gethostname()}, {size} bytes"
        self.is_usable = self._agree(zlib.crc32(where.encode()))  # behind all that reads the old landings
        self.places, self.memory = {}, []
        if not self.is_usable:
            return False
        try:
            with lasting_tensors(), _without_multicast():
                mine = symmetric.empty(2, size, dtype=torch.uint8, device=self.token.device)
                handle = symmetric.rendezvous(mine, self.peers.group.group_name)
                others = (handle.get_buffer(rank, mine.shape, mine.dtype) for rank in range(self.peers.world_size))
                self.memory = [mine if rank == self.peers.rank else x for rank, x in enumerate(others)]
        except RuntimeError:  # no access to the memory of the others
            self.memory = []
        self.is_usable = self._agree(bool(self.memory)) and bool(self.memory)
        self.size = size if self.is_usable else 0
        return self.is_usable

    def _agree(self, value: int) -> bool:
        """Whether a number is the same on all ranks; the host waits."""
        mine = torch.tensor([value], device=self.token.device)
        return self.peers.to_host(self.peers.gather(mine, WHAT)(), WHAT).unique().numel() == 1


@contextmanager
def _without_multicast() -> Iterator[None]:
    before = os.environ.get(NO_MULTICAST)
    os.environ[NO_MULTICAST] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[NO_MULTICAST]
        else:
            os.environ[NO_MULTICAST] = before

"""Landings: memory of a GPU that the copy engines of the other GPUs of its host write.

NCCL's gathers are kernels. They take multiprocessors from selection and attention, whose kernels fill all of them, and
launching one takes the host as long as all kernels before attention take the GPU. Here every rank copies its part into
the landings of the others, then the number of the call into their flags. Streams wait for the flags. The driver's
copies, writes and waits run on no multiprocessor, and launching them takes microseconds.
"""

from __future__ import annotations

import ctypes
import os
import socket
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stem.distributed.exchange import Peers
from stem.transforms import lasting_tensors

MOST_BYTES = 1 << 30  # of a landing; there are two of each kind
ALIGNMENT = 256  # bytes, of each tensor in a landing
FLAG_BYTES = 4
AT_LEAST = 0  # CU_STREAM_WAIT_VALUE_GEQ, of cuda.h
NO_MULTICAST = "TORCH_SYMM_MEM_DISABLE_MULTICAST"  # which no copy needs
WHAT = "the sharing of memory"


class Landings:
    """The landings of all ranks for one kind of exchange, as one rank sees them: two of each, which take turns.

    A rank writes one while slower ranks still read the other. It has waited for the flags of the call before; a rank
    sets its flags of a call after all that it launched before that call.
    """

    def __init__(self, peers: Peers, what: str) -> None:
        self.peers, self.what, self.size, self.calls, self.places = peers, what, 0, 0, {}
        self.memory: list[Tensor] = []  # of each rank: two landings, then a flag for each rank
        self.is_usable = dist.get_backend(peers.group) == "nccl" and peers.world_size > 1 and _driver() is not None
        if self.is_usable:
            self.away, self.ready, self.done = torch.cuda.Stream(priority=-1), torch.cuda.Event(), torch.cuda.Event()
            self.caller = torch.cuda.current_stream()
            peers.releases.append(self._release)

    @classmethod
    @cache
    def of(cls, peers: Peers, what: str) -> Landings:
        """Landings of peers, made once."""
        return cls(peers, what)

    def gather(self, tensors: list[Tensor]) -> Callable[[], list[Tensor]] | None:
        """Start to gather tensors as Peers.gather_together does; None if NCCL has to do it.

        The results are there for what is launched before the next call.
        """
        tensors = [x.contiguous() for x in tensors]
        size = sum(-(-x.nbytes // ALIGNMENT) * ALIGNMENT for x in tensors) * self.peers.world_size
        if not self.is_usable or size > MOST_BYTES or torch.cuda.is_current_stream_capturing():
            return None
        if size > self.size and not self._made(1 << (size - 1).bit_length()):
            return None
        caller, away = torch.cuda.current_stream(), self.away.cuda_stream
        if caller != self.caller:
            self.away.wait_stream(self.caller)  # which may still read
            self.caller = caller
        self.calls += 1
        gathered, copies = self._places(self.calls % 2, tuple((x.shape, x.dtype) for x in tensors))
        self.ready.record(caller)
        self.away.wait_event(self.ready)
        for rank, targets in copies:
            for x, target in zip(tensors, targets, strict=True):
                _check(_driver().cuMemcpyDtoDAsync_v2(target, x.data_ptr(), x.nbytes, away))
            if rank != self.peers.rank:
                self._signal(rank)
        self.done.record(self.away)
        self.peers.received += sum(x.nbytes for x in tensors) * (self.peers.world_size - 1)
        calls = self.calls

        def finish() -> list[Tensor]:
            caller = torch.cuda.current_stream()
            caller.wait_event(self.done)
            for rank in range(self.peers.world_size):
                if rank != self.peers.rank:
                    flag = self._flag(self.peers.rank, rank)
                    _check(_driver().cuStreamWaitValue32_v2(caller.cuda_stream, flag, calls, AT_LEAST))
            self.peers.has_arrived(self.what)
            tensors.clear()  # until here, nothing else may take their memory
            return gathered

        return finish

    def _flag(self, owner: int, rank: int) -> int:
        """Address of the flag of a rank in the memory of the owner."""
        return self.memory[owner].data_ptr() + 2 * self.size + rank * FLAG_BYTES

    def _signal(self, rank: int) -> None:
        """Tell a rank that what was copied before has arrived."""
        flag = self._flag(rank, self.peers.rank)
        _check(_driver().cuStreamWriteValue32_v2(self.away.cuda_stream, flag, self.calls, 0))

    def _release(self) -> None:
        """Let streams go on that wait for ranks that are missing."""
        if self.memory:
            with torch.cuda.stream(torch.cuda.Stream()):
                self._flags().fill_(self.calls)

    def _flags(self) -> Tensor:
        return self.memory[self.peers.rank][2 * self.size :].view(torch.int32)

    def _places(self, turn: int, kinds: tuple) -> tuple[list[Tensor], list[tuple[int, list[int]]]]:
        """Tensors of all ranks [world_size, *shape] in the rank's landing, and its own addresses in those of each."""
        key = turn, *kinds
        if key not in self.places:
            rank, world, found, first = self.peers.rank, self.peers.world_size, [], turn * self.size
            ranks = [*((rank + step) % world for step in range(1, world)), rank]
            copies = [(other, []) for other in ranks]
            with lasting_tensors():
                for shape, dtype in kinds:
                    size = shape.numel() * dtype.itemsize
                    found.append(self.memory[rank][first : first + world * size].view(dtype).view(world, *shape))
                    for other, targets in copies:
                        targets.append(self.memory[other].data_ptr() + first + rank * size)
                    first += -(-world * size // ALIGNMENT) * ALIGNMENT
            self.places[key] = found, copies
        return self.places[key]

    def _made(self, size: int) -> bool:
        """Make landings of a size on all ranks, or else on none, for good."""
        import torch.distributed._symmetric_memory as symmetric

        peers, device, self.is_usable = self.peers, torch.device("cuda", torch.cuda.current_device()), False
        where = f"{socket.gethostname()}, {size} bytes"
        if not self._agree(zlib.crc32(where.encode())):  # behind all that reads the old landings
            return False
        self.places, self.memory, self.calls = {}, [], self.calls + 1

        def allocated() -> Tensor:
            mine = symmetric.empty(2 * size + peers.world_size * FLAG_BYTES, dtype=torch.uint8, device=device)
            mine[2 * size :] = 0
            return mine

        def shared() -> list[Tensor]:
            handle = symmetric.rendezvous(mine, peers.group.group_name)
            found = [handle.get_buffer(rank, mine.shape, mine.dtype) for rank in range(peers.world_size)]
            found[peers.rank] = mine
            return found

        def signalled() -> bool:
            for rank in range(peers.world_size):
                self._signal(rank)
            self.away.synchronize()
            return True

        with lasting_tensors(), _without_multicast():
            mine = self._on_all(allocated)
            memory = mine is not None and self._on_all(shared)
        if memory:
            self.memory, self.size = memory, size
            has_signals = self._on_all(signalled) and (peers.to_host(self._flags(), WHAT) == self.calls).all()
            self.is_usable = bool(self._on_all(lambda: has_signals or None))
        return self.is_usable

    def _on_all(self, step: Callable[[], Any]) -> Any:
        """Result of a step; None on all ranks if one gets None or RuntimeError, as without access to other memory."""
        try:
            result = step()
        except RuntimeError:
            result = None
        return result if self._agree(result is not None) else None

    def _agree(self, value: int) -> bool:
        """Whether a number is the same on all ranks; the host waits."""
        mine = torch.tensor([value], dtype=torch.int64, device=self.peers.device_type)
        return self.peers.to_host(self.peers.gather(mine, WHAT)(), WHAT).unique().numel() == 1


@cache
def _driver() -> ctypes.CDLL | None:
    """The CUDA driver; None without its copies, writes and waits."""
    from stem.kernels.driver import cuda_driver

    library, number, pointer = cuda_driver(), ctypes.c_uint, ctypes.c_void_p
    try:
        library.cuMemcpyDtoDAsync_v2.argtypes = [pointer, pointer, ctypes.c_size_t, pointer]
        for function in (library.cuStreamWriteValue32_v2, library.cuStreamWaitValue32_v2):
            function.argtypes = [pointer, pointer, number, number]
    except AttributeError:
        return None
    return library


def _check(error: int) -> None:
    if error:
        raise RuntimeError(f"the CUDA driver returned error {error}")


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

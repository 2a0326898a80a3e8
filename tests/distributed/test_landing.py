"""Landings in threads of one process: the driver's copies, writes and waits are stand-ins on the CPU."""

import ctypes
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from threading import Barrier, local
from types import SimpleNamespace

import pytest
import torch
import torch.distributed._symmetric_memory as symmetric

from stem.distributed import landing
from stem.distributed.landing import Landings

WORLD, SECONDS = 3, 5
THREAD = local()  # with the rank


class Driver:
    """Does at once what the driver launches; `fails` makes its writes return an error."""

    fails = False

    def cuMemcpyDtoDAsync_v2(self, target, source, size, stream):
        ctypes.memmove(target, source, size)
        return 0

    def cuStreamWriteValue32_v2(self, stream, address, value, flags):
        ctypes.c_uint.from_address(address).value = value
        return int(self.fails)

    def cuStreamWaitValue32_v2(self, stream, address, value, flags):
        deadline = time.monotonic() + SECONDS
        while ctypes.c_uint.from_address(address).value < value:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        return 0


class Ranks:
    """What all threads share."""

    def __init__(self):
        self.barrier, self.values, self.memory = Barrier(WORLD, timeout=SECONDS), [None] * WORLD, [None] * WORLD

    def gathered(self, rank, x):
        self.values[rank] = x
        self.barrier.wait()
        found = list(self.values)
        self.barrier.wait()
        return found


class Peers:
    device_type, world_size, group = "cpu", WORLD, SimpleNamespace(group_name="ranks")

    def __init__(self, ranks, rank):
        self.ranks, self.rank, self.received, self.releases, self.seen = ranks, rank, 0, [], []

    def gather(self, x, what):
        found = torch.stack(self.ranks.gathered(self.rank, x))
        return lambda: found

    def to_host(self, x, what):
        return x

    def has_arrived(self, what):
        self.seen.append(what)


class Stream:
    cuda_stream = 0

    def __init__(self, priority=0):
        self.waits = []

    def __getattr__(self, name):  # wait_event, wait_stream, synchronize
        return lambda *args: self.waits.append((name, *args))


@pytest.fixture
def ranks(monkeypatch):
    ranks, caller = Ranks(), Stream()

    def rendezvous(mine, group):
        memory = ranks.gathered(THREAD.rank, mine)
        return SimpleNamespace(get_buffer=lambda rank, shape, dtype: memory[rank])

    def empty(size, dtype, device):
        return torch.full((size,), 255, dtype=dtype)

    monkeypatch.setattr(symmetric, "empty", empty)
    monkeypatch.setattr(symmetric, "rendezvous", rendezvous)
    monkeypatch.setattr(landing.dist, "get_backend", lambda group: "nccl")
    monkeypatch.setattr(landing, "_driver", Driver)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda stream: None))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: caller)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return ranks


def on_all(ranks, function):
    """Results of function(peers) in a thread for each rank."""

    def run(rank):
        THREAD.rank = rank
        return function(Peers(ranks, rank))

    with ThreadPoolExecutor(WORLD) as pool:
        return list(pool.map(run, range(WORLD)))


def test_every_rank_gets_the_tensors_of_all(ranks):
    def run(peers):
        landings = Landings(peers, "the test")
        for call, rows in enumerate((3, 5, 5, 400, 2, 2)):
            tensors = [torch.full((2, rows, 7), 10.0 * call + peers.rank).to(t) for t in (torch.bfloat16, torch.int32)]
            copies = [x.clone() for x in tensors]
            gathered = landings.gather(tensors)()
            for x, mine in zip(gathered, copies, strict=True):
                expected = torch.stack([mine - peers.rank + rank for rank in range(WORLD)])
                assert x.dtype == mine.dtype and torch.equal(x, expected)
        assert landings.calls == 6 + 3 and peers.seen == ["the test"] * 6
        assert landings.gather([torch.empty(landing.MOST_BYTES // WORLD + 1, dtype=torch.uint8)]) is None
        return peers.received

    received = on_all(ranks, run)
    assert received == [(WORLD - 1) * 2 * 7 * (2 + 4) * sum((3, 5, 5, 400, 2, 2))] * WORLD


@pytest.mark.parametrize("why", ["the host", "the memory", "the driver"])
def test_nccl_gathers_where_landings_cannot_be_made(ranks, monkeypatch, why):
    real = symmetric.rendezvous

    def run(peers):
        landings = Landings(peers, why)
        return landings.gather([torch.ones(4)]), landings.gather([torch.ones(4)]), landings.is_usable

    if why == "the driver":
        monkeypatch.setattr(Driver, "fails", True)
    if why == "the host":
        names = iter(["a", "b", "a"])
        monkeypatch.setattr(landing.socket, "gethostname", lambda: next(names))
    if why == "the memory":

        def refused(mine, group):
            found = real(mine, group)
            if THREAD.rank == 1:
                raise RuntimeError("no access")
            return found

        monkeypatch.setattr(symmetric, "rendezvous", refused)
    assert on_all(ranks, run) == [(None, None, False)] * WORLD


def test_streams_go_on_when_a_rank_is_missing(ranks):
    def run(peers):
        landings = Landings(peers, "the test")
        landings.gather([torch.ones(4)])()
        if peers.rank == 1:
            return
        finish = landings.gather([torch.ones(4)])
        for release in peers.releases:
            release()
        finish()

    on_all(ranks, run)

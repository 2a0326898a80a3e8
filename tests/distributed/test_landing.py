"""Landings in threads of one process, on CPUs: streams and collectives are stand-ins."""

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


class Ranks:
    """Values and memory of all threads, and a barrier."""

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
        self.ranks, self.rank, self.received = ranks, rank, 0

    def gather(self, x, what):
        found = torch.stack(self.ranks.gathered(self.rank, x))
        return lambda: found

    def to_host(self, x, what):
        return x


class Stream:
    def __init__(self, priority=0):
        self.wait_event = self.wait_stream = lambda other: None


@pytest.fixture
def ranks(monkeypatch):
    ranks, caller = Ranks(), Stream()

    def rendezvous(mine, group):
        memory = ranks.gathered(THREAD.rank, mine)
        return SimpleNamespace(get_buffer=lambda rank, shape, dtype: memory[rank])

    def empty(*shape, dtype, device):
        return torch.full(shape, 255, dtype=dtype)

    monkeypatch.setattr(symmetric, "empty", empty)
    monkeypatch.setattr(symmetric, "rendezvous", rendezvous)
    monkeypatch.setattr(landing.dist, "get_backend", lambda group: "nccl")
    monkeypatch.setattr(landing, "SIZES", (0, 1 << 20))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: None))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: caller)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
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
    sizes = (3, 5, 5, 400, 2, 2)

    def run(peers):
        landings, received = Landings(peers), 0
        for call, rows in enumerate(sizes):
            tensors = [torch.full((2, rows, 8), 10.0 * call + peers.rank).to(t) for t in (torch.bfloat16, torch.int32)]
            received += sum(x.nbytes for x in tensors) * (WORLD - 1)
            gathered = landings.gather(list(tensors), "the test")()()
            for x, mine in zip(gathered, tensors, strict=True):
                expected = torch.stack([mine - peers.rank + rank for rank in range(WORLD)])
                assert x.dtype == mine.dtype and torch.equal(x, expected)
        assert peers.received == received and landings.turn == 0 and landings.size == 1 << 17
        assert landings.gather([torch.empty((1 << 20) // WORLD + 1, dtype=torch.uint8)], "the test") is None
        return True

    assert all(on_all(ranks, run))


@pytest.mark.parametrize("why", ["another host", "no access to the memory of the others", "no NCCL", "few bytes"])
def test_peers_gather_where_landings_cannot(ranks, monkeypatch, why):
    real = symmetric.rendezvous

    def rendezvous(mine, group):
        found = real(mine, group)
        if THREAD.rank == 1 and why.startswith("no access"):
            raise RuntimeError(why)
        return found

    monkeypatch.setattr(symmetric, "rendezvous", rendezvous)
    if why == "another host":
        monkeypatch.setattr(landing.socket, "gethostname", lambda: str(THREAD.rank == 1))
    if why == "no NCCL":
        monkeypatch.setattr(landing.dist, "get_backend", lambda group: "gloo")
    if why == "few bytes":
        monkeypatch.setattr(landing, "SIZES", (1 << 10, 1 << 20))

    def run(peers):
        landings = Landings(peers)
        found = [landings.gather([torch.ones(4)], "the test") for _ in range(2)]
        return found, landings.is_usable

    assert on_all(ranks, run) == [([None, None], why == "few bytes")] * WORLD

"""Prompts shared by several GPUs: times and bytes of the operator and of a whole model, and what more GPUs would take.

    torchrun --nproc-per-node 2 -m stem.experiments.speed.shared --profile full

Rows go to results/speed/shared/<machine>.csv. Each row compares all ranks with one: every rank first runs the whole
prompt alone, at the same time as the others.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import stem
from stem import hf, metrics
from stem.distributed import Layout, stem_attention
from stem.distributed.attention import TIMEOUT
from stem.distributed.exchange import Peers
from stem.experiments import records
from stem.experiments.speed.bench import latencies
from stem.experiments.speed.candidates import Shape
from stem.experiments.speed.first_token import LLAMA_8B, TINY, first_token, random_llama

DENSITIES = (0.207, 0.08)
LENGTHS = {"full": [2**15, 2**17, 2**19, 2**20], "smoke": [2**12]}  # tokens of the operator
MODEL_TOKENS = {"full": 2**18, "smoke": 2**11}
MESSAGES = (2**24, 2**27, 2**30)  # bytes that a rank receives from each other rank
PLANNED = (2, 8, 64, 512)  # ranks
CALLS = 5
TIMING = "perf_counter on every rank, the slowest rank of each of five calls, clocks not locked"
WHAT = "the measurement"


def ring_bytes(shape: Shape, ranks: int) -> int:
    """Bytes that a rank receives in dense ring attention: keys and values of all other ranks, once."""
    keys = shape.batch * shape.kv_heads * shape.tokens * shape.head_dim * getattr(torch, shape.dtype).itemsize
    return 2 * keys * (ranks - 1) // ranks


def operator_row(shape: Shape, config: stem.StemConfig, mesh: DeviceMesh, seed: int = 0) -> dict[str, Any]:
    """Row of stem_attention by all ranks and by one; error is that of the ranks' output relative to one rank's."""
    peers = Peers.of(mesh, TIMEOUT)
    generator = torch.Generator(mesh.device_type).manual_seed(seed)
    heads, dtype = (shape.q_heads, shape.kv_heads, shape.kv_heads), getattr(torch, shape.dtype)
    q, k, v = (
        torch.randn(
            shape.batch, h, shape.tokens, shape.head_dim, generator=generator, device=mesh.device_type, dtype=dtype
        )
        for h in heads
    )
    layout = Layout.for_config(config, shape.tokens, mesh.size())
    mine = [layout.shard(x, peers.rank) for x in (q, k, v)]
    with torch.no_grad():
        whole, selection = stem.stem_attention(q, k, v, config, return_selection=True)
        before = peers.received
        out = stem_attention(*mine, config, mesh=mesh, layout=layout)
        received = peers.received - before
        error = metrics.rel_l2_error(out, layout.shard(whole, peers.rank))
        density = selection.density()
        del whole, selection, out
        alone = _times(lambda: stem.stem_attention(q, k, v, config), peers)
        together = _times(lambda: stem_attention(*mine, config, mesh=mesh, layout=layout), peers)
    about = dict(operation="operator", density=density, block_size=config.block_size, error=_largest(error, peers))
    return about | asdict(shape) | _compared(alone, together, received, shape, peers)


def model_row(model: nn.Module, tokens: int, config: stem.StemConfig, mesh: DeviceMesh) -> dict[str, Any]:
    """Row of operation "ttft" (time to first token); error is the largest difference of the logits from one rank's."""
    settings, peers = model.config, Peers.of(mesh, TIMEOUT)
    heads = settings.num_attention_heads, settings.num_key_value_heads, settings.head_dim
    shape = Shape(tokens, 1, *heads, str(model.dtype).removeprefix("torch."))
    ids = torch.randint(settings.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0)).to(model.device)
    with torch.inference_mode():
        with hf.stem_prefill(model, config):
            expected = first_token(model, ids)
            alone = _times(lambda: first_token(model, ids), peers)
        with hf.stem_prefill(model, config, mesh=mesh) as report:
            before = peers.received
            error = float((first_token(model, ids) - expected).abs().max())
            received = (peers.received - before) // settings.num_hidden_layers
            together = _times(lambda: first_token(model, ids), peers)
            about = dict(operation="ttft", density=report.density(), block_size=config.block_size)
    about["error"] = _largest(error, peers)
    return about | asdict(shape) | _compared(alone, together, received, shape, peers)


def bandwidth_rows(mesh: DeviceMesh, sizes: Sequence[int] = MESSAGES) -> list[dict[str, Any]]:
    """Rows of the operations "all-gather" and "exchange": received gigabytes per second of each rank."""
    peers, rows = Peers.of(mesh, TIMEOUT), []
    others = [0 if rank == peers.rank else 1 for rank in range(peers.world_size)]
    for size in sizes:
        x = torch.zeros(size, dtype=torch.uint8, device=mesh.device_type)
        packed = x.expand(sum(others), size).contiguous()
        calls = {
            "all-gather": lambda x=x: peers.gather(x, WHAT)(),
            "exchange": lambda packed=packed: peers.exchange(packed, others, others, WHAT)(),
        }
        for operation, call in calls.items():
            times = latencies([1e3 * seconds for seconds in _times(call, peers)])
            received = size * sum(others)
            rate = received / times["latency_ms"] / 1e6
            about = dict(operation=operation, ranks=peers.world_size, received_mib=received / 2**20, gb_per_s=rate)
            rows.append(about | times | dict(timing=TIMING))
    return rows


@dataclass(frozen=True)
class Machine:
    """Measured rates that `predict` extrapolates from."""

    attention_tflops: float  # of the kept block pairs, on one GPU
    selection_ms: float  # of a prompt of `selection_tokens`, on one GPU; grows with the square of the tokens
    selection_tokens: int
    gb_per_s: float  # received by a rank, within a host
    network_gb_per_s: float  # received by a rank from other hosts
    ranks_per_host: int
    collective_ms: float  # of a collective with hardly any bytes, and of the host's wait for it


def predict(shape: Shape, density: float, named: float, ranks: int, machine: Machine) -> dict[str, float]:
    """Predicted time of the operator and bytes that a rank receives, for a number of ranks.

    Attention, selection and keys are evenly spread. A rank has 1 / ranks of the blocks that its lists name, and attends
    to these while the others travel. `named` is the share of the other ranks' key blocks that the lists of a rank name,
    in [0, 1]; dense ring attention receives all. Block summaries are those of the default config, fp32. Three
    collectives and waits come one after the other.

    Returns:
        latency_ms, attention_ms, selection_ms and exchange_ms of a rank; received_mib and ring_mib; speedup over one.
    """

    def parts(ranks: int) -> dict[str, float]:
        attention = density * shape.dense_flops() / ranks / machine.attention_tflops / 1e9
        selection = machine.selection_ms * (shape.tokens / machine.selection_tokens) ** 2 / ranks
        other_hosts = max(0, ranks - machine.ranks_per_host) / max(1, ranks - 1)
        seconds_per_gb = (1 - other_hosts) / machine.gb_per_s + other_hosts / machine.network_gb_per_s
        config = stem.StemConfig()
        blocks = -(-shape.tokens // config.block_size) * shape.batch * shape.kv_heads
        features = config.score_stride * shape.head_dim + config.block_size // config.score_stride
        summaries = 4 * blocks * features * (ranks - 1) // ranks
        keys = named * ring_bytes(shape, ranks)
        exchange, before = (1e-6 * size * seconds_per_gb for size in (keys, summaries))
        latency = selection + before + max(attention / ranks, exchange) + attention * (1 - 1 / ranks)
        latency += 3 * machine.collective_ms if ranks > 1 else 0
        times = dict(latency_ms=latency, attention_ms=attention, selection_ms=selection, exchange_ms=exchange + before)
        return times | dict(received_mib=(keys + summaries) / 2**20, ring_mib=ring_bytes(shape, ranks) / 2**20)

    found = parts(ranks)
    return found | dict(speedup=parts(1)["latency_ms"] / found["latency_ms"])


def plan(shape: Shape, machine: Machine, ranks: Sequence[int] = PLANNED) -> pd.DataFrame:
    """Predictions by density and number of ranks, where every rank receives all key blocks (`named` is 1).

    Returns:
        Columns: latency_ms, attention_ms and exchange_ms of a rank, received_gib, and speedup over one rank.
    """
    found = {}
    for density in DENSITIES:
        for number in ranks:
            row = predict(shape, density, 1.0, number, machine)
            found[density, number] = row | dict(received_gib=row["received_mib"] / 1024)
    table = pd.DataFrame(found).T.rename_axis(["density", "ranks"])
    return table[["latency_ms", "attention_ms", "exchange_ms", "received_gib", "speedup"]]


def _times(call: Callable[[], Tensor], peers: Peers) -> list[float]:
    """Seconds of the slowest rank in each of CALLS calls, after one that does not count."""
    times = []
    for _ in range(CALLS + 1):
        _largest(0.0, peers)  # the ranks begin together
        start = time.perf_counter()
        call()
        if peers.device_type == "cuda":
            torch.cuda.synchronize()
        times.append(_largest(time.perf_counter() - start, peers))
    return times[1:]


def _largest(value: float, peers: Peers) -> float:
    x = torch.tensor([value], dtype=torch.float64, device=peers.device_type)
    return float(peers.to_host(peers.gather(x, WHAT)(), WHAT).max())


def _compared(alone: list[float], together: list[float], received: int, shape: Shape, peers: Peers) -> dict[str, Any]:
    """Columns of the times of one and of all ranks, and of the bytes that the rank that receives most receives."""
    one, all_ranks = (latencies([1e3 * seconds for seconds in times]) for times in (alone, together))
    bytes_beside = dict(
        received_mib=_largest(received, peers) / 2**20, ring_mib=ring_bytes(shape, peers.world_size) / 2**20
    )
    times = all_ranks | dict(one_rank_ms=one["latency_ms"], speedup=one["latency_ms"] / all_ranks["latency_ms"])
    return dict(ranks=peers.world_size) | times | bytes_beside | dict(timing=TIMING)


def rows(profile: str, mesh: DeviceMesh, shape: Shape, model: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Rows of a profile on the ranks of a mesh; all ranks iterate together."""
    yield from bandwidth_rows(mesh, MESSAGES if mesh.device_type == "cuda" else MESSAGES[:1])
    for tokens in LENGTHS[profile]:
        for density in DENSITIES:
            yield operator_row(Shape(**asdict(shape) | dict(tokens=tokens)), stem.StemConfig(density=density), mesh)
    dtype = torch.bfloat16 if mesh.device_type == "cuda" else torch.float32
    built = random_llama(model, mesh.device_type, dtype)
    for density in DENSITIES:
        yield model_row(built, MODEL_TOKENS[profile], stem.StemConfig(density=density), mesh)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure on the processes that torchrun has started; rank 0 writes the rows after each one."""
    parser = argparse.ArgumentParser(prog="torchrun -m stem.experiments.speed.shared", description=__doc__)
    parser.add_argument("--profile", choices=records.PROFILES, default="smoke")
    options = parser.parse_args(arguments)
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(kind, (int(os.environ["WORLD_SIZE"]),))
    on_cpu = Shape(0, q_heads=3, kv_heads=1, head_dim=64, dtype="float32")
    shape, model = (Shape(0), LLAMA_8B) if kind == "cuda" else (on_cpu, TINY)
    found = []
    for row in rows(options.profile, mesh, shape, model):
        found.append(row)
        if mesh.get_local_rank() == 0:
            path = records.write_rows("speed/shared", found, options.profile)
            print({name: row[name] for name in ("operation", "latency_ms", "received_mib")}, path, flush=True)


if __name__ == "__main__":
    main()

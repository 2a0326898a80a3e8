"""Prompts shared by several GPUs: times and bytes of the operator and of a whole model, beside one GPU.

    python -m stem.experiments.speed.shared --profile full      # one process for each GPU; or torchrun -m ...

Rows go to results/speed/shared/<machine>.csv. Each row compares all ranks with one: calls of all ranks together take
turns with calls in which every rank runs the whole prompt alone, at the same time as the others.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import stem
from stem import hf, metrics
from stem.distributed import Layout, stem_attention
from stem.distributed.attention import TIMEOUT, attend_to_all, plan_part
from stem.distributed.choose import choose_rows
from stem.distributed.exchange import Peers
from stem.distributed.shards import Shard, gather_all
from stem.experiments import records
from stem.experiments.speed.bench import first_line, latencies
from stem.experiments.speed.candidates import Shape
from stem.experiments.speed.first_token import LLAMA_8B, TINY, first_token, random_llama
from stem.experiments.speed.scaling import DENSITIES, ring_bytes

LENGTHS = {"full": [2**17, 2**20, 2**19, 2**15], "smoke": [2**12]}  # tokens of the operator, most wanted first
MODEL_TOKENS = {"full": 2**18, "smoke": 2**11}
MESSAGES = (2**24, 2**27, 2**30)  # bytes that a rank receives from each other rank
PAIRS, SECONDS = (3, 60), 1.5  # fewest and most pairs of calls; no more begin after this time
MODEL_PAIRS = (2, 3)
TIMING = "perf_counter on every rank, the slowest rank of each call, pairs of calls, clocks not locked"
WHAT = "the measurement"


@torch.no_grad()
def operator_row(shape: Shape, config: stem.StemConfig, mesh: DeviceMesh, seed: int = 0) -> dict[str, Any]:
    """Row of stem_attention by all ranks and by one: `same_lists` and `difference` (relative to one rank's output)."""
    peers, options = Peers.of(mesh, TIMEOUT), dict(device=mesh.device_type, dtype=getattr(torch, shape.dtype))
    generator = torch.Generator(mesh.device_type).manual_seed(seed)
    q, k, v = (
        torch.randn(shape.batch, heads, shape.tokens, shape.head_dim, generator=generator, **options)
        for heads in (shape.q_heads, shape.kv_heads, shape.kv_heads)
    )
    layout = Layout.for_config(config, shape.tokens, mesh.size())
    mine = [layout.shard(x, peers.rank) for x in (q, k, v)]
    whole, selection = stem.stem_attention(q, k, v, config, return_selection=True)
    before = peers.received
    out, found = stem_attention(*mine, config, mesh=mesh, layout=layout, return_selection=True)
    received = peers.received - before
    rows = found.q_blocks.to(q.device)
    width = min(x.kv_indices.shape[3] for x in (found, selection))
    same = torch.equal(found.kv_num_blocks, selection.kv_num_blocks[:, :, rows]) and torch.equal(
        found.kv_indices[..., :width], selection.kv_indices[:, :, rows, :width]
    )
    difference = metrics.rel_l2_error(out, layout.shard(whole, peers.rank))
    about = dict(operation="operator", density=selection.density(), block_size=config.block_size)
    about |= dict(same_lists=not _largest(not same, peers), difference=_largest(difference, peers))
    del whole, selection, out, found
    one = partial(stem.stem_attention, q, k, v, config)
    together = partial(stem_attention, *mine, config, mesh=mesh, layout=layout)
    times = _pairs(one, together, peers, PAIRS)
    row = about | asdict(shape) | _compared(times, received, shape, peers) | _parts(mine, config, layout, peers)
    return row | dict(exposed_ms=row["latency_ms"] - row["selection_ms"] - row["attention_ms"])


def _parts(mine: list[Tensor], config: stem.StemConfig, layout: Layout, peers: Peers) -> dict[str, float]:
    """Columns of parts of a call, each alone [ms]: selection and its exchange, keys and values, attention."""
    plan = plan_part(*mine, config, layout, peers.rank)
    shard = Shard.of(layout, peers.rank, config.block_size)

    def gathered() -> list[Tensor]:
        return gather_all(*mine[1:], shard, peers)()()

    lists, keys = choose_rows(*mine, plan, shard, peers)(), gathered()
    calls = dict(
        selection=lambda: choose_rows(*mine, plan, shard, peers)(),
        exchange=gathered,
        attention=lambda: attend_to_all(mine[0], *keys, *lists, plan, shard),
    )
    for call in calls.values():
        _time(call, peers)
    times = {name: [_time(call, peers) for _ in range(PAIRS[0])] for name, call in calls.items()}
    return {f"{name}_ms": latencies(seconds)["latency_ms"] * 1e3 for name, seconds in times.items()}


@torch.inference_mode()
def model_row(model: nn.Module, tokens: int, config: stem.StemConfig, mesh: DeviceMesh) -> dict[str, Any]:
    """Row of operation "ttft" (time to first token); difference is the largest of the logits from one rank's."""
    settings, peers = model.config, Peers.of(mesh, TIMEOUT)
    heads = settings.num_attention_heads, settings.num_key_value_heads, settings.head_dim
    shape = Shape(tokens, 1, *heads, str(model.dtype).removeprefix("torch."))
    ids = torch.randint(settings.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0)).to(model.device)
    logits, reports, received = {}, {}, [0]

    def call(name: str, **options: DeviceMesh) -> None:
        before = peers.received
        with hf.stem_prefill(model, config, **options) as reports[name]:
            logits[name] = first_token(model, ids)
        received[0] = peers.received - before

    one, together = partial(call, "one"), partial(call, "together", mesh=mesh)
    times = _pairs(one, together, peers, MODEL_PAIRS)
    difference = _largest(float((logits["one"] - logits["together"]).abs().max()), peers)
    about = dict(operation="ttft", density=reports["together"].density(), block_size=config.block_size)
    about |= dict(difference=difference, layers=settings.num_hidden_layers)
    return about | asdict(shape) | _compared(times, received[0] // settings.num_hidden_layers, shape, peers)


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
            _time(call, peers)
            times = latencies([1e3 * _time(call, peers) for _ in range(5)])
            received = size * sum(others)
            rate = received / times["latency_ms"] / 1e6
            about = dict(operation=operation, ranks=peers.world_size, received_mib=received / 2**20, gb_per_s=rate)
            rows.append(about | times | dict(timing=TIMING))
    return rows


def _time(call: Callable[[], Any], peers: Peers) -> float:
    """Seconds of a call on the slowest rank; the ranks begin together."""
    _largest(0.0, peers)
    start = time.perf_counter()
    call()
    if peers.device_type == "cuda":
        torch.cuda.synchronize()
    return _largest(time.perf_counter() - start, peers)


def _pairs(one: Callable, together: Callable, peers: Peers, limits: tuple[int, int]) -> Tensor:
    """Seconds of calls that take turns [n, 2]; a call of each goes before them."""
    pairs, spent = [], 0.0
    _time(one, peers), _time(together, peers)
    while len(pairs) < limits[0] or (len(pairs) < limits[1] and spent < SECONDS):
        pairs.append([_time(one, peers), _time(together, peers)])
        spent += sum(pairs[-1])
    return torch.tensor(pairs, dtype=torch.float64)


def _largest(value: float, peers: Peers) -> float:
    x = torch.tensor([value], dtype=torch.float64, device=peers.device_type)
    return float(peers.to_host(peers.gather(x, WHAT)(), WHAT).max())


def _compared(pairs: Tensor, received: int, shape: Shape, peers: Peers) -> dict[str, Any]:
    """Columns of the times of one and of all ranks, and of the bytes that the rank that receives most receives.

    speedup is the median over pairs, with a 95 % bootstrap interval of that median; efficiency is speedup / ranks.
    """
    one, together = (latencies((1e3 * times).tolist()) for times in pairs.T)
    ratios = pairs[:, 0] / pairs[:, 1]
    drawn = torch.randint(len(ratios), (10_000, len(ratios)), generator=torch.Generator().manual_seed(0))
    low, high = ratios[drawn].quantile(0.5, dim=1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    speedup = float(ratios.quantile(0.5))
    about = dict(ranks=peers.world_size, one_rank_ms=one["latency_ms"], pairs=len(ratios))
    about |= dict(speedup=speedup, speedup_low=low, speedup_high=high, efficiency=speedup / peers.world_size)
    received = _largest(received, peers) / 2**20
    about |= dict(received_mib=received, ring_mib=ring_bytes(shape, peers.world_size) / 2**20)
    return together | about | dict(timing=TIMING)


def cases(profile: str, mesh: DeviceMesh, shape: Shape, model: dict[str, int]) -> Iterator[tuple[str, Callable]]:
    """Labels and functions that return rows of a profile; the ranks of a mesh call them together."""
    on_cuda = mesh.device_type == "cuda"
    yield "bandwidth", lambda: bandwidth_rows(mesh, MESSAGES if on_cuda else MESSAGES[:1])
    configs = [stem.StemConfig(density=density) for density in DENSITIES]
    for tokens in LENGTHS[profile]:
        for config in configs:
            of = Shape(**asdict(shape) | dict(tokens=tokens))
            yield f"operator, {tokens} tokens, {config.density}", lambda a=(of, config, mesh): [operator_row(*a)]
    built = random_llama(model, mesh.device_type, torch.bfloat16 if on_cuda else torch.float32)
    for tokens in sorted({MODEL_TOKENS["smoke"], MODEL_TOKENS[profile]}):
        for config in configs:
            yield (
                f"first token, {tokens} tokens, {config.density}",
                lambda a=(built, tokens, config, mesh): [model_row(*a)],
            )


def measure(rank: int, world: int, profile: str, address: str = "env://") -> None:
    """Measure as one of `world` processes; rank 0 writes the rows after each case."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)))
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", init_method=address, rank=rank, world_size=world)
    mesh = init_device_mesh(kind, (world,))
    on_cpu = Shape(0, q_heads=3, kv_heads=1, head_dim=64, dtype="float32")
    shape, model = (Shape(0), LLAMA_8B) if kind == "cuda" else (on_cpu, TINY)
    rows, start = [], time.perf_counter()
    for label, call in cases(profile, mesh, shape, model):
        try:
            found = call()
        except Exception as error:  # a failure of all ranks costs one row
            found = [dict(operation=label, error=first_line(error))]
        rows += found
        if rank == 0:
            records.write_rows("speed/shared", rows, profile)
            told = {name: row[name] for row in found for name in ("latency_ms", "speedup", "gb_per_s") if name in row}
            print(f"{time.perf_counter() - start:6.1f} s  {label}  {told}", flush=True)
    dist.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure on the processes of torchrun, or on one for each GPU; without two GPUs only the smoke profile runs."""
    parser = argparse.ArgumentParser(prog="python -m stem.experiments.speed.shared", description=__doc__)
    parser.add_argument("--profile", choices=records.PROFILES, default="smoke")
    options = parser.parse_args(arguments)
    if "WORLD_SIZE" in os.environ:
        measure(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), options.profile)
        return
    gpus = torch.cuda.device_count()
    if gpus < 2 and (gpus or options.profile == "full"):
        print(f"skipped: prompts shared by several GPUs need two of them, {gpus} found")
        return
    world = max(gpus, 2)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure, (world, options.profile, f"file://{folder}/store"), nprocs=world)


if __name__ == "__main__":
    main()

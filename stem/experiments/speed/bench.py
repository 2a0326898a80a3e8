"""Timings of dense attention, FlexAttention and Stem on one machine; the gate checks each row before it is timed."""

import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch

from stem import metrics
from stem.experiments.speed import candidates, gate, peers
from stem.experiments.speed.candidates import BRIEFLY, CONFIGS, GRAPH, SHAPES, Candidate, Problem, Shape

LENGTHS = {  # tokens of each profile
    ("cuda", "full"): [*candidates.SHORT, *(2**n for n in range(15, 18)), 2**20],
    ("cuda", "smoke"): [2**13, 2**15, 2**17],
    ("cpu", "full"): [1024 * 2**n for n in range(6)],
    ("cpu", "smoke"): [1024 * 2**n for n in range(4)],
}
FLEX_TOKENS = (2**17,)  # each length costs one more compilation
# FLOP of an operation over FLOP of attention's forward pass. A backward pass takes five products, a forward pass two.
FLOP_FACTOR = {f"{kind}{part}": 1 for kind in ("", "captured ", GRAPH) for part in ("attention", "operator")}
FLOP_FACTOR["forward+backward"] = 3.5
ONE_CONFIG_TOKENS = 2**19  # from this length on only the first config is timed, which saves minutes
COLUMNS = (
    *("operation", "provider", "config", "tokens", "batch", "q_heads", "kv_heads", "head_dim", "dtype", "block_size"),
    *("density", "latency_ms", "latency_ms_p20", "latency_ms_p80", "host_ms", "host_ratio", "outside_ms"),
    *("tflops", "gb_per_s", "peak_memory_mib"),
    *(f"speedup_vs_{name}" for name in candidates.BASELINES),
    *("fastest_dense", "speedup", "speedup_low", "speedup_high"),
    *("flop", "least_bytes", "error_vs_fp64", "error", "timing", "seed"),
)
LONGEST_CALL_MS = {"cuda": 2_000, "cpu": 30_000}  # dense calls that are predicted to take longer are skipped
TIMING = {
    "cuda": "triton.testing.do_bench, L2 flushed before each call, clocks not locked",
    "cpu": "perf_counter, caches warm, clocks not locked",
}
CAPTURES = 4  # of a call in CUDA graphs; two captures of one call differ by up to 1.3 us on an NVIDIA H200
IN_TURNS = f"replays of {CAPTURES} graphs in turns, each after one of itself, L2 flushed before each, clocks not locked"
TURNS_MS, FEWEST_TURNS, MOST_TURNS = 2_000, 5, 25
L2_BYTES = 2**28  # written to flush L2, more than any GPU's


def run(candidate: Candidate, problem: Problem, config_name: str, later: list | None = None) -> dict[str, Any]:
    """Check a candidate, time it, and return its row of `COLUMNS`; a failure leaves its error in the row and no time.

    tflops counts the kept pairs, and error_vs_fp64 is the relative L2 error of the worst sampled row.
    later: Takes (row, calls, problem) of checked CUDA graphs, for `time_in_turns`; by default one is timed at once.
    """
    shape, dense = problem.shape, candidate.provider in candidates.BASELINES
    config_name = "dense fp8" if candidate.provider in peers.FP8 else "dense" if dense else config_name
    row = dict(operation=candidate.operation, provider=candidate.provider, config=config_name)
    row |= asdict(shape) | dict(block_size=None if dense else problem.config.block_size, error="")
    row |= dict(timing=TIMING[problem.q.device.type])
    row |= dict(dtype="float8_e4m3fn") if candidate.provider in peers.FP8 else {}
    try:
        waits = later is not None and candidate.operation.startswith(GRAPH)
        calls = []
        for _ in range(CAPTURES if waits else 1):
            call, check = candidate.prepare(problem)
            with gate.poisoned_buffers() if candidate.provider.startswith("stem") else nullcontext():  # not Flex
                row["error_vs_fp64"] = check(call())
            calls.append(call)
        if not waits:
            row |= measure(call, problem.q.device.type)
        row["density"] = 1.0 if dense else problem.selection.density()
        if candidate.operation in FLOP_FACTOR:
            flop = shape.dense_flops() if dense else metrics.attention_flops(problem.selection, shape.head_dim)
            row["flop"] = flop * FLOP_FACTOR[candidate.operation]
            row["least_bytes"] = shape.least_bytes()
        if waits:
            later.append((row, calls, problem))
        else:
            add_tflops(row)
    except Exception as error:  # one provider's failure costs one row
        row["error"] = first_line(error)
    return row


def add_tflops(row: dict[str, Any]) -> None:
    """Add the rate of the operations that a timed row counts; parts of the operator count none."""
    if "flop" in row:
        row["tflops"] = row["flop"] / row["latency_ms"] / 1e9


def time_in_turns(graphs: Sequence[tuple[dict[str, Any], Sequence[Callable], Problem]], device: str) -> None:
    """Time the graphs of one length, each with its row, its calls and the inputs that they read; complete their rows.

    Clocks and temperature change during a run. Turns spread that over all, so ratios of the medians are comparable.
    """
    for (row, *_), times in zip(graphs, turns([calls for _, calls, _ in graphs], device), strict=True):
        row |= latencies(times) | dict(timing=IN_TURNS, peak_memory_mib=0.0)  # a replay allocates nothing
        add_tflops(row)


def turns(alike: Sequence[Sequence[Callable[[], Any]]], device: str) -> list[list[float]]:
    """Times [ms] of calls that have run before, those of calls that are alike together, all in a new order each turn.

    As many turns as fit into TURNS_MS. Each call runs once untimed before it is timed, so it finds its clock and its
    code as if it ran alone.
    """
    every = [(i, call) for i, calls in enumerate(alike) for call in calls]
    once = sum(_one_call(call, device) for _, call in every)
    number = int(min(MOST_TURNS, max(FEWEST_TURNS, TURNS_MS / max(2 * once, 1e-3))))
    times: list[list[float]] = [[] for _ in alike]
    flushed = torch.empty(L2_BYTES, dtype=torch.uint8, device=device) if device == "cuda" else None
    order = random.Random(0)
    for _ in range(number):
        for i, call in order.sample(every, len(every)):
            call()
            times[i].append(_one_call(call, device) if flushed is None else _after_flush(call, flushed))
    return times


def _after_flush(call: Callable[[], Any], flushed: torch.Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flushed.zero_()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def first_line(error: Exception) -> str:
    """Type and first line of an error, at most 300 characters, for the column "error"."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]


def measure(call: Callable[[], Any], device: str) -> dict[str, float]:
    """Time a call that has run before: median, p20, p80 [ms] and peak memory with the result [MiB], NaN on a CPU."""
    peak_mib = float("nan")
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        once = _one_call(call, device)
        peak_mib = (torch.cuda.max_memory_allocated() - before) / 2**20
    if device == "cuda" and once < 1_000:
        from triton.testing import do_bench

        # short calls get a longer warm-up, because clocks fall during the compilation before them
        times = do_bench(call, warmup=10 if once > 10 else 50, rep=max(60, int(5 * once)), return_mode="all")
    elif device == "cuda":
        times = [once, _one_call(call, device)]
    else:
        times, enough = [], time.perf_counter() + 0.5
        while len(times) < 3 or time.perf_counter() < enough:
            times.append(_one_call(call, device))
    return latencies(times) | dict(peak_memory_mib=peak_mib)


def latencies(times: Sequence[float]) -> dict[str, float]:
    """Median, p20 and p80 of the times of single calls [ms], by column."""
    p20, median, p80 = torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return dict(latency_ms=median, latency_ms_p20=p20, latency_ms_p80=p80)


def _one_call(call: Callable[[], Any], device: str) -> float:
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return (time.perf_counter() - start) * 1e3


def case(
    shape: Shape,
    device: str,
    *,
    impls: Sequence[str],
    configs: Sequence[str] | None = None,
    dense: Iterable[str] | None = None,
    flex: bool = False,
    briefly: Iterable[str] = (),
    graphs: bool = False,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Rows of one shape: the dense baselines, then each config in each implementation, with speed-ups.

    Args:
        impls: Implementations of stem_attention. The first one selects the blocks for all, FlexAttention included.
        configs: Names in CONFIGS, default all. Implementations but the last are timed with the first config only.
        dense: Names in candidates.dense_attends, default all of the device.
        flex: Measure FlexAttention with the blocks of the first config. Sparse peers get them at every length.
        briefly: Names in BRIEFLY: the operator with impl=None only.
        graphs: Measure the dense baselines but FP8 and the operator with impl=None in CUDA graphs too, all in turns.
    """
    briefs = {name: BRIEFLY[name][0] for name in briefly}
    chosen = {name: CONFIGS[name] for name in (CONFIGS if configs is None else configs)}
    attends = candidates.dense_attends(device)
    names = attends if dense is None else dense
    baselines = [candidates.attention_candidate(name, attends[name]) for name in names]
    baselines += [candidates.graph_candidate(c) for c in baselines if graphs and c.provider not in peers.FP8]
    every = [c for impl in ([*impls, None] if device == "cuda" else impls) for c in candidates.stem_candidates(impl)]
    slower = [f"stem_{impl}" for impl in impls[:-1]]
    fast = [c for c in every if c.operation in ("scores", "selection") or c.provider not in slower]
    whole = candidates.stem_candidates(None)
    in_graphs = [candidates.graph_candidate(candidate) for candidate in whole if graphs]
    rows, later, qkv = [], [], None
    with torch.no_grad():
        for name, config in (chosen | briefs).items():
            compared = whole if name in briefs else fast
            if name == next(iter(chosen)):
                compared = baselines + every
                compared += candidates.sparse_peers(flex) if device == "cuda" else []
            problem = None  # free the last one's memory first, unless a graph reads it
            problem = Problem(shape, config, device, impls[0], seed, qkv)
            qkv = problem.qkv  # the same memory for all: where it lies changes short times by 3 %
            rows += [run(candidate, problem, name, later) for candidate in compared + in_graphs]
        if later:
            time_in_turns(later, device)
    return with_speedups(rows, seed)


def with_speedups(rows: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Add to each row its speed-ups over the dense baselines, graphs over graphs; scores and selection get none.

    The fastest baseline is named too. It is one in the precision of the inputs, so not FP8.
    """
    for row in rows:
        in_graph = row["operation"].startswith(GRAPH)
        dense = [r for r in rows if r["provider"] in candidates.BASELINES and "latency_ms" in r]
        baseline = {r["provider"]: r["latency_ms"] for r in dense if r["operation"].startswith(GRAPH) == in_graph}
        fastest = min(baseline.keys() - peers.FP8.keys(), key=baseline.get, default=None)
        compared = row["operation"] not in ("scores", "selection") and "latency_ms" in row
        row["fastest_dense"] = fastest if compared else None
        for name in candidates.BASELINES:
            row[f"speedup_vs_{name}"] = baseline[name] / row["latency_ms"] if compared and name in baseline else None
    return [row | dict(seed=seed) for row in rows]


def sweep(
    lengths: Iterable[int],
    device: str,
    *,
    impls: Sequence[str] | None = None,
    configs: Sequence[str] | None = None,
    seed: int = 0,
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Yield (tokens, rows) of the machine's ceilings (as 0 tokens), then of each length, in this order.

    A dense back end is skipped, with a row that says so, where its last call predicts one over LONGEST_CALL_MS.
    `configs` is by default all of CONFIGS, on CUDA with those of BRIEFLY.
    """
    briefly = BRIEFLY if device == "cuda" and configs is None else {}
    shape, impls = SHAPES[device], impls or candidates.default_impls(device)
    configs = tuple(CONFIGS) if configs is None else configs
    yield 0, ceilings(device, shape.dtype)
    last = {}  # provider -> (tokens, ms)
    for tokens in lengths:
        predicted = {name: ms * (tokens / before) ** 2 for name, (before, ms) in last.items()}
        names = candidates.dense_attends(device)
        affordable = [name for name in names if predicted.get(name, 0) <= LONGEST_CALL_MS[device]]
        rows = case(
            replace(shape, tokens=tokens),
            device,
            impls=impls,
            configs=configs[: 1 if tokens >= ONE_CONFIG_TOKENS else None],
            dense=affordable,
            flex=device == "cuda" and tokens in FLEX_TOKENS,
            briefly=[name for name, (_, measured) in briefly.items() if tokens in measured],
            graphs=device == "cuda" and tokens in candidates.SHORT,
            seed=seed,
        )
        timed = [r for r in rows if r["provider"] in names and "latency_ms" in r]
        last |= {r["provider"]: (tokens, r["latency_ms"]) for r in timed}
        for name in set(names) - set(affordable):
            skipped = dict(operation="attention", provider=name, config="dense", density=1.0, seed=seed)
            skipped["error"] = f"skipped: about {predicted[name] / 1e3:.0f} s a call"
            rows.append(asdict(replace(shape, tokens=tokens)) | skipped)
        yield tokens, rows


def ceilings(device: str, dtype: str) -> list[dict[str, Any]]:
    """Rows of the machine's measured ceilings: the rate of a square matmul [TFLOP/s] and of a copy [GB/s]."""
    kind = getattr(torch, dtype)
    n, elements = (8192, 2**29) if device == "cuda" else (2048, 2**25)
    a, b = (torch.randn(n, n, device=device).to(kind) for _ in range(2))
    source = torch.ones(elements, dtype=kind, device=device)
    target = torch.empty_like(source)
    common = dict(operation="ceiling", dtype=dtype, error="", timing=TIMING[device])
    matmul = common | dict(provider="matmul") | measure(lambda: torch.mm(a, b), device)
    copy = common | dict(provider="copy") | measure(lambda: target.copy_(source), device)
    matmul["tflops"] = 2 * n**3 / matmul["latency_ms"] / 1e9
    copy["gb_per_s"] = 2 * elements * kind.itemsize / copy["latency_ms"] / 1e6
    return [matmul, copy]

"""Prefill of whole models with random weights, dense and through stem.hf in turn, and the host's share of the time."""

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import stem
from stem import hf
from stem.experiments.speed import first_token, peers
from stem.experiments.speed.bench import first_line, latencies, with_speedups
from stem.experiments.speed.candidates import (
    BRIEFLY,
    CONFIGS,
    EIGHT_PERCENT,
    LOW_DENSITY,
    PREFILL,
    PRESETS,
    SHAPES,
    Shape,
)

MODELS = {  # shapes of eight layers of Llama-3.1-8B, of Qwen2.5-0.5B, and of SmolLM2-135M
    "cuda": {
        "8B, 8 layers": first_token.LLAMA_8B
        | dict(hidden_size=4096, num_hidden_layers=8, num_attention_heads=32),
        "0.5B": dict(
            hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
            num_attention_heads=14, num_key_value_heads=2, vocab_size=151936,
        ),
        "135M": dict(
            hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
            num_attention_heads=9, num_key_value_heads=3, vocab_size=49152,
        ),
    },
    "cpu": {"tiny": first_token.TINY},
}  # fmt: skip
LENGTHS = {  # tokens of each profile
    ("cuda", "full"): [8192, 1024, 32768, 2048, 4096, 16384],
    ("cuda", "smoke"): [2**13],
    ("cpu", "full"): [2**10, 2**11, 2**12],
    ("cpu", "smoke"): [2**10],
}
WAYS = {"cuda": ("default", *PRESETS), "cpu": ("default", "adaptive")}  # configs
LONG = {"cuda": 2**15}  # tokens from which on EIGHT_PERCENT is one of them
ROUNDS, WARM_UP = {"cuda": 61, "cpu": 3}, 3  # calls of each way; calls before, untimed
SECONDS, LEAST_ROUNDS = 2.0, 5  # no round of one config begins later, once there have been so many
TIMING = "perf_counter around a prefill of the whole model, dense and sparse in turn, clocks not locked"
FARTHEST = 0.1  # largest relative error of the logits where every block is kept


def prefill(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits of the last position [1, V] after a prefill as in generation."""
    return model(ids, use_cache=True, logits_to_keep=1).logits[:, 0]


def case(
    name: str, model: nn.Module, tokens: int, device: str, *, ids: Tensor | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """Rows of operation "prefill <name>" of one length: the dense back ends, no attention, stem.hf with each config.

    The dense back ends take turns. Then each config and the fastest of them do, call by call on the enabled model, and
    each round turns their order round, so that a change of the machine's speed meets both. `speedup` is the median over
    the rounds of a round's ratio, from `speedup_low` to `speedup_high` (95 %). `host_ms` is the time until the call
    returns, and `host_ratio` the median over the rounds of its ratio to the dense one. A config that keeps every block
    must give the logits of dense attention. `flop` are those of all layers' attention. The configs are those of WAYS,
    and from LONG on EIGHT_PERCENT. `ids` [1, >= tokens] are the prompt, by default random.
    """
    settings, dtype = model.config, str(model.dtype).removeprefix("torch.")
    head_dim = getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
    heads = settings.num_attention_heads, settings.num_key_value_heads, head_dim
    shape = Shape(tokens, 1, *heads, dtype)
    common = dict(operation=PREFILL + name) | asdict(shape) | dict(timing=TIMING)
    if ids is None:
        ids = torch.randint(settings.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(seed))
    ids = ids[:, :tokens].to(model.device)
    contexts = first_token.dense_contexts(model, device)
    contexts.pop("fa4", None)  # its calls cost the host more than FlashAttention-3's, and the GPU no less
    dense, _ = take_turns(model, ids, contexts, LEAST_ROUNDS)
    rows = [common | dict(provider=way, config="dense", density=1.0) | of_way for way, of_way in dense.items()]
    timed = {way: of_way["latency_ms"] for way, of_way in dense.items() if "latency_ms" in of_way}
    fastest = min(timed, key=timed.get, default=None)
    bare, _ = take_turns(model, ids, {peers.NONE: partial(peers.no_attention, model)}, LEAST_ROUNDS)
    rows.append(common | dict(provider=peers.NONE, config=peers.NONE) | bare[peers.NONE] | dict(density=0.0))
    for chosen in (*WAYS[device], *([EIGHT_PERCENT] if tokens >= LONG.get(device, float("inf")) else [])):
        config = calibrated(model, ids) if chosen == EIGHT_PERCENT else CONFIGS.get(chosen) or BRIEFLY[chosen][0]
        with hf.stem_prefill(model, config) as report:
            ways = {way: contexts[way] for way in (fastest,) if way} | {"stem": partial(nullcontext, report)}
            found, times = take_turns(model, ids, ways, ROUNDS[device])
        row = common | dict(provider="stem", config=chosen, block_size=config.block_size) | found["stem"]
        rows.append(row | (compared(times[fastest], times["stem"]) if fastest and times["stem"] else {}))
    flop = settings.num_hidden_layers * shape.dense_flops()
    rows = [row | (dict(flop=flop * row["density"]) if "density" in row else {}) for row in rows]
    return with_speedups(rows, seed)


def calibrated(model: nn.Module, ids: Tensor) -> stem.StemConfig:
    """The preset adaptive with the threshold at which the model computes LOW_DENSITY on this prompt [1, N]."""
    return stem.calibrate(model, [ids], LOW_DENSITY, stem.StemConfig.preset("adaptive"), tolerance=0.002).config


def compared(dense: Sequence[tuple[float, float]], sparse: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Columns speedup, its interval and host_ratio of both ways' times, see `take_turns`."""
    rounds = list(zip(dense, sparse, strict=False))
    host_ratio = median(own / of_dense for (_, of_dense), (_, own) in rounds)
    return paired(of_dense / own for (of_dense, _), (own, _) in rounds) | dict(host_ratio=host_ratio)


def paired(ratios: Iterable[float]) -> dict[str, float]:
    """Median of speed-ups of rounds and its 95 % interval from order statistics, the range for fewer than six."""
    ratios = sorted(ratios)
    outside = max(0, int((len(ratios) - 1.96 * len(ratios) ** 0.5) / 2))
    return dict(speedup=median(ratios), speedup_low=ratios[outside], speedup_high=ratios[-1 - outside])


@torch.inference_mode()
def take_turns(
    model: nn.Module, ids: Tensor, ways: Mapping[str, Callable[[], AbstractContextManager]], rounds: int
) -> tuple[dict[str, dict[str, Any]], dict[str, list[tuple[float, float]]]]:
    """Latency, host time [ms], density and error of each way to attend, and the times of its call in each round [ms].

    The first way gives the logits to compare with. A context of Stem gives its report. Python collects garbage between
    rounds, in no timed call.
    """
    found, times = {way: dict(error="") for way in ways}, {way: [] for way in ways}
    expected = None
    for way in ways:
        try:
            with ways[way]() as report:
                logits = [prefill(model, ids) for _ in range(WARM_UP)][-1].double()
                expected = logits if expected is None else expected
                found[way] |= _checked(logits, expected, report)
        except Exception as error:  # one way's failure costs one row
            found[way]["error"] = first_line(error)
    begun = time.perf_counter()
    with _garbage_kept():
        for turn in range(rounds):
            if turn >= LEAST_ROUNDS and time.perf_counter() - begun > SECONDS:
                break
            gc.collect()
            for way in reversed(ways) if turn % 2 == 0 else ways:
                try:
                    with ways[way]():
                        times[way] += [] if found[way]["error"] else [_timed(model, ids)]
                except Exception as error:
                    found[way]["error"] = first_line(error)
    for way, pairs in times.items():
        if pairs:
            found[way] |= latencies([whole for whole, _ in pairs]) | dict(host_ms=median(host for _, host in pairs))
    return found, times


@contextmanager
def _garbage_kept() -> Iterator[None]:
    """No automatic garbage collection; a collection by hand looks at objects made in this context only."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def _checked(logits: Tensor, expected: Tensor, report: hf.Report | None) -> dict[str, float]:
    density = report.density() if isinstance(report, hf.Report) else 1.0
    if not logits.isfinite().all():
        raise FloatingPointError("the logits of the last position are not finite")
    error = float((logits - expected).norm() / expected.norm())
    if density == 1 and error > FARTHEST:
        raise ArithmeticError(
            f"every block is kept, and the logits differ by {error:.2g} from those of dense attention"
        )
    return dict(density=density)


def _timed(model: nn.Module, ids: Tensor) -> tuple[float, float]:
    synchronize = torch.cuda.synchronize if ids.is_cuda else lambda: None
    synchronize()
    start = time.perf_counter()
    prefill(model, ids)
    returned = time.perf_counter()
    synchronize()
    return 1e3 * (time.perf_counter() - start), 1e3 * (returned - start)


def cases(device: str, lengths: Iterable[int], *, seed: int = 0) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield (label, rows) of each model with random weights and each length."""
    for name, settings in MODELS[device].items():
        model = first_token.random_llama(settings, device, getattr(torch, SHAPES[device].dtype), seed)
        for tokens in lengths:
            yield f"prefill of {name}, {tokens:,} tokens", case(name, model, tokens, device, seed=seed)


def trained_cases(
    model: nn.Module, name: str, ids: Tensor, device: str, lengths: Iterable[int], *, seed: int = 0
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield (label, rows) of a model with trained weights on the text `ids`: `adaptive` keeps all of random ones."""
    for tokens in lengths:
        if tokens <= ids.shape[1]:
            yield f"prefill of {name}, {tokens:,} tokens", case(name, model, tokens, device, ids=ids, seed=seed)

"""Prefill of whole models with random weights, dense and through stem.hf in turn, and the host's share of the time."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from stem import hf
from stem.experiments.speed import first_token
from stem.experiments.speed.bench import first_line, latencies, with_speedups
from stem.experiments.speed.candidates import BRIEFLY, CONFIGS, PREFILL, PRESETS, SHAPES, Shape

MODELS = {  # shapes of SmolLM2-135M, Qwen2.5-0.5B, and eight layers of Llama-3.1-8B
    "cuda": {
        "135M": dict(
            hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
            num_attention_heads=9, num_key_value_heads=3, vocab_size=49152,
        ),
        "0.5B": dict(
            hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
            num_attention_heads=14, num_key_value_heads=2, vocab_size=151936,
        ),
        "8B, 8 layers": first_token.LLAMA_8B
        | dict(hidden_size=4096, num_hidden_layers=8, num_attention_heads=32),
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
ROUNDS, CALLS, WARM_UP = {"cuda": 12, "cpu": 3}, 2, 3  # rounds; calls of each kind in one; calls before, untimed
SECONDS, LEAST_ROUNDS = 4.0, 3  # no round of one length begins later, once there have been so many
TIMING = "perf_counter around a prefill of the whole model, dense and sparse in turn, clocks not locked"
FARTHEST = 0.1  # largest relative error of the logits where every block is kept


def prefill(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits of the last position [1, V] after a prefill as in generation."""
    return model(ids, use_cache=True, logits_to_keep=1).logits[:, 0]


def case(
    name: str, model: nn.Module, tokens: int, device: str, *, ids: Tensor | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """Rows of operation "prefill <name>" of one length: the dense back ends, then stem.hf with each config of WAYS.

    All take turns, and each round turns their order round, so that a change of the clocks meets all of them. `speedup`
    is the median over the rounds of a round's ratio to the fastest dense back end, from `speedup_low` to `speedup_high`
    (95 %). `host_ms` is the time until the call returns. A config that keeps every block must give the logits of the
    first dense back end. `ids` [1, >= tokens] are the prompt, by default random.
    """
    settings, dtype = model.config, str(model.dtype).removeprefix("torch.")
    head_dim = getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
    heads = settings.num_attention_heads, settings.num_key_value_heads, head_dim
    common = dict(operation=PREFILL + name) | asdict(Shape(tokens, 1, *heads, dtype)) | dict(timing=TIMING)
    if ids is None:
        ids = torch.randint(settings.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(seed))
    ways, rows = {}, {}
    contexts = first_token.dense_contexts(model, device)
    contexts.pop("fa4", None)  # its calls cost the host more than FlashAttention-3's, and the GPU no less
    for provider, context in contexts.items():
        ways[provider] = context
        rows[provider] = common | dict(provider=provider, config="dense", density=1.0)
    for chosen in WAYS[device]:
        config = CONFIGS[chosen] if chosen in CONFIGS else BRIEFLY[chosen][0]
        ways[chosen] = partial(hf.stem_prefill, model, config)
        rows[chosen] = common | dict(provider="stem", config=chosen, block_size=config.block_size)
    measured, rounds = take_turns(model, ids[:, :tokens].to(model.device), ways, ROUNDS[device])
    found = with_speedups([rows[way] | measured[way] for way in ways], seed)
    fastest = next((row["fastest_dense"] for row in found if row.get("fastest_dense")), None)
    for way, row in zip(ways, found, strict=True):
        if rounds[way] and fastest:
            row |= paired([dense / own for dense, own in zip(rounds[fastest], rounds[way], strict=False)])
    return found


def paired(ratios: list[float]) -> dict[str, float]:
    """Median of speed-ups of rounds and its 95 % interval from order statistics, the range for fewer than six."""
    ratios, count = sorted(ratios), len(ratios)
    outside = max(0, int((count - 1.96 * count**0.5) / 2))
    return dict(speedup=median(ratios), speedup_low=ratios[outside], speedup_high=ratios[count - 1 - outside])


@torch.inference_mode()
def take_turns(
    model: nn.Module, ids: Tensor, ways: Mapping[str, Callable[[], AbstractContextManager]], rounds: int
) -> tuple[dict[str, dict[str, Any]], dict[str, list[float]]]:
    """Latency, host time [ms], density and error of each way to attend, and the mean latency of each of its rounds.

    A context of Stem gives its report.
    """
    found = {way: dict(error="") for way in ways}
    times = {way: [] for way in ways}  # (whole call, until it returns) [ms]
    expected, begun = None, 0.0
    for turn in range(rounds + 1):
        begun = time.perf_counter() if turn == 1 else begun
        if turn > LEAST_ROUNDS and time.perf_counter() - begun > SECONDS:
            break
        for way in ways if turn % 2 == 0 else reversed(ways):
            if found[way]["error"]:
                continue
            try:
                with ways[way]() as report:
                    if turn:
                        times[way] += [_timed(model, ids) for _ in range(CALLS)]
                        continue
                    logits = [prefill(model, ids) for _ in range(WARM_UP)][-1].double()
                    expected = logits if expected is None else expected
                    found[way] |= _checked(logits, expected, report)
            except Exception as error:  # one way's failure costs one row
                found[way]["error"] = first_line(error)
    rounds_of = {}
    for way, pairs in times.items():
        whole = [whole for whole, _ in pairs]
        rounds_of[way] = [sum(whole[i : i + CALLS]) / CALLS for i in range(0, len(whole), CALLS)]
        if pairs:
            found[way] |= latencies(whole) | dict(host_ms=median(host for _, host in pairs))
    return found, rounds_of


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


def cases(device: str, profile: str, *, seed: int = 0) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield (label, rows) of each model with random weights and each length."""
    for name, settings in MODELS[device].items():
        model = first_token.random_llama(settings, device, getattr(torch, SHAPES[device].dtype), seed)
        for tokens in LENGTHS[device, profile]:
            yield f"prefill of {name}, {tokens:,} tokens", case(name, model, tokens, device, seed=seed)


def trained_cases(
    model: nn.Module, name: str, ids: Tensor, device: str, profile: str, *, seed: int = 0
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield (label, rows) of a model with trained weights on the text `ids`: `adaptive` keeps all of random ones."""
    for tokens in LENGTHS[device, profile]:
        if tokens <= ids.shape[1]:
            yield f"prefill of {name}, {tokens:,} tokens", case(name, model, tokens, device, ids=ids, seed=seed)

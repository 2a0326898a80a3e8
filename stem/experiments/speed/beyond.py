"""Speed beyond one operator: training, q, k and v of a real model, and the first token of a whole model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from stem import pretrained
from stem.experiments.documents import stdlib_documents
from stem.experiments.speed import first_token
from stem.experiments.speed.bench import run, with_speedups
from stem.experiments.speed.candidates import (
    CONFIGS,
    DENSE,
    SHAPES,
    Problem,
    Shape,
    attend_by_flex,
    attend_densely,
    attend_sparsely,
    attention_candidate,
    default_impls,
    stem_candidates,
    training_candidate,
)
from stem.experiments.theory import flow

TRAINING_TOKENS = {"cuda": (2**15, 2**13), "cpu": (2**11,)}  # forward and backward, the first with FlexAttention
TRAINING_CONFIG = "default"
CAPTURED_TOKENS = {"cuda": 2**13, "cpu": 2**11}
CAPTURED_LAYERS = {"cuda": (0, 10, 20, 29), "cpu": (10,)}  # of SmolLM2-135M's thirty


def training_case(
    shape: Shape, device: str, *, impls: Sequence[str], flex: bool, seed: int = 0
) -> list[dict[str, Any]]:
    """Rows of operation "forward+backward" of one shape with the config TRAINING_CONFIG; arguments of `bench.case`."""
    attends = {name: attend_densely(backend) for name, backend in DENSE[device].items()}
    attends |= {f"stem_{impl}": attend_sparsely(impl) for impl in impls}
    if flex:
        attends["flex"] = attend_by_flex()
    with torch.no_grad():
        problem = Problem(shape, CONFIGS[TRAINING_CONFIG], device, impls[0], seed)
        rows = [run(training_candidate(name, attend), problem, TRAINING_CONFIG) for name, attend in attends.items()]
    return with_speedups(rows, seed)


def captured_case(
    model: torch.nn.Module, ids: Tensor, layers: Iterable[int], device: str, *, impls: Sequence[str], seed: int = 0
) -> list[dict[str, Any]]:
    """Rows of attention and operator on q, k and v of a real model's layers: "captured attention", "captured operator".

    Args:
        model: A causal language model of transformers on the device; ids: Token ids [1, N].
        layers: Layer numbers; a row has their median latency, mean density and worst error.
        device, impls: See `bench.case`; the config is "default".
        seed: Of the sampled rows.
    """
    found = []
    for layer in layers:
        with torch.no_grad():
            q, k, v = (x.contiguous() for x in flow.capture(model, ids, layer))
            shape = Shape(q.shape[2], 1, q.shape[1], k.shape[1], q.shape[3], str(q.dtype).removeprefix("torch."))
            problem = Problem(shape, CONFIGS["default"], device, impls[0], seed, (q, k, v))
            candidates = [attention_candidate(name, attend_densely(of)) for name, of in DENSE[device].items()]
            for impl in impls:
                candidates += [c for c in stem_candidates(impl) if c.operation in ("attention", "operator")]
            for candidate in candidates:
                candidate = replace(candidate, operation=f"captured {candidate.operation}")
                found.append(run(candidate, problem, "default"))
    rows = pd.DataFrame(found)
    merged = []
    for _, group in rows.groupby(["operation", "provider"], sort=False):
        row = group.iloc[0].to_dict()
        numbers = group.select_dtypes("number")
        row |= numbers.median().to_dict() | dict(density=group.get("density", pd.Series(dtype=float)).mean())
        row |= dict(error_vs_fp64=group["error_vs_fp64"].max(), error="; ".join(e for e in group["error"] if e))
        merged.append({name: value for name, value in row.items() if not pd.isna(value)} | dict(error=row["error"]))
    return with_speedups(merged, seed)


def beyond_the_operator(
    device: str, profile: str, *, impls: Sequence[str] | None = None, seed: int = 0
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield (label, rows) of training, of time to first token, and of a real model's q, k and v.

    The headline measurements come first, so that an interrupted run holds them.
    """
    impls = default_impls(device) if impls is None else impls

    def train(lengths: Iterable[int], flex: bool = False):
        for tokens in lengths:
            shape = replace(SHAPES[device], tokens=tokens)
            yield (
                f"forward+backward, {tokens:,} tokens",
                training_case(shape, device, impls=impls, flex=flex, seed=seed),
            )

    def read(lengths: Iterable[int]):
        for tokens in lengths:
            rows = first_token.case(model, tokens, device, configs=configs, seed=seed)
            yield f"time to first token, {tokens:,} tokens", rows

    dtype = getattr(torch, SHAPES[device].dtype)
    yield from train(TRAINING_TOKENS[device][:1], flex=device == "cuda")
    settings = first_token.LLAMA_8B if device == "cuda" else first_token.TINY
    model = first_token.random_llama(settings, device, dtype, seed)
    configs = ("released",) if device == "cuda" else ("default",)
    lengths = first_token.LENGTHS[device, profile]
    yield from read(lengths)
    small, tokenizer = pretrained.load("smollm2", device=device, dtype=dtype)
    ids = prompt(tokenizer, CAPTURED_TOKENS[device]).to(device)
    yield "captured from SmolLM2", captured_case(small, ids, CAPTURED_LAYERS[device], device, impls=impls, seed=seed)
    yield from train(TRAINING_TOKENS[device][1:] if profile == "full" else ())


def prompt(tokenizer, tokens: int) -> Tensor:
    """Token ids [1, tokens] of the standard library's sources."""
    text = "\n".join(stdlib_documents().values())[: 8 * tokens]  # more than enough characters
    return torch.tensor(tokenizer(text).input_ids[:tokens])[None]

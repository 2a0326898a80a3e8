"""Speed beyond one operator: training, q, k and v of a real model, first token and prefill of whole models."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from pandas.api.types import is_numeric_dtype
from torch import Tensor

from stem import pretrained
from stem.experiments.documents import stdlib_documents
from stem.experiments.speed import candidates, drop_in, first_token
from stem.experiments.speed.bench import run, with_speedups
from stem.experiments.speed.candidates import CONFIGS, DENSE, SHAPES, Problem, Shape
from stem.experiments.theory import flow

TRAINING_TOKENS = {"cuda": (2**15, 2**13), "cpu": (2**11,)}  # forward and backward, the first with FlexAttention
TRAINING_CONFIG = "default"
CAPTURED_TOKENS = {"cuda": 2**13, "cpu": 2**11}
CAPTURED_LAYERS = {"cuda": (0, 10, 20, 29), "cpu": (10,)}  # of SmolLM2-135M's thirty


def training_case(
    shape: Shape, device: str, *, impls: Sequence[str], flex: bool, seed: int = 0
) -> list[dict[str, Any]]:
    """Rows of operation "forward+backward" of one shape with the config TRAINING_CONFIG; arguments of `bench.case`."""
    attends = {name: candidates.attend_densely(backend) for name, backend in DENSE[device].items()}
    attends |= {f"stem_{impl}": candidates.attend_sparsely(impl) for impl in impls}
    attends |= {"flex": candidates.attend_by_flex()} if flex else {}
    with torch.no_grad():
        problem = Problem(shape, CONFIGS[TRAINING_CONFIG], device, impls[0], seed)
        rows = [run(candidates.training_candidate(name, of), problem, TRAINING_CONFIG) for name, of in attends.items()]
    return with_speedups(rows, seed)


def captured_case(
    model: torch.nn.Module, ids: Tensor, layers: Iterable[int], device: str, *, impls: Sequence[str], seed: int = 0
) -> list[dict[str, Any]]:
    """Rows of attention and operator on q, k, v of a real model's layers: "captured attention", "captured operator".

    A row has the median latency, mean density and worst error of the layers. The config is "default"; ids are [1, N].
    """
    found = []
    for layer in layers:
        with torch.no_grad():
            q, k, v = (x.contiguous() for x in flow.capture(model, ids, layer))
            shape = Shape(q.shape[2], 1, q.shape[1], k.shape[1], q.shape[3], str(q.dtype).removeprefix("torch."))
            problem = Problem(shape, CONFIGS["default"], device, impls[0], seed, (q, k, v))
            compared = [candidates.attention_candidate(*named) for named in candidates.dense_attends(device).items()]
            for impl in impls:
                compared += [c for c in candidates.stem_candidates(impl) if c.operation in ("attention", "operator")]
            for candidate in compared:
                found.append(run(replace(candidate, operation=f"captured {candidate.operation}"), problem, "default"))
    rows, keys = pd.DataFrame(found), ["operation", "provider"]
    how = {name: "median" if is_numeric_dtype(of) else "first" for name, of in rows.drop(columns=keys).items()}
    how |= {name: of for name, of in dict(density="mean", error_vs_fp64="max").items() if name in rows}
    how["error"] = lambda of: "; ".join(filter(None, of))
    merged = rows.groupby(keys, sort=False, as_index=False).agg(how)
    return with_speedups([row.dropna().to_dict() for _, row in merged.iterrows()], seed)


def beyond_the_operator(
    device: str, profile: str, *, impls: Sequence[str] | None = None, seed: int = 0
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield (label, rows) of training, whole models, and a real model's q, k and v; headline measurements first."""
    common = dict(impls=impls or candidates.default_impls(device), seed=seed)

    def train(tokens: int, flex: bool) -> tuple[str, list[dict[str, Any]]]:
        rows = training_case(replace(SHAPES[device], tokens=tokens), device, flex=flex, **common)
        return f"forward+backward, {tokens:,} tokens", rows

    cuda, dtype = device == "cuda", getattr(torch, SHAPES[device].dtype)
    first, *others = TRAINING_TOKENS[device]
    yield train(first, flex=cuda)
    model = first_token.random_llama(first_token.LLAMA_8B if cuda else first_token.TINY, device, dtype, seed)
    configs = ("released",) if cuda else ("default",)
    for tokens in first_token.LENGTHS[device, profile]:
        rows = first_token.case(model, tokens, device, configs=configs, seed=seed)
        yield f"time to first token, {tokens:,} tokens", rows
    del model  # 16 GB on CUDA
    yield from drop_in.cases(device, profile, seed=seed)
    small, tokenizer = pretrained.load("smollm2", device=device, dtype=dtype)
    text = "\n".join(stdlib_documents().values())[: 8 * CAPTURED_TOKENS[device]]  # more than enough characters
    ids = torch.tensor(tokenizer(text).input_ids[: CAPTURED_TOKENS[device]])[None].to(device)
    yield "captured from SmolLM2", captured_case(small, ids, CAPTURED_LAYERS[device], device, **common)
    for tokens in others if profile == "full" else ():
        yield train(tokens, flex=False)

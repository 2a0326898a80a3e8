"""Speed beyond one operator: training, q, k and v of a real model, first token and prefill of whole models."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from pandas.api.types import is_numeric_dtype
from torch import Tensor

import stem
from stem import pretrained
from stem.experiments.documents import stdlib_documents
from stem.experiments.long_context.report import MODELS
from stem.experiments.speed import candidates, drop_in, first_token, peers
from stem.experiments.speed.bench import run, with_speedups
from stem.experiments.speed.candidates import CONFIGS, DENSE, EIGHT_PERCENT, LOW_DENSITY, SHAPES, Problem, Shape
from stem.experiments.theory import flow

TRAINING_TOKENS = {"cuda": (2**15, 2**13), "cpu": (2**11,)}  # forward and backward, the first with FlexAttention
TRAINING_CONFIG = "default"
CAPTURED_TOKENS = {"cuda": 2**13, "cpu": 2**11}
CAPTURED_LAYERS = {"cuda": (0, 10, 20, 29), "cpu": (10,)}  # of SmolLM2-135M's thirty
BREAK_EVEN_TOKENS = (2048, 3000, 4096, 5500, 8192, 12000, 16384)  # on CUDA
LOW = {"cuda": (2**16, 2**17), "cpu": ()}  # tokens at which the first token has the config EIGHT_PERCENT too
SMALL = "smollm2"  # the model of the rows of q, k and v
PARTS = ("training", "first token", "drop-in", "captured", "break-even")


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
            problem = _captured_problem(flow.capture(model, ids, layer), CONFIGS["default"], device, impls[0], seed)
            compared = [candidates.attention_candidate(*named) for named in candidates.dense_attends(device).items()]
            for impl in impls:
                compared += [c for c in candidates.stem_candidates(impl) if c.operation in ("attention", "operator")]
            for candidate in compared:
                found.append(run(replace(candidate, operation=f"captured {candidate.operation}"), problem, "default"))
    return with_speedups(_over_layers(found), seed)


def break_even_cases(
    model: torch.nn.Module, name: str, ids: Tensor, layers: Iterable[int], device: str, *, seed: int = 0
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield (label, rows) by length of the preset adaptive without its `dense_up_to`, on q, k, v of a model's layers.

    Operations are "captured <name> attention" (dense) and "captured <name> operator", on CUDA from a graph as well.
    Shorter prompts are the first tokens of the captured ones; ids are [1, N]. Rows are those of `captured_case`.
    """
    config = stem.StemConfig.preset("adaptive", dense_up_to=0)
    captured = flow.captures(model, ids, layers)
    dense = {name: of for name, of in candidates.dense_attends(device).items() if name not in (*peers.FP8, "fa4")}
    compared = [candidates.attention_candidate(*named) for named in dense.items()] + candidates.stem_candidates(None)
    compared += [candidates.graph_candidate(candidate) for candidate in compared] if device == "cuda" else []
    named = [replace(c, operation=_captured_name(c.operation, name)) for c in compared]
    for tokens in BREAK_EVEN_TOKENS:
        found = []
        for qkv in captured.values() if tokens <= ids.shape[1] else ():
            with torch.no_grad():
                short = tuple(x[:, :, :tokens] for x in qkv)
                problem = _captured_problem(short, config, device, candidates.default_impls(device)[-1], seed)
                found += [run(candidate, problem, candidates.NEVER_DENSE) for candidate in named]
        if found:
            yield f"break-even on {name}, {tokens:,} tokens", with_speedups(_over_layers(found), seed)


def _captured_name(operation: str, name: str) -> str:
    prefix = candidates.GRAPH if operation.startswith(candidates.GRAPH) else ""
    return f"{prefix}captured {name} {operation.removeprefix(prefix)}"


def _captured_problem(qkv: tuple[Tensor, ...], config: stem.StemConfig, device: str, impl: str, seed: int) -> Problem:
    q, k, v = (x.contiguous() for x in qkv)
    shape = Shape(q.shape[2], 1, q.shape[1], k.shape[1], q.shape[3], str(q.dtype).removeprefix("torch."))
    return Problem(shape, config, device, impl, seed, (q, k, v))


def _over_layers(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for the rows of all layers: median latency, mean density, worst error."""
    rows, keys = pd.DataFrame(found), ["operation", "provider"]
    how = {name: "median" if is_numeric_dtype(of) else "first" for name, of in rows.drop(columns=keys).items()}
    how |= {name: of for name, of in dict(density="mean", error_vs_fp64="max").items() if name in rows}
    how["error"] = lambda of: "; ".join(filter(None, of))
    merged = rows.groupby(keys, sort=False, as_index=False).agg(how)
    return [row.dropna().to_dict() for _, row in merged.iterrows()]


def calibrated(settings: dict[str, int], tokens: int, device: str, dtype: torch.dtype, seed: int) -> stem.StemConfig:
    """The preset adaptive with the threshold at which two layers of a model's shape compute LOW_DENSITY."""
    model = first_token.random_llama(settings | dict(num_hidden_layers=2), device, dtype, seed)
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(seed))
    return stem.calibrate(model, [ids], LOW_DENSITY, stem.StemConfig.preset("adaptive"), tolerance=0.002).config


def beyond_the_operator(
    device: str,
    profile: str,
    *,
    impls: Sequence[str] | None = None,
    seed: int = 0,
    parts: Sequence[str] = PARTS,
    lengths: Sequence[int] | None = None,
    model: str = SMALL,
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield (label, rows) of training, whole models, and a real model's q, k and v; headline measurements first.

    `lengths` are those of "drop-in" and "first token", by default of the profile. `model`, a name for
    stem.pretrained.load, is that of "break-even" and of "drop-in" with trained weights. For others than SMALL,
    "drop-in" has no random weights, and "captured", whose rows name no model, must be left out.
    """
    common = dict(impls=impls or candidates.default_impls(device), seed=seed)

    def train(tokens: int, flex: bool) -> tuple[str, list[dict[str, Any]]]:
        rows = training_case(replace(SHAPES[device], tokens=tokens), device, flex=flex, **common)
        return f"forward+backward, {tokens:,} tokens", rows

    prompts = lengths or first_token.LENGTHS[device, profile]
    lengths = lengths or drop_in.LENGTHS[device, profile]
    cuda, dtype = device == "cuda", getattr(torch, SHAPES[device].dtype)
    first, *others = TRAINING_TOKENS[device]
    if "training" in parts:
        yield train(first, flex=cuda)
    if "first token" in parts:
        yield from _first_token_cases(device, prompts, dtype, seed)
    if "drop-in" in parts and model == SMALL:
        yield from drop_in.cases(device, lengths, seed=seed)
    parts = {*parts} - ({"break-even", "drop-in"} if not cuda else set())
    if parts & {"captured", "break-even", "drop-in"}:
        trained, tokenizer = pretrained.load(model, device=device, dtype=dtype)
        name = MODELS.get(Path(pretrained.resolve(model)).name, Path(model).stem)
        longest = trained.config.max_position_embeddings
        text = "\n".join(stdlib_documents().values())[: 8 * max(*lengths, BREAK_EVEN_TOKENS[-1])]
        ids = torch.tensor(tokenizer(text).input_ids)[None, :longest].to(device)
        layers = [layer for layer in CAPTURED_LAYERS[device] if layer < trained.config.num_hidden_layers]
    if "drop-in" in parts:
        yield from drop_in.trained_cases(trained, f"{name}, trained", ids, device, lengths, seed=seed)
    if "captured" in parts:
        short = ids[:, : CAPTURED_TOKENS[device]]
        yield f"captured from {name}", captured_case(trained, short, layers, device, **common)
    if "break-even" in parts:
        ids = ids[:, : BREAK_EVEN_TOKENS[-1]]
        yield from break_even_cases(trained, name, ids, layers, device, seed=seed)
    for tokens in others if profile == "full" and "training" in parts else ():
        yield train(tokens, flex=False)


def _first_token_cases(
    device: str, lengths: Sequence[int], dtype: torch.dtype, seed: int
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    settings = first_token.LLAMA_8B if device == "cuda" else first_token.TINY
    configs = {"released": CONFIGS["released"]} if device == "cuda" else {"default": CONFIGS["default"]}
    low = {tokens: calibrated(settings, tokens, device, dtype, seed) for tokens in lengths if tokens in LOW[device]}
    model = first_token.random_llama(settings, device, dtype, seed)
    for tokens in lengths:
        more = {EIGHT_PERCENT: low[tokens]} if tokens in low else {}
        rows = first_token.case(model, tokens, device, configs=configs | more, seed=seed)
        yield f"time to first token, {tokens:,} tokens", rows

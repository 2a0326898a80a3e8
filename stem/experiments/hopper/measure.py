"""Times of the variants, and stamps of the clock inside them, on a Hopper GPU."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

import stem
from stem.attention import stem_attention
from stem.cells import kernel_cells
from stem.experiments.hopper import variants
from stem.experiments.speed import gate
from stem.experiments.speed.bench import measure
from stem.experiments.speed.candidates import CONFIGS, Problem, Shape
from stem.experiments.speed.variants import threshold_for
from stem.metrics import attention_flops

TIMED = Shape(2**15)  # attention of one layer of Llama-3.1-8B
DENSITY = 0.25
STAMPED = Shape(2**12, q_heads=8, kv_heads=2)  # every block is kept: 256 tasks of 1 to 32 blocks
WINDOW = range(22, 38)  # steps of program 0 whose stamps are kept: the end of its first task, the start of the next
SCHEDULED = ("overlap", "persistent")  # stages whose tasks are kept, of all programs
SM, NS = variants.MARKS.index("sm"), variants.MARKS.index("ns")
BOUND = Shape(2**17)  # on which the FP8 kernel is timed without parts of its softmax
MOST_ERROR = 0.01  # of the sums of cells, relative


def problem_of(shape: Shape, seed: int, density: float) -> Problem:
    """Random inputs, and the blocks that the default config keeps at a density."""
    return Problem(shape, stem.StemConfig(density=density), "cuda", "triton", seed)


def forward(module, problem: Problem) -> Callable[[], tuple[Tensor, Tensor]]:
    """The call of a module's sparse_forward on a problem: out and lse."""
    lists = problem.selection.kv_indices, problem.selection.kv_num_blocks
    return lambda: module.sparse_forward(*problem.qkv, *lists, 128, problem.shape.head_dim**-0.5)


def checked(call: Callable[[], tuple[Tensor, Tensor]], problem: Problem, allowed: float | None = None) -> float:
    """Largest relative L2 error of sampled rows against attention in fp64; WrongResult if it is too large."""
    with gate.poisoned_buffers():
        return gate.check_output(call()[0], *problem.qkv, problem.rows, problem.selection, allowed)


def attention_times(seed: int = 0) -> Iterator[dict]:
    """Time the Triton kernel, each stage of the bf16 kernel, its diary, and FP8 with and without its quantisation."""
    from stem.kernels import fp8_quantize, sparse_forward

    problem = problem_of(TIMED, seed, DENSITY)
    about = dict(tokens=TIMED.tokens, q_heads=TIMED.q_heads, density=problem.selection.density())
    flop = attention_flops(problem.selection, TIMED.head_dim)
    modules = [("attention", "triton", sparse_forward, None)]
    for part, every in (("attention", variants.HOPPER), ("diary", variants.DIARY)):
        modules += [(part, stage, variants.load("hopper_forward", edits), None) for stage, edits in every.items()]
    modules += [("attention", "fp8", variants.load("fp8_forward", {}), gate.FP8_TOLERANCE)]
    for part, stage, module, allowed in modules:
        call = forward(module, problem)
        error = checked(call, problem, allowed)
        times = measure(call, "cuda")
        yield dict(part=part, stage=stage, error=error, tflops=flop / times["latency_ms"] / 1e9) | about | times
    lse = torch.empty(problem.q.shape[:3], device="cuda")
    quantize = measure(lambda: fp8_quantize.quantize(*problem.qkv, 128, TIMED.head_dim**-0.5, lse), "cuda")
    yield dict(part="attention", stage="fp8 quantisation") | about | quantize


def bound_rows(seed: int = 0) -> Iterator[dict]:
    """Rows of `variants.BOUNDS` on the blocks of the released schedule, without quantisation: stage, latency, tflops.

    The shipped kernel is checked, and has an error.
    """
    from stem.kernels.fp8_quantize import quantize

    problem = Problem(BOUND, CONFIGS["released"], "cuda", "triton", seed)
    selection, out, scale = problem.selection, torch.empty_like(problem.q), BOUND.head_dim**-0.5
    lse = torch.empty(problem.q.shape[:3], device="cuda")
    (q, *of_q), (k, *of_k), (v, *of_v) = quantize(*problem.qkv, 128, scale, lse)
    lists, flop = (selection.kv_indices, selection.kv_num_blocks), attention_flops(selection, BOUND.head_dim)
    for stage, edits in variants.BOUNDS.items():
        module = variants.load("fp8_forward", edits)
        call = partial(module.attend_quantized, q, k, v, (*of_q, *of_k, *of_v), lists, BOUND.tokens, out, lse)
        call()
        error = None
        if not edits:
            error = gate.check_output(out, *problem.qkv, problem.rows, selection, gate.FP8_TOLERANCE)
        times = measure(call, "cuda")
        row = dict(stage=stage, tokens=BOUND.tokens, density=selection.density(), error=error)
        yield row | dict(tflops=flop / times["latency_ms"] / 1e9) | times | dict(seed=seed)


def cell_times(seed: int = 0) -> Iterator[dict]:
    """Time each stage of the kernel that pairs cells, and the parts of the preset adaptive."""
    from stem.kernels.cell_features import cell_features
    from stem.planning import select

    problem = problem_of(TIMED, seed, DENSITY)
    q, k, v = problem.qkv
    config = threshold_for(DENSITY, q, k, v, stem.StemConfig.preset("adaptive"))
    cells, scale = kernel_cells(TIMED.tokens, TIMED.tokens, config), TIMED.head_dim**-0.5
    features = cell_features(q, k, cells, scale)
    about = dict(tokens=TIMED.tokens, q_heads=TIMED.q_heads)
    num_cells = features[0].shape[2]
    flop = features[0].shape[-1] * num_cells * (num_cells + 1) * TIMED.q_heads
    for stage, edits in variants.CELLS.items():
        call = pairing(stage_of_cells(edits), features, cells)
        error = sums_error(call(), *features, cells)
        times = measure(call, "cuda")
        yield dict(part="cells", stage=stage, error=error, tflops=flop / times["latency_ms"] / 1e9) | about | times
    choose = partial(select, q, k, v, config, scale, None)
    selection = choose()
    parts = {
        "features": lambda: cell_features(q, k, cells, scale),
        "pairs of cells": pairing(variants.load("cell_pairs", {}), features, cells),
        "whole selection": choose,
        "attention": lambda: stem.block_sparse_attention(q, k, v, selection),
        "whole operator": lambda: stem_attention(q, k, v, config),
    }
    for stage, call in parts.items():
        call()
        yield dict(part="adaptive", stage=stage, density=selection.density()) | about | measure(call, "cuda")


def stage_of_cells(edits: variants.Edits, address: int | None = None) -> ModuleType:
    """A stage of cell_pairs.py, see variants.load. It uses the Triton kernel, also where the Gluon one applies."""
    module = variants.load("cell_pairs", edits, address)
    module.fits_sm90 = lambda *features: False
    return module


def pairing(module, features: tuple[Tensor, Tensor], cells) -> Callable[[], Tensor]:
    """The call of a module's pair_cells: sums [B * Hq, cells, nk] of all query blocks, which are one chunk."""

    def pair() -> Tensor:
        ((_, sums, _),) = module.pair_cells(*features, None, cells)
        return sums

    return pair


def sums_error(sums: Tensor, q_features: Tensor, k_features: Tensor, cells) -> float:
    """Largest relative L2 error of the shares of the last 32 query cells of the last head, against fp64.

    Raises:
        WrongResult: If it is above MOST_ERROR.
    """
    logits = q_features[0, -1, -32:].double() @ k_features[0, -1].double().T
    last = cells.kv_len - 1 - cells.q_cell * torch.arange(31, -1, -1, device=sums.device)  # position of each cell
    starts = torch.arange(logits.shape[1], device=sums.device) * cells.k_cell
    logits = logits.masked_fill(starts > last[:, None], -torch.inf)
    weights = (logits * math.log(2)).softmax(-1)  # logits are powers of two
    expected = weights.unflatten(-1, (-1, cells.key_cells)).sum(-1)
    found = sums[-1, -32:].double() * (expected > 0)
    found /= found.sum(-1, keepdim=True)
    error = ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()
    if not error <= MOST_ERROR:
        raise gate.WrongResult(f"shares of cells differ by {error:.2g}, allowed are {MOST_ERROR}")
    return error


def stage_rows(seed: int = 0) -> Iterator[dict]:
    """Rows of all times: part (attention, diary, cells or adaptive), stage, error, latency; tflops count kept pairs."""
    for times in (attention_times, cell_times):
        for row in times(seed):
            print(f"{row['part']:<10} {row['stage']:<24} {row['latency_ms']:7.3f} ms", flush=True)
            yield row | dict(seed=seed)


def timeline_rows(seed: int = 0) -> Iterator[dict]:
    """Rows of stamps: part, stage, program, group and step, then the marks that were set.

    Marks are clock cycles since the first stamp on the same multiprocessor, `sm`. `ns`, at the start of a task, is the
    time since the first task. Program 0 has its stamps in WINDOW; in the stages of SCHEDULED, others have their tasks.
    """
    for part, stage, found in stamps(seed):
        clocks, sms, started = found[..., :SM], found[..., SM].amax((1, 2)), found[..., NS]
        begin = started[started > 0].min().item()
        first = clocks.where(clocks > 0, clocks.max()).amin((1, 2, 3))  # of each program
        for program, group, step in (clocks.amax(3) > 0).nonzero().tolist():
            zero = first[sms == sms[program]].min().item()
            values = dict(zip(variants.MARKS[:SM], clocks[program, group, step].tolist(), strict=True))
            is_task = values["task"] > 0 and stage in SCHEDULED
            if not (is_task and group == 0 or program == 0 and step in WINDOW):
                continue
            row = dict(part=part, stage=stage, program=program, group=group, step=step, sm=sms[program].item())
            row |= {mark: clock - zero for mark, clock in values.items() if clock}
            ns = started[program, group, step].item()
            yield row | dict(ns=ns - begin if ns else None, seed=seed)


def stamps(seed: int = 0) -> Iterator[tuple[str, str, Tensor]]:
    """Run each stage stamped; yields part, stage and the stamps, int64 of variants.SHAPE on the CPU, 0 where unset."""
    from stem.kernels.cell_features import cell_features

    buffer = torch.zeros(variants.SHAPE, dtype=torch.int64, device="cuda")
    problem = problem_of(STAMPED, seed, 1.0)
    kernels = [("hopper_forward", stage, edits) for stage, edits in variants.HOPPER.items()]
    kernels += [("fp8_forward", "fp8", variants.FP8)]
    for kernel, stage, edits in kernels:
        call = forward(variants.load(kernel, edits, buffer.data_ptr()), problem)
        checked(call, problem, gate.FP8_TOLERANCE if stage == "fp8" else None)
        yield "attention", stage, stamped(call, buffer)
    problem = problem_of(TIMED, seed, DENSITY)
    config = stem.StemConfig.preset("adaptive")
    cells = kernel_cells(TIMED.tokens, TIMED.tokens, config)
    features = cell_features(problem.q, problem.k, cells, TIMED.head_dim**-0.5)
    for stage, edits in variants.CELLS.items():
        call = pairing(stage_of_cells(edits, buffer.data_ptr()), features, cells)
        yield "cells", stage, stamped(call, buffer)


def stamped(call: Callable, buffer: Tensor) -> Tensor:
    """The stamps of one call, after a call that warms up."""
    call()
    buffer.zero_()
    call()
    return buffer.cpu()

"""Texts and tables of notebook 08, of kernels, of their stages and cycles; and a sentence for results/README.md."""

import ast
import difflib

import pandas as pd

from stem.experiments.hopper import variants
from stem.experiments.markdown import full_rows, number, tokens_label

TENSOR_FLOP = {"bf16": 4096, "fp8": 8192}
"""Operations of the tensor cores of one multiprocessor in a clock cycle; NVIDIA H100 architecture white paper."""

BLOCK_FLOP = 2 * 2 * 128**3
"""Operations of QK^T and PV of one block pair, 128 tokens and 128 dimensions."""


def source(kernel: str, *names: str) -> str:
    """Functions of a module of stem.kernels, or lines of it that assign to these names, as in the file."""
    text = variants.source_of(kernel)
    lines, found = text.split("\n"), {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
        elif isinstance(node, ast.Assign):
            found[node.targets[0].id] = "\n".join(lines[node.lineno - 1 : node.end_lineno])
    return "\n\n".join(found[name] for name in names)


def added(kernel: str, before: variants.Edits, after: variants.Edits) -> str:
    """Lines that differ between two variants of a kernel, "-" before and "+" after; without stamps."""
    text = variants.source_of(kernel)
    versions = [variants.edited(text, edits, stamped=False).split("\n") for edits in (before, after)]
    changed = [line for line in difflib.ndiff(*versions) if line[:2] in ("- ", "+ ")]
    return "\n".join(line.rstrip() for line in changed)


def times(rows: pd.DataFrame, part: str) -> pd.DataFrame:
    """Stages of a part in order: latency [ms], rate [TFLOP/s], gain over the stage before, relative error.

    A part of a stage, such as the quantisation before FP8, has no rate and no gain.
    """
    shown = rows[rows.part == part].set_index("stage")
    shown = shown[["latency_ms", "tflops", "error"]]
    gain = shown.latency_ms.shift() / shown.latency_ms
    return shown.assign(gain=gain.where(shown.tflops.notna()))[["latency_ms", "tflops", "gain", "error"]]


def block_cycles(rows: pd.DataFrame) -> pd.DataFrame:
    """Clock cycles between two key blocks of a consumer, the median by stage, and the share that tensor cores need."""
    of_consumers = rows[(rows.part == "attention") & (rows.group < 2)].dropna(subset="tile")
    steps = of_consumers.sort_values("step").groupby(["stage", "group"], sort=False).tile.diff()
    cycles = steps.groupby(of_consumers.stage).median()[of_consumers.stage.unique()]
    rate = [TENSOR_FLOP["fp8" if stage == "fp8" else "bf16"] for stage in cycles.index]
    return pd.DataFrame(dict(cycles=cycles, tensor_cores=BLOCK_FLOP / pd.Series(rate, cycles.index) / cycles))


def bound_of_fp8(device: str) -> str:
    """A sentence on the rates of the FP8 kernel with and without parts of its softmax; nothing without rows."""
    rows = full_rows("hopper/bounds")
    if rows.empty or device not in set(rows.device):
        return ""
    of_device = rows[rows.device == device]
    tokens, density = of_device[["tokens", "density"]].iloc[0]
    rates = [f"{number(rate)} TFLOP/s" for rate in of_device.tflops]
    told = f"At {tokens_label(tokens)} tokens and density {density:.1%} the FP8 kernel alone reaches {rates[0]}. "
    told += f"Without row maxima it would reach {rates[1]}, and without exponentials {rates[2]}. "
    return f"{told}Both give wrong weights. `make hopper` measures this."

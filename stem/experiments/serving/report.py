"""Generated table of results/serving: times to the first token and of further ones, vLLM's own attention and Stem."""

from __future__ import annotations

import subprocess
import sys

import pandas as pd
import torch

from stem.experiments import records
from stem.experiments.long_context.report import MODELS
from stem.experiments.markdown import by_device, full_rows, markdown_table, not_run, number, tokens_label
from stem.experiments.serving import bounds, engines


def serving() -> str:
    """One table per machine: a line for each prompt, a column for each density, with speed-ups over vLLM."""
    rows = full_rows("serving")
    if rows.empty:
        return not_run("make serving PROFILE=full", "a GPU with vLLM")
    return "\n\n".join(f"**{device}**\n\n{_table(part)}" for device, part in by_device(rows))


def rows_of_a_cpu() -> tuple[str, pd.DataFrame]:
    """Rows of the embedded model on a CPU and where they come from: measured now if vLLM is here, else stored ones.

    The engines run in a process of their own, whose log is left out. Raises RuntimeError with its end if they fail.
    """
    if not engines.is_installed() or torch.cuda.is_available():
        rows = full_rows("serving")
        rows = rows[~rows.device.str.contains("NVIDIA")]
        return f"vLLM's CPU build is not installed here: rows stored by {', '.join(rows.device.unique())}", rows
    command = [sys.executable, "-m", "stem.experiments.serving", "--profile", "smoke"]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{process.stderr[-2000:]}")
    rows = records.read_rows("serving")
    return "measured here", rows[(rows.profile == "smoke") & (rows.machine == records.machine_name())]


def _table(rows: pd.DataFrame) -> str:
    """Lines of first tokens, then of further ones; the cost of chunks, the errors of FP8, and the clock if known."""
    rows = rows.assign(compute=rows.compute.fillna("input") if "compute" in rows else "input")
    sparse = rows[rows.attention == "Stem"].sort_values(["compute", "lists", "density"], ascending=False)
    ways = list(dict.fromkeys(zip(sparse.compute, sparse.lists, sparse.density, strict=True)))
    told = {"group": ", lists of groups", "fp8": ", FP8"}
    header = ["prompt", "vLLM"]
    header += [f"Stem, density {density:g}{told.get(lists, '')}{told.get(way, '')}" for way, lists, density in ways]
    lines = []
    for (chunk, requests, tokens), group in rows.groupby(["chunk", "requests", "tokens"]):
        name = tokens_label(tokens) if requests == 1 else f"{requests} of {tokens_label(tokens)} at once"
        name += f", chunks of {tokens_label(chunk)}" if chunk else ""
        lines.append([name, *_cells(group, "first_token_ms", ways)])
    for tokens, group in rows[rows.token_ms.notna()].groupby("tokens"):
        lines.append([f"each further token after {tokens_label(tokens)}", *_cells(group, "token_ms", ways)])
    accuracy = _accuracy() if "fp8" in set(rows.compute) else ""
    return markdown_table(header, lines) + _chunks(rows) + accuracy + _clocks(rows) + _bounds(rows)


def _accuracy() -> str:
    """Paragraphs on the errors of FP8, in attention and in answers; empty without rows of either."""
    told = filter(None, (_error(full_rows("speed/variants")), _answers(full_rows("serving/accuracy"))))
    return "".join(f"\n\n{part}" for part in told)


def _error(rows: pd.DataFrame) -> str:
    """Sentence on the error of attention in FP8, from rows of stem.experiments.speed.variants."""
    if "variant" not in rows:
        return ""
    known = rows[(rows.what == "random normal") & (rows.tokens == rows.tokens.max())].set_index("variant").error
    if not {"released", "released, FP8"} <= set(known.index):
        return ""
    fp8, bf16 = known["released, FP8"], known["released"]
    return f"Attention in FP8 is {fp8:.2%} from exact attention to the same blocks (random normal), bf16 {bf16:.2%}."


def _answers(rows: pd.DataFrame) -> str:
    """Table of losses and of changes by FP8, whole and in chunks, from rows of `accuracy`; empty without rows."""
    if rows.empty:
        return ""
    lines, costs = [], []
    for (attention, density, compute), group in rows.groupby(["attention", "density", "compute"], sort=False):
        name = "vLLM" if attention == "vLLM" else f"Stem, density {density:g}{', FP8' if compute == 'fp8' else ''}"
        group = group.sort_values("chunk")
        changes = [f"{x.difference:.4f}, {x.largest_difference:.2g}" for x in group.itertuples()]
        lines.append([name, *(f"{loss:.4f}" for loss in group.loss), *changes])
        if compute == "fp8":
            same = (rows.attention == attention) & (rows.density == density) & (rows.compute == "input")
            whole, cut = group.loss.to_numpy() - rows[same].sort_values("chunk").loss.to_numpy()
            worst = f"a single log-probability by up to {group.largest_difference.max():.2g}"
            costs.append(f"at density {density:g} the loss by {whole:+.4f} ({cut:+.4f} in chunks) and {worst}")
    text = f"{tokens_label(rows.tokens.iloc[0])} tokens of a text ({MODELS.get(rows.model[0], rows.model[0])})"
    chunks = f"chunks of {tokens_label(rows.chunk.max())}"
    header = [f"loss of {text} [nats]", "whole", chunks, "change by token, whole: mean, largest", f"change, {chunks}"]
    told = "A change is of a log-probability, from that of the whole text in bf16 at the same density."
    if not rows[rows.compute == "input"].difference.any():
        told += " In bf16, chunks change no log-probability by a single bit."
    return f"{markdown_table(header, lines)}\n\n{told} FP8 changes {'; '.join(costs)} nats."


def _chunks(rows: pd.DataFrame) -> str:
    """Sentence on the longest prompt: what chunks add to the time of its first token; "" without rows of one run."""
    known = rows[(rows.tokens == rows.tokens.max()) & (rows.requests == 1) & (rows.lists == "head")]
    if not {"speedup", "git_commit"} <= set(known) or set(known.chunk) <= {0}:
        return ""
    told, size = [], known.chunk.max()
    ways = known[known.speedup.notna()].groupby(["attention", "density", "compute"], sort=False)
    for (attention, density, compute), group in ways:
        found = group.drop_duplicates("chunk").set_index("chunk")
        if {0, size} <= set(found.index) and found.git_commit[0] == found.git_commit[size]:
            way = attention if attention == "vLLM" else f"density {density:g}{', FP8' if compute == 'fp8' else ''}"
            told.append(f"{way} {found.first_token_ms[size] / found.first_token_ms[0] - 1:+.1%}")
    where = f"the time to the first token of {tokens_label(known.tokens.iloc[0])}"
    return f"\n\nChunks of {tokens_label(size)} change {where}: {'; '.join(told)}." if told else ""


def _clocks(rows: pd.DataFrame) -> str:
    """Sentence with the median clock of the shortest and the longest whole prompt; empty where no row has it."""
    rows = rows[(rows.chunk == 0) & rows.get("clock_mhz", pd.Series(index=rows.index, dtype=float)).notna()]
    if rows.empty:
        return ""
    clocks = rows.groupby("tokens").clock_mhz.median().iloc[[0, -1]]
    told = " and ".join(f"{mhz:.0f} MHz at {tokens_label(tokens)}" for tokens, mhz in clocks.items())
    return f"\n\nMedian clock of the multiprocessors in these rounds: {told}."


def _bounds(rows: pd.DataFrame) -> str:
    """Sentences on the longest whole prompt: what a perfect kernel would reach, and the power; "" without a clock."""
    whole = rows[(rows.chunk == 0) & (rows.lists == "head") & (rows.compute == "input")]
    whole = whole[whole.tokens == whole.tokens.max()].drop_duplicates("density").set_index("density")
    if "clock_mhz" not in whole or len(whole) < 3 or whole.clock_mhz.isna().any():
        return ""
    found = bounds.perfect_speedups(whole)
    listed = " and ".join(f"{speedup:.3f}x at density {density:g}" for density, speedup in found.items())
    where = f"at {tokens_label(whole.tokens.iloc[0])} and Stem's clock"
    outside, attention = bounds.parts(whole.first_token_ms)
    before = whole.first_token_ms[1.0] - outside
    factors = " and ".join(f"{1 / x:.1f} × {before / attention:.2f} at density {x:g}" for x in found)
    share = before / whole.first_token_ms[1.0]
    told = (
        f"\n\nAt {tokens_label(whole.tokens.iloc[0])}, on a line through Stem's times at two densities, attention "
        f"takes {share:.0%} of vLLM's time. The factors of its own speed-up, block pairs not computed and the rate on "
        f"the others, are {factors}."
    )
    told += f"\n\nAttention in bf16 that left no clock of the tensor cores idle, {where}, would give {listed}."
    if "power_w" in whole and whole.power_w.notna().all():
        told += f" The GPU drew {whole.power_w.min():.0f} to {whole.power_w.max():.0f} W there"
        share = "all" if whole.capped.min() == 1 else f"at least {whole.capped.min():.0%} of the"
        told += f", and its power limit held the clock down in {share} samples."
    return told


def _cells(rows: pd.DataFrame, column: str, ways: list[tuple[str, str, float]]) -> list[str]:
    stock = rows[rows.attention == "vLLM"].iloc[0]
    ours = rows[rows.attention == "Stem"][::-1]  # of several the first
    found = {(row.compute, row.lists, row.density): row for row in ours.itertuples()}
    cells = [_cell(getattr(found[x], column), stock[column], found[x], column) if x in found else "–" for x in ways]
    return [number(stock[column], " ms"), *cells]


def _cell(own: float, dense: float, row, column: str) -> str:
    """A time and its speed-up: of the rounds if the row has it, else the ratio of the two times."""
    ratio = f"{dense / own:.2f}x"
    if column == "first_token_ms" and pd.notna(getattr(row, "speedup", None)):
        ratio = f"{row.speedup:.2f}x, {row.speedup_low:.2f} to {row.speedup_high:.2f}"
    return f"{number(own, ' ms')} ({ratio})"

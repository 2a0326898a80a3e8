"""Prompts shared by several GPUs: the table of `stem.experiments.speed.shared`, and what more GPUs would take."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch

import stem
from stem.experiments.markdown import by_device, full_rows, markdown_table, not_run, number, tokens_label
from stem.experiments.speed.candidates import Shape

DENSITIES = (0.207, 0.08)
PLANNED = (2, 8, 64, 512)  # ranks
NETWORK_GB_PER_S, RANKS_PER_HOST = 50.0, 8  # assumed: one 400 Gbit/s port for each GPU; not measured
LABELS = {"operator": "operator", "ttft": "first token of an 8B shape, {:.0f} layers"}


def ring_bytes(shape: Shape, ranks: int) -> int:
    """Bytes that a rank receives in dense ring attention: keys and values of all other ranks, once."""
    keys = shape.batch * shape.kv_heads * shape.tokens * shape.head_dim * getattr(torch, shape.dtype).itemsize
    return 2 * keys * (ranks - 1) // ranks


@dataclass(frozen=True)
class Machine:
    """Measured rates that `predict` extrapolates from."""

    attention_tflops: float  # of the kept block pairs, on one GPU
    selection_ms: float  # of a prompt of `selection_tokens`, on one GPU; grows with the square of the tokens
    selection_tokens: int
    gb_per_s: float  # received by a rank, within a host
    network_gb_per_s: float  # received by a rank from other hosts
    ranks_per_host: int
    collective_ms: float  # of a collective with hardly any bytes, and of what else a shared prompt adds


def machine(rows: pd.DataFrame, network_gb_per_s: float = NETWORK_GB_PER_S) -> Machine:
    """Rates of a machine from its rows: the longest prompt of the operator, and the largest message of "all-gather"."""
    operator = rows[rows.operation == "operator"].sort_values(["tokens", "density"]).iloc[-1]
    gather = rows[rows.operation == "all-gather"].sort_values("received_mib")
    shape = Shape(
        **{name: operator[name] for name in ("batch", "q_heads", "kv_heads", "head_dim", "dtype")}
        | {"tokens": int(operator.tokens)}
    )
    flops = operator.density * shape.dense_flops() / operator.ranks
    first = rows[(rows.operation == "operator") & (rows.tokens == rows.tokens.min())]
    return Machine(
        attention_tflops=flops / operator.attention_ms / 1e9,
        selection_ms=operator.selection_ms * operator.ranks,
        selection_tokens=shape.tokens,
        gb_per_s=gather.gb_per_s.iloc[-1],
        network_gb_per_s=network_gb_per_s,
        ranks_per_host=RANKS_PER_HOST,
        collective_ms=max(0.0, first.exposed_ms.min()),
    )


def predict(shape: Shape, density: float, named: float, ranks: int, machine: Machine) -> dict[str, float]:
    """Predicted time of the operator and bytes that a rank receives, for a number of ranks.

    Attention, selection and keys are evenly spread. Summaries travel first, then keys and values of one half of the
    heads after the other, during the selection; attention to a half begins once they are there. `named` is the share of
    the other ranks' key blocks that travel, in [0, 1]; dense ring attention receives all. Block summaries are those of
    the default config in bf16.

    Returns:
        latency_ms, attention_ms, selection_ms and exchange_ms of a rank; received_mib and ring_mib; speedup over one.
    """

    def parts(ranks: int) -> dict[str, float]:
        attention = density * shape.dense_flops() / ranks / machine.attention_tflops / 1e9
        selection = machine.selection_ms * (shape.tokens / machine.selection_tokens) ** 2 / ranks
        other_hosts = max(0, ranks - machine.ranks_per_host) / max(1, ranks - 1)
        seconds_per_gb = (1 - other_hosts) / machine.gb_per_s + other_hosts / machine.network_gb_per_s
        config = stem.StemConfig()
        blocks = -(-shape.tokens // config.block_size) * shape.batch * shape.kv_heads
        summaries = blocks * (2 * config.score_stride * shape.head_dim + 4) * (ranks - 1) // ranks
        keys = named * ring_bytes(shape, ranks)
        exchange, before = (1e-6 * size * seconds_per_gb for size in (keys, summaries))
        half = max(selection, exchange / 2) + attention / 2  # after the summaries
        latency = before + max(half, exchange) + attention / 2 + (machine.collective_ms if ranks > 1 else 0)
        times = dict(latency_ms=latency, attention_ms=attention, selection_ms=selection, exchange_ms=exchange + before)
        return times | dict(received_mib=(keys + summaries) / 2**20, ring_mib=ring_bytes(shape, ranks) / 2**20)

    found = parts(ranks)
    return found | dict(speedup=parts(1)["latency_ms"] / found["latency_ms"])


def plan(shape: Shape, machine: Machine, ranks: Sequence[int] = PLANNED) -> pd.DataFrame:
    """Predictions by density and number of ranks, where every rank receives all key blocks (`named` is 1).

    Returns:
        Columns: latency_ms, attention_ms, selection_ms and exchange_ms of a rank, received_gib, speedup over one rank,
        and efficiency, speedup / ranks.
    """
    found = {(density, n): predict(shape, density, 1.0, n, machine) for density in DENSITIES for n in ranks}
    table = pd.DataFrame(found).T.rename_axis(["density", "ranks"])
    table["received_gib"] = table.received_mib / 1024
    table["efficiency"] = table.speedup / table.index.get_level_values("ranks")
    return table[["latency_ms", "attention_ms", "selection_ms", "exchange_ms", "received_gib", "speedup", "efficiency"]]


def section() -> str:
    """For each machine the rows of all ranks beside one, the links, and the plan for more ranks."""
    rows = full_rows("speed/shared")
    if rows.empty:
        return not_run("make speed PROFILE=full", "a machine with two GPUs")
    parts = [f"**{device}, several GPUs of one host**\n\n{_tables(part)}" for device, part in by_device(rows)]
    memory = full_rows("speed/shared_memory")
    return "\n\n".join(parts if memory.empty else [*parts, _memory(memory)])


def _memory(rows: pd.DataFrame) -> str:
    """Table of stem.experiments.speed.shared_memory."""
    header = ["GPUs", "tokens", "layers", "weights [GiB]", "cache [GiB]", "peak [GiB]", "device"]
    lines = []
    for row in rows.sort_values("ranks").itertuples():
        sizes = (number(x / 1024) for x in (row.weights_mib, row.cache_mib, row.peak_memory_mib))
        lines.append([row.ranks, tokens_label(row.tokens), row.layers, *sizes, row.device])
    what = "Memory of each GPU while a model of an 8B shape prefills a prompt, measured on one, whose collectives copy:"
    return f"{what}\n\n{markdown_table(header, lines)}"


def _tables(rows: pd.DataFrame) -> str:
    lines = []
    for row in rows[rows.operation.isin(LABELS)].sort_values(["operation", "tokens", "density"]).to_dict("records"):
        times = [number(row["one_rank_ms"]), number(row["latency_ms"])]
        ratio = f"{row['speedup']:.3f}× [{row['speedup_low']:.3f}, {row['speedup_high']:.3f}]"
        parts = [
            number(row.get(f"{name}_ms", float("nan"))) for name in ("selection", "exchange", "attention", "exposed")
        ]
        about = [
            LABELS[row["operation"]].format(row.get("layers", 0)),
            tokens_label(row["tokens"]),
            f"{row['density']:.1%}",
            int(row["ranks"]),
        ]
        traffic = [number(row["received_mib"]), number(row["ring_mib"])]
        lines.append([*about, *times, ratio, f"{row['efficiency']:.1%}", *parts, *traffic])
    header = ["what", "tokens", "density", "GPUs", "one GPU [ms]", "all [ms]", "speed-up", "efficiency"]
    header += [
        "selection [ms]",
        "keys and values [ms]",
        "attention [ms]",
        "rest [ms]",
        "received [MiB]",
        "dense ring [MiB]",
    ]
    links = rows[rows.operation.isin(("all-gather", "exchange"))]
    told = [[x.operation, number(x.received_mib), number(x.latency_ms), number(x.gb_per_s)] for x in links.itertuples()]
    operator = rows[rows.operation == "operator"]
    same = operator.same_lists.astype(str) == "True"
    found = [
        f"In {same.sum()} of {len(same)} rows of the operator all GPUs choose the lists of one GPU, bit by bit. "
        f"Their outputs differ by at most {operator.difference.max():.1e} (relative L2 norm)."
    ]
    found.append(markdown_table(header, lines))
    found.append(markdown_table(["collective", "received [MiB]", "time [ms]", "rate [GB/s]"], told))
    here, longest = machine(rows), Shape(int(rows[rows.operation == "operator"].tokens.max()))
    planned = [
        [ranks, f"{density:.1%}", *map(number, row.iloc[:6]), f"{row.efficiency:.0%}"]
        for (density, ranks), row in plan(longest, here).iterrows()
    ]
    header = ["GPUs", "density", "time [ms]", "attention [ms]", "selection [ms]", "exchange [ms]", "received [GiB]"]
    found.append(
        f"Predicted from these rows for {tokens_label(longest.tokens)} tokens of the operator, with "
        f"{here.network_gb_per_s:g} GB/s between hosts of {here.ranks_per_host} GPUs (assumed):"
    )
    return "\n\n".join([*found, markdown_table([*header, "speed-up", "efficiency"], planned)])

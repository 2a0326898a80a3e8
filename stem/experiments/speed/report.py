"""Tables and verdicts of speed, from rows: speed-ups over dense attention and the sections of results/README.md."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from stem.config import StemConfig
from stem.experiments.hopper.report import bound_of_fp8
from stem.experiments.markdown import (
    MISSING,
    by_device,
    full_rows,
    markdown_table,
    no_rows,
    not_run,
    number,
    tokens_label,
)
from stem.experiments.speed.candidates import BASELINES, EIGHT_PERCENT, GRAPH, NEVER_DENSE, PREFILL, PRESETS, SHORT
from stem.experiments.speed.peers import FP8, NONE

DENSE_LABELS = {  # provider -> name, in the order of the tables
    "fa3": "FlashAttention-3",
    "fa4": "FlashAttention-4",
    "sdpa_cudnn": "cuDNN",
    "sdpa_flash": "FlashAttention-2",
    "sdpa_cpu": "SDPA",
    "fa3_fp8": "FlashAttention-3 in FP8",
}
SPARSE_LABELS = {
    "fa4_sparse": "FlashAttention-4",
    "flex_flash": "FlexAttention FLASH",
    "flex": "FlexAttention Triton",
}
NAN = float("nan")
CONFIG_LABELS = {
    "released": "released schedule",
    "default": "density 0.25",
    "three_regime": "released schedule, forced blocks inside",
}
PRESET_LABELS = dict(zip(PRESETS, ("paper", "angelslim", "hpc_ops", "adaptive"), strict=True))


def wins_from(speedups: pd.Series) -> int | None:
    """First length (index [tokens], ascending) from which on all speed-ups but NaN exceed 1; None without one."""
    always = (speedups.dropna() > 1)[::-1].cummin()[::-1]
    return int(always.idxmax()) if always.any() else None


def over_dense(
    rows: Iterable[dict[str, Any]] | pd.DataFrame,
    configs: Sequence[str] | None = PRESETS,
    *,
    graph: bool = False,
    fastest: bool = False,
) -> pd.DataFrame:
    """Speed-up of the operator over the fastest dense back end of one machine: tokens down, configs (None: all) across.

    `graph` takes the times of CUDA graphs, for both, instead of calls from Python. `fastest` takes the fastest
    implementation of each length in place of impl=None.
    """
    frame, prefix = pd.DataFrame(rows).dropna(subset="latency_ms"), GRAPH if graph else ""
    dense = _dense(frame, graph)
    operator = frame[(frame["operation"] == prefix + "operator") & (fastest | (frame["provider"] == "stem"))]
    times = operator.pivot_table(index="tokens", columns="config", values="latency_ms", aggfunc="min")
    names = [name for name in (configs or operator["config"].unique()) if name in times]
    return times[names].rdiv(dense.groupby("tokens").latency_ms.min(), axis=0).dropna(how="all")


def fastest_dense(rows: Iterable[dict[str, Any]] | pd.DataFrame, *, graph: bool = False) -> pd.Series:
    """Name of the fastest dense back end of one machine at each length, index [tokens], as over_dense divides by it."""
    dense = _dense(pd.DataFrame(rows).dropna(subset="latency_ms"), graph).sort_values("latency_ms")
    return dense.groupby("tokens").provider.first().map(DENSE_LABELS)


def best_ratio(row: Mapping[str, Any]) -> tuple[float, str]:
    """Speed-up of a row over the fastest dense back end in its precision, and the provider; (NaN, "") without one."""
    ratios = [(row.get(f"speedup_vs_{name}"), name) for name in DENSE_LABELS if name not in FP8]
    return min(((ratio, name) for ratio, name in ratios if ratio is not None and ratio == ratio), default=(NAN, ""))


def factors(dense_ms: float, row: Mapping[str, Any]) -> tuple[float, float, float] | None:
    """Factors of a row's speed-up over a dense time [ms]: attention's share of it, block pairs not computed, and rate.

    In a whole model the last two hold for attention alone, which is the time beyond that of the model without
    attention. Elsewhere the share is 1. None where a time is not known or not positive.
    """
    outside, in_model = row.get("outside_ms"), row.get("operation", "").startswith(("ttft", PREFILL))
    outside = (NAN if outside is None else outside) if in_model else 0.0
    before, after = dense_ms - outside, row["latency_ms"] - outside
    if not (before > 0 and after > 0 and row["density"] > 0):
        return None
    return before / dense_ms, 1 / row["density"], before / after * row["density"]


def factors_told(dense_ms: float, row: Mapping[str, Any]) -> str:
    """The factors of a row's speed-up over a dense time [ms], see `factors`; a dash where they are not known."""
    found = factors(dense_ms, row)
    if found is None:
        return MISSING
    share, pairs, rate = found
    return f"{f'{share:.0%}, ' if share < 1 else ''}{pairs:.2f} × {rate:.2f}"


def _with_factors(ratio: float, row: Mapping[str, Any]) -> str:
    """A speed-up over the fastest dense back end, with its factors where they are known."""
    told = MISSING if ratio != ratio else factors_told(ratio * row["latency_ms"], row)
    return number(ratio, "×") if told == MISSING else f"{number(ratio, '×')} = {told}"


def _dense(frame: pd.DataFrame, graph: bool) -> pd.DataFrame:
    """Rows of dense attention in the precision of the inputs, called or replayed from a CUDA graph."""
    operation = f"{GRAPH if graph else ''}attention"
    return frame[(frame["operation"] == operation) & (frame["config"] == "dense")]


def table(rows: Iterable[dict[str, Any]] | pd.DataFrame) -> str:
    """The rows as a text table of the columns that are compared, without empty ones."""
    frame = pd.DataFrame(rows)
    wanted = ["tokens", "config", "operation", "provider", "density", "latency_ms", "tflops", "gb_per_s"]
    wanted += ["peak_memory_mib", *(f"speedup_vs_{name}" for name in BASELINES), "error"]
    shown = frame[[column for column in wanted if column in frame and frame[column].notna().any()]]
    return shown.rename(columns=lambda name: name.replace("speedup_vs_", "vs_")).to_string(
        index=False, na_rep="", float_format=lambda x: f"{x:.4g}", max_colwidth=60
    )


def speed() -> str:
    """For each machine a sentence and tables: the whole operator against every dense back end."""
    rows = full_rows("speed")
    if rows.empty:
        return no_rows("04_speed")
    return "\n\n".join(_speed_of(device, part) for device, part in by_device(rows))


def _speed_of(device: str, rows: pd.DataFrame) -> str:
    stem = rows[(rows.operation == "operator") & rows.config.isin(CONFIG_LABELS) & rows.latency_ms.notna()]
    stem = stem.sort_values(["tokens", "config", "latency_ms"]).drop_duplicates(["tokens", "config"])  # the fastest
    names = _dense_names(rows[rows.operation == "attention"])
    lines = [
        [tokens_label(row["tokens"]), CONFIG_LABELS[row["config"]], *_against_dense(row, names)]
        for row in stem.to_dict("records")
    ]
    shape = stem.iloc[0]
    heads = f"{shape.q_heads:.0f} query and {shape.kv_heads:.0f} key-value heads of {shape.head_dim:.0f}"
    told = f"**{device}**, {heads}, {shape['dtype']}, batch {shape.batch:.0f}, random normal inputs. Times "
    told += f"are medians, and Stem's include scoring and selection. {FACTORS}{_speed_sentence(stem, names)}"
    preset = "Speed-up of the operator with each preset over the fastest dense back end"
    called = _presets(over_dense(rows), fastest_dense(rows), f"{preset}, both called from Python")
    in_graphs = over_dense(rows, graph=True), fastest_dense(rows, graph=True)
    replayed = _presets(*in_graphs, f"{preset}, both replayed from CUDA graphs")
    table = markdown_table(["tokens", "config", *_dense_header(names, "Stem")], lines)
    return "\n\n".join(part for part in (told, table, _same_blocks(rows), called, _waiting(rows), replayed) if part)


def _waiting(rows: pd.DataFrame) -> str:
    """A sentence on the lengths at which a call of FlashAttention-3 waits for the CPU; nothing without graphs."""
    fa3 = rows[rows.provider == "fa3"].set_index("tokens")
    called, replayed = (fa3[fa3.operation == name].latency_ms for name in ("attention", f"{GRAPH}attention"))
    ratios = (called / replayed).dropna()
    ratios = ratios[ratios > 1.5]
    if ratios.empty:
        return ""
    times = f"{number(ratios.min())} to {number(ratios.max())} times as long as its replay"
    told = f"Up to {tokens_label(ratios.index.max())} tokens a call of {DENSE_LABELS['fa3']} takes {times}, because it"
    return f"{told} waits for the CPU. Compare kernels of these lengths in the next table."


def _same_blocks(rows: pd.DataFrame) -> str:
    """Attention alone over the same blocks by Stem's kernels and by others'; nothing unless others were measured.

    Lengths at which every block is kept are left out: they are dense attention, in calls that wait for the CPU.
    """
    alone = rows[(rows.operation == "attention") & (rows.config == "released") & rows.latency_ms.notna()]
    alone = alone[alone.density < 1]
    if not set(alone.provider) & set(SPARSE_LABELS):
        return ""
    stem = alone[alone.provider.str.startswith("stem")].sort_values("latency_ms").drop_duplicates("tokens")
    names = [name for name in SPARSE_LABELS if name in set(alone.provider)]
    lines = []
    for row in stem.sort_values("tokens").itertuples():
        times = alone[alone.tokens == row.tokens].set_index("provider").latency_ms
        others = [number(times.get(name, NAN)) for name in names]
        lead = number(times.reindex(names).min() / row.latency_ms, "×")
        lines.append([tokens_label(row.tokens), f"{row.density:.1%}", number(row.latency_ms), *others, lead])
    header = ["tokens", "density", "Stem [ms]", *(f"{SPARSE_LABELS[name]} [ms]" for name in names)]
    table = markdown_table([*header, "speed-up over the fastest of these"], lines)
    return f"Attention alone over the same blocks, {CONFIG_LABELS['released']}:\n\n{table}"


def _presets(ratios: pd.DataFrame, fastest: pd.Series, told: str) -> str:
    """Speed-ups of the operator with each preset, and the worst of each; nothing unless all presets were measured."""
    if set(ratios) != set(PRESET_LABELS):
        return ""
    ratios = ratios.loc[: max(SHORT)].dropna(thresh=2).rename(columns=PRESET_LABELS)
    worst = ", ".join(f"{name} {number(x, '×')}" for name, x in ratios.min().items())
    lines = [
        [tokens_label(tokens), fastest[tokens], *(number(x, "×") for x in line)]
        for tokens, line in zip(ratios.index, ratios.to_numpy(), strict=True)
    ]
    return f"{told}; worst case: {worst}:\n\n{markdown_table(['tokens', 'fastest dense', *ratios], lines)}"


def _speed_sentence(stem: pd.DataFrame, names: Sequence[str]) -> str:
    measured = stem.dropna(subset=[f"speedup_vs_{name}" for name in names], how="all")
    if measured.empty:
        return ""
    best = measured[measured.tokens == measured.tokens.max()].sort_values("latency_ms").iloc[0]
    ratios = [(best[f"speedup_vs_{name}"], DENSE_LABELS[name]) for name in names]
    ratios = sorted((ratio, name) for ratio, name in ratios if ratio == ratio)  # the fastest back end first
    told = " and ".join(f"{ratio:.2g} times as fast as {name}" for ratio, name in ratios)
    return f" At {tokens_label(best.tokens)} tokens and density {best.density:.1%} the whole operator is {told}."


def _dense_names(rows: pd.DataFrame) -> list[str]:
    return [name for name in DENSE_LABELS if name in set(rows.provider)]


def _dense_header(names: Sequence[str], own: str) -> list[str]:
    times = [f"dense, {DENSE_LABELS[name]} [ms]" for name in names]
    ratios = [f"speed-up over {DENSE_LABELS[name]}" for name in names]
    return ["density", *times, f"{own} [ms]", "speed-up over the fastest dense", *ratios]


def _against_dense(row: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Density, time of each dense back end, own time, and speed-up over the fastest, with its name, and over each."""
    best, name = best_ratio(row)
    ratios = [row[f"speedup_vs_{name}"] for name in names]
    times = [number(time) for time in (*(ratio * row["latency_ms"] for ratio in ratios), row["latency_ms"])]
    lead = _with_factors(best, row) + (f" ({DENSE_LABELS[name]})" if name else "")
    return [f"{row['density']:.1%}", *times, lead, *(number(ratio, "×") for ratio in ratios)]


CALIBRATED = (
    f"The threshold of `{EIGHT_PERCENT}` is the one that `stem.calibrate` finds for that density in two layers of the "
    "model's shape, with random weights, on one random prompt of that length."
)
FACTORS = (
    "The factors of a speed-up over the fastest dense are the block pairs that are not computed, and the rate on the "
    "others, selection included, over the dense kernel's."
)
IN_MODELS = (
    "In whole models, the share of attention in the dense time stands before the factors, which hold for attention "
    "alone. Attention is the time beyond that of the model without attention."
)
TURNS = (
    "Dense and sparse prefills take turns. Each speed-up is the median over rounds of a round's ratio, with its 95 % "
    "interval. The last column is the speed-up of a model that skips attention, so no sparse attention can exceed it. "
    "It and the factors are missing where dense prefill waits for the CPU."
)
WAITS = 0.9  # share of a dense prefill's time after which its call returns, if it waits for the CPU
CALIBRATED_WHOLE = (
    f"The threshold of `{EIGHT_PERCENT}` is the one that `stem.calibrate` finds for that density on the timed prompt."
)
WANTED = ("135M", 2**15, 1.8)  # model, tokens and speed-up of a goal, for the rate that it asks of attention
BEYOND = {
    "forward+backward": "attention, forward and backward",
    "ttft": "first token of an 8B-shaped Llama, random weights",
    "captured attention": "attention on q, k, v of SmolLM2",
    "captured operator": "operator on q, k, v of SmolLM2",
}


def beyond() -> str:
    """For each machine a table: training, first token and a real model's tensors against every dense back end."""
    rows = full_rows("speed")
    rows = rows[rows.operation.isin(list(BEYOND)) & rows.latency_ms.notna()] if len(rows) else rows
    if rows.empty:
        return no_rows("04_speed")
    parts = []
    for device, part in by_device(rows):
        names = _dense_names(part)
        lines = []
        for row in part[part.config != "dense"].sort_values(["operation", "tokens", "latency_ms"]).to_dict("records"):
            sparse = f"{row['provider'].replace('_', ', ')}, {CONFIG_LABELS.get(row['config'], row['config'])}"
            about = [BEYOND[row["operation"]], tokens_label(row["tokens"]), sparse]
            lines.append([*about, *_against_dense(row, names), number(row["peak_memory_mib"] / 1024)])
        header = ["what", "tokens", "sparse", *_dense_header(names, "sparse"), "peak memory [GiB]"]
        told = f" {FACTORS} {IN_MODELS}{f' {CALIBRATED}' if EIGHT_PERCENT in set(part.config) else ''}"
        parts.append(f"**{device}**.{told}\n\n{markdown_table(header, lines)}")
    return "\n\n".join(parts)


def break_even() -> str:
    """For each machine the shortest captured prompt from which on `adaptive` beats dense attention, and a table."""
    rows = full_rows("speed")
    rows = rows[(rows.config == NEVER_DENSE) & rows.latency_ms.notna()] if len(rows) else rows
    if rows.empty:
        return no_rows("04_speed")
    limit, parts = StemConfig.preset("adaptive").dense_up_to, []
    for device, part in by_device(rows):
        model = part.operation.str.removeprefix(GRAPH).str.removeprefix("captured ").str.removesuffix(" operator")
        ratios, lines = {}, []
        for (name, tokens), group in part.groupby([model, "tokens"]):
            cells = []
            for row in group.sort_values("operation").to_dict("records"):  # called, then from a graph
                ratio, fastest = best_ratio(row)
                ratios[row["operation"].startswith(GRAPH), name, tokens] = ratio
                times = number(ratio * row["latency_ms"]), number(row["latency_ms"])
                cells += [f"{times[0]} ({DENSE_LABELS[fastest]})", times[1], _with_factors(ratio, row)]
            lines.append([name, tokens_label(tokens), f"{group.density.iloc[0]:.1%}", *cells])
        ratios, told = pd.Series(ratios), []
        for (is_graph, name), of_length in ratios.groupby(level=[0, 1]):
            first = wins_from(of_length.droplevel([0, 1]))
            how = "from CUDA graphs" if is_graph else "called from Python"
            found = "nowhere" if first is None else f"from {tokens_label(first)} tokens on"
            told.append(f"{found} ({how}, {name})")
        header = ["model", "tokens", "density", "dense [ms]", "`adaptive` [ms]", "speed-up"]
        header += [f"{name}, graph" for name in header[3:]]
        sentence = f"`adaptive` keeps every block up to {limit} tokens. Without that limit it beats dense attention "
        parts.append(f"**{device}**. {sentence}{', and '.join(told)}.\n\n{markdown_table(header, lines)}")
    return "\n\n".join(parts)


def drop_in() -> str:
    """For each machine a table: prefill of whole models through stem.hf against the fastest dense back end."""
    rows = full_rows("speed")
    if len(rows):
        rows = rows[rows.operation.str.startswith(PREFILL) & rows.latency_ms.notna()]
    if rows.empty:
        return no_rows("04_speed")
    parts = []
    for device, part in by_device(rows):
        configs = [name for name in ("default", *PRESETS, EIGHT_PERCENT) if name in set(part.config)]
        lines = []
        for (operation, tokens), group in part.groupby(["operation", "tokens"]):
            dense, bare = group[group.config == "dense"], group[group.config == NONE]
            sparse = group.drop_duplicates("config").set_index("config").reindex(configs)
            fastest = dense.loc[dense.latency_ms.idxmin()]
            time = f"{number(fastest.latency_ms)} ({DENSE_LABELS[fastest.provider]})"
            waits = fastest.host_ms > WAITS * fastest.latency_ms
            outside = NAN if waits else bare.latency_ms.min()
            ratios = [
                f"{number(row['speedup'], '×')} [{number(row['speedup_low'])}, {number(row['speedup_high'])}]"
                + f" = {factors_told(row['speedup'] * row['latency_ms'], row)}".removesuffix(f" = {MISSING}")
                if row["speedup"] == row["speedup"]
                else number(NAN)
                for row in sparse.assign(operation=operation, outside_ms=outside).to_dict("records")
            ]
            hosts = sparse.host_ms / dense.host_ms.min()
            host = number(sparse.get("host_ratio", hosts).fillna(hosts).max(), "×")
            most = number(fastest.latency_ms / outside, "×")
            lines.append([operation.removeprefix(PREFILL), tokens_label(tokens), time, *ratios, host, most])
        names = [PRESET_LABELS.get(name) or CONFIG_LABELS.get(name, name) for name in configs]
        header = ["model", "tokens", "dense, fastest [ms]", *names, "host time, highest", "without attention"]
        factors = [FACTORS, IN_MODELS] if (part.config == NONE).any() else []
        told = [TURNS, *factors, *([CALIBRATED_WHOLE] if EIGHT_PERCENT in configs else [])]
        parts += [f"**{device}**. {' '.join(told)}", markdown_table(header, lines), _rate_wanted(part)]
    return "\n\n".join(filter(None, parts))


def _rate_wanted(rows: pd.DataFrame) -> str:
    """A sentence on the rate at which attention would have to run for the speed-up WANTED; "" without its rows."""
    model, tokens, wanted = WANTED
    found = rows[(rows.operation == PREFILL + model) & (rows.tokens == tokens)].sort_values("latency_ms")
    dense, sparse, bare = (found[found.config == name].head(1) for name in ("dense", "default", NONE))
    if dense.empty or sparse.empty or bare.empty or sparse.flop.isna().any():
        return ""
    (dense, sparse, bare), outside = (x.iloc[0] for x in (dense, sparse, bare)), bare.latency_ms.iloc[0]
    rate, dense_rate = (x.flop / (x.latency_ms - outside) / 1e9 for x in (sparse, dense))
    needed = sparse.flop / (dense.latency_ms / wanted - outside) / 1e9
    return (
        f"The {model} spends {outside:.0f} of {dense.latency_ms:.0f} ms at {tokens_label(tokens)} outside attention. "
        f"For {wanted}× at density {sparse.density:.2f}, choosing and attention together would have to reach "
        f"{needed:.0f} TFLOP/s. They reach {rate:.0f}, and {DENSE_LABELS[dense.provider]}, which keeps every block, "
        f"{dense_rate:.0f}."
    )


def variants() -> str:
    """For each machine a table of stem.experiments.speed.variants: times, speed-ups over dense attention and errors."""
    rows = full_rows("speed/variants")
    rows = rows[rows.latency_ms.notna()] if len(rows) else rows
    if rows.empty:
        return not_run("make speed PROFILE=full")
    parts = []
    for device, part in by_device(rows):
        lines = []
        for (what, tokens), group in part.groupby(["what", "tokens"], sort=False):
            dense = group[(group.variant == "dense") & ~group.provider.isin(FP8)].latency_ms.min()
            for row in group.sort_values(["density", "latency_ms"], ascending=[False, True]).to_dict("records"):
                name = f"dense, {DENSE_LABELS[row['provider']]}" if row["variant"] == "dense" else row["variant"]
                times = [number(row["latency_ms"]), number(row.get("choosing_ms", NAN))]
                ratio = dense / row["latency_ms"]
                lead = number(ratio, "×") if row["variant"] == "dense" else _with_factors(ratio, row)
                rates = [number(row["tflops"]), lead, number(100 * row["error"], "%")]
                lines.append([what, tokens_label(tokens), name, f"{row['density']:.1%}", *times, *rates])
        header = ["q, k and v", "tokens", "variant", "density", "operator [ms]", "of it, choosing [ms]", "TFLOP/s"]
        table = markdown_table([*header, "over the fastest dense", "error"], lines)
        parts += [f"**{device}**", table, bound_of_fp8(device)]
    return "\n\n".join(filter(None, parts))

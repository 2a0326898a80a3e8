"""The factors of a speed-up, and which rows have no choice: every block is kept, or sinks and window alone."""

import pandas as pd

from stem.budget import BlockRows, keeps_every_block, scored_rows
from stem.config import StemConfig
from stem.experiments.markdown import by_device, full_rows, markdown_table, no_rows, number, tokens_label
from stem.experiments.speed.candidates import BRIEFLY, CONFIGS
from stem.experiments.speed.peers import FP8
from stem.experiments.speed.report import CONFIG_LABELS, DENSE_LABELS

EVERY_BLOCK, WINDOW, CHOSEN = "every block", "sinks and window", "chosen"


def kept_by(config: StemConfig, tokens: int) -> str:
    """Kind of selection that a config makes on a prompt: `EVERY_BLOCK`, `WINDOW` (forced blocks only) or `CHOSEN`."""
    rows = BlockRows.of(tokens, tokens, config.block_size)
    if keeps_every_block(rows, config):
        return EVERY_BLOCK
    return CHOSEN if scored_rows(rows, config) else WINDOW


def kinds(names, lengths) -> pd.DataFrame:
    """`kept_by` for the configs of the speed rows: lengths down, names across."""
    configs = CONFIGS | {name: config for name, (config, _) in BRIEFLY.items()}
    return pd.DataFrame(
        {name: [kept_by(configs[name], int(n)) for n in lengths] for name in names}, index=list(lengths)
    )


def factors(rows: pd.DataFrame, config: str) -> pd.DataFrame:
    """Speed-up of the operator over the fastest dense back end as a product of three factors, by length.

    Returns:
        Columns: dense, its name; pairs, dense over kept operations; rate, of the sparse kernel over the dense one;
        share, of attention in the time of the operator; operator, the speed-up, their product.
    """
    rows = rows.dropna(subset="latency_ms")
    attention = rows[rows.operation == "attention"]
    dense = attention[(attention.config == "dense") & ~attention.provider.isin(FP8)]
    dense = dense.sort_values("latency_ms").drop_duplicates("tokens").set_index("tokens")
    sparse = attention[(attention.config == config) & attention.provider.str.startswith("stem")]
    sparse = sparse.sort_values("latency_ms").drop_duplicates("tokens").set_index("tokens")
    whole = rows[(rows.operation == "operator") & (rows.config == config)].groupby("tokens").latency_ms.min()
    lengths = dense.index.intersection(sparse.index).intersection(whole.index).sort_values()
    dense, sparse, whole = dense.loc[lengths], sparse.loc[lengths], whole.loc[lengths]
    found = dict(dense=dense.provider.map(DENSE_LABELS), pairs=dense.flop / sparse.flop)
    found |= dict(rate=sparse.tflops / dense.tflops, share=sparse.latency_ms / whole)
    return pd.DataFrame(found).assign(operator=dense.latency_ms / whole)


def table() -> str:
    """For each machine a table of `factors`; configs and lengths at which nothing is chosen are marked."""
    rows = full_rows("speed")
    if rows.empty:
        return no_rows("04_speed")
    header = ["tokens", "config", "fewer pairs", "kernel's rate", "share of attention", "speed-up", "blocks"]
    parts = []
    for device, part in by_device(rows):
        found = pd.concat([factors(part, config).assign(config=config) for config in CONFIGS])
        lines = [
            [tokens_label(tokens), CONFIG_LABELS[row.config], *(number(x, "×") for x in (row.pairs, row.rate))]
            + [
                f"{row.share:.0%}",
                f"{number(row.operator, '×')} ({row.dense})",
                kept_by(CONFIGS[row.config], int(tokens)),
            ]
            for tokens, row in found.sort_index(kind="stable").iterrows()
        ]
        parts.append(f"**{device}**\n\n{markdown_table(header, lines)}")
    return "\n\n".join(parts)

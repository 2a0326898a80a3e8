"""Markdown tables and their numbers, shared by the reports that `stem.experiments.tables` puts together."""

from collections.abc import Iterable, Sequence

import pandas as pd

from stem.experiments import records

MISSING = "–"


def markdown_table(header: Sequence[str], lines: Iterable[Sequence]) -> str:
    """A Markdown table, first column left-aligned, the others right-aligned."""
    cells = [header, ["---", *["---:"] * (len(header) - 1)], *lines]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in cells)


def number(value: float, unit: str = "") -> str:
    """Three significant digits without an exponent, then the unit; a dash for a missing value."""
    if value != value:
        return MISSING
    return (f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}") + unit


def tokens_label(tokens: float) -> str:
    """1024 -> "1K", 1048576 -> "1M", 1000 -> "1000"."""
    tokens = int(tokens)
    for unit, name in ((2**20, "M"), (2**10, "K")):
        if tokens >= unit and tokens % unit == 0:
            return f"{tokens // unit}{name}"
    return str(tokens)


def full_rows(experiment: str, **values: object) -> pd.DataFrame:
    """The rows of full runs that hold these values in these columns; smoke rows of a laptop change no table."""
    rows = records.read_rows(experiment)
    for column, value in ({"profile": "full"} | values).items():
        rows = rows[rows[column] == value] if len(rows) else rows
    return rows


def by_device(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Device name and its rows, the device with most rows first."""
    return sorted(rows.groupby("device", sort=True), key=lambda group: -len(group[1]))


def not_run(command: str, machine: str = "a CUDA machine") -> str:
    """A sentence in place of a table: the command that writes the missing rows, and the machine it needs."""
    return f"No full run is committed yet: `{command}` on {machine} writes its rows."


def no_rows(notebook: str) -> str:
    """`not_run` for a notebook such as "04_speed", and where its rows of a CPU are."""
    told = not_run(f"make reproduce PROFILE=full ONLY={notebook[:2]}")
    return f"{told} What two CPU cores measure stands in [notebook {notebook[:2]}](notebooks/{notebook}.ipynb)."

"""Files in results/: each one is written by a make target, and paired rows were measured on the same samples."""

import re
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from stem.experiments.long_context.comparison import SAME
from stem.experiments.long_context.report import CELL

ROOT = Path(__file__).resolve().parents[2]
SHARED = {"README.md": "tables", "figures": "tables"}  # others: the experiment's own target
TARGETS = set(re.findall(r"^([a-z_-]+):", (ROOT / "Makefile").read_text(), re.M))


def committed() -> list[str]:
    """Paths below results/ that git tracks; every .csv, .svg, .png, .md and .ipynb file where there is no git."""
    listing = subprocess.run(["git", "ls-files", "results"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode == 0:
        return [name.removeprefix("results/") for name in listing.stdout.split() if (ROOT / name).is_file()]
    kinds = {".csv", ".svg", ".png", ".md", ".ipynb"}
    files = (ROOT / "results").rglob("*")
    return [str(path.relative_to(ROOT / "results")) for path in files if path.suffix in kinds]


@pytest.mark.parametrize("place", sorted({name.split("/")[0] for name in committed()}))
def test_every_file_in_results_has_a_target(place):
    target = SHARED.get(place, place)
    assert target in TARGETS, f"no make target writes results/{place}"
    if place not in SHARED:
        assert (ROOT / "stem" / "experiments" / place).is_dir()


PAIRED = re.compile(r"long_context/(answers|loss|choice)/")


@pytest.mark.parametrize("path", [*filter(PAIRED.match, committed())])
def test_rows_of_one_cell_have_the_same_samples(path):
    """Dense attention has one mean in all rows of a cell, which it has not on two sets of samples."""
    rows = pd.read_csv(ROOT / "results" / path)
    cells = rows.groupby([*CELL, "seed"], dropna=False)
    assert (cells["count"].nunique() == 1).all() and (cells.dense.nunique() == 1).all()
    assert not rows.duplicated([*SAME, "seed"]).any()

"""Files in results/: each one is written by a make target."""

import re
import subprocess
from pathlib import Path

import pytest

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

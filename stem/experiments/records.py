"""Result rows on disk: one CSV per experiment and machine, with provenance in each row.

A full run writes results/<experiment>/<machine>.csv (committed), a smoke run <machine>-smoke.csv (not committed). An
experiment with several tables names its part too: "long_context/answers" is results/long_context/answers/<machine>.csv.
The environment variable STEM_RESULTS redirects writing. Reading looks at both places.
"""

import io
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pandas as pd
import torch

from stem.validation import check_choice

PROFILES = ("smoke", "full")
PROVENANCE = ("machine", "device", "torch", "triton", "transformers", "python", "git_commit", "date", "profile")
_CHECKOUT = Path(__file__).resolve().parents[2]


def repository_root() -> Path:
    """Folder of the checkout, or the current folder when the package was installed from a wheel."""
    return _CHECKOUT if (_CHECKOUT / "pyproject.toml").is_file() else Path.cwd()


def device_name() -> str:
    """Name of the GPU, or of the processor with its number of usable cores where there is no CUDA."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    name = model[1].strip() if model else platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name} ({cores} cores)"


def machine_name() -> str:
    """`device_name` as a file name: lower case letters, digits and single hyphens."""
    plain = re.sub(r"\((r|tm)\)", "", device_name().lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def git_commit() -> str:
    """Short commit of the checkout, with "+changed" if .py files differ from it; "unknown" outside git.

    The environment variable STEM_COMMIT overrides it, for copies of a checkout without git.
    """
    if given := os.environ.get("STEM_COMMIT"):
        return given

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(repository_root()), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=10", "HEAD") + ("+changed" if git("diff", "HEAD", "--", "*.py") else "")
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def provenance(profile: str) -> dict[str, str]:
    """Provenance of a row measured now: its columns in the order of `PROVENANCE`."""
    check_choice("profile", profile, PROFILES)
    versions = torch.__version__, _version("triton"), _version("transformers"), platform.python_version()
    values = machine_name(), device_name(), *versions, git_commit(), datetime.now(UTC).strftime("%Y-%m-%d"), profile
    return dict(zip(PROVENANCE, values, strict=True))


def results_dir(experiment: str) -> Path:
    """Create and return the folder of an experiment's rows and figures, under STEM_RESULTS or results/."""
    folder = Path(os.environ.get("STEM_RESULTS") or repository_root() / "results") / _check_name(experiment)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_rows(
    experiment: str,
    rows: Iterable[Mapping] | pd.DataFrame,
    profile: str = "smoke",
    *,
    same: Sequence[str] | None = None,
) -> Path:
    """Write this machine's rows of one experiment in place of its last run with this profile; returns the CSV's path.

    The file is written under a temporary name and then moved, so it is never half-written.

    Args:
        rows: Mappings (column -> value) or a DataFrame, at least one row; must not hold a column of `PROVENANCE`.
        same: Columns that tell what a row measured, for a run that measures a part. Old rows stay, with their own
            provenance, unless they agree with a new row in all of these columns. None replaces all old rows.
    Raises:
        ValueError: On no rows, an unknown profile, a bad name, or a reserved column.
    """
    frame = pd.DataFrame(rows)
    if frame.empty:
        raise ValueError(f"rows of {experiment!r} are empty; at least one row is needed")
    if reserved := sorted(set(frame.columns) & set(PROVENANCE)):
        raise ValueError(f"rows of {experiment!r} hold the columns {reserved}, which write_rows adds itself")
    frame = frame.assign(**provenance(profile))
    path = results_dir(experiment) / f"{machine_name()}{'' if profile == 'full' else '-smoke'}.csv"
    if same is not None:
        before = path if path.is_file() else repository_root() / "results" / experiment / path.name
        frame = _replaced(before, frame, list(same)) if before.is_file() else frame
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".partial", delete=False, newline="") as partial:
        frame.to_csv(partial, index=False)
    os.chmod(partial.name, 0o644)
    os.replace(partial.name, path)
    return path


def _replaced(path: Path, new: pd.DataFrame, same: list[str]) -> pd.DataFrame:
    """Old rows of the file, as text, that agree with no new row in the columns `same`, then the new rows."""

    def keys(text: str) -> list[tuple]:
        named = pd.read_csv(io.StringIO(text)).reindex(columns=same).astype(object)
        return list(named.where(named.notna(), None).itertuples(index=False, name=None))

    old, written = path.read_text(), new.to_csv(index=False)
    measured = set(keys(written))
    stay = [key not in measured for key in keys(old)]
    before, after = (pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False) for text in (old, written))
    return pd.concat([before[stay], after], ignore_index=True)


def read_rows(experiment: str) -> pd.DataFrame:
    """Rows of one experiment from all machines, smoke and full, with the columns of `PROVENANCE`.

    Columns that a machine did not write are NaN; without files there are no rows. A file under STEM_RESULTS hides the
    file with its name in results/.
    """
    places = (repository_root() / "results", Path(os.environ.get("STEM_RESULTS") or repository_root() / "results"))
    files = {path.name: path for place in places for path in (place / _check_name(experiment)).glob("*.csv")}
    if not files:
        return pd.DataFrame(columns=list(PROVENANCE))
    return pd.concat([pd.read_csv(files[name]) for name in sorted(files)], ignore_index=True)


def _check_name(experiment: str) -> str:
    name = r"[a-z0-9][a-z0-9_-]*"
    if not re.fullmatch(f"{name}(/{name})?", experiment):
        raise ValueError(
            f"experiment must be one or two folder names of a-z, 0-9, _ and -, joined by a slash, got {experiment!r}"
        )
    return experiment

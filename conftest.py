"""Settings of every test and of every kernel that nbval starts, and minutes by part at the end of a run."""

import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch reads it while it is imported, see scripts/reproduce.py

import torch  # noqa: E402

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
os.environ.update(PYDEVD_DISABLE_FILE_VALIDATION="1", TQDM_DISABLE="1", TOKENIZERS_PARALLELISM="false")


def pytest_configure(config):
    """Send the rows that tests and notebooks write to a temporary folder, so that the tree stays clean."""
    os.environ["STEM_RESULTS"] = config.stem_results = tempfile.mkdtemp(prefix="stem-results-")


def pytest_unconfigure(config):
    shutil.rmtree(config.stem_results, ignore_errors=True)


def pytest_itemcollected(item):
    """Let a notebook's outputs arrive late: nbval's fixed limit of five seconds fails on a busy machine."""
    if hasattr(item, "output_timeout"):
        item.output_timeout = 1800


def pytest_terminal_summary(terminalreporter):
    """Print the minutes of each folder of tests, test file and notebook that took more than five seconds."""
    seconds = Counter()
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        path = Path(getattr(report, "nodeid", "").split("::")[0])
        seconds[path.parent if len(path.parts) > 2 else path] += getattr(report, "duration", 0)
    slow = [(path, total) for path, total in seconds.most_common() if total > 5]
    if slow:
        terminalreporter.section("minutes by part")
    for path, total in slow:
        terminalreporter.write_line(f"{total / 60:6.1f}  {path}")

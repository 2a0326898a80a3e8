"""Tasks in processes of their own: how many at a time, in which order, what a failure leaves, and an interruption."""

import os
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from stem.experiments.processes import run_in_processes


def note(folder: Path, name: str, seconds: float = 0.0) -> None:
    """Write who ran, when it began and when it ended."""
    began = time.monotonic()
    time.sleep(seconds)
    (folder / name).write_text(f"{os.getpid()} {began} {time.monotonic()}")


def test_tasks_run_in_order_and_a_few_at_a_time(tmp_path):
    names = ("a", "b", "c")
    polled = []
    codes = run_in_processes([partial(note, tmp_path, name, 0.2) for name in names], 2, polled.append)
    told = [(tmp_path / name).read_text().split() for name in names]
    began, ended = ([float(line[column]) for line in told] for column in (1, 2))
    assert codes == [0, 0, 0] == polled[-1] and any(None in seen for seen in polled)
    assert len({line[0] for line in told} | {str(os.getpid())}) == 4, "a process each"
    assert began[2] > min(ended[:2]), "the third task waited for a free place"


def test_a_failed_task_leaves_the_others_alone(tmp_path, capfd):
    tasks = [partial(sys.exit, 3), partial(int, "not a number"), partial(note, tmp_path, "last")]
    assert run_in_processes(tasks, 1) == [3, 1, 0]
    assert (tmp_path / "last").exists() and "ValueError" in capfd.readouterr().err


def test_an_interruption_ends_the_running_tasks(tmp_path):
    def interrupt(codes):
        raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_in_processes([partial(note, tmp_path, "long", 60.0), partial(note, tmp_path, "never")], 1, interrupt)
    assert time.monotonic() - start < 50 and not list(tmp_path.iterdir())

"""Processes that share a comparison: the times alone, then the rest, and nothing is lost with one of them."""

import multiprocessing
import time

import pytest

from stem.experiments.long_context import processes
from stem.experiments.long_context.plan import PLANS


@pytest.fixture
def pieces(monkeypatch):
    """Processes forked from this one, whose parts need no model: each row says who measured it and when."""

    def part(plan, model, seed, part, gpu, wait, limit_s, eager, show, save):
        if wait:
            wait()
        rows = [{"part": part, "model": model, "seed": seed, "gpu": gpu, "eager": eager, "began": time.monotonic()}]
        time.sleep(0.2)
        save(rows)
        if part == "2/3" and seed == 13:
            raise RuntimeError("lost")
        rows[0]["ended"] = time.monotonic()
        save(rows)

    forked = multiprocessing.get_context("fork")
    monkeypatch.setattr(processes.multiprocessing, "get_context", lambda method: forked)
    monkeypatch.setattr(processes, "_part", part)
    monkeypatch.setattr(processes, "POLL_S", 0.01)


def test_times_are_taken_alone_and_the_parts_together(pieces):
    saved = []
    rows = processes.measure(PLANS["smoke"], "tiny", 3, processes=3, eager=True, save=saved.append)
    assert [row["part"] for row in rows] == ["0/3", "1/3", "2/3", "3/3"] and saved[-1] == rows
    alone, *together = rows
    assert all(row["began"] > alone["ended"] for row in together)
    assert max(row["began"] for row in together) < min(row["ended"] for row in together)
    assert {(row["model"], row["seed"], row["eager"], row["gpu"]) for row in rows} == {("tiny", 3, True, None)}


def test_parts_are_dealt_to_the_gpus_and_only_those_beside_the_times_wait(pieces, monkeypatch):
    monkeypatch.setattr(processes.torch.cuda, "device_count", lambda: 2)
    rows = processes.measure(PLANS["smoke"], "tiny", processes=3)
    assert [row["gpu"] for row in rows] == [0, 1, 0, 1]
    times, first, beside, last = rows
    assert beside["began"] > times["ended"] > max(first["began"], last["began"])


def test_a_part_that_fails_is_named_and_its_rows_and_the_others_are_kept(pieces):
    saved = []
    with pytest.raises(RuntimeError, match=r"parts \[2\] of 3 failed.*; 4 rows"):
        processes.measure(PLANS["smoke"], "tiny", 13, processes=3, save=saved.append)
    assert ["ended" in row for row in saved[-1]] == [True, True, False, True]


def test_one_process_measures_here_and_none_is_refused(monkeypatch):
    monkeypatch.setattr(processes, "_part", lambda *about: about)
    plan = PLANS["smoke"]
    assert processes.measure(plan, "tiny", 5, limit_s=8, show=str) == (
        (plan, "tiny", 5, None, None, None, 8, False, str, None)
    )
    with pytest.raises(ValueError, match="processes must be at least 1, got 0"):
        processes.measure(plan, "tiny", processes=0)

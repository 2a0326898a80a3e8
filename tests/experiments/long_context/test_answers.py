"""Answers in several processes: the times alone, then the rest, and a failed part loses nothing of the others."""

import multiprocessing
import time

import pytest

from stem.experiments import processes, records
from stem.experiments.long_context import __main__, answers, comparison, methods
from stem.experiments.long_context.study import STUDIES


@pytest.fixture
def pieces(monkeypatch):
    """Processes forked from this one, whose parts need no model: each row says who measured it and when."""

    def part(study, model, seed, part, limit_s, eager, show, save):
        about = dict(part=part, model=model, seed=seed, eager=eager, limit_s=limit_s)
        rows = [{**about, "began": time.monotonic()}]
        time.sleep(1.0 if part == (0, 3) else 0.4)  # longer than the processes need to start
        save(rows)
        if part == (2, 3) and seed == 13:
            raise RuntimeError("lost")
        rows[0]["ended"] = time.monotonic()
        save(rows)

    forked = multiprocessing.get_context("fork")
    monkeypatch.setattr(processes.multiprocessing, "get_context", lambda method: forked)
    monkeypatch.setattr(answers, "_part", part)
    monkeypatch.setattr(processes, "POLL_S", 0.01)


def test_times_are_taken_alone_and_the_parts_together(pieces):
    saved = []
    rows = answers.measure(STUDIES["smoke"], "tiny", 3, processes=3, limit_s=99, eager=True, save=saved.append)
    assert [row["part"] for row in rows] == [(0, 3), (1, 3), (2, 3), (3, 3)] and saved[-1] == rows
    alone, *together = rows
    assert all(row["began"] > alone["ended"] for row in together)
    assert max(row["began"] for row in together) < min(row["ended"] for row in together)
    assert {(row["model"], row["seed"], row["eager"]) for row in rows} == {("tiny", 3, True)}
    assert 90 < together[0]["limit_s"] < alone["limit_s"] - 1, "the limit holds for both together"


def test_rows_are_saved_while_the_parts_run(pieces, monkeypatch):
    monkeypatch.setattr(comparison, "SAVE_EVERY_S", 0)
    saved = []
    rows = answers.measure(STUDIES["smoke"], "tiny", processes=3, save=saved.append)
    assert [row["part"] for row in saved[0]] == [(0, 3)] and len(saved) > 2 and saved[-1] == rows


def test_parts_are_dealt_to_the_gpus(monkeypatch):
    chosen, cuda = [], answers.torch.cuda
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "device_count", lambda: 2)
    monkeypatch.setattr(cuda, "set_device", chosen.append)
    monkeypatch.setattr(answers, "load", lambda model: (None, None, model))
    monkeypatch.setattr(comparison, "run", lambda *_, part, **__: part)
    parts = [(number, 3) for number in range(4)]
    assert [answers._part(STUDIES["smoke"], "tiny", 0, part, 9.0, True, print, None) for part in parts] == parts
    assert chosen == [0, 1, 0, 1]
    assert answers._part(STUDIES["smoke"], "tiny", 0, None, 9.0, True, print, None) is None and len(chosen) == 4


def test_a_part_that_fails_is_named_and_its_rows_and_the_others_are_kept(pieces):
    saved = []
    with pytest.raises(RuntimeError, match=r"parts \[2\] of 3 failed.*; 4 rows"):
        answers.measure(STUDIES["smoke"], "tiny", 13, processes=3, save=saved.append)
    assert ["ended" in row for row in saved[-1]] == [True, True, False, True]


def test_one_process_measures_here_and_none_is_refused(monkeypatch):
    monkeypatch.setattr(answers, "_part", lambda *about: about)
    study = STUDIES["smoke"]
    assert answers.measure(study, "tiny", 5, limit_s=8, show=str) == ((study, "tiny", 5, None, 8, False, str, None))
    with pytest.raises(ValueError, match="processes must be >= 1, got 0"):
        answers.measure(study, "tiny", processes=0)


def test_a_run_of_some_methods_leaves_the_rows_of_the_others(monkeypatch, tmp_path, capsys):
    def measure(study, model, seed, *, save, **options):
        for name in {"dense", *(study.names or methods.all_names())}:
            about = dict(method=name, block_size=None if name == "dense" else 64, measure="answer", model=model)
            found.append(about | dict(task="ruler_vt", length=512, seed=seed))
        save(found)

    monkeypatch.setenv("STEM_RESULTS", str(tmp_path))
    monkeypatch.setattr(records, "repository_root", lambda: tmp_path)
    monkeypatch.setattr(answers, "measure", measure)
    for seed, options in ((0, []), (1, ["--methods", "stem adaptive", "longformer"])):
        found = []
        __main__.main(["answers", "--profile", "full", "--seed", str(seed), *options])
    seeds = records.read_rows("long_context/answers").set_index("method").seed
    assert seeds[["dense", "stem adaptive", "longformer"]].eq(1).all() and seeds.sum() == 3
    assert set(seeds.index) == {"dense", *methods.all_names()}
    with pytest.raises(SystemExit):
        __main__.main(["answers", "--methods", "sten"])
    assert "invalid choice: 'sten'" in capsys.readouterr().err

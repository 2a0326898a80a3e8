"""stem.experiments.records and stem.experiments.notebook: rows with provenance, and the helpers of the notebooks."""

import dataclasses

import pandas as pd
import pytest
import torch

from stem.experiments import notebook, records


@pytest.fixture(autouse=True)
def redirected(tmp_path, monkeypatch):
    monkeypatch.setenv("STEM_RESULTS", str(tmp_path / "redirected"))
    monkeypatch.setattr(records, "_CHECKOUT", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    return tmp_path / "redirected"


def test_rows_come_back_with_provenance(redirected):
    path = records.write_rows("speed", [{"tokens": 8, "ms": 0.5, "seed": 0}, {"tokens": 16, "seed": 0}])
    assert path == redirected / "speed" / f"{records.machine_name()}-smoke.csv"
    rows = records.read_rows("speed")
    assert rows.tokens.tolist() == [8, 16] and rows.ms.isna().tolist() == [False, True]
    assert set(records.PROVENANCE) <= set(rows) and set(rows.profile) == {"smoke"}
    assert set(rows.torch) == {torch.__version__}
    assert not list(redirected.rglob("*.partial"))


def test_a_second_run_replaces_the_first_and_profiles_have_their_own_files(redirected):
    for ms in (1.0, 2.0):
        records.write_rows("speed", [{"ms": ms}])
    records.write_rows("speed", pd.DataFrame([{"ms": 3.0}]), profile="full")
    rows = records.read_rows("speed")
    assert dict(zip(rows.profile, rows.ms, strict=True)) == {"smoke": 2.0, "full": 3.0}


def test_a_part_replaces_only_what_it_measured_again(redirected):
    def row(method, block_size, **numbers):
        return dict(method=method, block_size=block_size, **numbers)

    records.write_rows("quality", [row("a", 64, ms=0.1), row("a", 128, ms=0.2), row("dense", None, ms=0.3)])
    path = records.write_rows("quality", [row("a", 64, ms=1.0, loss=2.0)], same=("method", "block_size", "absent"))
    rows = records.read_rows("quality")
    assert rows.ms.tolist() == [0.2, 0.3, 1.0] and rows.loss.isna().tolist() == [True, True, False]
    records.write_rows("quality", [row("dense", None, ms=3.0)], same=("method", "block_size"))
    assert records.read_rows("quality").ms.tolist() == [0.2, 1.0, 3.0]
    assert "0.2" in path.read_text().splitlines()[1]


def test_a_part_keeps_the_committed_rows_of_this_machine(redirected, tmp_path):
    committed = tmp_path / "results" / "speed"
    committed.mkdir(parents=True)
    (committed / f"{records.machine_name()}-smoke.csv").write_text("tokens,ms,git_commit\n8,7.0,old\n16,8.0,old\n")
    records.write_rows("speed", [dict(tokens=16, ms=9.0)], same=("tokens",))
    rows = records.read_rows("speed")
    assert rows.ms.tolist() == [7.0, 9.0] and rows.git_commit[0] == "old" and rows.profile[1] == "smoke"


def test_reading_joins_machines_and_redirected_files_win(redirected, tmp_path):
    committed = tmp_path / "results" / "speed"
    committed.mkdir(parents=True)
    ours = f"{records.machine_name()}-smoke.csv"
    (committed / "another-machine.csv").write_text("ms,machine,profile\n7.0,another-machine,full\n")
    (committed / ours).write_text("ms,machine,profile\n8.0,this,smoke\n")
    assert sorted(records.read_rows("speed").ms) == [7.0, 8.0]
    records.write_rows("speed", [{"ms": 9.0}])
    assert sorted(records.read_rows("speed").ms) == [7.0, 9.0]


def test_parts_of_an_experiment_have_folders_of_their_own(redirected, tmp_path):
    path = records.write_rows("long_context/answers", [{"correct": 1}], profile="full")
    assert path == redirected / "long_context" / "answers" / f"{records.machine_name()}.csv"
    assert records.read_rows("long_context/answers").correct.tolist() == [1]
    assert records.read_rows("long_context").empty and records.read_rows("long_context/loss").empty
    committed = tmp_path / "results" / "long_context" / "answers"
    committed.mkdir(parents=True)
    (committed / "another-machine.csv").write_text("correct,profile\n0,full\n")
    assert sorted(records.read_rows("long_context/answers").correct) == [0, 1]


def test_no_rows_yet():
    rows = records.read_rows("nothing")
    assert rows.empty and list(rows) == list(records.PROVENANCE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("speed", []), "'speed' are empty"),
        (("speed", [{"a": 1}], "medium"), "profile must be one of .* got 'medium'"),
        (("../speed", [{"a": 1}]), "experiment must be one or two folder names .* got '../speed'"),
        (("long_context/a/b", [{"a": 1}]), "experiment must be one or two folder names .* got 'long_context/a/b'"),
        (("/speed", [{"a": 1}]), "experiment must be one or two folder names .* got '/speed'"),
        (("speed", [{"a": 1, "date": "today"}]), r"hold the columns \['date'\]"),
    ],
    ids=["empty", "profile", "outside", "deep", "absolute", "reserved"],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        records.write_rows(*arguments)


def test_setup_seeds_and_tells(capsys):
    run = notebook.setup("smoke", 3)
    first = torch.rand(2)
    assert notebook.setup("full", 3).full and not run.full and run.seed == 3
    assert torch.equal(first, torch.rand(2))
    assert f"torch {torch.__version__}" in capsys.readouterr().out
    with pytest.raises(ValueError, match="got 'quick'"):
        notebook.setup("quick", 0)


def test_check(capsys):
    notebook.check("one is one", torch.tensor(1) == 1)
    assert capsys.readouterr().out == "ok: one is one\n"
    with pytest.raises(AssertionError, match="does not hold: two is one"):
        notebook.check("two is one", 2 == 1)


@dataclasses.dataclass
class Pair:
    first: torch.Tensor
    second: int


@pytest.mark.parametrize(
    "answer",
    [
        lambda n: n + 1,
        lambda n: torch.arange(n),
        lambda n: (torch.ones(n), 0.5),
        lambda n: Pair(torch.ones(n), n),
        lambda n: {"blocks": [n, n]},
    ],
    ids=["number", "tensor", "tuple", "dataclass", "mapping"],
)
def test_exercise(answer, capsys):
    notebook.exercise(lambda n: None, against=answer, args=(3,))
    notebook.exercise(answer, against=answer, args=(3,))
    assert capsys.readouterr().out == "not attempted\ncorrect\n"
    with pytest.raises((AssertionError, TypeError)):
        notebook.exercise(lambda n: answer(n + 1), against=answer, args=(3,))


def test_the_commit_of_a_copy_without_git_comes_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setattr(records, "repository_root", lambda: tmp_path)
    monkeypatch.delenv("STEM_COMMIT", raising=False)
    assert records.git_commit() == "unknown"
    monkeypatch.setenv("STEM_COMMIT", "0123456789")
    assert records.git_commit() == "0123456789"
    monkeypatch.undo()
    monkeypatch.setenv("STEM_COMMIT", "0123456789")
    assert records.git_commit() == "0123456789"


SCRIPT = "import sys; print(*sys.argv[1:]); sys.exit(3)"


@pytest.mark.parametrize(("arguments", "profile"), [([], "auto"), (["--profile", "full"], "full")])
def test_an_experiment_runs_its_notebook(arguments, profile, tmp_path, capfd):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "reproduce.py").write_text(SCRIPT)
    with pytest.raises(SystemExit) as exit:
        notebook.run_from_shell("03", "correctness", arguments)
    assert exit.value.code == 3
    assert capfd.readouterr().out == f"--only 03 --profile {profile} --force\n"


def test_an_experiment_without_a_checkout_says_so(capsys):
    with pytest.raises(SystemExit):
        notebook.run_from_shell("03", "correctness", [])
    assert "checkout of the repository" in capsys.readouterr().err

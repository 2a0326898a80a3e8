"""The training experiment: arms of one density, parts that are kept and resumed, failures that are named."""

import contextlib
import dataclasses
import sys

import pandas as pd
import pytest
import torch

import stem
from stem import patterns
from stem.experiments.training import experiment
from stem.experiments.training.__main__ import main
from stem.experiments.training.config import TrainConfig
from stem.experiments.training.model import ModelSize

SPARSE = stem.StemConfig(block_size=16, score_stride=4, density=0.4, sink_blocks=1, local_blocks=1)
SIZE = ModelSize(layers=1, width=32, heads=2, kv_heads=1, hidden=48)
STUDY = experiment.Study(
    TrainConfig(steps=4, batch_size=2, seq_len=64, warmup=1, size=SIZE, stem_config=SPARSE, device="cpu"),
    seeds=(0, 1), arms=("dense", "stem"), lengths=(1, 2), num_rows=1, speed_steps=1,
)  # fmt: skip


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch, tmp_path):
    """Parts run at once in this process, on one thread; results go to a temporary folder."""

    def run_here(tasks, workers):
        for task in tasks:
            with contextlib.suppress(FloatingPointError):  # as a process of its own would end
                task()

    monkeypatch.setattr(experiment, "run_in_processes", run_here)
    monkeypatch.setattr(experiment, "STUDIES", {"smoke": STUDY})
    monkeypatch.setenv("STEM_RESULTS", str(tmp_path / "results"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_run_writes_every_arm_seed_reading_and_length(tmp_path):
    rows = pd.read_csv(experiment.run("smoke", tmp_path))
    read = rows[rows.measure.isin(["loss", "correct"])]
    found = set(read[["trained", "inferred", "seed", "seq_len"]].itertuples(index=False, name=None))
    pairs = [("dense", "dense"), ("dense", "stem"), ("dense", "sliding_window"), ("stem", "stem"), ("stem", "dense")]
    assert found == {(*pair, seed, length) for pair in pairs for seed in (0, 1) for length in (64, 128)}
    curves = rows[rows.place == "step"].groupby("trained").measure.agg(set)
    expected = {"loss_text", "loss_recall", "grad_norm", "spikes", "largest_spike", "tokens_per_second"}
    assert all(measures == expected for measures in curves)


def test_finished_parts_are_kept_and_missing_ones_are_run_again(tmp_path, monkeypatch):
    first = pd.read_csv(experiment.run("smoke", tmp_path))
    (missing,) = tmp_path.glob("*/stem-1.csv")
    missing.unlink()
    ran = []
    monkeypatch.setattr(experiment, "run_arm", lambda *a, **k: ran.append(a[1:3]) or [dict(trained="again")])
    again = pd.read_csv(experiment.run("smoke", tmp_path))
    assert ran == [("stem", 1)] and (again.trained == "again").sum() == 1
    kept = again[again.trained != "again"].reset_index(drop=True)
    assert kept.value.equals(first[(first.trained != "stem") | (first.seed != 1)].value.reset_index(drop=True))
    more = dataclasses.replace(STUDY, seeds=(0, 1, 7))
    monkeypatch.setattr(experiment, "STUDIES", {"smoke": more})
    with_seed = pd.read_csv(experiment.run("smoke", tmp_path))
    assert ran[1:] == [("dense", 7), ("stem", 7)] and (with_seed.trained == "again").sum() == 3
    other = dataclasses.replace(STUDY, num_rows=2)
    assert experiment.part_folder(other, tmp_path) != experiment.part_folder(STUDY, tmp_path)


def test_a_failed_part_is_named_and_the_others_are_written(tmp_path, monkeypatch):
    whole = experiment.run_arm

    def fail(study, arm, seed, *rest, **options):
        if (arm, seed) == ("stem", 0):
            raise FloatingPointError
        return whole(study, arm, seed, *rest, **options)

    monkeypatch.setattr(experiment, "run_arm", fail)
    with pytest.raises(RuntimeError, match="parts failed: stem-0;"):
        experiment.run("smoke", tmp_path)
    (written,) = (tmp_path / "results" / "training").glob("*.csv")
    read = pd.read_csv(written).query("place == 'position'")
    assert set(zip(read.trained, read.seed, strict=True)) == {("dense", 0), ("dense", 1), ("stem", 1)}


def test_an_arm_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ValueError, match="attention must be one of 'dense', .*, got 'tortoise'"):
        experiment.run_part(STUDY, "tortoise-0", tmp_path)


def test_an_experiment_that_cannot_start_ends_with_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(sys, "argv", ["training", "--folder", str(tmp_path / "file" / "parts")])
    with pytest.raises(SystemExit, match="^stem.experiments.training: .*Not a directory: '.*file"):
        main()


def test_results_that_cannot_be_written_are_found_out_before_the_training(tmp_path, monkeypatch):
    (tmp_path / "results").write_text("in the way")
    with pytest.raises(OSError, match="results"):
        experiment.run("smoke", tmp_path / "parts")
    assert not (tmp_path / "parts").exists()


def test_a_checkpoint_is_kept_until_the_rows_are_written(tmp_path, monkeypatch):
    def disk_full(frame, path, **options):
        raise OSError("no space left")

    monkeypatch.setattr(pd.DataFrame, "to_csv", disk_full)
    with pytest.raises(OSError, match="no space left"):
        experiment.run_part(STUDY, "dense-0", tmp_path)
    assert (tmp_path / "dense-0" / "checkpoint.safetensors").exists()
    monkeypatch.undo()
    experiment.run_part(STUDY, "dense-0", tmp_path)
    assert (tmp_path / "dense-0.csv").exists() and not (tmp_path / "dense-0" / "checkpoint.safetensors").exists()


@pytest.mark.parametrize("arm", [arm for arm in (*experiment.ARMS, experiment.CONTROL) if arm != "dense"])
def test_arms_differ_in_what_they_keep_and_not_in_how_much(arm):
    q, k, v = (torch.randn(1, 2, 1024, 32) for _ in range(3))
    config = experiment.arm_config(STUDY, arm)
    selection = patterns.select(config.attention, q, k, v, config.stem_config)
    reference = patterns.select("stem", q, k, v, SPARSE)
    assert selection.density() == pytest.approx(reference.density(), abs=0.03)
    assert arm == "stem" or not torch.equal(selection.to_mask(), reference.to_mask())


def test_an_arm_changes_fields_of_the_study_s_config():
    config = experiment.arm_config(STUDY, "stem_softmax")
    assert config.attention == "stem"
    assert config.stem_config == SPARSE.replace(reduction="softmax", allocation="uniform")
    assert (config.stem_config.reduction, config.stem_config.decay) == ("softmax", 1)

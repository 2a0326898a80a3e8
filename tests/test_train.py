"""The training loop: one curve, whole, split, interrupted or distributed, and checkpoints that are whole or absent."""

import csv
import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import stem
from stem.distributed import Processes, join_processes
from stem.model import LanguageModel, ModelSize
from stem.runs import load_checkpoint, save_checkpoint, training_state
from stem.train import (
    TrainConfig,
    learning_rate,
    make_optimizer,
    parse_config,
    row_parts,
    train,
)

SIZE = ModelSize(layers=1, width=32, heads=2, kv_heads=1, hidden=48)
SPARSE = stem.StemConfig(block_size=16, score_stride=4, density=0.5, sink_blocks=1, local_blocks=1)


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small gain nothing from threads, and sums in a fixed order are equal to the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small(out: Path, **changes) -> TrainConfig:
    settings = dict(steps=6, batch_size=4, seq_len=64, warmup=2, checkpoint_every=2, size=SIZE, stem_config=SPARSE)
    return TrainConfig(out=str(out), device="cpu", **settings | changes)


def options(config: TrainConfig) -> list[str]:
    """The command line of a small run."""
    named = ("out", "attention", "steps", "batch_size", "seq_len", "warmup", "checkpoint_every", "device")
    named += ("parallel", "accumulate")
    nested = (("layers", "width", "heads", "kv_heads", "hidden"), ("block_size", "score_stride", "density"))
    values = {name: getattr(config, name) for name in named}
    values |= {name: getattr(config.size, name) for name in nested[0]}
    values |= {name: getattr(config.stem_config, name) for name in (*nested[1], "sink_blocks", "local_blocks")}
    return [part for name, value in values.items() for part in ("--" + name.replace("_", "-"), str(value))]


def curve(folder: str | Path, *columns: str) -> torch.Tensor:
    """Columns of a run's log, float64 [steps, columns]."""
    with open(Path(folder) / "log.csv", newline="") as file:
        rows = [[float(row[name]) for name in columns or ("step", "loss", "grad_norm")] for row in csv.DictReader(file)]
    return torch.tensor(rows, dtype=torch.float64)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def test_the_loss_falls_and_every_step_is_logged(tmp_path):
    train(small(tmp_path, steps=30, lr=1e-2))
    step, loss = curve(tmp_path, "step", "loss").T
    assert step.tolist() == list(range(1, 31))
    assert loss[0] > 5 and loss[-1] < loss[0] - 1
    assert not list(tmp_path.glob("*.partial"))


def test_accumulation_does_not_change_the_curve(tmp_path):
    train(small(tmp_path / "whole"))
    train(small(tmp_path / "parts", accumulate=4))
    torch.testing.assert_close(curve(tmp_path / "parts"), curve(tmp_path / "whole"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("attention", "parallel"), [("dense", "ddp"), ("stem", "ddp"), ("stem", "fsdp")])
def test_two_processes_give_the_curve_of_one(tmp_path, attention, parallel):
    """Also in parts, and the checkpoint of shards holds whole tensors."""
    one = small(tmp_path / "one", attention=attention)
    two = small(tmp_path / "two", attention=attention, parallel=parallel, accumulate=2)
    model = train(one)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "stem.train"]
    result = subprocess.run([*torchrun, *options(two)], env=environment(), capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    torch.testing.assert_close(curve(two.out), curve(one.out), rtol=1e-5, atol=1e-6)
    with safe_open(Path(two.out) / "checkpoint.safetensors", "pt") as file:
        weights = {name: file.get_tensor(f"model.{name}") for name in model.state_dict()}
    torch.testing.assert_close(weights, dict(model.state_dict()), rtol=1e-4, atol=1e-5)


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path):
    """SIGKILL after a few steps, wherever that falls, then the same command again."""
    whole, killed = (small(tmp_path / name, steps=80, checkpoint_every=3) for name in ("whole", "killed"))
    command = [sys.executable, "-m", "stem.train", *options(killed)]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoint, deadline = Path(killed.out) / "checkpoint.safetensors", time.monotonic() + 60
    while not checkpoint.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with safe_open(checkpoint, "pt") as file:
        done = int(file.metadata()["step"])
    assert 0 < done < killed.steps, "the run was killed on its way"
    train(killed)
    train(whole)
    assert torch.equal(curve(killed.out)[:, 0], torch.arange(1, 81).double())
    torch.testing.assert_close(curve(killed.out), curve(whole.out), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_resuming_is_exact(tmp_path, stop):
    """In one process, where the arithmetic is the same, a resumed run is equal to the last bit."""

    class Stop(Exception):
        pass

    def interrupt(done, model):
        if done == stop:
            raise Stop

    whole, stopped = small(tmp_path / "whole"), small(tmp_path / "stopped")
    expected = train(whole)
    with pytest.raises(Stop):
        train(stopped, on_step=interrupt)
    random_state = torch.get_rng_state()
    torch.rand(5)
    found = train(stopped)
    assert torch.equal(curve(stopped.out), curve(whole.out))
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_finished_run_is_not_trained_again(tmp_path):
    first = train(small(tmp_path))
    log = (tmp_path / "log.csv").read_bytes()
    again = train(small(tmp_path))
    assert (tmp_path / "log.csv").read_bytes() == log
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_a_checkpoint_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    config = small(tmp_path)
    model = LanguageModel(SIZE)
    optimizer = make_optimizer(model, config)
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, 1, config.settings(), training_state(model, optimizer))
    before = path.read_bytes()

    def disk_full(*arguments):
        Path(arguments[1]).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("stem.runs.save_file", disk_full)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(path, 2, config.settings(), training_state(model, optimizer))
    assert path.read_bytes() == before


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    train(small(tmp_path))
    with pytest.raises(ValueError, match=r"belongs to another run \(lr: 0.003 there, 0.1 asked\)"):
        train(small(tmp_path, lr=0.1))


def test_checkpoint_holds_optimizer_and_random_state(tmp_path):
    config = small(tmp_path)
    train(config)
    model = LanguageModel(SIZE)
    optimizer = make_optimizer(model, config)
    torch.manual_seed(123)
    assert load_checkpoint(tmp_path / "checkpoint.safetensors", config.settings(), model, optimizer) == config.steps
    assert {float(state["step"]) for state in optimizer.state.values()} == {float(config.steps)}
    assert all(state["exp_avg_sq"].abs().max() > 0 for state in optimizer.state.values())


def test_bf16_autocast_stays_close(tmp_path):
    train(small(tmp_path / "fp32"))
    train(small(tmp_path / "bf16", bf16=True))
    fp32, bf16 = (curve(tmp_path / name, "loss") for name in ("fp32", "bf16"))
    assert not torch.equal(fp32, bf16)
    torch.testing.assert_close(bf16, fp32, rtol=2e-2, atol=2e-2)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    def break_weights(done, model):
        with torch.no_grad():
            model.norm.weight.fill_(float("nan"))

    with pytest.raises(FloatingPointError, match="step 2: loss=nan"):
        train(small(tmp_path), on_step=break_weights)


def test_learning_rate_warms_up_and_falls_to_a_tenth(tmp_path):
    config = small(tmp_path, steps=100, warmup=10, lr=1.0)
    rates = [learning_rate(step, config) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == pytest.approx(1.0)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert rates[100] == pytest.approx(0.1)


def test_processes_and_parts_share_the_rows_of_a_step_without_overlap(tmp_path):
    config = small(tmp_path, batch_size=12, accumulate=2)
    shares = [row_parts(5, config, Processes(rank, 3, torch.device("cpu"))) for rank in range(3)]
    assert sorted(row for share in shares for part in share for row in part) == list(range(60, 72))
    with pytest.raises(ValueError, match="batch_size=12 must be a multiple of accumulate"):
        row_parts(0, dataclasses.replace(config, accumulate=5), Processes(0, 1, torch.device("cpu")))


def test_without_torchrun_a_process_is_alone():
    with join_processes("cpu") as processes:
        assert processes == Processes(0, 1, torch.device("cpu")) and processes.is_main


def test_command_line_reaches_every_part_of_the_config(tmp_path):
    config = small(tmp_path, attention="stem")
    assert parse_config(options(config)) == config
    assert parse_config(["--bf16", "--lr", "1e-3"]) == TrainConfig(bf16=True, lr=1e-3)


@pytest.mark.parametrize("name", ["steps", "batch_size", "accumulate", "checkpoint_every"])
def test_counts_below_one_are_named(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}=0"):
        small(tmp_path, **{name: 0})


def test_nothing_is_written_for_a_bad_task(tmp_path):
    with pytest.raises(ValueError, match="unknown"):
        train(small(tmp_path / "run", tasks="text,typo"))
    assert not (tmp_path / "run").exists()

"""The training loop: one curve, whole, split, interrupted or distributed, and checkpoints that are whole or absent."""

import contextlib
import csv
import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import are_deterministic_algorithms_enabled as deterministic_now

import stem
from stem.experiments.training.checkpoints import load_checkpoint, save_checkpoint, training_state
from stem.experiments.training.config import TrainConfig, parse_config
from stem.experiments.training.distributed import Processes, join_processes
from stem.experiments.training.model import LanguageModel, ModelSize
from stem.experiments.training.train import learning_rate, main, make_optimizer, row_length, row_parts, train

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
    return TrainConfig(out=str(out), **dict(device="cpu") | settings | changes)


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


class Stop(Exception):
    """Ends a run between two steps."""


def stop_after(stop: int):
    def on_step(done, model):
        if done == stop:
            raise Stop

    return on_step


def tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    """Tensors of a run's checkpoint."""
    with safe_open(Path(folder) / "checkpoint.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize(("attention", "parallel"), [("dense", "ddp"), ("stem", "ddp"), ("stem", "fsdp")])
def test_two_processes_give_the_curve_of_one(tmp_path, attention, parallel):
    """Also in parts, going on from a checkpoint of one process, and with a checkpoint that holds whole tensors."""
    one = small(tmp_path / "one", attention=attention)
    two = small(tmp_path / "two", attention=attention, parallel=parallel, accumulate=2)
    train(one)
    with pytest.raises(Stop):
        train(two, on_step=stop_after(3))  # the last checkpoint is of step 2
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "stem.experiments.training.train",
    ]
    result = subprocess.run([*torchrun, *options(two)], env=environment(), capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stderr
    torch.testing.assert_close(curve(two.out), curve(one.out), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tensors(two.out), tensors(one.out), rtol=1e-3, atol=1e-5)


def test_the_distributed_model_dies_before_its_group(tmp_path, monkeypatch):
    """Else it may be the last owner of the group, and gloo's destructor then waits for itself."""
    shared = []

    class Share(torch.nn.Module):
        def __init__(self, model, parallel, processes):
            super().__init__()
            self.forward = model.forward
            self.blocks = model  # what gives it the parameters
            shared.append(weakref.ref(self))

    @contextlib.contextmanager
    def join(device):
        yield Processes(0, 1, torch.device("cpu"))
        left.extend(ref() is not None for ref in shared)

    left = []
    monkeypatch.setattr("stem.experiments.training.train.share", Share)
    monkeypatch.setattr("stem.experiments.training.train.join_processes", join)
    train(small(tmp_path))
    assert left == [False]


KILLED_IN_WRITE = """
import os, signal, stem.experiments.training.checkpoints, stem.experiments.training.train

def save_half(tensors, path, metadata, whole=stem.experiments.training.checkpoints.save_file, calls=[]):
    whole(tensors, path, metadata)
    calls.append(path)
    if len(calls) == 4:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

stem.experiments.training.checkpoints.save_file = save_half
stem.experiments.training.train.main()
"""


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path):
    """SIGKILL in the middle of writing a checkpoint, then at a random moment, then once more: equal to the last bit."""
    whole, killed = (small(tmp_path / name, steps=60, checkpoint_every=1) for name in ("whole", "killed"))
    quiet = dict(env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first = subprocess.run([sys.executable, "-c", KILLED_IN_WRITE, *options(killed)], **quiet)
    assert first.returncode == -signal.SIGKILL and len(curve(killed.out)) == 4
    assert (Path(killed.out) / "checkpoint.partial").exists()
    process = subprocess.Popen([sys.executable, "-m", "stem.experiments.training.train", *options(killed)], **quiet)
    while process.poll() is None and len(curve(killed.out)) < 5:
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.3))
    process.send_signal(signal.SIGKILL)
    process.wait()
    train(killed)
    train(whole)
    assert torch.equal(curve(killed.out), curve(whole.out))
    assert all(torch.equal(value, tensors(whole.out)[name]) for name, value in tensors(killed.out).items())
    assert not list(tmp_path.glob("*/*.partial"))


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_resuming_is_exact(tmp_path, stop):
    """Also while rows grow, and whatever the random state of the process was."""
    whole, stopped = (small(tmp_path / name, start_len=32, grow_steps=4) for name in ("whole", "stopped"))
    expected = train(whole)
    with pytest.raises(Stop):
        train(stopped, on_step=stop_after(stop))
    random_state = torch.get_rng_state()
    torch.rand(5)
    found = train(stopped)
    assert torch.equal(curve(stopped.out), curve(whole.out))
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_log_with_a_hole_is_refused(tmp_path):
    train(small(tmp_path))
    log = tmp_path / "log.csv"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-2]))
    with pytest.raises(ValueError, match="lacks rows of the 6 steps"):
        train(small(tmp_path))
    log.unlink()
    with pytest.raises(ValueError, match="lacks rows of the 6 steps"):
        train(small(tmp_path))


@pytest.mark.parametrize("damage", ["torn row", "rows after the checkpoint"])
def test_a_log_that_ran_ahead_of_the_checkpoint_is_cut(tmp_path, damage):
    whole, stopped = small(tmp_path / "whole"), small(tmp_path / "stopped")
    train(whole)
    with pytest.raises(Stop):
        train(stopped, on_step=stop_after(3))
    with open(tmp_path / "stopped" / "log.csv", "a") as file:
        file.write("4,1.2" if damage == "torn row" else "4,1,1,1,1,1,1,1\n5,1,1,1,1,1,1,1\n")
    train(stopped)
    assert torch.equal(curve(stopped.out), curve(whole.out))


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

    monkeypatch.setattr("stem.experiments.training.checkpoints.save_file", disk_full)
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
    assert load_checkpoint(tmp_path / "checkpoint.safetensors", model, optimizer) == config.steps
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
    assert parse_config(["--bf16", "--lr", "1e-3", "--out", "7"]) == TrainConfig(bf16=True, lr=1e-3, out="7")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"accumulate": 0.5}, "accumulate must be an int >= 1, got 0.5"),
        ({"checkpoint_every": -1}, "checkpoint_every must be >= 1, got -1"),
        ({"seq_len": 16}, "seq_len must be >= 32, got 16"),
        ({"seed": True}, "seed must be an int >= 0, got True"),
        ({"lr": 0.0}, r"lr must be in \(0, 1e\+06\], got 0.0"),
        ({"lr": "fast"}, r"lr must be a number in \(0, 1e\+06\], got 'fast'"),
        ({"weight_decay": -0.1}, r"weight_decay must be in \[0, 1e\+06\], got -0.1"),
        ({"clip": float("nan")}, r"clip must be in \(0, inf\), got nan"),
        ({"attention": "stemm"}, "attention must be one of .*'stem'.*, got 'stemm'"),
        ({"impl": "cuda"}, "impl must be one of None, 'reference', .*, got 'cuda'"),
        ({"impl": "torch"}, "impl='torch' has no effect on attention='dense'; accepted: None"),
        ({"parallel": "tensor"}, "parallel must be one of 'ddp', 'fsdp', got 'tensor'"),
        ({"tasks": "text,typo"}, "each of tasks must be one of 'text', 'recall', got 'typo'"),
        ({"device": "tpu"}, "device must be one of '', 'cpu', 'cuda', got 'tpu'"),
        ({"start_len": 48, "grow_steps": 2}, "start_len=48; accepted: 0, or seq_len=64 halved"),
        ({"start_len": 128, "grow_steps": 2}, "start_len=128"),
        ({"start_len": 16, "grow_steps": 2}, "start_len=16; accepted: .* from 32"),
        ({"start_len": 32}, "start_len=32 and grow_steps=0 go together"),
    ],
)
def test_bad_settings_are_named(tmp_path, changes, words):
    with pytest.raises((TypeError, ValueError), match=words):
        small(tmp_path, **changes)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "many"], "steps must be an int >= 1, got 'many'"),
        (["--density", "2"], "density must be in (0, 1], got 2"),
        (["--heads", "5"], "width=128 must be an even multiple of heads=5"),
        (["--stepss", "3"], "unrecognized arguments: --stepss"),
    ],
)
def test_a_bad_option_ends_with_usage_and_one_line(arguments, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_config(arguments)
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_a_run_that_cannot_start_ends_with_one_line(tmp_path, monkeypatch):
    train(small(tmp_path))
    for changes, words in (
        ({"lr": 0.1}, "lr: 0.003 there, 0.1 asked"),
        ({"accumulate": 3}, "batch_size=4 must be a mul"),
    ):
        value = [part for name, value in changes.items() for part in (f"--{name}", str(value))]
        monkeypatch.setattr(sys, "argv", ["stem.experiments.training.train", *options(small(tmp_path)), *value])
        with pytest.raises(SystemExit, match=words):
            main()


def test_two_runs_do_not_write_one_folder(tmp_path):
    """A killed torchrun can leave its processes behind; a second start must not tear their log."""
    script = "import sys, pathlib, stem.experiments.training.checkpoints as checkpoints\n"
    script += "with checkpoints.only_writer(pathlib.Path(sys.argv[1])): input()"
    other = subprocess.Popen([sys.executable, "-c", script, tmp_path], stdin=subprocess.PIPE, env=environment())
    while not (tmp_path / "lock").exists():
        time.sleep(0.01)
    time.sleep(0.2)
    with pytest.raises(ValueError, match="another process trains there"):
        train(small(tmp_path))
    assert not (tmp_path / "log.csv").exists()
    other.send_signal(signal.SIGKILL)
    other.wait()
    train(small(tmp_path))  # the lock died with its process


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_named_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="process 0 of this machine needs a GPU, 0 found"):
        train(dataclasses.replace(small(tmp_path / "run"), device="cuda"))
    assert not (tmp_path / "run").exists()


def test_rows_grow_and_a_step_keeps_its_tokens(tmp_path):
    config = small(tmp_path, seq_len=256, start_len=32, grow_steps=6, steps=10)
    lengths = [row_length(step, config) for step in range(10)]
    assert lengths == [32, 32, 64, 64, 128, 128, 256, 256, 256, 256]
    alone = Processes(0, 1, torch.device("cpu"))
    assert all(len(row_parts(step, config, alone)[0]) * length == 4 * 256 for step, length in enumerate(lengths))


def test_deterministic_reaches_torch_and_is_put_back(tmp_path):
    seen = []
    train(small(tmp_path, steps=1, deterministic=True), on_step=lambda *_: seen.append(deterministic_now()))
    assert seen == [True] and not deterministic_now()


def test_every_column_of_the_log_is_filled(tmp_path):
    train(small(tmp_path))
    values = curve(
        tmp_path, "loss", "loss_text", "loss_recall", "grad_norm", "lr", "tokens_per_second", "peak_memory_mib"
    )
    assert values.isfinite().all() and (values > 0).all()
    assert values[:, 4].tolist() == [learning_rate(step, small(tmp_path)) for step in range(6)]

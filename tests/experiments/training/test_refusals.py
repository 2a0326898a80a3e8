"""Runs of the training command that cannot start or go on: one line that names the cause, and no file is changed."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stem.experiments.training import checkpoints
from stem.experiments.training.config import TrainConfig, parse_config
from stem.experiments.training.model import LanguageModel, attend
from stem.experiments.training.train import learning_rate, main, take_step, train

SIZE = "--layers 1 --width 32 --heads 2 --kv-heads 1 --hidden 48"
SPARSE = "--attention stem --block-size 16 --score-stride 4 --density 0.5 --sink-blocks 1 --local-blocks 1"
RUN = f"--device cpu --steps 4 --batch-size 2 --seq-len 64 --warmup 2 --checkpoint-every 2 {SIZE} {SPARSE}".split()
BEGINNING = "^stem.experiments.training.train: "


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small gain nothing from threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Run the training command in a temporary folder; returns the message that it ends with, "" after success."""

    def run(*options: object) -> str:
        monkeypatch.setattr(sys, "argv", ["train", *RUN, "--out", str(tmp_path / "run"), *map(str, options)])
        try:
            main()
        except SystemExit as end:
            assert isinstance(end.code, str) and "\n" not in end.code
            return end.code
        return ""

    return run


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below a folder, with the bytes of the files."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def rewrite(path: Path, change=lambda tensors: None, **metadata: str) -> None:
    """Change the tensors and the metadata of a checkpoint."""
    step, settings = checkpoints.read_header(path)
    tensors = load_file(path)
    change(tensors)
    with safe_open(path, "pt") as file:
        checksum = file.metadata()["checksum"]
    save_file(tensors, path, {"step": str(step), "settings": json.dumps(settings), "checksum": checksum} | metadata)


def flip_a_bit(path: Path, name: str, bit: int = 16) -> None:
    """Flip a bit in the first number of a checkpoint's tensor, in the file."""
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    first = 8 + length + json.loads(content[8 : 8 + length])[name]["data_offsets"][0]
    content[first + bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(content))


def with_tensor(name: str, change):
    """Change one tensor of a checkpoint by a function."""
    return lambda path: rewrite(path, lambda tensors: tensors.update({name: change(tensors[name])}))


DAMAGE = {
    "empty": (lambda path: path.write_bytes(b""), "cannot be read"),
    "half": (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "cannot be read"),
    "last byte lost": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "cannot be read"),
    "text": (lambda path: path.write_text("not a checkpoint" * 1000), "cannot be read"),
    "foreign file": (lambda path: save_file({"x": torch.ones(2)}, path), "does not say which step and settings"),
    "no step": (lambda path: rewrite(path, step="many"), "does not say which step and settings"),
    "negative step": (lambda path: rewrite(path, step="-3"), "does not say which step and settings"),
    "settings": (lambda path: rewrite(path, settings="[1]"), "does not say which step and settings"),
    "other size": (
        lambda path: rewrite(path, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64)})),
        r"does not hold this model: model.norm.weight has shape \(64,\), expected \(32,\)",
    ),
    "weights in half": (
        with_tensor("model.norm.weight", torch.Tensor.half),
        "does not hold this model: model.norm.weight has dtype torch.float16, expected torch.float32",
    ),
    "moments in double": (
        with_tensor("optimizer.norm.weight.exp_avg", torch.Tensor.double),
        "does not hold this model: optimizer.norm.weight.exp_avg has dtype torch.float64, expected torch.float32",
    ),
    "steps as integers": (
        with_tensor("optimizer.norm.weight.step", torch.Tensor.long),
        "does not hold this model: optimizer.norm.weight.step has dtype torch.int64",
    ),
    "random state in float": (
        with_tensor("random.cpu", torch.Tensor.float),
        "does not hold this model: random.cpu has dtype torch.float32, expected torch.uint8",
    ),
    "other random state": (with_tensor("random.cpu", torch.zeros_like), "has been damaged or changed.*checksum"),
    "NaN": (
        with_tensor("model.norm.weight", lambda x: x / 0 - x / 0),
        "does not hold this model: model.norm.weight holds NaN or infinity",
    ),
    "infinite moment": (
        with_tensor("optimizer.norm.weight.exp_avg_sq", lambda x: x + torch.inf),
        "does not hold this model: optimizer.norm.weight.exp_avg_sq holds NaN or infinity",
    ),
    "a bit of a weight": (lambda path: flip_a_bit(path, "model.norm.weight"), "has been damaged or changed.*checksum"),
    "a bit of the random state": (lambda path: flip_a_bit(path, "random.cpu"), "has been damaged or changed.*checksum"),
    "another step": (lambda path: rewrite(path, step="3"), "has been damaged or changed.*checksum"),
    "no checksum": (lambda path: rewrite(path, checksum=""), "has been damaged or changed.*checksum"),
    "one more tensor": (
        lambda path: rewrite(path, lambda tensors: tensors.update(extra=torch.ones(1))),
        "has been damaged or changed.*checksum",
    ),
    "no optimizer": (
        lambda path: rewrite(path, lambda tensors: tensors.pop("optimizer.norm.weight.exp_avg")),
        "does not hold this model: optimizer.norm.weight.exp_avg is missing",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_left_alone(command, tmp_path, damage):
    assert command() == ""
    path = tmp_path / "run" / "checkpoint.safetensors"
    change, words = DAMAGE[damage]
    change(path)
    before = contents(tmp_path)
    assert re.search(f"{BEGINNING}{path} {words}.*remove it to start from step 0", command())
    assert contents(tmp_path) == before


def lines(change):
    """Change the lines of a log: header, then one for each step."""
    return lambda path: path.write_text("".join(change(path.read_text().splitlines(keepends=True))))


@pytest.mark.parametrize(
    "damage",
    [
        Path.unlink,
        lambda path: path.write_text(""),
        lambda path: path.write_bytes(b"\xff\xfe" + path.read_bytes()),
        lines(lambda log: log[:-1]),
        lines(lambda log: [*log[:-1], log[-1][:-1]]),
        lines(lambda log: [*log[:-1], "4,1.2"]),
        lines(lambda log: [*log[:2], "2,1.2\n", *log[3:]]),
        lines(lambda log: [*log[:2], *log[3:], "5" + log[-1][1:]]),
        lines(lambda log: ["step,loss\n", *log[1:]]),
        lines(lambda log: [*log[:-1], log[-1].replace(".", "x")]),
    ],
    ids=[
        "missing", "empty", "not text", "last row lost", "end of line lost", "torn", "short row", "step left out",
        "other columns", "no numbers",
    ],
)  # fmt: skip
def test_a_log_without_a_row_of_the_checkpoint_is_named_and_left_alone(command, tmp_path, damage):
    assert command() == ""
    path = tmp_path / "run" / "log.csv"
    damage(path)
    before = contents(tmp_path)
    assert re.search(f"{BEGINNING}{path} lacks rows of the 4 steps of the checkpoint", command())
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--density", "0.25"], r"stem_config.density: 0.5 there, 0.25 asked"),
        (["--layers", "2", "--lr", "0.1"], r"lr: 0.003 there, 0.1 asked, size.layers: 1 there, 2 asked"),
        (["--steps", "6"], r"steps: 4 there, 6 asked"),
        (["--impl", "torch"], r"impl: None there, torch asked"),
    ],
)
def test_other_settings_are_named_one_by_one(command, tmp_path, options, words):
    assert command() == ""
    before = contents(tmp_path)
    assert re.search(rf"{BEGINNING}.*checkpoint.safetensors belongs to another run \({words}\)", command(*options))
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("file", "file is not a folder"),
        ("file/runs/stem", "file is not a folder"),
        ("nowhere", "nowhere is not a folder"),
        ("taken", "taken/log.csv is not a file"),
    ],
)
def test_a_folder_that_cannot_be_written_to_is_named_before_anything_is_written(command, tmp_path, out, words):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "taken" / "log.csv").mkdir(parents=True)
    before = contents(tmp_path)
    assert re.search(f"{BEGINNING}out='{tmp_path / out}': {tmp_path}/{words}", command("--out", tmp_path / out))
    assert contents(tmp_path) == before


def test_a_folder_without_permission_is_named(command, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints.os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write anywhere
    assert re.search(f"{BEGINNING}out='{tmp_path}/run': {tmp_path} cannot be written to", command())
    assert contents(tmp_path) == {}


def test_a_disk_that_fills_up_is_named_and_the_last_checkpoint_is_kept(command, tmp_path, monkeypatch):
    def fill_up(path, step, *rest, save=checkpoints.save_checkpoint):
        if step == 4:
            path.with_suffix(".partial").mkdir()
        save(path, step, *rest)

    monkeypatch.setattr("stem.experiments.training.checkpoints.save_checkpoint", fill_up)
    path = tmp_path / "run" / "checkpoint.partial"
    assert re.search(f"{BEGINNING}{path}: .*[Ii]s a directory", command())
    assert checkpoints.read_header(path.with_suffix(".safetensors"))[0] == 2
    monkeypatch.undo()
    path.rmdir()
    train(parse_config([*RUN, "--out", str(tmp_path / "run")]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("attention", ["stem", "uniform_topk"])
def test_an_implementation_that_this_machine_lacks_is_refused_before_anything_is_written(command, tmp_path, attention):
    message = command("--impl", "hopper", "--attention", attention)
    assert re.search(f"{BEGINNING}impl='hopper' does not cover device cpu, accepted: CUDA of sm_90", message)
    assert contents(tmp_path) == {}


def test_an_implementation_that_covers_the_run_is_taken(command):
    assert command("--impl", "reference", "--bf16") == ""


@pytest.mark.parametrize("attention", ["dense", "stem", "uniform_topk"])
def test_a_diverging_learning_rate_names_the_step_the_loss_and_the_rate(command, tmp_path, attention):
    """The weights of the last checkpoint are finite, and a smaller learning rate can start from step 0."""
    message = command("--attention", attention, "--lr", "1e5", "--steps", 40)
    found = re.search(
        rf"{BEGINNING}step (\d+): loss=\S+, .*, learning rate (\S+); .*lower lr=100000 or clip=1", message
    )
    step, rate = int(found[1]), float(found[2])
    assert rate == pytest.approx(learning_rate(step - 1, TrainConfig(lr=1e5, warmup=2, steps=40)), rel=1e-4)
    log = (tmp_path / "run" / "log.csv").read_text()
    assert len(log.splitlines()) == step and "nan" not in log and "inf" not in log
    path = tmp_path / "run" / "checkpoint.safetensors"
    assert not path.exists() or all(value.isfinite().all() for value in load_file(path).values())


def break_weights(name: str):
    """Callback that makes one weight of a model infinite after its second step."""

    def on_step(done: int, model: LanguageModel) -> None:
        if done == 2:
            with torch.no_grad():
                dict(model.named_parameters())[name].view(-1)[0] = float("inf")

    return on_step


@pytest.mark.parametrize("attention", ["stem", "uniform_topk"])
def test_q_that_is_not_finite_is_a_diverging_run(tmp_path, attention):
    config = parse_config([*RUN, "--attention", attention, "--out", str(tmp_path)])
    with pytest.raises(FloatingPointError, match="step 3: loss=nan, NaN or infinity in q, k or v, learning rate 0.00"):
        train(config, on_step=break_weights("blocks.0.attention.qkv.weight"))


def test_a_checkpoint_never_holds_weights_that_are_not_finite(tmp_path, monkeypatch):
    config = parse_config([*RUN, "--out", str(tmp_path), "--checkpoint-every", "1"])
    before = []

    def spoil(step, config, model, *rest, take=take_step):
        row = take(step, config, model, *rest)
        if step == 2:
            before.append((tmp_path / "checkpoint.safetensors").read_bytes())
            break_weights("norm.weight")(2, model)
        return row

    monkeypatch.setattr("stem.experiments.training.train.take_step", spoil)
    with pytest.raises(FloatingPointError, match="step 3: loss=.*, the new weights are not finite"):
        train(config)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before[0]


def test_other_errors_of_the_attention_stay_what_they_are():
    q = torch.ones(1, 2, 32, 16)
    with pytest.raises(ValueError, match="impl must be"):
        attend(q, q, q, "stem", None, impl="none")

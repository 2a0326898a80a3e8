"""What a training run leaves on disk: its checkpoint and its log."""

import contextlib
import csv
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from stem.experiments.training.distributed import like, whole


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights, optimizer and random state as full tensors on the CPU; with shards, every process must call this.

    The names are those of the plain model, so a checkpoint is good for any number of processes, DDP and FSDP2.
    """
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name, weight in model.named_parameters():
        tensors |= {f"optimizer.{name}.{entry}": value for entry, value in optimizer.state[weight].items()}
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    return {name: whole(value.detach()).cpu().contiguous() for name, value in tensors.items()}


def save_checkpoint(path: Path, step: int, settings: Mapping, tensors: Mapping[str, Tensor]) -> None:
    """The `training_state` after `step` steps: one safetensors file that appears whole or not at all.

    It is written under another name, forced to the disk and moved, so a kill at any moment leaves the old or the new.
    """
    metadata = {"step": str(step), "settings": json.dumps(settings)}
    partial = path.with_suffix(".partial")
    save_file(dict(tensors), partial, metadata)
    _to_disk(partial)
    partial.replace(path)
    _to_disk(path.parent)


def check_settings(path: Path, settings: Mapping) -> None:
    """Raise ValueError, naming the differences, if a checkpoint is of a run with other settings."""
    with safe_open(path, "pt") as file:
        theirs = json.loads(file.metadata()["settings"])
    ours = json.loads(json.dumps(settings))
    if different := sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)):
        changes = ", ".join(f"{name}: {theirs.get(name)} there, {ours.get(name)} asked" for name in different)
        raise ValueError(f"{path} belongs to another run ({changes}); take another folder or the same settings")


def load_checkpoint(path: Path, settings: Mapping, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Put a checkpoint's state into the model, the optimizer and the generators; returns the number of steps done.

    Raises:
        ValueError: If the checkpoint is of a run with other settings, naming them.
    """
    check_settings(path, settings)
    with safe_open(path, "pt") as file:
        step = int(file.metadata()["step"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  a safetensors file is no mapping
    weights = model.state_dict()
    model.load_state_dict({name: like(tensors[f"model.{name}"], shard) for name, shard in weights.items()})
    names = {weight: name for name, weight in model.named_parameters()}
    ordered = [weight for group in optimizer.param_groups for weight in group["params"]]
    state = {}
    for index, weight in enumerate(ordered):
        prefix = f"optimizer.{names[weight]}."
        entries = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        state[index] = {entry: like(value, weight) for entry, value in entries.items()}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
    return step


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Make the folder and hold it: two runs that write to one folder would tear its log and its checkpoint.

    The lock dies with its process, however that ends. A killed torchrun can leave its processes behind, still training.

    Raises:
        ValueError: If another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"out={folder}: another process trains there; wait for it or end it") from None
        yield


class Log:
    """log.csv with one row a step, flushed at once; a resumed run drops the rows after its checkpoint.

    Raises:
        ValueError: If rows from before the checkpoint are missing, so that the curve would have a hole.
    """

    def __init__(self, path: Path, steps_done: int, columns: Sequence[str]):
        found = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = found[: steps_done + 1] if steps_done else []
        if steps_done and len(kept) < steps_done + 1:
            raise ValueError(f"{path} lacks rows of the {steps_done} steps of the checkpoint beside it; remove both")
        partial = path.with_suffix(".partial")
        partial.write_text("".join(kept))
        partial.replace(path)
        self.file = path.open("a", newline="", buffering=1)
        self.writer = csv.DictWriter(self.file, columns, lineterminator="\n")
        if not kept:
            self.writer.writeheader()

    def write(self, row: Mapping[str, float]) -> None:
        """Add a row; every digit of its floats, so that equal curves are equal files."""
        self.writer.writerow(row)

    def sync(self) -> None:
        """Force the rows to the disk: a checkpoint must not outlive the rows before it."""
        os.fsync(self.file.fileno())


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

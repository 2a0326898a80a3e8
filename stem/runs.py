"""What a training run leaves on disk: its checkpoint and its log."""

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


def save_checkpoint(path: Path, step: int, settings: dict, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Weights, optimizer and random state after `step` steps: one safetensors file that appears whole or not at all."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    metadata = {"step": str(step), "settings": json.dumps(settings)}
    partial = path.with_suffix(".partial")
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, partial, metadata)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def load_checkpoint(path: Path, settings: dict, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Put a checkpoint's state into the model, the optimizer and the generators; returns the number of steps done.

    Raises:
        ValueError: If the checkpoint is of a run with other settings, naming them.
    """
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  a safetensors file is no mapping
    theirs, ours = json.loads(metadata["settings"]), json.loads(json.dumps(settings))
    if different := sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)):
        changes = ", ".join(f"{name}: {theirs.get(name)} there, {ours.get(name)} asked" for name in different)
        raise ValueError(f"{path} belongs to another run ({changes}); take another folder or the same settings")
    model.load_state_dict({name[6:]: value for name, value in tensors.items() if name.startswith("model.")})
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, entry = name.split(".")
            state.setdefault(int(index), {})[entry] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
    return int(metadata["step"])


class Log:
    """log.csv with one row a step, flushed at once; a resumed run drops the rows after its checkpoint."""

    def __init__(self, path: Path, steps_done: int, columns: Sequence[str]):
        kept = path.read_text().splitlines(keepends=True)[: steps_done + 1] if steps_done else []
        partial = path.with_suffix(".partial")
        partial.write_text("".join(kept))
        partial.replace(path)
        self.file = path.open("a", newline="", buffering=1)
        self.writer = csv.DictWriter(self.file, columns, lineterminator="\n")
        if not kept:
            self.writer.writeheader()

    def write(self, row: dict) -> None:
        self.writer.writerow({name: f"{value:.9g}" for name, value in row.items()})

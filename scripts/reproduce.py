"""Run the notebooks in order by papermill: one process, one progress line and one log each; stop at the first failure.

Executed copies go to results/notebooks/<profile>/. A notebook is skipped when its copy is up to date: same cells, same
profile, same .py files in stem/ and kernels/, same notebooks before it. A copy appears only after a success, so an
interrupted or failed run leaves nothing half-written, and the next run resumes where this one stopped.
"""

import argparse
import base64
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = {"smoke": 600, "full": 1800}  # one notebook may take this long before it counts as stuck
KERNEL_ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",  # with Agg, figures would vanish from the copies
    "STEM_WIDGETS": "0",  # a copy shows pictures, also one made from inside Jupyter
    "PYTHONWARNINGS": "ignore:IProgress not found",  # this and the next four keep noise out of the outputs
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class Failure(Exception):
    """A notebook did not run to its end; the text says where."""


def fingerprints(root: Path, profile: str) -> dict[Path, str]:
    """Notebook -> sha256 of everything that its outputs depend on, in running order."""
    code = hashlib.sha256(profile.encode())
    for source in sorted(path for folder in ("stem", "kernels") for path in (root / folder).rglob("*.py")):
        code.update(f"{source.relative_to(root)}\0{source.read_text()}\0".encode())
    prints, previous = {}, code.hexdigest()
    for path in sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        cells = nbformat.read(path, 4).cells
        content = [(cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in cells]
        prints[path] = previous = hashlib.sha256(json.dumps([previous, content]).encode()).hexdigest()
    return prints


def choose_profile(name: str) -> str:
    """Turn "auto" into "full" on a machine with CUDA and into "smoke" elsewhere."""
    if name != "auto":
        return name
    import torch  # late: takes a second, and only auto needs it

    return "full" if torch.cuda.is_available() else "smoke"


def choose_notebooks(paths: list[Path], only: str | None) -> list[Path]:
    """The notebooks whose number is `only` (such as "02" or "2"); all without it."""
    if not paths:
        raise SystemExit("no notebook NN_*.ipynb in notebooks/")
    chosen = [path for path in paths if only is None or path.name[:2] == only.zfill(2)]
    if not chosen:
        raise SystemExit(f"ONLY must be one of {', '.join(path.name[:2] for path in paths)}, got {only!r}")
    return chosen


def strip(path: Path) -> None:
    """Remove what papermill notes in a notebook (times, paths), so that the same outputs give the same file; its
    pictures are stored with 64 colours, a third of the bytes."""
    notebook = nbformat.read(path, 4)
    notebook.metadata.pop("papermill", None)
    for cell in notebook.cells:
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]
        for output in cell.get("outputs", []):
            if picture := output.get("data", {}).get("image/png"):
                output.data["image/png"] = fewer_colours(picture)
    nbformat.write(notebook, path)


def fewer_colours(picture: str) -> str:
    """A PNG in base64 with at most 256 colours."""
    file = io.BytesIO()
    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    image.quantize(256, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def cells_started(process: subprocess.Popen, log: Path) -> Iterator[int]:
    """Copy papermill's output to the log line by line, and yield the number of each cell as it starts."""
    with log.open("w") as file:
        for line in process.stdout:
            file.write(line)
            file.flush()
            if started := re.search(r"Executing Cell (\d+)-", line):
                yield int(started[1])


def execute(notebook: Path, partial: Path, log: Path, profile: str, limit_s: float, show) -> None:
    """Run one notebook into `partial` and call `show(cell, cells)` as cells start; raise `Failure` if one fails."""
    command = [sys.executable, "-m", "papermill", notebook, partial, "--cwd", notebook.parent, "-k", "python3"]
    command += ["--language", "python", "--log-output", "--no-progress-bar"]
    if profile == "full":
        command += ["-p", "profile", "full"]  # smoke passes no parameter, so the copy has no injected cell
    cells = nbformat.read(notebook, 4).cells
    process = subprocess.Popen(
        list(map(str, command)),
        env={**os.environ, **KERNEL_ENVIRONMENT},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # Ctrl-C reaches this process only, which then ends papermill and its kernel
    )
    late = threading.Event()

    def stop() -> None:
        late.set()
        process.terminate()

    timer = threading.Timer(limit_s, stop)
    timer.start()
    cell = 0
    try:
        for cell in cells_started(process, log):
            show(cell, len(cells))
        process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:  # Ctrl-C; the kernel ends by itself within a second of its parent
            process.terminate()
            process.wait()
    if process.returncode:
        reason = f"took more than {limit_s:g} s" if late.is_set() else last_error(log)
        source = cells[cell - 1].source.strip().split("\n")[0] if cell else "(before the first cell)"
        raise Failure(f"{notebook.name}, cell {cell}: {source}\n  {reason}\n  log: {log}")


def last_error(log: Path) -> str:
    """The last line of a log that reads like an exception, or its last line."""
    lines = [line.strip() for line in log.read_text().splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt|Exit)\b", line)]
    return (errors or lines or ["no output"])[-1]


def run(root: Path, profile: str, only: str | None, force: bool, limit_s: float) -> list[Path]:
    """Bring the executed copies up to date and return them; raise `Failure` at the first notebook that fails."""
    prints = fingerprints(root, profile)
    chosen = choose_notebooks(list(prints), only)
    folder = root / "results" / "notebooks" / profile
    folder.mkdir(parents=True, exist_ok=True)
    copies = []
    for number, notebook in enumerate(chosen, 1):
        copy, stamp = folder / notebook.name, folder / f"{notebook.stem}.json"
        title = f"[{number}/{len(chosen)}] {notebook.stem:<24} {profile}"
        copies.append(copy)
        if not force and copy.exists() and stamp.exists():
            if json.loads(stamp.read_text())["fingerprint"] == prints[notebook]:
                print(f"{title}  up to date")
                continue
        stamp.unlink(missing_ok=True)
        partial, started = folder / f"{notebook.stem}.partial.ipynb", time.monotonic()

        def show(cell: int, cells: int, title: str = title, started: float = started) -> None:
            if sys.stdout.isatty():
                print(f"\r{title}  cell {cell}/{cells}, {time.monotonic() - started:.0f} s ", end="", flush=True)

        if not sys.stdout.isatty():
            print(f"{title}  ...", flush=True)
        try:
            execute(notebook, partial, folder / f"{notebook.stem}.log", profile, limit_s, show)
            strip(partial)
            os.replace(partial, copy)
        finally:
            partial.unlink(missing_ok=True)
        seconds = round(time.monotonic() - started, 1)
        stamp.write_text(json.dumps({"fingerprint": prints[notebook], "seconds": seconds}))
        print(f"\r{title}  done in {seconds:.0f} s          ", flush=True)
    return copies


def publish(copies: list[Path], notebooks: Path) -> None:
    """Put executed copies in the place of the notebooks that they came from."""
    for copy in copies:
        partial = notebooks / f"{copy.stem}.partial.ipynb"
        partial.write_bytes(copy.read_bytes())
        os.replace(partial, notebooks / copy.name)


def main() -> None:
    """Parse the command line; exit with 1 on a failed notebook and with 130 on Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--profile", choices=["smoke", "full", "auto"], default="auto", help="auto: full on CUDA")
    parser.add_argument("--only", metavar="NN", help="run this notebook only")
    parser.add_argument("--force", action="store_true", help="run even what is up to date")
    parser.add_argument("--limit", type=float, metavar="S", help=f"seconds that a notebook may take ({LIMIT_S})")
    parser.add_argument("--publish", action="store_true", help="copy the executed notebooks over notebooks/")
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout to work on")
    arguments = parser.parse_args()
    if arguments.publish and arguments.profile != "smoke":
        parser.error("--publish needs --profile smoke: other copies hold an injected cell")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` and `timeout` end like Ctrl-C
    profile = choose_profile(arguments.profile)
    try:
        limit_s = arguments.limit or LIMIT_S[profile]
        copies = run(arguments.root, profile, arguments.only, arguments.force, limit_s)
        if arguments.publish:
            publish(copies, arguments.root / "notebooks")
    except Failure as failure:
        sys.exit(f"\nFAILED {failure}")
    except KeyboardInterrupt:
        print("\ninterrupted; the next run resumes here", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()

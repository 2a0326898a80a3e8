"""Run the notebooks in order with papermill and stop at the first failure.

Executed copies go to results/notebooks/<profile>/, each with a log. A notebook is skipped while its copy is up to date:
its cells, its profile, every .py file in stem/ and kernels/, and the notebooks before it are unchanged. A copy is
written only after a success, so the next run resumes at the notebook that failed or was interrupted. A notebook may
take any time: it is stopped only after SILENCE minutes without output and CPU time.
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
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import nbformat
import psutil
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SILENCE_MIN = 15.0
IDLE_SHARE = 0.01  # processes that use less of one core than this are silent; a waiting kernel uses 0.002
KERNEL_ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",
    "OMP_WAIT_POLICY": "passive",  # torch's threads yield a shared core while they wait
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",  # with Agg, figures would vanish from the copies
    "STEM_WIDGETS": "0",  # copies show pictures, not widgets
    "PYTHONWARNINGS": "ignore:IProgress not found",  # this and the next four keep noise out of the outputs
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
EXECUTE = """
import json, logging, sys
import papermill
logging.basicConfig(level=logging.INFO, format="%(message)s")
papermill.execute_notebook(**json.loads(sys.argv[1]))
"""


class Failure(Exception):
    """A notebook did not run to its end. The text names the cell, the reason and the log."""


def fingerprints(root: Path, profile: str) -> dict[Path, str]:
    """Map each notebook, in running order, to a sha256 of everything that its outputs depend on."""
    code = hashlib.sha256(profile.encode())
    for source in sorted(path for folder in ("stem", "kernels") for path in (root / folder).rglob("*.py")):
        code.update(f"{source.relative_to(root)}\0{source.read_text()}\0".encode())
    prints, previous = {}, code.hexdigest()
    for path in sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        cells = nbformat.read(path, 4).cells
        content = [(cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in cells]
        prints[path] = previous = hashlib.sha256(json.dumps([previous, content]).encode()).hexdigest()
    return prints


def choose_notebooks(paths: list[Path], only: str | None) -> list[Path]:
    """Return the notebooks whose number is `only` (such as "02" or "2"), or all of them without `only`."""
    if not paths:
        raise SystemExit("no notebook NN_*.ipynb in notebooks/")
    chosen = [path for path in paths if only is None or path.name[:2] == only.zfill(2)]
    if not chosen:
        raise SystemExit(f"ONLY must be one of {', '.join(path.name[:2] for path in paths)}, got {only!r}")
    return chosen


def strip(path: Path) -> None:
    """Remove papermill's times and paths, and cut pictures to 256 colours: equal outputs give equal, smaller files."""
    notebook = nbformat.read(path, 4)
    notebook.metadata.pop("papermill", None)
    for cell in notebook.cells:
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]
        for output in cell.get("outputs", []):
            if picture := output.get("data", {}).get("image/png"):
                image, file = Image.open(io.BytesIO(base64.b64decode(picture))), io.BytesIO()
                image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
                output.data["image/png"] = base64.b64encode(file.getvalue()).decode()
    nbformat.write(notebook, path)


def family(process: subprocess.Popen) -> list[psutil.Process]:
    """Return a process and all its descendants, or an empty list after its end."""
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        return [parent, *parent.children(recursive=True)]
    return []


def end(process: subprocess.Popen) -> None:
    """End a process and all its descendants: ask, then kill after five seconds."""
    members = family(process)
    for stop in (psutil.Process.terminate, psutil.Process.kill):
        for member in members:
            with suppress(psutil.NoSuchProcess):
                stop(member)
        _, members = psutil.wait_procs(members, timeout=5)
    process.wait()


class SilenceWatch(threading.Thread):
    """Ends a process that for `limit_s` neither printed (`last_sign`) nor used CPU time; `silent_s` is then set [s]."""

    def __init__(self, process: subprocess.Popen, limit_s: float):
        super().__init__(daemon=True)
        self.process, self.limit_s, self.silent_s, self.last_sign = process, limit_s, None, time.monotonic()
        self.cpu_s: dict[int, float] = {}  # CPU time of each process at the last look [s]

    def has_worked(self, interval_s: float) -> bool:
        before, self.cpu_s = self.cpu_s, {}
        for member in family(self.process):
            with suppress(psutil.NoSuchProcess):
                self.cpu_s[member.pid] = sum(member.cpu_times()[:2])  # user and system
        return sum(max(0.0, s - before.get(pid, 0.0)) for pid, s in self.cpu_s.items()) > IDLE_SHARE * interval_s

    def run(self) -> None:
        interval_s = min(5.0, self.limit_s / 10)
        while self.process.poll() is None:
            if self.has_worked(interval_s):
                self.last_sign = time.monotonic()
            silent_s = time.monotonic() - self.last_sign
            if silent_s > self.limit_s and self.process.poll() is None:
                self.silent_s = silent_s
                end(self.process)
            time.sleep(interval_s)


def execute(
    notebook: Path, partial: Path, log: Path, profile: str, silence_min: float, show: Callable[[str, str], None]
) -> None:
    """Run one notebook in its folder into `partial` and `log`. Failure: a cell fails, the kernel dies or is silent."""
    arguments = dict(input_path=str(notebook), output_path=str(partial), cwd=str(notebook.parent))
    arguments |= dict(kernel_name="python3", language="python", log_output=True, progress_bar=False)
    arguments |= dict(start_timeout=1800, iopub_timeout=1800)  # their defaults of 60 s and 4 s fail on a busy machine
    order = list(enumerate(nbformat.read(notebook, 4).cells, 1))  # (number, cell) as papermill counts cells
    if profile == "full":  # papermill injects its parameters as a cell after the one tagged "parameters"
        arguments["parameters"] = {"profile": "full"}
        (tagged,) = [i for i, (_, cell) in enumerate(order) if "parameters" in cell.metadata.get("tags", [])]
        order.insert(tagged + 1, order[tagged])
    process = subprocess.Popen(
        [sys.executable, "-c", EXECUTE, json.dumps(arguments)],
        env={**os.environ, **KERNEL_ENVIRONMENT},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # Ctrl-C reaches this process only, which then ends papermill and its kernel
    )
    heading, place, running = "", "before the first cell", True
    watch = SilenceWatch(process, 60 * silence_min)
    watch.start()
    try:
        with log.open("w") as file:
            for line in process.stdout:
                watch.last_sign = time.monotonic()
                file.write(line)
                file.flush()
                if not (event := re.match(r"(Executing|Ending) Cell (\d+)-", line)):
                    continue
                running = event[1] == "Executing"
                number, cell = order[int(event[2]) - 1]
                place = f"cell {number}: {cell.source.strip().partition(chr(10))[0]}"
                if cell.cell_type == "markdown" and (title := re.search(r"^##? (.+)$", cell.source, re.M)):
                    heading = title[1]
                if running:
                    show(f"cell {number}/{order[-1][0]}", heading)
        process.wait()
    finally:
        if process.poll() is None:
            end(process)
    if watch.silent_s is not None:
        place = place if running else f"after {place}"
        reason = f"stopped: it printed nothing and used no CPU time for {watch.silent_s / 60:.1f} minutes. "
        reason += f"The limit is {silence_min:g}; `make reproduce SILENCE={2 * silence_min:g}` raises it."
    elif process.returncode:
        reason = last_error(log)
    else:
        return
    raise Failure(f"{notebook.name}, {place}\n  {reason}\n  log: {log}")


def last_error(log: Path) -> str:
    """Return the last line of a log that reads like an exception, or its last line."""
    lines = [line.strip() for line in log.read_text().splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt|Exit)\b", line)]
    return (errors or lines or ["no output"])[-1]


class Progress:
    """Shows how far a notebook is: one changing line in a terminal, a line for each section elsewhere."""

    def __init__(self, title: str):
        self.title, self.started, self.heading, self.terminal = title, time.monotonic(), "", sys.stdout.isatty()
        if not self.terminal:
            print(title, flush=True)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def show(self, cell: str, heading: str) -> None:
        if self.terminal:
            print(f"\r\x1b[K{self.title}  {self.seconds:4.0f} s  {cell}  {heading}"[:119], end="", flush=True)
        elif heading != self.heading:
            self.heading = heading
            print(f"      {self.seconds:4.0f} s  {heading}", flush=True)

    def done(self) -> None:
        print(f"\r\x1b[K{self.title}" if self.terminal else "     ", f" done in {self.seconds:.0f} s", flush=True)


def run(root: Path, profile: str, only: str | None, force: bool, silence_min: float) -> list[Path]:
    """Bring the executed copies up to date and return their paths; stop with a Failure at the first that fails."""
    prints = fingerprints(root, profile)
    chosen = choose_notebooks(list(prints), only)
    folder = root / "results" / "notebooks" / profile
    folder.mkdir(parents=True, exist_ok=True)
    for number, notebook in enumerate(chosen, 1):
        copy, stamp = folder / notebook.name, folder / f"{notebook.stem}.json"
        title = f"[{number}/{len(chosen)}] {notebook.stem:<24} {profile}"
        known = json.loads(stamp.read_text())["fingerprint"] if copy.exists() and stamp.exists() else None
        if known == prints[notebook] and not force:
            print(f"{title}  up to date")
            continue
        stamp.unlink(missing_ok=True)
        partial, progress = folder / f"{notebook.stem}.partial.ipynb", Progress(title)
        try:
            execute(notebook, partial, folder / f"{notebook.stem}.log", profile, silence_min, progress.show)
            strip(partial)
            os.replace(partial, copy)
        finally:
            partial.unlink(missing_ok=True)
        stamp.write_text(json.dumps({"fingerprint": prints[notebook], "seconds": round(progress.seconds, 1)}))
        progress.done()
    return [folder / notebook.name for notebook in chosen]


def publish(copies: list[Path], notebooks: Path) -> None:
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
    silence = "stop a notebook after so many minutes without output and CPU time (%(default)g)"
    parser.add_argument("--silence", type=float, default=SILENCE_MIN, metavar="MIN", help=silence)
    parser.add_argument("--publish", action="store_true", help="copy the executed notebooks over notebooks/")
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout to work on")
    arguments = parser.parse_args()
    if arguments.publish and arguments.profile != "smoke":
        parser.error("--publish needs --profile smoke: other copies hold an injected cell")
    if not arguments.silence > 0:
        parser.error(f"--silence must be > 0 minutes, got {arguments.silence:g}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` and `timeout` end like Ctrl-C
    if arguments.profile == "auto":
        import torch  # late: takes a second, and only auto needs it

        arguments.profile = "full" if torch.cuda.is_available() else "smoke"
    try:
        copies = run(arguments.root, arguments.profile, arguments.only, arguments.force, arguments.silence)
        if arguments.publish:
            publish(copies, arguments.root / "notebooks")
    except Failure as failure:
        sys.exit(f"\nFAILED {failure}")
    except KeyboardInterrupt:
        print("\ninterrupted; the next run resumes here", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()

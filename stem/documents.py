"""Long real text that every machine already has: Python's standard library and its language reference.

No download, no licence question. The text changes with the Python version, so `fingerprint` goes beside results.
"""

import hashlib
import re
import sysconfig
from collections.abc import Sequence
from pathlib import Path

LONG_MODULES = ("argparse", "typing", "subprocess", "tarfile")  # each over 8192 SmolLM2 tokens


def stdlib_documents(names: Sequence[str] | None = LONG_MODULES, min_chars: int = 0) -> dict[str, str]:
    """Source of standard-library modules, as real documents with long-range structure (our choice of text).

    Args:
        names: Top-level module names such as "argparse"; None takes every top-level module, in alphabetical order.
        min_chars: Leave out documents shorter than this [characters].
    Returns:
        Module name -> source text, in the order of `names`.
    Raises:
        ValueError: If a name has no source file, or nothing is long enough.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    if names is None:
        names = sorted(path.stem for path in root.glob("*.py"))
    paths = {name: root / f"{name}.py" for name in names}
    if missing := [name for name, path in paths.items() if not path.is_file()]:
        raise ValueError(f"names={missing}: expected modules that are one .py file in {root}")
    texts = {name: path.read_text(encoding="utf-8") for name, path in paths.items()}
    texts = {name: text for name, text in texts.items() if len(text) >= min_chars}
    if not texts:
        raise ValueError(f"min_chars={min_chars}: no document of names={list(names)} is that long")
    return texts


def prose() -> str:
    """English prose of about 65 thousand words: the language reference that ships inside CPython for `help()`."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def words(text: str) -> list[str]:
    """Split on white space, so that a haystack can be cut at any word: list of non-empty words."""
    return re.findall(r"\S+", text)


def fingerprint(*texts: str) -> str:
    """First 12 hexadecimal digits of the SHA-256 of the texts, to tell whether two results saw the same text."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]

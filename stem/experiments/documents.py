"""Long real text of five kinds without a download, from packages that every installation has.

The kinds are Python's standard library and language reference, and the documentation strings, C++ headers and licences
of torch and NumPy. Where a kind is too short for the windows asked for, another text of the kind follows (`KINDS`). All
texts change with package versions.
"""

import ast
import hashlib
import importlib
import importlib.metadata
import re
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

LONG_MODULES = ("argparse", "typing", "subprocess", "tarfile")  # each over 8192 SmolLM2 tokens
EVALUATED_MODULES = (
    "argparse", "ast", "dataclasses", "difflib", "doctest", "enum", "inspect", "ipaddress", "mailbox", "optparse",
    "pdb", "pickle", "pydoc", "shutil", "subprocess", "tarfile", "threading", "typing",
)  # fmt: skip
CALIBRATION_MODULES = (  # read for calibration alone
    "turtle", "_pydecimal", "tokenize", "random", "statistics", "configparser", "imaplib", "smtplib",
)  # fmt: skip
DOCUMENTED = ("torch._torch_docs", "torch._tensor_docs", "numpy._core._add_newdocs")
HEADER_FOLDERS = ("ATen/core", "c10/core", "fmt")
LICENSED = ("matplotlib", "numpy", "pandas", "torch")
PROJECT, EXTRAS = "stem-sparse-attention", ("notebooks", "dev")  # what `make` installs
LONG = 200  # fewest characters of a documentation string


def stdlib_documents(names: Sequence[str] | None = LONG_MODULES, min_chars: int = 0) -> dict[str, str]:
    """Source of top-level standard-library modules (None: all) by name, those of at least `min_chars` characters.

    Raises:
        ValueError: If a name has no source file, or no document is long enough.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(path.stem for path in root.glob("*.py")) if names is None else names
    paths = {name: root / f"{name}.py" for name in names}
    if missing := [name for name, path in paths.items() if not path.is_file()]:
        raise ValueError(f"names={missing}: expected modules that are one .py file in {root}")
    texts = {name: path.read_text(encoding="utf-8") for name, path in paths.items()}
    texts = {name: text for name, text in texts.items() if len(text) >= min_chars}
    if not texts:
        raise ValueError(f"min_chars={min_chars}: no document of names={list(names)} is that long")
    return texts


def source() -> str:
    """Source of `EVALUATED_MODULES`, 1.5 MB."""
    return "\n".join(stdlib_documents(EVALUATED_MODULES).values())


def prose() -> str:
    """English prose of about 65,000 words: Python's language reference, which CPython ships for `help()`."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def explanations() -> str:
    """Documentation strings of the standard library, 1 MB; modules that other texts read are left out."""
    read = {f"{name}.py" for name in (*EVALUATED_MODULES, *CALIBRATION_MODULES)}
    return _documentation_strings(Path(sysconfig.get_paths()["stdlib"]), {*read, "site-packages"})


def reference() -> str:
    """Documentation strings of torch and NumPy: reStructuredText with formulas, tables and examples, 0.6 MB."""
    folders = {name: _package_folder(name.split(".")[0]).parent for name in DOCUMENTED}
    paths = [folder.joinpath(*name.split(".")).with_suffix(".py") for name, folder in folders.items()]
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    values = [node.value for node in nodes if isinstance(node, ast.Constant)]
    return "\n\n".join(value for value in values if isinstance(value, str) and len(value) > LONG)


def graph_reference() -> str:
    """Documentation strings of NetworkX, on which torch depends: reStructuredText, 1.9 MB."""
    return _documentation_strings(_package_folder("networkx"))


def headers() -> str:
    """C++ headers of torch's core and of the fmt library inside torch, 2 MB."""
    root = _package_folder("torch") / "include"
    paths = [path for folder in HEADER_FOLDERS for path in sorted((root / folder).rglob("*.h"))]
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)


def licences() -> str:
    """Licence texts of torch, NumPy, pandas and Matplotlib, each text once."""
    return "\n\n".join(_licences(LICENSED))


def other_licences() -> str:
    """Licence texts of all other packages that `make` installs, each text once, 0.8 MB.

    Raises:
        importlib.metadata.PackageNotFoundError: If this repository's package or one that it needs is not installed.
    """
    read = set(_licences(LICENSED))
    return "\n\n".join(text for text in _licences(sorted(_required() - {*LICENSED})) if text not in read)


KINDS: dict[str, tuple[Callable[[], str], ...]] = {  # texts of a kind; windows read a text where those before it end
    "python source": (source,),
    "prose": (prose, explanations),
    "reStructuredText": (reference, graph_reference),
    "C++ headers": (headers,),
    "licences": (licences, other_licences),
}


def windows(tokens: Sequence[int], length: int, count: int) -> list[Sequence[int]]:
    """Cut `count` windows of `length` tokens out of a long text, evenly spaced and without overlap.

    Raises:
        ValueError: If the text is shorter than count * length tokens.
    """
    if count < 1 or length < 1 or len(tokens) < count * length:
        raise ValueError(f"count={count} windows of length={length} need {count * length} tokens, got {len(tokens)}")
    step = len(tokens) // count
    return [tokens[start : start + length] for start in range(0, step * count, step)]


def words(text: str) -> list[str]:
    """Non-empty words of a text, split at white space."""
    return re.findall(r"\S+", text)


def fingerprint(*texts: str) -> str:
    """First 12 hexadecimal digits of the SHA-256 of the texts; equal texts give equal fingerprints."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]


def _package_folder(name: str) -> Path:
    return Path(importlib.import_module(name).__path__[0])


def _documentation_strings(root: Path, skipped: set[str] = frozenset()) -> str:
    """Documentation strings longer than `LONG` of a folder's modules, each once, without tests and `skipped` names."""
    found, skipped = {}, {"test", "tests", "idle_test", *skipped}
    for path in sorted(root.rglob("*.py")):
        if skipped.isdisjoint(path.relative_to(root).parts):
            nodes = ast.walk(ast.parse(path.read_bytes()))
            kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
            found |= dict.fromkeys(ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds))
    return "\n\n".join(text for text in found if len(text) > LONG)


def _licences(names: Iterable[str]) -> list[str]:
    """Licence texts of installed packages, each text once."""
    files = [file for name in names for file in importlib.metadata.files(name) or ()]
    named = re.compile(r".*\.dist-info/.*(licen[cs]e|copying|notice)[^/]*(?<!\.json)", re.IGNORECASE)
    found = [Path(file.locate()) for file in files if named.fullmatch(str(file))]
    return list(dict.fromkeys(path.read_text(encoding="utf-8", errors="replace") for path in found))


def _required() -> set[str]:
    """Names of the packages that this repository's package needs with `EXTRAS`, and of those that they need."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found, waiting = set(), [(PROJECT, EXTRAS)]
    while waiting:
        name, extras = waiting.pop()
        for needed in map(Requirement, importlib.metadata.requires(name) or ()):
            if needed.marker is None or any(needed.marker.evaluate({"extra": of}) for of in ("", *extras)):
                at = canonicalize_name(needed.name), tuple(sorted(needed.extras))
                waiting += [at] if at not in found else []
                found.add(at)
    return {name for name, _ in found} - {PROJECT}

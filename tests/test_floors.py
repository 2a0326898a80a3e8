"""Form of the code: four floors whose imports go down only, one vocabulary for experiments, sizes, first lines."""

import ast
import re
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = ("theory", "correctness", "speed", "hopper", "training", "long_context")
FLOORS = (("stem.kernels",), ("stem",), ("stem.experiments",), ("scripts", "notebooks"))  # lowest first
ALLOWED = {  # packages -> the modules that may import them; notebooks and scripts may import anything
    ("pandas", "matplotlib", "seaborn", "papermill", "nbval"): ("stem.experiments",),
    ("lm_eval",): ("stem.experiments", "stem.evaluate"),
    ("transformers",): ("stem.experiments", "stem.evaluate", "stem.hf", "stem.pretrained"),
}
BESIDE_THE_METHOD = ("patterns", "experiments", "evaluate", "hf", "vllm", "distributed")
VAGUE = re.compile(r"(What|Those|As|The same|Which|That of|Whether)\b")


def name_of(path: Path) -> str:
    """Module name of a file: stem/impl/gather.py is stem.impl.gather, and kernels/ is stem.kernels."""
    parts = [*path.relative_to(ROOT).with_suffix("").parts]
    parts = ["stem", *parts] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def source_of(path: Path) -> str:
    """Text of a .py file, or of a notebook's code cells."""
    if path.suffix == ".py":
        return path.read_text()
    return "\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code")


FILES = {
    name_of(path): path
    for folder, kind in (("stem", "*.py"), ("kernels", "*.py"), ("scripts", "*.py"), ("notebooks", "*.ipynb"))
    for path in sorted((ROOT / folder).rglob(kind))
    if ".ipynb_checkpoints" not in path.parts
}


def imports(name: str) -> set[str]:
    """Modules that a module imports anywhere in its text; `from stem import hf` imports stem.hf."""
    path, found = FILES[name], set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(source_of(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            members = {f"{module}.{alias.name}" for alias in node.names}
            found |= {member if member in FILES else module for member in members}
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            found |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    return found


IMPORTS = {name: imports(name) for name in FILES}
ARROWS = sorted((source, target) for source, targets in IMPORTS.items() for target in targets)


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


def floor(name: str) -> int:
    """Index in FLOORS of the floor with the longest matching package; -1 for other people's packages."""
    matches = [(len(p), number) for number, packages in enumerate(FLOORS) for p in packages if within(name, (p,))]
    return max(matches, default=(0, -1))[1]


def circle(arrows: list[tuple[str, str]]) -> list[str]:
    """Modules of one import circle, or an empty list."""
    graph = {source: {target for begin, target in arrows if begin == source} for source, _ in arrows}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


# imports


def test_floors_and_circles_are_told_apart():
    assert [floor(name) for name in ("torch", "stem.kernels.driver", "stem.hf", "stem", "stem.experiments.tables")] == [
        -1, 0, 1, 1, 2,
    ]  # fmt: skip
    assert floor("notebooks.01_theory") == 3
    assert circle([("a", "b"), ("b", "c"), ("c", "b")]) and not circle([("a", "b"), ("a", "c"), ("b", "c")])


def test_imports_go_down():
    up = [arrow for arrow in ARROWS if floor(arrow[1]) > floor(arrow[0])]
    assert not up


def test_no_import_circle():
    ours = [arrow for arrow in ARROWS if arrow[1] in FILES]
    assert not circle(ours)


def test_imported_modules_exist():
    ours = ("stem", "kernels", "scripts")
    assert not [arrow for arrow in ARROWS if within(arrow[1], ours) and arrow[1] not in FILES]


@pytest.mark.parametrize("packages", ALLOWED, ids=lambda packages: packages[0])
def test_heavy_packages_stay_where_they_belong(packages):
    astray = [
        (source, target)
        for source, target in ARROWS
        if within(target, packages) and floor(source) < 3 and not within(source, ALLOWED[packages])
    ]
    assert not astray


def test_kernels_import_torch_and_triton_only():
    packages = ("stem.kernels", "torch", "triton", *sys.stdlib_module_names)
    kernels = [(source, target) for source, target in ARROWS if floor(source) == 0]
    assert kernels and not [arrow for arrow in kernels if not within(arrow[1], packages)]


def test_the_method_imports_torch_triton_and_numpy_only():
    packages = ("stem", "torch", "triton", "numpy", "tqdm", *sys.stdlib_module_names)  # tqdm where it is installed
    beside = tuple(f"stem.{name}" for name in (*BESIDE_THE_METHOD, "pretrained") if name != "patterns")
    method = [(source, target) for source, target in ARROWS if floor(source) == 1 and not within(source, beside)]
    assert method and not [arrow for arrow in method if not within(arrow[1], packages)]


@pytest.mark.parametrize("name", ["scores", "budget", "selection"])
def test_stages_do_not_import_each_other(name):
    stages = ("scores", "budget", "selection", "choose", "planning", "attention")
    others = {f"stem.{other}" for other in stages if other != name}
    assert not [target for target in IMPORTS[f"stem.{name}"] if within(target, tuple(others))]


# vocabulary


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_has_one_name(name):
    assert f"stem.experiments.{name}" in FILES
    assert (ROOT / "tests" / "experiments" / name).is_dir()
    assert re.search(rf"^{name}:.*## ", (ROOT / "Makefile").read_text(), re.M), f"no `make {name}`"
    assert any((ROOT / "results" / name).iterdir()), f"nothing in results/{name}"


def test_changelog_names_modules_that_exist():
    rows = re.findall(r"^\| (`stem\..+) \| (`stem\..+) \|$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    before, after = ({name for row in rows for name in re.findall(r"`(.+?)`", row[side])} for side in (0, 1))
    assert len(rows) > 30 and after <= set(FILES) and not before & set(FILES)


# sizes and first lines


def test_the_method_is_compact():
    method = [p for p in (ROOT / "stem").rglob("*.py") if p.relative_to(ROOT).parts[1] not in BESIDE_THE_METHOD]
    assert sum(len(path.read_text().splitlines()) for path in method) < 2700


def test_long_files_say_why():
    texts = {name: path.read_text() for name, path in FILES.items() if path.suffix == ".py"}
    long = {name: text for name, text in texts.items() if len(text.splitlines()) > 400}
    reason = re.compile(r"\d lines|one file because")
    silent = [name for name, text in long.items() if not reason.search(ast.get_docstring(ast.parse(text)) or "")]
    assert not silent


def test_first_lines_say_what_is_returned_or_done():
    vague = []
    for path in sorted(
        path for folder in ("stem", "kernels", "scripts", "tests") for path in (ROOT / folder).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                continue
            first = VAGUE.match(ast.get_docstring(node) or "")
            returns = getattr(node, "returns", None)
            if first and not (first[0] == "Whether" and returns and ast.unparse(returns) == "bool"):
                vague.append(f"{path.relative_to(ROOT)}: {getattr(node, 'name', 'module')}")
    assert vague == []

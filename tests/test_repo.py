"""Files of the repository: layout, size, private paths, licence, and README's links, snippets and numbers."""

import re
import subprocess
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TOP_LEVEL = {
    "README.md", "CHANGELOG.md", "LICENSE", "CITATION.cff", "Makefile", "environment.yml", "pyproject.toml", "setup.py",
    "conftest.py", ".gitignore", ".ci", ".github", "stem", "kernels", "notebooks", "results", "scripts", "tests",
}  # fmt: skip


def tracked() -> list[Path]:
    """Files that git tracks; every file outside hidden and generated folders where there is no git."""
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode == 0:
        return [ROOT / name for name in listing.stdout.splitlines() if (ROOT / name).is_file()]
    files = (path for path in ROOT.rglob("*") if path.is_file())
    return [path for path in files if not re.search(r"\.venv|__pycache__|\.egg-info|_cache|build/", str(path))]


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

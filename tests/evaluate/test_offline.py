"""stem.evaluate.offline: NLTK's sentence splitter from a package, written once into the cache."""

import nltk
import pytest

from stem.evaluate.offline import provide_sentence_splitter

FILES = {"abbrev_types.txt", "sent_starters.txt", "collocations.tab", "ortho_context.tab"}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and an NLTK that has no data of its own."""
    pytest.importorskip("punkt")
    monkeypatch.setenv("STEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(nltk.data, "path", [])
    return tmp_path / "cache"


def written(cache):
    return {path: path.stat().st_mtime_ns for path in (cache, *cache.rglob("*"))}


def test_sentences_are_split_without_a_download(cache):
    provide_sentence_splitter()
    assert {path.name for path in cache.rglob("*") if path.is_file()} == FILES
    assert nltk.tokenize.punkt.PunktTokenizer().tokenize("Dr. Smith went home. He was tired.") == [
        "Dr. Smith went home.",
        "He was tired.",
    ]


def test_files_that_exist_are_not_written_again(cache, monkeypatch):
    provide_sentence_splitter()
    before = written(cache)
    monkeypatch.setattr(nltk.data, "path", [])  # as in a new process
    provide_sentence_splitter()
    assert nltk.data.path and written(cache) == before


def test_only_a_missing_file_is_written(cache, monkeypatch):
    provide_sentence_splitter()
    before = written(cache)
    (lost,) = cache.rglob("collocations.tab")
    content = lost.read_bytes()
    lost.unlink()
    monkeypatch.setattr(nltk.data, "path", [])
    provide_sentence_splitter()
    assert lost.read_bytes() == content and nltk.data.path
    changed = {path for path, time in written(cache).items() if before[path] != time}
    assert changed == {lost, lost.parent}


def test_a_cache_that_cannot_be_written_is_no_error(cache):
    cache.write_text("a file, so that no folder can be made here")
    provide_sentence_splitter()
    assert not nltk.data.path


def test_a_splitter_of_the_user_is_left_alone(cache, tmp_path, monkeypatch):
    (tmp_path / "mine" / "tokenizers" / "punkt_tab").mkdir(parents=True)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "mine")])
    provide_sentence_splitter()
    assert nltk.data.path == [str(tmp_path / "mine")] and not cache.exists()

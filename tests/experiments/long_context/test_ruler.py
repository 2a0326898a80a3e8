"""RULER's samples: each task, length and seed draws from a stream of its own."""

import random

import pytest
from transformers import AutoTokenizer

from stem import pretrained
from stem.experiments.long_context import ruler

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(pretrained.resolve("smollm2"))


@pytest.mark.parametrize("task", ruler.TASKS)
def test_samples_of_every_task_do_not_depend_on_what_came_before(task, tokenizer):
    before = random.getstate()
    samples = ruler.build_samples(task, tokenizer, 1024, 2, seed=3)
    assert random.getstate() == before
    ruler.build_samples("ruler_cwe", tokenizer, 512, 1)
    random.seed(99)
    again = ruler.build_samples(task, tokenizer, 1024, 2, seed=3)
    assert samples == again
    assert samples != ruler.build_samples(task, tokenizer, 1024, 2, seed=4)
    for sample in samples:
        assert sample["max_length"] == 1024
        assert len(tokenizer(sample["input"]).input_ids) <= 1024
        assert all(answer in sample["input"] for answer in sample["outputs"])


def test_a_sample_does_not_depend_on_how_many_there_are(tokenizer):
    few, many = (ruler.build_samples("niah_single_2", tokenizer, 1024, count) for count in (1, 3))
    assert many[:1] == few


def test_bad_ruler_arguments_are_named(tokenizer):
    for arguments, message in [
        (("niah_single_9", tokenizer, 1024, 1), "niah_single_9"),
        (("niah_single_1", tokenizer, 100, 1), "length must be >= 512"),
        (("niah_single_1", tokenizer, 1024, 0), "samples"),
    ]:
        with pytest.raises(ValueError, match=message):
            ruler.build_samples(*arguments)


def test_samples_do_not_need_a_cache_that_can_be_written(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(ruler, "build_samples", lambda *arguments: [{"input": "text"}])
    (tmp_path / "cache").write_text("a file, so that no folder can be made here")
    monkeypatch.setenv("STEM_CACHE", str(tmp_path / "cache"))
    assert ruler.stored_samples("ruler_vt", tokenizer, 512, 1) == [{"input": "text"}]

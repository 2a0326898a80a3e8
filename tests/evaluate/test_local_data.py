"""stem.evaluate.local_data: files of the user take the place of what lm-eval's tasks download."""

import json
import sys
from pathlib import Path
from types import ModuleType

import datasets
import pytest
import requests

from stem.evaluate.local_data import SUBSETS, local_data

lm_eval = pytest.importorskip("lm_eval")

QUESTION = dict(input="Who sings?", context="Ann sings.", answers=["Ann"], length=2, dataset="x", all_classes=None)
CHOICES = {f"choice_{letter}": letter.lower() for letter in "ABCD"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A data folder in the formats of the original files, and no network."""
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: _no_network(args))
    monkeypatch.setattr(requests, "get", lambda url, **options: _no_network(url))
    (tmp_path / "longbench").mkdir()
    (tmp_path / "longbench" / "2wikimqa.jsonl").write_text(json.dumps(QUESTION) + "\n")
    rows = [
        dict(_id=str(i), domain=domain, sub_domain=kind, question=f"{kind}?", answer="B", context="c", **CHOICES)
        for i, (domain, kind) in enumerate(SUBSETS.values())
    ]
    (tmp_path / "longbench_v2.json").write_text(json.dumps(rows))
    (tmp_path / "essays.txt").write_text("Some prose.\nMore of it.")
    paragraph = dict(context="Ann sings.", qas=[dict(question="Who?", is_impossible=False, answers=[dict(text="Ann")])])
    (tmp_path / "dev-v2.0.json").write_text(json.dumps(dict(data=[dict(paragraphs=[paragraph])])))
    return tmp_path


def _no_network(what):
    raise ConnectionError(f"no network for {what}")


def load_tasks(group: str, *names: str) -> dict:
    from lm_eval.tasks import TaskManager

    where = str(Path(lm_eval.__path__[0], "tasks", group))
    return TaskManager(include_path=where, include_defaults=False).load(list(names))["tasks"]


def test_longbench_keeps_lm_evals_prompt_and_metric(folder, monkeypatch):
    for name in ("jieba", "fuzzywuzzy", "rouge"):  # packages of metrics that these tasks do not use
        module = ModuleType(name)
        module.fuzz = module.Rouge = None
        monkeypatch.setitem(sys.modules, name, module)
    with local_data(folder):
        (task,) = load_tasks("longbench", "longbench_2wikimqa").values()
    (document,) = task.test_docs()
    assert "Question: Who sings?\nAnswer:" in task.doc_to_text(document)
    assert task.process_results(document, ["Ann"])["qa_f1_score"] == 1


def test_longbench_v2_is_split_into_lm_evals_subsets(folder):
    with local_data(folder):
        (task,) = load_tasks("longbench2", "longbench2_table").values()
        kinds = {name: datasets.load_dataset("recursal/longbench-v2", name)["train"]["question"] for name in SUBSETS}
    (document,) = task.test_docs()
    assert document["sub_domain"] == "Table QA" and document["choices"] == list("abcd")
    assert task.doc_to_target(document) in (1, "B")
    assert kinds == {name: [f"{kind}?"] for name, (_, kind) in SUBSETS.items()}


def test_essays_and_questions_of_ruler(folder):
    with local_data(folder):
        essays = datasets.load_dataset("baber/paul_graham_essays", split="train")["text"]
        from lm_eval.tasks.ruler import qa_utils

        questions, documents = qa_utils.read_squad.__wrapped__("https://host/dev-v2.0.json")
    assert list(essays) == ["Some prose.\nMore of it."]
    assert documents == ["Ann sings."] and questions[0]["outputs"] == ["Ann"]


@pytest.mark.parametrize("given", [True, False])
def test_a_missing_file_is_named_when_it_cannot_be_downloaded(folder, given):
    with local_data(folder if given else None):
        with pytest.raises(FileNotFoundError, match=r"LongBench .* longbench/qasper.jsonl .* --data_dir"):
            datasets.load_dataset("Xnhyacinth/LongBench", "qasper")
        with pytest.raises(FileNotFoundError, match=r"https://host/hotpot.* --data_dir"):
            requests.get("https://host/hotpot_dev_distractor_v1.json", timeout=60)
        with pytest.raises(ConnectionError, match="no network"):
            datasets.load_dataset("other/data")
    with pytest.raises(ConnectionError, match="no network"):
        datasets.load_dataset("Xnhyacinth/LongBench", "2wikimqa")


def test_a_wrong_folder_or_file_is_named(folder):
    with pytest.raises(ValueError, match="data_dir must be a folder, got '/no/such'"), local_data("/no/such"):
        pass
    (folder / "longbench_v2.json").write_text("[]")
    with local_data(folder), pytest.raises(ValueError, match="has no row with .*'Table QA'"):
        datasets.load_dataset("recursal/longbench-v2", "table_qa")

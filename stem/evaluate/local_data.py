"""`--data_dir`: data of lm-eval's long-context tasks from the user's folder instead of the network.

| tasks | file in the folder | source |
|---|---|---|
| RULER with essays | essays.txt | Paul Graham's essays, or any long prose |
| ruler_qa_squad | dev-v2.0.json | SQuAD 2.0 |
| ruler_qa_hotpot | hotpot_dev_distractor_v1.json | HotpotQA |
| longbench_* | longbench/<name>.jsonl, for example longbench/2wikimqa.jsonl | THUDM/LongBench, data.zip |
| longbench2_* | longbench_v2.json | THUDM/LongBench-v2, data.json |

The RULER tasks niah_single_1, niah_multikey_2, niah_multikey_3, ruler_vt, ruler_cwe and ruler_fwe need no files.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pkgutil import resolve_name
from unittest import mock

ESSAYS, LONGBENCH, LONGBENCH2 = "baber/paul_graham_essays", "Xnhyacinth/LongBench", "recursal/longbench-v2"
QUESTIONS = ("dev-v2.0.json", "hotpot_dev_distractor_v1.json")  # last parts of the URLs that RULER's QA tasks fetch
SINGLE, MULTI, DIALOGUE = "Single-Document QA", "Multi-Document QA", "Long-dialogue History Understanding"
IN_CONTEXT, STRUCTURED = "Long In-context Learning", "Long Structured Data Understanding"
SUBSETS = {  # of recursal/longbench-v2 -> domain and sub_domain in LongBench v2's own file
    "academic_single": (SINGLE, "Academic"),
    "literary": (SINGLE, "Literary"),
    "legal_single": (SINGLE, "Legal"),
    "financial_single": (SINGLE, "Financial"),
    "government_single": (SINGLE, "Governmental"),
    "detective": (SINGLE, "Detective"),
    "event_ordering": (SINGLE, "Event ordering"),
    "academic_multi": (MULTI, "Academic"),
    "legal_multi": (MULTI, "Legal"),
    "financial_multi": (MULTI, "Financial"),
    "government_multi": (MULTI, "Governmental"),
    "multinews": (MULTI, "Multi-news"),
    "user_guide_qa": (IN_CONTEXT, "User guide QA"),
    "new_language_translation": (IN_CONTEXT, "New language translation"),
    "manyshot_learning": (IN_CONTEXT, "Many-shot learning"),
    "agent_history_qa": (DIALOGUE, "Agent history QA"),
    "dialogue_history_qa": (DIALOGUE, "Dialogue history QA"),
    "code_repo_qa": ("Code Repository Understanding", "Code repo QA"),
    "table_qa": (STRUCTURED, "Table QA"),
    "graph_reasoning": (STRUCTURED, "Knowledge graph reasoning"),
}


@contextmanager
def local_data(folder: str | Path | None) -> Iterator[None]:
    """Context in which lm-eval's tasks read their data from files in `folder`, and download the files it lacks.

    Raises ValueError if folder is no folder. FileNotFoundError, while tasks load, names a file that fails to download.
    """
    import datasets

    if folder is not None and not Path(folder).is_dir():
        raise ValueError(f"data_dir must be a folder, got {str(folder)!r}")
    download, get = datasets.load_dataset, resolve_name("requests.get")  # lm-eval brings requests

    def load_dataset(path, name=None, *args, split=None, **options):
        places = {ESSAYS: "essays.txt", LONGBENCH: f"longbench/{name}.jsonl", LONGBENCH2: "longbench_v2.json"}
        with _file(folder, places.get(path), path) as file:
            if file is None:
                return download(path, name, *args, split=split, **options)
        data = datasets.Dataset.from_list(_rows(file, path, name))
        return data if split else datasets.DatasetDict(test=data, train=data)

    def fetch(url, *args, **options):
        with _file(folder, next((name for name in QUESTIONS if str(url).endswith(name)), None), url) as file:
            if file is None:
                return get(url, *args, **options)
        content = json.loads(file.read_text(encoding="utf-8"))
        return mock.Mock(json=lambda: content, raise_for_status=lambda: None)

    with mock.patch.object(datasets, "load_dataset", load_dataset), mock.patch("requests.get", fetch):
        yield


@contextmanager
def _file(folder: str | Path | None, place: str | None, source: str) -> Iterator[Path | None]:
    """Yield the user's file, or None: a download that then fails in the context names the file to provide instead."""
    file = Path(folder) / place if folder is not None and place is not None else None
    try:
        yield file if file is not None and file.is_file() else None
    except OSError as error:  # every failure of the network is one
        if place is None:
            raise
        raise FileNotFoundError(
            f"{source} could not be downloaded; put it as {place} into a folder and name the folder by --data_dir"
        ) from error


def _rows(file: Path, path: str, name: str | None) -> list[dict]:
    text = file.read_text(encoding="utf-8")
    if path == ESSAYS:
        return [{"text": text}]
    if path == LONGBENCH:  # its own files say input where lm-eval's copy says question
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        return [{"question": row.get("input"), **row} for row in rows]
    rows = [row for row in json.loads(text) if (row["domain"], row["sub_domain"]) == SUBSETS[name]]
    if not rows:
        raise ValueError(f"{file} has no row with domain and sub_domain {SUBSETS[name]}")
    return [{**row, "choices": [row[f"choice_{letter}"] for letter in "ABCD"]} for row in rows]

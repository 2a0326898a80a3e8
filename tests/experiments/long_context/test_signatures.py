"""Samples in LongBench's format: fields, answers that the context holds once, and a file that lm-eval's tasks read."""

import pytest

from stem.evaluate.local_data import LONGBENCH, _rows
from stem.experiments.long_context import samples, signatures


@pytest.fixture(scope="module")
def made(tokenizer):
    return signatures.records(tokenizer, 4096, 3)


def test_records_have_longbenchs_fields_and_an_answer_that_the_context_holds(made, tokenizer):
    fields = {"input", "context", "answers", "length", "dataset", "language", "all_classes", "_id"}
    assert all(set(record) == fields for record in made) and len({record["_id"] for record in made}) == 3
    for record in made:
        (answer,) = record["answers"]
        name = answer.split("(")[0]
        assert record["context"].count(f"def {answer}:") == record["context"].count(f"def {name}(") == 1
        assert name in record["input"] and "longbench" == record["dataset"].split("_")[0]
    assert made == signatures.records(tokenizer, 4096, 3) != signatures.records(tokenizer, 4096, 3, seed=1)


def test_prompts_ask_for_the_signature_and_end_with_it(made, tokenizer):
    prompts = samples.exact_prompts(signatures.TASK, tokenizer, 4096, 3)
    assert prompts.ids.shape == (3, 4096)
    for ids, count, record in zip(prompts.ids, prompts.answer_tokens, made, strict=True):
        assert tokenizer.decode(ids[-count:]) == f" {record['answers'][0]}"
        assert tokenizer.decode(ids).endswith(f"{record['input']} Answer: def {record['answers'][0]}")


def test_a_written_file_is_read_where_longbenchs_own_files_are(made, tmp_path):
    signatures.write(tmp_path / "longbench.jsonl", made)
    found = _rows(tmp_path / "longbench.jsonl", LONGBENCH, None)
    assert [{**of, "question": of["input"]} for of in made] == found


def test_too_short_a_context_is_named(tokenizer):
    with pytest.raises(ValueError, match="length=200: the contexts hold no signature"):
        signatures.records(tokenizer, 200, 1)

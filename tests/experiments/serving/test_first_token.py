"""Engines of the serving experiment on a small random model; vLLM and Stem give rows with the same columns."""

from concurrent.futures import ThreadPoolExecutor

import serving_engine as tools  # skips without vLLM

from stem.experiments.serving import first_token
from stem.experiments.serving.engines import answer, engine


def test_rows_and_tokens_of_both_attentions(tmp_path):
    from tiny_models import build

    sizes = dict(hidden_size=128, num_attention_heads=4, max_position_embeddings=2048, vocab_size=tools.VOCABULARY)
    build("Llama", **sizes, eos_token_id=None, bos_token_id=None).save_pretrained(tmp_path)
    ids, found, tokens = tools.prompt(600), [], []
    for settings in (None, tools.SETTINGS):
        with engine(str(tmp_path), settings, 600, 256, dtype="float32") as llm:
            found.append(first_token._row(llm, settings, 256, [ids, ids], further_tokens=3))
            tokens.append(answer(llm, [ids], 4)[0][0])
    assert [row["attention"] for row in found] == ["vLLM", "Stem"]
    assert all((row["chunk"], row["tokens"], row["requests"]) == (256, 600, 2) for row in found)
    assert [round(row["realised"], 1) for row in found] == [1.0, 0.3]
    assert all(row["first_token_ms"] > 0 for row in found)
    assert [row["answer"] for row in found] == [" ".join(map(str, x)) for x in tokens] and tokens[0] != tokens[1]


def test_each_engine_of_the_large_model_has_a_process(monkeypatch):
    class Processes(ThreadPoolExecutor):  # whose processes would take 8 s each to import torch
        def __init__(self, workers, context, max_tasks_per_child):
            super().__init__(workers)
            started.append((workers, context.get_start_method(), max_tasks_per_child))

    started = []
    monkeypatch.setattr(first_token, "ProcessPoolExecutor", Processes)
    for name in ("whole_rows", "chunked_rows"):
        monkeypatch.setattr(first_token, name, lambda start, *case, name=name: [(name, *case)])
    rows = first_token.large_model_rows()
    assert started == [(1, "spawn", 1)]
    densities = None, 0.25, 0.1
    assert rows[:3] == [("whole_rows", density, first_token.LENGTHS) for density in densities]
    assert rows[3:] == [("chunked_rows", density, first_token.CHUNKED_LENGTHS) for density in densities]

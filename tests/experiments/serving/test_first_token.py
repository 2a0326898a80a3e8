"""Engines of the serving experiment on a small random model; vLLM and Stem give rows with the same columns."""

from contextlib import ExitStack, contextmanager
from math import isnan

import pytest
import serving_engine as tools  # skips without vLLM

import stem
from stem.experiments.serving import engines, first_token
from stem.experiments.serving.engines import answer, engine


def test_rows_and_tokens_of_both_attentions(tmp_path, monkeypatch):
    from tiny_models import build

    def timed(llms, prompts, tokens=1):
        rounds = [[x + 5.0 * tokens for x in times] for times in ((100, 200, 140), (100, 100, 100))]
        both = zip(llms, rounds, strict=True)
        return [engines.Timing(answer(llm, prompts, tokens)[0], times, 1500.0, 690.0, 0.5) for llm, times in both]

    monkeypatch.setattr("gc.collect", lambda *generation: 0)  # takes long over all that vLLM imports
    monkeypatch.setattr(first_token, "timed", timed)
    sizes = dict(hidden_size=128, num_attention_heads=4, max_position_embeddings=2048, vocab_size=tools.VOCABULARY)
    build("Llama", **sizes, eos_token_id=None, bos_token_id=None).save_pretrained(tmp_path)
    ids, settings = tools.prompt(600), [None, tools.SETTINGS | dict(lists="group")]
    with ExitStack() as stack:
        llms = [stack.enter_context(engine(str(tmp_path), x, 600, 256, dtype="float32")) for x in settings]
        answer(llms[1], [tools.prompt(100)])  # its density is not that of the rows
        found = first_token._rows(llms, settings, 256, [ids, ids], further_tokens=3)
        tokens = [answer(llm, [ids], 4)[0][0] for llm in llms]
    assert [(row["attention"], row["lists"]) for row in found] == [("vLLM", "head"), ("Stem", "group")]
    assert all((row["chunk"], row["tokens"], row["requests"]) == (256, 600, 2) for row in found)
    budget = stem.block_budget(38, stem.StemConfig(**tools.SETTINGS))  # blocks of 16 tokens
    assert [row["realised"] for row in found] == [1.0, pytest.approx(int(budget.sum()) / (38 * 39 / 2), abs=1e-9)]
    assert all((row["first_token_ms"], row["token_ms"]) == (105.0, 5.0) for row in found)
    speedups = [[row[x] for x in ("speedup", "speedup_low", "speedup_high")] for row in found]
    assert speedups == [[1.0] * 3, pytest.approx([145 / 105, 1.0, 205 / 105])]
    assert all((row["clock_mhz"], row["power_w"], row["capped"]) == (1500, 690, 0.5) for row in found)
    assert all(row["compute"] == "input" for row in found)
    assert [row["answer"] for row in found] == [" ".join(map(str, x)) for x in tokens] and tokens[0] != tokens[1]


def test_engines_take_turns(monkeypatch):
    calls, seconds = [], dict(a=iter([9.0, 3.0, 2.0, 4.0, 5.0]), b=iter([9.0, 4.0, 5.0, 6.0, 6.0]))
    monkeypatch.setattr(engines, "answer", lambda llm, *args: (calls.append(llm) or [[7]], next(seconds[llm])))
    assert [x[:2] for x in engines.timed(["a", "b"], [[1]])] == [([[7]], [3e3, 2e3, 4e3]), ([[7]], [4e3, 5e3, 6e3])]
    assert calls == ["a", "b"] + ["b", "a", "a", "b", "b", "a"]  # three rounds, as they take longer than MEASURED
    monkeypatch.setattr(engines, "MEASURED", 25.0)
    calls.clear()
    seconds.update(a=iter([9.0, 3.0, 2.0, 4.0, 1.0]), b=iter([9.0, 4.0, 5.0, 6.0, 6.0]))
    assert engines.timed(["a", "b"], [[1]])[0].all_ms == [3e3, 2e3, 4e3, 1e3] and len(calls) == 10
    monkeypatch.setattr(engines, "MOST_ROUNDS", 3)
    seconds.update(a=iter([9.0, 3.0, 2.0, 4.0, 1.0]), b=iter([9.0, 4.0, 5.0, 6.0, 6.0]))
    assert len(engines.timed(["a", "b"], [[1]])[0].all_ms) == 3


def test_each_engine_has_the_clock_of_its_rounds(monkeypatch):
    @contextmanager
    def samples():
        yield [(100.0 + i, 1000.0 + i, 600.0 + i, i % 4 / 3) for i in range(8)]  # two in each answer after the warm-up

    beginnings = iter([100.0, 102.0, 104.0, 106.0])
    monkeypatch.setattr(engines, "clock_samples", samples)
    monkeypatch.setattr(engines, "answer", lambda llm, *args: ([[7]], 1.5))
    monkeypatch.setattr(engines.time, "time", lambda: next(beginnings, 200.0))
    for found in engines.timed(["a", "b"], [[1]]):
        assert found[2:] == (1003.5, 603.5, pytest.approx(0.5))
    lines = ("042, 345, 81.25, Not Active", "062, 1980, 699.9, Active", "082, 1980, [N/A], [N/A]", "102, 19")
    assert engines.parsed("Failed to initialize NVML\n") == []
    first, second, third = engines.parsed("\n".join(f"2026/11/29 18:54:22.{line}" for line in lines))
    assert first[1:] == (345, 81.25, 0) and second[1:] == (1980, 699.9, 1)
    assert second[0] - first[0] == pytest.approx(0.02, abs=1e-4) and third[1] == 1980 and all(map(isnan, third[2:]))


def test_engines_of_the_large_model_live_at_a_time(monkeypatch):
    events = []

    @contextmanager
    def start(folder, settings, longest, chunk, **options):
        way = settings and (settings["density"], settings.get("lists") or settings.get("compute", "head"))
        events.append((way, longest, chunk, options["enforce_eager"]))
        yield way
        events.append("end")

    def rows(llms, settings, chunk, prompts, further):
        events.append((llms, [len(ids) for ids in prompts], further))
        return [dict(chunk=chunk)]

    monkeypatch.setattr(first_token, "engine", start)
    monkeypatch.setattr(first_token, "_rows", rows)
    found = [row for case in first_token.large_model_rows() for row in case]
    ways = [None, (0.25, "head"), (0.1, "head")]
    whole = ways + [(density, changed) for changed in ("group", "fp8") for density in (0.25, 0.1)]
    assert events[:7] == [(way, 131072, None, False) for way in whole]
    assert events[7:14] == [(whole, [n], 0) for n in first_token.LENGTHS] + [(whole, [4096], 128)]
    chunked = ways + whole[-2:]
    assert events[14:26] == ["end"] * 7 + [(way, 131072, 8192, True) for way in chunked]
    assert events[26:] == [(chunked, lengths, 0) for lengths in ([131072], [32768], [32768] * 8)] + ["end"] * 5
    assert [row["chunk"] for row in found] == [None] * 7 + [8192] * 3

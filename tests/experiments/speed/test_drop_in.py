"""stem.experiments.speed.drop_in: whole models in turn, with the host's time; a wrong or failing way costs one row."""

import pytest
import torch

import stem
from stem.experiments import records
from stem.experiments.speed import bench, candidates, drop_in, first_token, report

CONFIG = stem.StemConfig(density=0.5, block_size=16, sink_blocks=1, local_blocks=1)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(drop_in, "CONFIGS", {"small": CONFIG, "everything": CONFIG.replace(density=1.0)})
    monkeypatch.setitem(drop_in.WAYS, "cpu", ("small", "everything"))
    monkeypatch.setitem(drop_in.ROUNDS, "cpu", 2)
    settings = first_token.TINY | dict(hidden_size=48, intermediate_size=32, num_hidden_layers=2, head_dim=16)
    return first_token.random_llama(settings, "cpu", torch.float32)


def test_rows_of_whole_models(tiny):
    dense, small, everything = rows = drop_in.case("tiny", tiny, 100, "cpu")
    assert [row["provider"] for row in rows] == ["sdpa_cpu", "stem", "stem"]
    assert [row["config"] for row in rows] == ["dense", "small", "everything"]
    assert [row["density"] for row in rows] == [1.0, pytest.approx(0.5, abs=0.05), 1.0]
    for row in rows:
        assert row["error"] == "" and row["operation"] == "prefill tiny" and row["tokens"] == 100
        assert 0 < row["host_ms"] <= row["latency_ms_p80"] and set(row) <= set(bench.COLUMNS)
        assert row["speedup_vs_sdpa_cpu"] == pytest.approx(dense["latency_ms"] / row["latency_ms"])
        assert 0 < row["outside_ms"] == dense["outside_ms"]
    for row in (small, everything):
        assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"] and row["host_ratio"] > 0
    assert not hasattr(tiny.model.layers[0].self_attn, "stem_layer")


def test_dense_and_sparse_calls_take_turns(tiny, monkeypatch):
    order, least = [], drop_in.LEAST_ROUNDS
    monkeypatch.setattr(
        drop_in, "_timed", lambda model, ids: order.append(model.config._attn_implementation) or (2.0, 1.0)
    )
    rows = drop_in.case("tiny", tiny, 100, "cpu")
    alone = [first_token.NO_ATTENTION] * least + ["sdpa"] * least
    assert order == alone + ["stem", "sdpa", "sdpa", "stem"] * 2  # then both configs
    assert [(row["latency_ms"], row["host_ms"]) for row in rows] == [(2, 1)] * 3
    assert tiny.config._attn_implementation == "sdpa"


def test_speedups_are_of_one_round(tiny, monkeypatch):
    """A machine that is three times as slow in one round changes no ratio, but the medians of all calls."""
    monkeypatch.setitem(drop_in.ROUNDS, "cpu", 3)
    calls = []

    def timed(model, ids):
        calls.append(model.config._attn_implementation)
        ms = 2.0 if calls[-1] == "sdpa" else 1.0
        is_slow = (len(calls) - 2 * drop_in.LEAST_ROUNDS - 1) % 6 < 2
        return (3 * ms if is_slow else ms), (ms / 4 if calls[-1] == "sdpa" else ms)

    monkeypatch.setattr(drop_in, "_timed", timed)
    _, *sparse = drop_in.case("tiny", tiny, 100, "cpu")
    assert [(row["speedup"], row["host_ratio"]) for row in sparse] == [(2, 2)] * 2
    few, many = drop_in.paired([3.0, 1.0, 2.0]), drop_in.paired([float(x) for x in range(20)])
    assert few == dict(speedup=2, speedup_low=1, speedup_high=3)
    assert many == dict(speedup=9.5, speedup_low=5, speedup_high=14)


def test_long_prompts_take_fewer_turns(tiny, monkeypatch):
    calls = []
    monkeypatch.setattr(drop_in, "_timed", lambda *args: calls.append(args) or (2.0, 1.0))
    monkeypatch.setitem(drop_in.ROUNDS, "cpu", 9)
    monkeypatch.setattr(drop_in, "SECONDS", 0)
    drop_in.case("tiny", tiny, 100, "cpu")
    assert len(calls) == drop_in.LEAST_ROUNDS * (2 + 2 * 2)  # no attention, dense, and both with each config


def test_a_way_that_computes_something_else_is_not_timed(tiny, monkeypatch):
    right = drop_in.prefill

    def wrong(model, ids):
        return right(model, ids) * (1.2 if model.config._attn_implementation == "stem" else 1)

    monkeypatch.setattr(drop_in, "prefill", wrong)
    dense, small, everything = drop_in.case("tiny", tiny, 100, "cpu")
    assert dense["error"] == small["error"] == "" and "latency_ms" not in everything
    assert everything["error"].startswith("ArithmeticError: every block is kept, and the logits differ by 0.2 from")
    monkeypatch.setattr(drop_in, "prefill", lambda model, ids: torch.full((1, 8), torch.nan))
    for row in drop_in.case("tiny", tiny, 100, "cpu"):
        assert row["error"].startswith("FloatingPointError: the logits") and "latency_ms" not in row


def test_every_model_and_length_is_measured(tiny, monkeypatch):
    monkeypatch.setattr(drop_in, "case", lambda name, model, tokens, device, seed: [(name, tokens)])
    found = [row for _, rows in drop_in.cases("cpu", [64, 32]) for row in rows]
    assert found == [("tiny", 64), ("tiny", 32)]
    monkeypatch.setattr(drop_in, "case", lambda name, model, tokens, device, ids, seed: [(name, tokens)])
    text = torch.zeros(1, 2048)
    trained = [row for _, rows in drop_in.trained_cases(tiny, "text", text, "cpu", [1024, 4096, 2048]) for row in rows]
    assert trained == [("text", 1024), ("text", 2048)]  # the text is not longer
    for settings, heads in zip(drop_in.MODELS["cuda"].values(), [(32, 8, 128), (14, 2, 64), (9, 3, 64)], strict=True):
        dim = settings["hidden_size"] // settings["num_attention_heads"]
        assert (settings["num_attention_heads"], settings["num_key_value_heads"], dim) == heads


def test_the_table_compares_with_the_fastest_dense_back_end(made_up_machine):
    def row(provider, config, ms, host):
        common = dict(operation=candidates.PREFILL + "135M", tokens=8192, provider=provider, config=config)
        paired = dict(speedup=21 / ms, speedup_low=1.0, speedup_high=1.5, host_ratio=host / 9)
        return common | dict(latency_ms=ms, host_ms=host) | paired

    rows = [row("sdpa_cudnn", "dense", 20, 10), row("sdpa_flash", "dense", 30, 9)]
    records.write_rows("speed", [*rows, row("stem", "default", 16, 11), row("stem", "adaptive", 25, 12)], "full")
    header, _, line = report.drop_in().splitlines()[2:]
    assert header == "| model | tokens | dense, fastest [ms] | density 0.25 | adaptive | host time, highest |"
    assert line == "| 135M | 8K | 20 (cuDNN) | 1.31× [1, 1.5] | 0.84× [1, 1.5] | 1.33× |"
    rows = [of | dict(density=0.25 if of["provider"] == "stem" else 1.0, outside_ms=12.0) for of in rows]
    split = row("stem", "default", 16, 11) | dict(density=0.25, outside_ms=12.0)
    records.write_rows("speed", [*rows, split], "full")
    assert report.drop_in().splitlines()[-1].split(" | ")[3] == "1.31× [1, 1.5] = 43%, 4.00 × 0.56"

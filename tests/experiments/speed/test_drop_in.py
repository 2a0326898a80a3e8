"""stem.experiments.speed.drop_in: whole models in turn, with the host's time; a wrong or failing way costs one row."""

import gc
from contextlib import nullcontext

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
    dense, bare, small, everything = rows = drop_in.case("tiny", tiny, 100, "cpu")
    assert [row["provider"] for row in rows] == ["sdpa_cpu", "none", "stem", "stem"]
    assert [row["config"] for row in rows] == ["dense", "none", "small", "everything"]
    assert [row["density"] for row in rows] == [1.0, 0.0, pytest.approx(0.5, abs=0.05), 1.0]
    assert dense["flop"] == everything["flop"] == 2 * 2 * 3 * 16 * 100 * 101 and bare["flop"] == 0  # of two layers
    assert small["flop"] == dense["flop"] * small["density"]
    for row in rows:
        assert row["error"] == "" and row["operation"] == "prefill tiny" and row["tokens"] == 100
        assert 0 < row["host_ms"] <= row["latency_ms_p80"] and set(row) <= set(bench.COLUMNS)
        assert row["speedup_vs_sdpa_cpu"] == pytest.approx(dense["latency_ms"] / row["latency_ms"])
    for row in (small, everything):
        assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"] and row["host_ratio"] > 0
    assert not hasattr(tiny.model.layers[0].self_attn, "stem_layer")


def test_dense_and_sparse_calls_take_turns(tiny, monkeypatch):
    order, least = [], drop_in.LEAST_ROUNDS
    monkeypatch.setattr(
        drop_in, "_timed", lambda model, ids: order.append(model.config._attn_implementation) or (2.0, 1.0)
    )
    rows = drop_in.case("tiny", tiny, 100, "cpu")
    alone = ["sdpa"] * least + ["none"] * least
    assert order == alone + ["stem", "sdpa", "sdpa", "stem"] * 2  # then both configs with dense
    assert [(row["latency_ms"], row["host_ms"]) for row in rows] == [(2, 1)] * 4
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
    _, _, *sparse = drop_in.case("tiny", tiny, 100, "cpu")
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
    assert len(calls) == drop_in.LEAST_ROUNDS * (2 + 2 * 2)  # dense, no attention, and dense with each config


def test_no_garbage_is_collected_in_a_timed_call(tiny, monkeypatch):
    enabled, collected = [], []
    monkeypatch.setattr(drop_in, "_timed", lambda *args: enabled.append(gc.isenabled()) or (2.0, 1.0))
    monkeypatch.setattr(drop_in.gc, "collect", lambda: collected.append(len(enabled)))
    ways = dict.fromkeys(("one", "other"), nullcontext)
    drop_in.take_turns(tiny, torch.zeros(1, 40, dtype=torch.int64), ways, 3)
    assert enabled == [False] * 6 and collected == [0, 0, 2, 4]  # before the first round, and before each
    assert gc.isenabled() and not gc.get_freeze_count()


def test_long_prompts_have_a_config_with_the_threshold_of_a_density(tiny, monkeypatch):
    def calibrate(model, prompts, density, config, *, tolerance):
        assert model is tiny and [tuple(ids.shape) for ids in prompts] == [(1, 100)] and density == 0.08
        return stem.hf.calibration.Calibration(CONFIG, density)

    monkeypatch.setattr(stem, "calibrate", calibrate)
    monkeypatch.setitem(drop_in.LONG, "cpu", 100)
    *_, last = drop_in.case("tiny", tiny, 100, "cpu")
    assert last["config"] == "adaptive, 8 %" and last["density"] == pytest.approx(0.5, abs=0.05)
    assert [row["config"] for row in drop_in.case("tiny", tiny, 99, "cpu")][-1] == "everything"


def test_a_way_that_computes_something_else_is_not_timed(tiny, monkeypatch):
    right = drop_in.prefill

    def wrong(model, ids):
        return right(model, ids) * (1.2 if model.config._attn_implementation == "stem" else 1)

    monkeypatch.setattr(drop_in, "prefill", wrong)
    dense, _, small, everything = drop_in.case("tiny", tiny, 100, "cpu")
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

    rows = [row("sdpa_cudnn", "dense", 20, 10), row("sdpa_flash", "dense", 30, 9), row("none", "none", 12, 8)]
    rows += [row("stem", "default", 16, 11) | dict(density=0.25), row("stem", "adaptive", 25, 12)]
    records.write_rows("speed", rows, "full")
    told, _, header, _, line = report.drop_in().splitlines()
    assert "calibrate" not in told
    columns = "density 0.25 | adaptive | host time, highest | without attention |"
    assert header == f"| model | tokens | dense, fastest [ms] | {columns}"
    split = "1.31× [1, 1.5] = 43%, 4.00 × 0.56"  # of attention: 21 - 12 ms to 16 - 12 ms
    assert line == f"| 135M | 8K | 20 (cuDNN) | {split} | 0.84× [1, 1.5] | 1.33× | 1.67× |"


def test_the_rate_that_a_goal_asks_of_attention(made_up_machine):
    def row(config, ms, tflop, tokens=2**15):
        common = dict(operation=candidates.PREFILL + "135M", tokens=tokens, config=config, latency_ms=ms, host_ms=1.0)
        provider = dict(dense="fa3", none="none").get(config, "stem")
        paired = dict(speedup=108 / ms, speedup_low=1.0, speedup_high=3.0)
        return common | paired | dict(provider=provider, flop=tflop * 1e12, density=tflop / 40)

    rows = [row("dense", 108, 40), row("none", 50, 0), row("default", 70, 10), row("default", 9, 1, 8192)]
    rows += [row("dense", 20, 4, 8192), row("adaptive, 8 %", 54, 3.2)]
    records.write_rows("speed", rows, "full")
    told, *_, short, long, _, sentence = report.drop_in().splitlines()
    assert "`stem.calibrate` finds for that density on the timed prompt" in told
    assert short.split(" | ")[4] == "–" and long.split(" | ")[4].startswith("2× [1, 3] = 54%, ")  # the last config
    assert sentence == (
        "The 135M spends 50 of 108 ms at 32K outside attention. For 1.8× at density 0.25, choosing and attention "
        "together would have to reach 1000 TFLOP/s. They reach 500, and FlashAttention-3, which keeps every block, 690."
    )

"""stem.experiments.speed.scaling: bytes of ring attention, predictions by hand and the table of made-up rows."""

import dataclasses

import pandas as pd
import pytest
import torch

from stem.distributed import Layout
from stem.experiments import records
from stem.experiments.speed import scaling, shared, shared_memory
from stem.experiments.speed.candidates import Shape
from stem.experiments.speed.scaling import Machine, predict, ring_bytes

SHAPE = Shape(2**17)
MACHINE = Machine(
    attention_tflops=700.0,
    selection_ms=1.2,
    selection_tokens=2**17,
    gb_per_s=300.0,
    network_gb_per_s=50.0,
    ranks_per_host=8,
    collective_ms=0.1,
)


def test_ring_bytes():
    assert ring_bytes(SHAPE, 2) == 256 * 2**20  # half of 512 MiB
    assert ring_bytes(SHAPE, 8) == 448 * 2**20
    assert ring_bytes(SHAPE, 1) == 0


def test_one_rank_sends_nothing():
    one = predict(SHAPE, 0.2, 1.0, 1, MACHINE)
    attention = 0.2 * 2 * 32 * 128 * 2**17 * (2**17 + 1) / 700e12 * 1e3
    assert one["latency_ms"] == pytest.approx(attention + 1.2)
    assert one["received_mib"] == one["exchange_ms"] == 0 and one["speedup"] == 1


def test_two_ranks_by_hand():
    two, one = (predict(SHAPE, 0.2, 1.0, ranks, MACHINE) for ranks in (2, 1))
    attention = one["attention_ms"] / 2
    summaries = 1024 * 8 * (16 * 128 * 2 + 4) / 2
    exchange, before = 256 * 2**20 / 300e6, summaries / 300e6
    assert two["received_mib"] == pytest.approx(256 + summaries / 2**20) and two["ring_mib"] == 256
    assert two["exchange_ms"] == pytest.approx(exchange + before)
    assert exchange < 2 * 0.6  # so half of the keys and values travels during the selection, the rest during attention
    assert two["latency_ms"] == pytest.approx(before + 0.6 + attention + 0.1)
    slow = dataclasses.replace(MACHINE, gb_per_s=150.0)
    some, few = (predict(SHAPE, density, 1.0, 2, slow) for density in (0.2, 0.01))
    assert exchange > 0.6  # a half takes longer than the selection now
    assert some["latency_ms"] == pytest.approx(2 * before + exchange + attention + 0.1)
    assert few["attention_ms"] / 2 < exchange  # and than attention to the half before
    assert few["latency_ms"] == pytest.approx(2 * before + 2 * exchange + few["attention_ms"] / 2 + 0.1)
    assert two["speedup"] == pytest.approx(one["latency_ms"] / two["latency_ms"])


def test_what_changes_a_prediction():
    dense, few = (predict(SHAPE, 0.2, named, 8, MACHINE) for named in (1.0, 0.25))
    assert few["received_mib"] == pytest.approx(dense["received_mib"] - 0.75 * dense["ring_mib"])
    assert few["latency_ms"] < dense["latency_ms"]
    hosts = [predict(Shape(2**20), 0.08, 1.0, ranks, MACHINE) for ranks in (8, 64, 512)]
    assert (
        hosts[0]["exchange_ms"] < hosts[1]["exchange_ms"] < hosts[2]["exchange_ms"]
    )  # 56 of 63, 504 of 511 by network
    at_64 = 4 * 2**30 * 63 / 64 * ((7 / 63) / 300e6 + (56 / 63) / 50e6)
    summaries = 8192 * 8 * (16 * 128 * 2 + 4) * 63 / 64 * ((7 / 63) / 300e6 + (56 / 63) / 50e6)
    assert hosts[1]["exchange_ms"] == pytest.approx(at_64 + summaries)


def made_up_rows():
    """Rows of two ranks whose attention takes what 600 TFLOP/s take."""
    rows = [dict(operation="all-gather", received_mib=2.0**i, gb_per_s=100.0 + i, latency_ms=i) for i in (4, 10)]
    for tokens, exposed in ((2**15, 0.2), (2**17, 0.4)):
        attention = 0.2 * Shape(tokens).dense_flops() / 2 / 600e9
        row = dict(operation="operator", density=0.2, ranks=2, tokens=tokens, batch=1, q_heads=32, kv_heads=8)
        row |= dict(head_dim=128, dtype="bfloat16", attention_ms=attention, selection_ms=0.5, exchange_ms=1.0)
        row |= dict(same_lists=tokens > 2**15, difference=1e-4 * exposed, lists_ms=0.1)
        row |= dict(exposed_ms=exposed, one_rank_ms=2 * attention, latency_ms=attention + 1, received_mib=272.0)
        rows.append(row | dict(ring_mib=256.0, speedup=1.9, speedup_low=1.88, speedup_high=1.91, efficiency=0.95))
    return [*rows, rows[-1] | dict(operation="ttft", layers=8.0)]


def test_a_machine_and_its_plan_come_from_rows():
    here = scaling.machine(pd.DataFrame(made_up_rows()), network_gb_per_s=40.0)
    assert here == Machine(pytest.approx(600), 1.0, 2**17, 110.0, 40.0, 8, 0.2)
    table = scaling.plan(SHAPE, here)
    assert list(table.index) == [(density, ranks) for density in (0.207, 0.08) for ranks in (2, 8, 64, 512)]
    for (density, ranks), row in table.iterrows():
        expected = predict(SHAPE, density, 1.0, ranks, here)
        assert row.speedup == expected["speedup"] and row.efficiency == expected["speedup"] / ranks
        assert row.received_gib == expected["received_mib"] / 1024


def test_the_section(made_up_machine):
    assert "two GPUs" in scaling.section()
    records.write_rows("speed/shared", made_up_rows(), profile="full")
    text = scaling.section()
    assert "1.900× [1.880, 1.910] | 95.0% | 0.5 | 1 |" in text and "| 272 | 256 |" in text
    assert "| all-gather | 1024 | 10 | 110 |" in text
    assert "In 1 of 2 rows" in text and "at most 4.0e-05 " in text
    assert text.index("| operator | 32K |") < text.index("| operator | 128K |") < text.index("| 512 | 8.0% |")
    assert "Memory of each GPU" not in text and "| first token of an 8B shape, 8 layers | 128K |" in text
    row = dict(operation="memory", tokens=2**20, layers=32, weights_mib=15360.0, peak_memory_mib=61440.0)
    rows = [row | dict(ranks=ranks, cache_mib=2**17 / ranks) for ranks in (8, 4)]
    records.write_rows("speed/shared_memory", rows, profile="full")
    lines = scaling.section().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| 4 | 1M | 32 | 15 | 32 | 60 |"))
    assert lines[first + 1].startswith("| 8 | 1M | 32 | 15 | 16 | 60 |")


def test_the_cache_of_a_rank_holds_its_part_of_the_prompt():
    settings = shared_memory.TINY | dict(num_hidden_layers=2)
    model = shared_memory.random_llama(settings, "cpu", torch.float32)
    for ranks in (2, 3):
        row = shared_memory.memory_row(model, 128 * 9, ranks)
        own = Layout.for_config(shared_memory.CONFIG, 128 * 9, ranks).num_tokens_of(0)[1]
        assert row["cache_mib"] == 2 * 2 * own * 64 * 4 / 2**20 and own <= 128 * (9 / ranks + 1)
        assert row["weights_mib"] == sum(x.numel() for x in model.parameters()) * 4 / 2**20


def test_one_gpu_skips_the_rows(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    shared.main(["--profile", "full"])
    assert "skipped" in capsys.readouterr().out

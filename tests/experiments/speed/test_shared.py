"""stem.experiments.speed.shared: bytes of ring attention and predictions by hand; tests/distributed runs the rows."""

import pytest

from stem.experiments.speed.candidates import Shape
from stem.experiments.speed.shared import DENSITIES, PLANNED, Machine, plan, predict, ring_bytes

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
    summaries = 1024 * 8 * (16 * 128 + 8) * 4 / 2
    exchange, before = 256 * 2**20 / 300e6, summaries / 300e6
    assert two["received_mib"] == pytest.approx(256 + summaries / 2**20) and two["ring_mib"] == 256
    assert two["exchange_ms"] == pytest.approx(exchange + before)
    assert exchange < attention / 2  # hidden behind the rank's own blocks
    assert two["latency_ms"] == pytest.approx(0.6 + before + attention + 0.3)
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
    summaries = 8192 * 8 * (16 * 128 + 8) * 4 * 63 / 64 * ((7 / 63) / 300e6 + (56 / 63) / 50e6)
    assert hosts[1]["exchange_ms"] == pytest.approx(at_64 + summaries)


def test_a_plan_holds_the_predictions_for_all_key_blocks():
    table = plan(SHAPE, MACHINE)
    assert list(table.index) == [(density, ranks) for density in DENSITIES for ranks in PLANNED]
    for (density, ranks), row in table.iterrows():
        expected = predict(SHAPE, density, 1.0, ranks, MACHINE)
        assert row.speedup == expected["speedup"] and row.latency_ms == expected["latency_ms"]
        assert row.received_gib == expected["received_mib"] / 1024

"""Speed at matched accuracy: thresholds give their density, an operator that differs is refused, rows name methods."""

import pytest
import torch

import stem
from stem.experiments.long_context import __main__, matched, methods
from stem.experiments.long_context.report import Difference


@pytest.fixture(scope="module")
def layers():
    torch.manual_seed(0)
    return [tuple(torch.randn(1, heads, 512, 16) for heads in (4, 2, 2)) for _ in range(2)]


def test_rows_hold_the_density_and_the_times_of_each_method(layers):
    names = ("stem", "adaptive", "xattention")
    found = list(matched.rows(layers, "random normal", [(name, 0.4) for name in names], 16))
    assert [row["method"] for row in found] == ["sdpa_cpu", "stem", "adaptive", "xattention"]
    assert found[0]["density"] == 1 and found[0]["operator_ms"] > 0
    for row in found[1:]:
        assert row["density"] == pytest.approx(0.4, rel=0.03)
        assert 0 < row["selection_ms"] and 0 < row["attention_ms"] < row["operator_ms"] * 3
        assert row["dense"] == "sdpa_cpu" and 0 < row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
        assert row["turns"] >= matched.LEAST_TURNS
        assert (row["tokens"], row["layers"], row["q_heads"], row["kv_heads"], row["head_dim"]) == (512, 2, 4, 2, 16)


def test_a_threshold_gives_its_mean_density_over_the_layers(layers):
    config = methods.make("adaptive", 0.5, 16, methods.Forced(1, 1)).attention
    found = matched.with_threshold(config, 0.5, layers)
    kept = [stem.stem_attention(*qkv, found, return_selection=True)[1].density() for qkv in layers]
    assert sum(kept) / 2 == pytest.approx(0.5, rel=matched.TOLERANCE)
    with pytest.raises(ValueError, match="density=0.01 is not reached"):
        matched.with_threshold(config, 0.01, layers)  # less than the forced blocks


def test_an_operator_with_another_output_has_no_row(layers, monkeypatch):
    told, real = [], stem.stem_attention
    monkeypatch.setattr(stem, "stem_attention", lambda *args, **options: real(*args, **options) * 1.05)
    found = list(matched.rows(layers, "random normal", [("stem", 0.4)], 16, show=told.append))
    assert [row["method"] for row in found] == ["sdpa_cpu"] and "differs from attention" in told[0]


def test_times_are_of_one_layer(layers, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(matched.time, "perf_counter", lambda: next(clock) * 4e-3)
    assert matched.layer_ms(lambda *qkv: None, layers) == 2.0


def test_a_speed_up_is_the_median_ratio_of_turns(layers, monkeypatch):
    """The second call takes a third of the first one's time, and each turn is slower than the one before."""
    now, speed = [0.0], [1.0]

    def call(seconds):
        def spend(*_):
            now[0] += seconds * speed[0] / len(layers)
            speed[0] *= 1.001

        return spend

    monkeypatch.setattr(matched.time, "perf_counter", lambda: now[0])
    found = matched.in_turns(call(0.3), call(0.1), layers)
    assert found["turns"] == 7 and found["speedup"] == pytest.approx(3, rel=0.01)  # 1.5 s pass before the seventh ends
    assert found["speedup_low"] <= found["speedup"] <= found["speedup_high"]
    assert found["dense_ms"] / found["operator_ms"] == pytest.approx(3, rel=0.01)


def test_without_densities_each_method_has_its_own(layers, monkeypatch):
    points = dict(stem=0.9, subblock=0.7, oracle_mass=0.1, adaptive=0.5, xattention=0.3)
    picked = {
        name: matched.matched_report.Picked(
            matched.matched_report.Point(asked, None, Difference(0, 0, 0, name != "xattention"), asked),
            None if name in ("adaptive", "xattention") else True,
        )
        for name, asked in points.items()
    }
    monkeypatch.setattr(matched.matched_report, "longest", lambda model, length: length)
    monkeypatch.setattr(matched.matched_report, "picked", lambda model, length: picked)
    assert matched.picked_pairs(["a", "b"], 512) == [("stem", 0.9), ("subblock", 0.7), ("adaptive", 0.5)]


def test_options_choose_methods_densities_and_inputs(layers, monkeypatch):
    found = []
    monkeypatch.setattr(matched.records, "write_rows", lambda name, rows, *_, **__: found.extend(rows))
    monkeypatch.setattr(matched.measures, "load", lambda name: (None, None, name))
    monkeypatch.setattr(matched.samples, "document_windows", lambda *_: {"python source": None})
    monkeypatch.setattr(matched, "captured_layers", lambda model, ids: layers)
    __main__.main(["matched", "--methods", "subblock", "--densities", "0.5", "--inputs", "captured"])
    assert [(row["method"], row["asked"]) for row in found] == [("sdpa_cpu", None), ("subblock", 0.5)]
    with pytest.raises(ValueError, match="densities"):
        __main__.main(["matched", "--densities", "2"])


def test_random_inputs_load_no_model(layers, monkeypatch):
    found = []
    monkeypatch.setattr(matched.records, "write_rows", lambda name, rows, *_, **__: found.extend(rows))
    monkeypatch.setattr(matched.measures, "load", None)
    monkeypatch.setattr(matched.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(matched, "random_layer", lambda shape, device: layers)
    __main__.main(["matched", "--profile", "full", "--methods", "stem", "--densities", "0.9", "--inputs", "random"])
    assert [row["source"] for row in found] == ["random normal"] * 2

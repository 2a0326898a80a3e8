"""Speed at matched accuracy: thresholds give their density, an operator that differs is refused, rows name methods."""

import pytest
import torch

import stem
from stem.experiments.long_context import __main__, matched, methods


@pytest.fixture(scope="module")
def layers():
    torch.manual_seed(0)
    return [tuple(torch.randn(1, heads, 512, 16) for heads in (4, 2, 2)) for _ in range(2)]


def test_rows_hold_the_density_and_the_times_of_each_method(layers):
    found = list(matched.rows(layers, "random normal", ("stem", "adaptive", "xattention"), (0.4,), 16))
    assert [row["method"] for row in found] == ["sdpa_cpu", "stem", "adaptive", "xattention"]
    assert found[0]["density"] == 1 and found[0]["operator_ms"] > 0
    for row in found[1:]:
        assert row["density"] == pytest.approx(0.4, rel=0.03)
        assert 0 < row["selection_ms"] and 0 < row["attention_ms"] < row["operator_ms"] * 3
        assert (row["tokens"], row["layers"], row["q_heads"], row["kv_heads"], row["head_dim"]) == (512, 2, 4, 2, 16)


def test_a_threshold_gives_its_mean_density_over_the_layers(layers):
    config = methods.make("adaptive", 0.5, 16, matched.FORCED).attention
    found = matched.with_threshold(config, 0.5, layers)
    kept = [stem.stem_attention(*qkv, found, return_selection=True)[1].density() for qkv in layers]
    assert sum(kept) / 2 == pytest.approx(0.5, rel=matched.TOLERANCE)
    with pytest.raises(ValueError, match="density=0.01 is not reached"):
        matched.with_threshold(config, 0.01, layers)  # less than the forced blocks


def test_an_operator_with_another_output_has_no_row(layers, monkeypatch):
    told, real = [], stem.stem_attention
    monkeypatch.setattr(stem, "stem_attention", lambda *args, **options: real(*args, **options) * 1.05)
    found = list(matched.rows(layers, "random normal", ("stem",), (0.4,), 16, show=told.append))
    assert [row["method"] for row in found] == ["sdpa_cpu"] and "differs from attention" in told[0]


def test_times_are_of_one_layer(layers, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(matched.time, "perf_counter", lambda: next(clock) * 4e-3)
    assert matched.layer_ms(lambda *qkv: None, layers) == 2.0


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

"""StemConfig: presets, what is refused, and that no knob is dead."""

from dataclasses import FrozenInstanceError, fields

import numpy as np
import pytest
import torch

import stem
from stem import StemConfig

N = 512  # tokens of the probe: 32 blocks of 16


@pytest.fixture(scope="module")
def qkv():
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, heads, N - 5, 16, generator=generator) for heads in (2, 1, 1))
    return 2 * q, k, v * torch.rand(1, 1, N - 5, 1, generator=generator) * 2


def test_defaults_are_those_of_the_design():
    config = StemConfig()
    assert (config.block_size, config.score_stride, config.decay, config.min_blocks) == (128, 16, 0.7, 0)
    assert (config.value_weight, config.value_norm, config.sink_blocks, config.local_blocks) == (0.2, "log", 4, 4)
    assert (config.dense_last_blocks, config.allocation, config.reduction) == (0, "position_decay", "mean")
    assert (config.density, config.k_start, config.forced) == (None, None, "inside")


def test_configs_are_equal_where_they_mean_the_same():
    one = StemConfig(decay=1, value_weight=0, density=np.float64(0.5))
    same = StemConfig(decay=1.0, value_weight=0.0, density=0.5)
    assert one == same and hash(one) == hash(same) and one != StemConfig() and one != "StemConfig"
    assert StemConfig(k_start=1) != StemConfig(k_start=1.0)  # a block, and every block
    assert StemConfig(k_start=np.int64(3)) == StemConfig(k_start=3)


def test_without_a_budget_a_quarter_is_kept():
    assert torch.equal(stem.block_budget(100, StemConfig()), stem.block_budget(100, StemConfig(density=0.25)))


PRESET_FIELDS = {
    "paper": dict(score_stride=16, value_weight=0.2, value_norm="log", decay=0.7, forced="inside", min_blocks=54),
    "angelslim": dict(score_stride=8, value_weight=0.2, value_norm="zscore", decay=0.7, forced="on_top"),
    "hpc_ops": dict(score_stride=16, value_weight=0.3, value_norm="zscore_padded", decay=1.0, forced="on_top"),
}


@pytest.mark.parametrize("name", PRESET_FIELDS)
def test_presets(name):
    config = StemConfig.preset(name)
    assert {field: getattr(config, field) for field in PRESET_FIELDS[name]} == PRESET_FIELDS[name]
    assert (config.block_size, config.sink_blocks, config.local_blocks) == (128, 4, 4)


@pytest.mark.parametrize("name", PRESET_FIELDS)
def test_overrides_replace_fields_and_a_budget_replaces_the_schedule(name):
    assert StemConfig.preset(name, decay=0.5, block_size=64).decay == 0.5
    config = StemConfig.preset(name, density=0.5, forced="inside")
    assert config.k_start_regimes is None and config.min_blocks == 0
    assert stem.block_budget(64, config).sum() / (32 * 65) == pytest.approx(0.5, abs=0.01)
    assert stem.block_budget(64, StemConfig.preset(name, k_start=3, decay=1.0)).max() == 3


def test_the_adaptive_preset_has_a_threshold_or_the_budget_that_is_asked_for():
    config = StemConfig.preset("adaptive", threshold=0.02, block_size=64)
    assert (config.allocation, config.threshold, config.block_size) == ("adaptive", 0.02, 64)
    assert (config.reduction, config.score_cells, config.value_weight) == ("softmax", 16, 0)
    assert (config.score_peak, config.score_pooling) == (0.3, "rms")
    cells = [StemConfig.preset("adaptive", block_size=size).score_cells for size in (128, 64, 32)]
    assert cells == [8, 16, 8] and StemConfig.preset("adaptive", block_size=64, score_cells=4).score_cells == 4
    config = StemConfig.preset("adaptive", density=0.5)
    assert (config.allocation, config.decay, config.threshold, config.score_peak) == ("position_decay", 1.0, None, 0.3)
    assert config.dense_up_to == 0 < StemConfig.preset("adaptive").dense_up_to
    assert stem.block_budget(64, config).sum() / (32 * 65) == pytest.approx(0.5, abs=0.01)


def test_config_is_frozen_and_replace_validates():
    config = StemConfig(density=0.5)
    with pytest.raises(FrozenInstanceError):
        config.density = 0.1
    assert config.replace(decay=1.0) == StemConfig(density=0.5, decay=1.0)
    with pytest.raises(ValueError, match="decay.*got 2"):
        config.replace(decay=2.0)


def test_regimes_may_be_lists():
    regimes = [[0, 1.0, 0], [8, 0.5, 1]]
    assert stem.block_budget(10, StemConfig(k_start_regimes=regimes, decay=1.0)).max() == 6
    assert hash(StemConfig(k_start_regimes=regimes)) == hash(StemConfig(k_start_regimes=((0, 1.0, 0), (8, 0.5, 1))))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (dict(block_size=100), ValueError, "block_size.*16, 32, 64, 128.*100"),
        (dict(block_size=64.0), TypeError, "block_size.*int.*64.0"),
        (dict(score_stride=48), ValueError, "score_stride.*128.*48"),
        (dict(score_stride=0), ValueError, "score_stride.*>= 1.*0"),
        (dict(score_stride="8"), TypeError, "score_stride.*int.*'8'"),
        (dict(density=0.0), ValueError, r"density.*\(0, 1\].*0.0"),
        (dict(density=1.5), ValueError, r"density.*\(0, 1\].*1.5"),
        (dict(density=float("nan")), ValueError, r"density.*\(0, 1\].*nan"),
        (dict(density="half"), TypeError, "density.*number.*'half'"),
        (dict(k_start=0), ValueError, "k_start.*>= 1.*0"),
        (dict(k_start=0.0), ValueError, r"k_start.*\(0, 1\].*0.0"),
        (dict(k_start=1.5), ValueError, r"k_start.*\(0, 1\].*1.5"),
        (dict(k_start=True), TypeError, "k_start.*number.*True"),
        (dict(density=0.5, k_start=4), ValueError, "at most one.*density=0.5.*k_start=4"),
        (dict(k_start=4, k_start_regimes=((0, 1.0, 0),)), ValueError, "at most one.*k_start=4"),
        (dict(k_start_regimes=()), ValueError, r"k_start_regimes.*start at 0.*\(\)"),
        (dict(k_start_regimes=((8, 0.5, 0),)), ValueError, "k_start_regimes.*start at 0"),
        (dict(k_start_regimes=((0, 0.5),)), ValueError, "k_start_regimes.*triples"),
        (dict(k_start_regimes=7), ValueError, "k_start_regimes.*triples.*7"),
        (dict(k_start_regimes=((0, 2.0, 0),)), ValueError, r"k_start_regimes: share.*\[0, 1\].*2"),
        (dict(k_start_regimes=((0, 0.5, -1),)), ValueError, "k_start_regimes: blocks added.*>= 0.*-1"),
        (dict(min_blocks=-1), ValueError, "min_blocks.*>= 0.*-1"),
        (dict(decay=0.0), ValueError, r"decay.*\(0, 1\].*0.0"),
        (dict(decay=1.1), ValueError, r"decay.*\(0, 1\].*1.1"),
        (dict(decay_from="row"), ValueError, "decay_from.*'first_row', 'k_start'.*'row'"),
        (dict(dense_last_blocks=-1), ValueError, "dense_last_blocks.*>= 0.*-1"),
        (dict(reduction="softmax", exact_last_blocks=1.0), TypeError, "exact_last_blocks.*int.*1.0"),
        (dict(exact_last_blocks=1), ValueError, "exact_last_blocks.*reduction='softmax'.*'mean'"),
        (dict(sink_blocks=-1), ValueError, "sink_blocks.*>= 0.*-1"),
        (dict(local_blocks=1.0), TypeError, "local_blocks.*int.*1.0"),
        (dict(forced="outside"), ValueError, "forced.*'inside', 'on_top'.*'outside'"),
        (dict(value_weight=-0.1), ValueError, r"value_weight.*\[0, inf\).*-0.1"),
        (dict(value_weight=float("inf")), ValueError, r"value_weight.*\[0, inf\).*inf"),
        (dict(value_norm="l2"), ValueError, "value_norm.*'log', 'zscore'.*'l2'"),
        (dict(routing_scale="sum"), ValueError, "routing_scale.*'mean', 'raw'.*'sum'"),
        (dict(reduction="max"), ValueError, "reduction.*'mean', 'softmax'.*'max'"),
        (dict(reduction="softmax", score_cells=16), ValueError, "score_cells.*128.*16"),
        (dict(reduction="softmax", score_cells=0), ValueError, "score_cells.*>= 1.*0"),
        (dict(reduction="softmax", score_query_cells=16), ValueError, "score_query_cells.*128.*16"),
        (dict(reduction="softmax", score_query_cells=2.0), TypeError, "score_query_cells.*int.*2.0"),
        (dict(score_pooling="max"), ValueError, "score_pooling.*'mean', 'rms'.*'max'"),
        (dict(reduction="softmax", score_stride=1, score_peak=1.5), ValueError, r"score_peak.*\[0, 1\].*1.5"),
        (dict(reduction="softmax", score_peak=0.5), ValueError, "score_peak.*score_stride=1.*score_stride=16"),
        (dict(score_stride=1, score_peak=0.5), ValueError, "score_peak.*'softmax'.*reduction='mean'"),
        (dict(allocation="even"), ValueError, "allocation.*'position_decay', 'uniform', 'adaptive'.*'even'"),
        (dict(allocation="adaptive"), ValueError, "adaptive.*threshold.*None"),
        (dict(threshold=0.1), ValueError, "adaptive.*threshold.*'position_decay'.*0.1"),
        (dict(allocation="adaptive", threshold=0.0), ValueError, r"threshold.*\(0, 1\].*0.0"),
        (dict(allocation="adaptive", threshold=0.1, density=0.5), ValueError, "adaptive.*threshold.*density"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_bad_settings_name_the_field_its_value_and_what_is_accepted(arguments, error, words):
    with pytest.raises(error, match=words):
        StemConfig(**arguments)


def test_unknown_presets_and_fields():
    with pytest.raises(ValueError, match="preset.*'paper', 'angelslim', 'hpc_ops', 'adaptive'.*'peper'"):
        StemConfig.preset("peper")
    with pytest.raises(TypeError, match="densty.*density"):
        StemConfig.preset("paper", densty=0.5)
    with pytest.raises(TypeError, match="densty"):
        StemConfig(densty=0.5)


BASE = dict(block_size=16, score_stride=4, k_start=0.4, sink_blocks=1, local_blocks=2)
REGIMES = dict(k_start=None, k_start_regimes=((0, 0.25, 1),))
KNOBS = [  # (changed field, shared settings beside BASE, one value, another value)
    ("block_size", {}, 16, 32),
    ("score_stride", {}, 4, 16),
    ("density", dict(k_start=None), 0.2, 0.5),
    ("k_start", {}, 0.4, 0.7),
    ("k_start", {}, 3, 9),
    ("k_start_regimes", dict(k_start=None), ((0, 0.25, 1),), ((0, 0.25, 1), (32, 0.5, 0))),
    ("min_blocks", REGIMES, 0, 20),
    ("decay", {}, 0.7, 0.5),
    ("decay_from", {}, "first_row", "k_start"),
    ("dense_first_blocks", {}, 0, 12),
    ("dense_first_blocks", dict(k_start=None, allocation="adaptive", threshold=0.2), 0, 6),
    ("dense_up_to", {}, 0, 4096),
    ("dense_up_to", dict(k_start=None, allocation="adaptive", threshold=0.2), 0, 4096),
    ("dense_last_blocks", {}, 0, 2),
    ("dense_last_blocks", dict(k_start=None, allocation="adaptive", threshold=0.2), 0, 2),
    ("exact_last_blocks", dict(reduction="softmax"), 0, 2),
    ("sink_blocks", {}, 1, 4),
    ("local_blocks", {}, 2, 5),
    ("forced", {}, "inside", "on_top"),
    ("value_weight", {}, 0.2, 2.0),
    ("value_norm", {}, "log", "zscore"),
    ("value_norm", dict(value_weight=1.0), "zscore", "zscore_padded"),
    ("routing_scale", {}, "mean", "raw"),
    ("reduction", {}, "mean", "softmax"),
    ("score_cells", dict(reduction="softmax", score_query_cells=2), 1, 4),
    ("score_query_cells", dict(reduction="softmax", score_cells=2), None, 4),
    ("score_peak", dict(reduction="softmax", score_stride=1), 0.0, 0.5),
    ("score_pooling", dict(reduction="softmax"), "mean", "rms"),
    ("allocation", {}, "position_decay", "uniform"),
    ("threshold", dict(k_start=None, allocation="adaptive"), 0.02, 0.2),
    ("lists", {}, "head", "group"),
    ("lists", dict(k_start=None, allocation="adaptive", threshold=0.05, reduction="softmax"), "head", "group"),
    ("dropped", {}, "skip", "mean"),
    ("dropped", dict(block_size=32), "mean", "cells"),
]


@pytest.mark.parametrize(("field", "shared", "one", "other"), KNOBS, ids=lambda x: x if isinstance(x, str) else "")
def test_changing_a_knob_changes_the_attention(qkv, field, shared, one, other):
    outs = []
    for value in (one, other):
        outs.append(stem.stem_attention(*qkv, StemConfig(**{**BASE, **shared, field: value})))
    assert not torch.equal(*outs)


def test_every_field_is_in_the_list_of_knobs():
    elsewhere = {"compute"}  # needs a GPU: tests/kernels/test_fp8_forward.py
    assert {field.name for field in fields(StemConfig)} == {field for field, *_ in KNOBS} | elsewhere


@pytest.mark.parametrize("share", [0.5, np.float32(0.5), np.float64(0.5)], ids=["float", "float32", "float64"])
def test_a_share_may_be_any_real_number(share):
    assert stem.block_budget(8, StemConfig(k_start=share, decay=1.0)).tolist() == [1, 2, 3, 4, 4, 4, 4, 4]

"""Methods of a comparison: forced blocks and what they leave to choose, names, controls, blind patterns."""

from dataclasses import replace

import pytest
import torch

import stem
from stem import patterns
from stem.experiments.long_context import methods
from stem.experiments.long_context.methods import Forced

SPARSE = stem.StemConfig(density=0.4, block_size=16, sink_blocks=1, local_blocks=1)


@pytest.mark.parametrize("forced", [Forced(1, 1), Forced(2, 4), Forced(0, 0), Forced(4, 4, 3), Forced(1, 2, 40)])
def test_forced_pairs_are_those_of_a_mask(forced):
    row, key = torch.arange(20)[:, None], torch.arange(20)
    mask = (
        (key < forced.sink_blocks) | (row - key < max(1, forced.local_blocks)) | (row >= 20 - forced.dense_last_blocks)
    )
    pairs = int((mask & (key <= row)).sum())
    assert forced.pairs(20) == pairs
    assert forced.chosen_share(20, 0.5) == pytest.approx(max(0.0, (105 - pairs) / 105))


def test_the_papers_forced_blocks_leave_nothing_to_choose_at_8k():
    assert Forced(4, 4).chosen_share(64, 0.1) == 0  # the rows that this comparison replaces
    assert Forced(4, 4).chosen_share(64, 0.25) < methods.LEAST_CHOSEN
    assert [of.forced for of in methods.candidates("stem", 0.1, 128, 8192)] == [Forced(1, 1)]
    assert methods.candidates("stem", 0.07, 128, 8192) == []


def test_a_threshold_may_compute_less_than_its_density():
    assert Forced(4, 4).chosen_share(256, 0.08) > methods.LEAST_CHOSEN > Forced(4, 4).chosen_share(256, 0.0754)
    budget, threshold = (methods.candidates(name, 0.08, 128, 2**15) for name in ("stem", "adaptive"))
    assert {of.forced for of in budget} - {of.forced for of in threshold} == {Forced(4, 4)}


def kept(method, q, k, v):
    """Mask of the blocks that a method keeps."""
    attention = method.attention
    if isinstance(attention, stem.StemConfig):
        return stem.planning.select(q, k, v, attention, q.shape[-1] ** -0.5, None).to_mask()
    return attention(q, k, v).to_mask()


@pytest.mark.parametrize("name", [name for name in methods.all_names() if name not in methods.BLIND])
def test_every_candidate_keeps_its_forced_blocks_and_chooses_others(name):
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 640, 16), torch.randn(1, 1, 640, 16), torch.randn(1, 1, 640, 16)
    found = methods.candidates(name, 0.6, 16, 640)
    assert found and len({of.forced for of in found}) == len(found)
    if name not in ("vertical_slash", "flexprefill", "blasst"):
        assert {(of.forced.sink_blocks, of.forced.local_blocks) for of in found} == set(methods.GRID)
    row, key = torch.arange(40)[:, None], torch.arange(40)
    for method in found:
        mask, forced = kept(method, q, k, v), method.forced
        must = (key < forced.sink_blocks) | (row - key < forced.local_blocks) | (row >= 40 - forced.dense_last_blocks)
        assert mask[:, :, must & (key <= row)].all()
        assert mask[:, :, ~must & (key <= row)].any()
        assert method.asked == 0.6 and method.block_size == 16


def test_dense_last_rows_are_a_choice_where_a_method_has_them():
    choices = {of.forced.dense_last_blocks for of in methods.candidates("flashprefill", 0.5, 64, 8192)}
    assert choices == {0, patterns.keywords("flashprefill")["dense_last_blocks"]}


def test_variants_differ_from_their_method_in_the_named_fields_only():
    for name, (base, changes) in methods.VARIANTS.items():
        (ours, *_), (theirs, *_) = (methods.candidates(of, 0.5, 64, 8192) for of in (name, base))
        if isinstance(theirs.attention, stem.StemConfig):
            assert ours.attention == theirs.attention.replace(**changes) != theirs.attention
    assert methods.candidates("adaptive", 0.5, 64, 8192)[0].attention.exact_last_blocks == 1


@pytest.mark.parametrize("name", [name for name in methods.LAST_DENSE if name != "adaptive"])
def test_a_dense_last_block_is_inside_the_density_and_counts_as_forced(name):
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 640, 16), torch.randn(1, 1, 640, 16), torch.randn(1, 1, 640, 16)
    found, plain = (methods.candidates(of, 0.3, 16, 640) for of in (f"{name}, last block dense", name))
    masks = [kept(of[0], q, k, v) for of in (found, plain)]
    assert masks[0][:, :, -1].all() and not masks[1][:, :, -1].all()
    assert not masks[0][:, :, -2].all()
    assert all(of.forced.dense_last_blocks == 1 for of in found)
    assert int(masks[0].sum()) == pytest.approx(int(masks[1].sum()), rel=0.06)


def test_the_oracle_by_threshold_keeps_the_blocks_of_the_largest_true_mass():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 320, 16), torch.randn(1, 1, 320, 16), torch.randn(1, 1, 320, 16)
    oracle = methods.candidates(methods.ORACLE, 0.9, 16, 320)[0]
    mass = stem.metrics.block_attention_mass(q, k, 16)
    threshold, row, key = 0.05, torch.arange(20)[:, None], torch.arange(20)
    mask = kept(replace(oracle, attention=oracle.attention.replace(threshold=threshold)), q, k, v)
    forced = (key < 1) | (row == key)
    assert torch.equal(mask, ((mass > threshold) | forced) & (key <= row))


def test_means_reach_the_attention_of_patterns_and_configs():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 640, 16), torch.randn(1, 1, 640, 16), torch.randn(1, 1, 640, 16)
    pattern = methods.candidates("flashprefill_v2, means", 0.3, 16, 640)[0].attention(q, k, v)
    assert pattern.dropped == "mean"
    assert methods.candidates(methods.TUNED, 0.5, 64, 8192)[0].attention.dropped == "cells"


def test_presets_hold_angelslims_dense_layers_both_ways():
    found = {method.name: method for method in methods.presets()}
    assert list(found) == ["stem, paper", "stem, angelslim", "stem, hpc_ops", "stem, angelslim, 2 dense layers"]
    every, default = found["stem, angelslim"], found["stem, angelslim, 2 dense layers"]
    assert (every.dense_layers, default.dense_layers) == (0, 2) and every.attention == default.attention
    assert every.forced == Forced(4, 4)


def test_the_control_keeps_three_blocks():
    budget = stem.block_budget(20, methods.window_control(64))
    assert budget.tolist()[:4] == [1, 2, 3, 3] and budget[-1] == 3
    assert methods.control(64).attention == methods.window_control(64)


@pytest.mark.parametrize("name", methods.BLIND)
def test_blind_patterns_do_not_look_at_the_tensors(name):
    q, k = torch.randn(2, 3, 160, 16), torch.randn(2, 1, 160, 16)
    first, second = (stem.patterns.select(name, q * x, k * x, k, SPARSE).to_mask() for x in (1, -2))
    assert torch.equal(first, second)
    method = methods.candidates(name, 0.5, 16, 160)[0]
    assert method.attention(q, k, k) is method.attention(q + 1, k, k)
    assert (method.forced is None) == (name != "random")

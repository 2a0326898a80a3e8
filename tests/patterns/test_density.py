"""Patterns at equal cost: they keep as many blocks as the config's schedule, and the right ones."""

import oracles
import pattern_oracles
import pytest
import torch
from pattern_inputs import BLOCK, CONFIG, LENGTHS, NAMES, as_mask, draw

import stem
from stem import StemConfig, patterns

LIKE_THE_PAPER = "dense", "stem"  # their budget is their own
BY_THE_VALUES = "blasst"  # keeps every block that raises a running maximum


def constant_rows(nk):
    return oracles.constant_rows(int(stem.block_budget(nk, CONFIG).sum()), nk)


def fill(first, i, count):
    """Return `count` blocks as a set: those of `first` in this order, then the most recent ones."""
    order = dict.fromkeys([j for j in first if 0 <= j <= i] + list(range(i, -1, -1)))
    return set(list(order)[:count])


WINDOWS = {"sliding_window": [], "a_shape": [0, 1], "longformer": [0]}  # kept first


def equal_cost_oracle(name, q, k, v):
    """Return the mask of a pattern at the cost of the config's own schedule: bool [B, Hq, nq, nk]."""
    nk = -(-k.shape[2] // BLOCK)
    even = constant_rows(nk)
    if name in WINDOWS:
        grid = pattern_oracles.rows(q.shape[2], k.shape[2], BLOCK)
        return as_mask([[fill([i, *WINDOWS[name]], i, even[i]) for i in grid]] * q.shape[1], nk)
    routing = oracles.antidiagonal_sums(q, k, BLOCK, 4) / 4 / (BLOCK * BLOCK / 4)
    if name == "stem":
        value = oracles.repeat_heads(oracles.log_value_term(v, BLOCK), q.shape[1])[:, :, None]
        budget = stem.block_budget(nk, CONFIG).tolist()
        return oracles.selection_mask(oracles.hide_future(routing + 0.2 * value), budget, 2, 2)
    if name == "uniform_topk":
        return oracles.selection_mask(oracles.hide_future(routing), even, 2, 2)
    if name == "xattention":
        return oracles.selection_mask(oracles.softmax_scores(q, k, v, BLOCK, 4, (BLOCK // 4,) * 2, 0.0), even, 1, 1)
    mass = oracles.probabilities(q, k)
    if name == "oracle_output":
        mass = mass * oracles.repeat_heads(v, q.shape[1]).norm(dim=-1)[:, :, None]
    return oracles.selection_mask(oracles.block_means(mass, BLOCK), even, 0, 1)


EQUAL_COST = (*WINDOWS, "stem", "uniform_topk", "xattention", "oracle_mass", "oracle_output")


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", EQUAL_COST)
def test_at_equal_cost(name, lengths):
    q, k, v = draw(*LENGTHS[lengths])
    selection = patterns.select(name, q, k, v, CONFIG)
    assert (selection.q_len, selection.kv_len) == LENGTHS[lengths]
    assert torch.equal(selection.to_mask(), equal_cost_oracle(name, q, k, v))


LEAST = {  # blocks that a pattern keeps whatever the density, at n blocks of 64 tokens
    "longformer": lambda i, j, n: j < 1,
    "bigbird": lambda i, j, n: i - j < 3 or j < 2,
    "a_shape": lambda i, j, n: j < 2,
    "tri_shape": lambda i, j, n: j < 2 or i >= n - 2,
    "vertical_slash": lambda i, j, n: i - j < 2 or j < 1,
    "flashprefill": lambda i, j, n: i - j < 4 or j < 2 or i >= n - 2,
    "flashprefill_v2": lambda i, j, n: i - j < 4 or j < 2 or i >= n - 8,
}


def least_density(name, n):
    keep = LEAST.get(name, lambda i, j, n: False)
    kept = sum(i == j or keep(i, j, n) for i in range(n) for j in range(i + 1))
    if name == "sparse_transformer_fixed":
        kept = min(sum(j // s == i // s or j % s == s - 1 for i in range(n) for j in range(i + 1)) for s in (8, 9, 11))
    return kept / (n * (n + 1) / 2)


@pytest.mark.parametrize("blocks", [64, 100])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("dense", BY_THE_VALUES)])
def test_density_is_the_requested_one_or_the_least(name, blocks):
    size = BLOCK if name.startswith("oracle") else 64
    q, k, v = draw(size * blocks - 3, size * blocks - 3, 2, 1, torch.float32)
    least = least_density(name, blocks)
    for density in (0.1, 0.16, 0.25, 0.31, 0.5, 1.0):
        config = CONFIG.replace(block_size=size, density=density)
        selection = patterns.select(name, q, k, v, config)
        assert selection.density() == pytest.approx(max(density, least), abs=0.02)


SCHEDULES = {
    "paper": StemConfig.preset("paper", block_size=BLOCK),
    "angelslim": StemConfig.preset("angelslim", block_size=BLOCK),
    "dense-last": StemConfig(block_size=BLOCK, k_start=14, dense_last_blocks=4),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", [name for name in NAMES if name not in (*LIKE_THE_PAPER, BY_THE_VALUES)])
def test_methods_spend_what_the_schedule_of_the_config_costs(name, schedule):
    q, k, v = draw(64 * BLOCK, 64 * BLOCK, 1, 1, torch.float32)
    pairs = int(stem.block_budget(64, SCHEDULES[schedule]).sum())
    counts = patterns.select(name, q, k, v, SCHEDULES[schedule]).kv_num_blocks
    assert int(counts.sum()) == pytest.approx(pairs, abs=0.02 * 64 * 65 / 2)
    if name in (*EQUAL_COST, "random", "bigbird"):
        assert counts[0, 0].tolist() == oracles.constant_rows(pairs, 64)


@pytest.mark.parametrize("name", ["sparse_transformer_strided", "sparse_transformer_fixed", "vertical_slash"])
def test_solved_parameters_are_parameters(name):
    """Some native parameters give the solved pattern, but for at most one block in a row."""
    q, k, v = draw(128, 128, 1, 1, torch.float32)
    solved = patterns.select(name, q, k, v, CONFIG).to_mask()
    tries = {
        "sparse_transformer_strided": [
            dict(window_blocks=w, stride_blocks=s) for w in range(1, 9) for s in range(1, 9)
        ],
        "sparse_transformer_fixed": [
            dict(stride_blocks=s, summary_blocks=c) for s in range(1, 9) for c in range(1, s + 1)
        ],
        "vertical_slash": [dict(verticals=x, slashes=y) for x in range(30, 129, 7) for y in range(50, 129, 7)],
    }[name]
    tries = [patterns.select(name, q, k, v, CONFIG, **native).to_mask() for native in tries]
    most = 1 if name == "sparse_transformer_strided" else 0
    assert any((solved >= mask).all() and ((solved & ~mask).sum(-1) <= most).all() for mask in tries)


def test_flexprefill_spends_a_density_over_its_heads():
    selection = patterns.select("flexprefill", *draw(1024, 1024), CONFIG.replace(density=0.3), tau=0.15)
    per_head = selection.kv_num_blocks.sum(-1)[0].double() / selection.causal_pairs
    assert selection.density() == pytest.approx(0.3, abs=0.01) and per_head.std() > 0.02


def test_random_blocks_beside_the_forced_ones():
    q, k, v = draw(64 * BLOCK, 64 * BLOCK, 2, 1, torch.float32)
    config = CONFIG.replace(density=0.3)
    counts = oracles.constant_rows(int(stem.block_budget(64, config).sum()), 64)
    for name, (sink, local) in {"random": (2, 2), "bigbird": (2, 3)}.items():
        mask = patterns.select(name, q, k, v, config).to_mask()[0]
        assert mask.sum(-1).tolist() == [counts, counts]
        for i in range(64):
            forced = {*range(min(sink, i + 1)), *range(max(0, i - local + 1), i + 1)}
            assert all(mask[:, i, j].all() for j in forced)
        kept = mask[:, 40:, 2:38].float().mean((0, 1))  # of each block that is free in these 24 rows
        assert 0 < kept.min() and kept.max() < 0.5
        assert not torch.equal(mask[0], mask[1])  # heads draw their own
        other = patterns.select(name, q, k, v, config, seed=1).to_mask()[0]
        assert 0.1 < (other != mask).float().mean() < 0.4  # and so do seeds


@pytest.mark.parametrize("name", ["flexprefill", "flashprefill", "flashprefill_v2"])
def test_a_density_holds_in_the_rows_of_a_chunk(name):
    q, k, v = draw(400, 1600)
    assert patterns.select(name, q, k, v, CONFIG).density() == pytest.approx(0.45, abs=0.01)


def test_blasst_spends_a_density_above_its_least():
    q, k, v = draw(64 * BLOCK, 64 * BLOCK, 2, 1, torch.float32)
    least = patterns.select("blasst", q, k, v, CONFIG, skip_threshold=1.0).density()
    found = [patterns.select("blasst", q, k, v, CONFIG.replace(density=x)).density() for x in (0.01, 0.9, 1.0)]
    assert found == pytest.approx([least, 0.9, 1.0], abs=0.01)


def test_oracles_keep_the_most_mass():
    q, k, v = draw()
    recall = {
        name: float(stem.metrics.attention_recall(q, k, patterns.select(name, q, k, v, CONFIG)).mean())
        for name in (*EQUAL_COST, "random")
        if name != "stem"
    }
    assert max(recall, key=recall.get) == "oracle_mass"

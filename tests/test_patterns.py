"""Every pattern against a brute-force mask written from its specification, at equal cost."""

import oracles
import pytest
import torch

import stem
from stem import StemConfig, patterns

BLOCK = 16
CONFIG = StemConfig(block_size=BLOCK, score_stride=4, density=0.45, sink_blocks=2, local_blocks=2)
LENGTHS = {"whole": (192, 192), "ragged": (187, 187), "chunk": (64, 192), "unaligned": (75, 187)}
NAMES = patterns.names()


def draw(q_len=192, kv_len=192, q_heads=4, kv_heads=2, dtype=torch.float64):
    q = 2 * torch.randn(1, q_heads, q_len, 16, dtype=dtype)
    k, v = (torch.randn(1, kv_heads, kv_len, 16, dtype=dtype) for _ in range(2))
    return q, k, v * torch.rand(1, kv_heads, kv_len, 1, dtype=dtype).exp()


def fill(first, i, count):
    """The blocks `first` in this order, then the most recent ones, until there are `count`: a set."""
    order = dict.fromkeys([j for j in first if 0 <= j <= i] + list(range(i, -1, -1)))
    return set(list(order)[:count])


FIXED = {  # what row i keeps of `count` blocks
    "dense": lambda i, count: set(range(i + 1)),
    "sliding_window": lambda i, count: fill([], i, count),
    "a_shape": lambda i, count: fill([i, 0, 1], i, count),
    "longformer": lambda i, count: fill([i, 0], i, count),
}


def brute_force(name, q, k, v):
    """bool [B, Hq, nq, nk], from the specification and the cost of the config's own schedule."""
    nk = -(-k.shape[2] // BLOCK)
    nq = nk - (k.shape[2] - q.shape[2]) // BLOCK
    budget = stem.block_budget(nk, CONFIG).tolist()
    even = oracles.constant_rows(sum(budget), nk)
    if name in FIXED:
        mask = torch.zeros(*q.shape[:2], nq, nk, dtype=torch.bool)
        for r in range(nq):
            mask[:, :, r, sorted(FIXED[name](nk - nq + r, even[nk - nq + r]))] = True
        return mask
    routing = oracles.antidiagonal_sums(q, k, BLOCK, 4) / 4 / (BLOCK * BLOCK / 4)
    if name == "stem":
        value = oracles.repeat_heads(oracles.log_value_term(v, BLOCK), q.shape[1])[:, :, None]
        return oracles.selection_mask(oracles.hide_future(routing + 0.2 * value), budget, 2, 2)
    if name == "uniform_topk":
        return oracles.selection_mask(oracles.hide_future(routing), even, 2, 2)
    if name == "xattention":
        return oracles.selection_mask(oracles.softmax_scores(q, k, v, BLOCK, 4, BLOCK // 4, 0.0), even, 1, 1)
    mass = oracles.probabilities(q, k)
    if name == "oracle_output":
        mass = mass * oracles.repeat_heads(v, q.shape[1]).norm(dim=-1)[:, :, None]
    return oracles.selection_mask(oracles.block_means(mass, BLOCK), even, 0, 1)


RANDOM = {"random": (2, 2), "bigbird": (1, 3)}  # sink and local blocks beside the random ones


def test_every_pattern_has_a_specification_here():
    specified = {*FIXED, *RANDOM, "stem", "uniform_topk", "xattention", "oracle_mass", "oracle_output"}
    assert set(NAMES) == specified


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", [name for name in NAMES if name not in RANDOM])
def test_brute_force(name, lengths):
    q, k, v = draw(*LENGTHS[lengths])
    selection = patterns.select(name, q, k, v, CONFIG)
    assert (selection.q_len, selection.kv_len) == LENGTHS[lengths]
    assert torch.equal(selection.to_mask(), brute_force(name, q, k, v))


@pytest.mark.parametrize("name", RANDOM)
def test_random_blocks_beside_the_forced_ones(name):
    q, k, v = draw(64 * BLOCK, 64 * BLOCK, 2, 1, torch.float32)
    config = CONFIG.replace(density=0.3)
    mask = patterns.select(name, q, k, v, config).to_mask()[0]
    counts = oracles.constant_rows(int(stem.block_budget(64, config).sum()), 64)
    assert mask.sum(-1).tolist() == [counts, counts]
    sink, local = RANDOM[name]
    for i in range(64):
        forced = {*range(min(sink, i + 1)), *range(max(0, i - local + 1), i + 1)}
        assert all(mask[:, i, j].all() for j in forced)
    assert not torch.equal(mask[0], mask[1])  # heads draw their own
    kept = mask[:, 40:, 2:38].float().mean((0, 1))  # of each block that is free in these 24 rows
    assert 0 < kept.min() and kept.max() < 0.5


@pytest.mark.parametrize("density", [0.1, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "dense"])
def test_density_is_the_requested_one(name, density):
    q, k, v = draw(64 * BLOCK - 3, 64 * BLOCK - 3, 2, 1, torch.float32)
    config = CONFIG.replace(density=density)
    assert patterns.select(name, q, k, v, config).density() == pytest.approx(density, abs=0.02)


SCHEDULES = {
    "paper": StemConfig.preset("paper", block_size=BLOCK),
    "angelslim": StemConfig.preset("angelslim", block_size=BLOCK),
    "dense-last": StemConfig(block_size=BLOCK, k_start=6, dense_last_blocks=4),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("dense", "stem")])
def test_methods_spend_what_the_schedule_of_the_config_costs_evenly(name, schedule):
    q, k, v = draw(64 * BLOCK, 64 * BLOCK, 1, 1, torch.float32)
    pairs = int(stem.block_budget(64, SCHEDULES[schedule]).sum())
    counts = patterns.select(name, q, k, v, SCHEDULES[schedule]).kv_num_blocks
    assert counts[0, 0].tolist() == oracles.constant_rows(pairs, 64)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_call_gives_the_same_blocks(name):
    q, k, v = draw(dtype=torch.float32)
    first = patterns.select(name, q, k, v, CONFIG)
    state = torch.get_rng_state()
    second = patterns.select(name, q, k, v, CONFIG)
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers change
    torch.manual_seed(99)
    third = patterns.select(name, q, k, v, CONFIG)
    assert torch.equal(first.to_mask(), second.to_mask()) and torch.equal(first.to_mask(), third.to_mask())


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_chunk_are_those_of_the_whole_prompt(name):
    q, k, v = draw()
    whole = patterns.select(name, q, k, v, CONFIG).to_mask()
    chunk = patterns.select(name, q[:, :, 112:], k, v, CONFIG).to_mask()
    assert torch.equal(chunk, whole[:, :, 7:])


@pytest.mark.parametrize("name", NAMES)
def test_a_selection_can_be_attended_to(name):
    q, k, v = draw(75, 187)
    selection = patterns.select(name, q, k, v, CONFIG)
    allowed = oracles.token_mask(selection.to_mask(), BLOCK, 75, 187)
    expected, _ = oracles.attention(q, k, v, allowed)
    torch.testing.assert_close(stem.block_sparse_attention(q, k, v, selection), expected)


def test_oracles_keep_the_most_mass():
    q, k, v = draw()
    recall = {
        name: float(stem.metrics.attention_recall(q, k, patterns.select(name, q, k, v, CONFIG)).mean())
        for name in NAMES
        if name not in ("dense", "stem")
    }
    assert max(recall, key=recall.get) == "oracle_mass"


def test_without_a_config_the_default_holds():
    q, k, v = draw(1280, 1280, 1, 1, torch.float32)
    assert patterns.select("sliding_window", q, k, v).block_size == 128


@pytest.mark.parametrize(
    ("name", "config", "error", "words"),
    [
        ("longfomer", CONFIG, ValueError, "name must be one of.*'longformer'.*'longfomer'"),
        ("stem", {"density": 0.5}, TypeError, "config must be a StemConfig.*density"),
        (
            "longformer",
            StemConfig(block_size=BLOCK, allocation="adaptive", threshold=0.1),
            ValueError,
            "allocation='adaptive'.*'stem'",
        ),
    ],
    ids=["unknown", "dict", "adaptive"],
)
def test_bad_input(name, config, error, words):
    with pytest.raises(error, match=words):
        patterns.select(name, *draw(), config)
    with pytest.raises(ValueError, match="q .*at most"):
        patterns.select("dense", *draw(40, 20), CONFIG)

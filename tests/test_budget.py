"""Token Position-Decay: schedules value by value, their densities, and the solver."""

import math
from fractions import Fraction

import oracles
import pytest
import torch

import stem
from stem import StemConfig, block_budget, select_blocks
from stem.budget import BlockRows, causal_pairs, full_rows, keeps_every_block, scored_rows
from stem.experiments.theory.paper import decay_cost, uniform_cost

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [1, 2, 8, 32, 55, 56, 85, 128, 129, 159, 160, 256, 512, 1024]


@pytest.mark.parametrize("n", LENGTHS)
def test_paper_schedule(n):
    assert stem.block_budget(n, StemConfig.preset("paper")).tolist() == oracles.paper_schedule(n)


@pytest.mark.parametrize("n", [32, 128, 129, 160])
def test_paper_schedule_without_the_floor(n):
    budget = stem.block_budget(n, StemConfig.preset("paper", min_blocks=0))
    assert budget.tolist() == oracles.paper_schedule(n, floor=0)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("decay", ["7/10", "1"])
def test_angelslim_schedule(n, decay):
    config = StemConfig.preset("angelslim", decay=float(Fraction(decay)))
    assert stem.block_budget(n, config).tolist() == oracles.three_regime_schedule(n, Fraction(decay))


@pytest.mark.parametrize("n", LENGTHS)
def test_hpc_ops_schedule_is_constant_by_default(n):
    assert stem.block_budget(n, StemConfig.preset("hpc_ops")).tolist() == oracles.three_regime_schedule(n, Fraction(1))


def test_schedules_at_every_length_differ_only_where_the_exact_value_is_an_integer():
    """floor() of a float may fall to either side there; elsewhere float64 and exact arithmetic agree."""
    for n in range(1, 700, 7):
        for preset, schedule in (("paper", oracles.paper_schedule), ("angelslim", oracles.three_regime_schedule)):
            budget = stem.block_budget(n, StemConfig.preset(preset)).tolist()
            above = schedule(n, decay=Fraction(7, 10) + Fraction(1, 10**9))
            below = schedule(n, decay=Fraction(7, 10) - Fraction(1, 10**9))
            assert all(low <= kept <= high for low, kept, high in zip(below, budget, above, strict=True))


def test_regime_switches():
    def first(n):
        return int(stem.block_budget(n, StemConfig.preset("angelslim", decay=1.0)).max())

    assert [first(n) for n in (55, 56, 159, 160)] == [55, 41, 61, 46]


# tokens: percent of the causal block pairs, forced blocks inside the budget - added to it (paper.md, section 1.6)
DENSITIES = {
    "angelslim": {
        4: (100, 100), 8: (80.8, 88.4), 16: (59.6, 66.4), 32: (32.9, 37.8), 64: (25.0, 27.6), 128: (20.7, 22.0),
        256: (18.5, None), 1024: (16.9, None),
    },
    "hpc_ops": {
        4: (100, 100), 8: (87.8, 95.0), 16: (67.3, 74.0), 32: (38.3, 43.1), 64: (29.1, 31.7), 128: (24.1, 25.5),
        256: (21.5, None), 1024: (19.7, None),
    },
    "paper": {
        4: (91.7, 99.4), 8: (85.7, 92.9), 16: (55.2, 62.7), 32: (31.3, 36.2), 64: (16.7, 19.4), 128: (15.9, 17.3),
        256: (16.0, None), 1024: (16.0, None),
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("preset", "kilotokens"), [(preset, length) for preset, row in DENSITIES.items() for length in row]
)
def test_density_table(preset, kilotokens):
    inside, added = DENSITIES[preset][kilotokens]
    n = kilotokens * 8
    budget = stem.block_budget(n, StemConfig.preset(preset)).tolist()
    assert round(100 * sum(budget) / causal_pairs(n), 1) == inside
    if added is not None:  # eight forced blocks that the scores never chose, where the row has them
        assert round(100 * sum(min(i + 1, kept + 8) for i, kept in enumerate(budget)) / causal_pairs(n), 1) == added


@pytest.mark.parametrize("n", [64, 65, 100, 257, 1000])
@pytest.mark.parametrize("decay", [0.5, 0.6, 0.7, 0.85, 0.99, 1.0])
def test_realised_density_is_the_requested_one(n, decay):
    for density in (0.05, 0.1, 0.16, 0.25, 0.31, 0.5, 0.77, 0.95, 1.0):
        budget = stem.block_budget(n, StemConfig(density=density, decay=decay))
        assert abs(int(budget.sum()) / causal_pairs(n) - density) <= 0.01


@pytest.mark.parametrize(
    "settings",
    [dict(decay_from="k_start"), dict(allocation="uniform"), dict(dense_last_blocks=3), dict(dense_first_blocks=3)],
    ids=lambda settings: next(iter(settings)),
)
def test_realised_density_with_other_shapes(settings):
    for density in (0.15, 0.3, 0.6, 1.0):
        budget = stem.block_budget(96, StemConfig(density=density, **settings))
        assert abs(int(budget.sum()) / causal_pairs(96) - density) <= 0.01


def test_density_one_keeps_everything():
    for n in (1, 2, 3, 17, 64, 129):
        assert stem.block_budget(n, StemConfig(density=1.0)).tolist() == list(range(1, n + 1))


@pytest.mark.parametrize("name", ["paper", "angelslim", "hpc_ops", None])
@pytest.mark.parametrize("n", [1, 3, 56, 200])
def test_every_row_keeps_between_one_block_and_all_of_its_past(name, n):
    config = StemConfig.preset(name) if name else StemConfig(density=0.05, sink_blocks=20)
    budget = stem.block_budget(n, config)
    assert budget.dtype == torch.int32 and budget.device.type == "cpu" and budget.shape == (n,)
    assert (budget >= 1).all() and (budget <= torch.arange(1, n + 1)).all()


def test_k_start_in_blocks_and_as_a_share():
    n, decay = 40, Fraction(1, 2)
    expected = [max(1, min(i, math.floor(10 - 10 * (1 - decay) / n * i))) for i in range(1, n + 1)]
    assert stem.block_budget(n, StemConfig(k_start=10, decay=0.5)).tolist() == expected
    assert stem.block_budget(n, StemConfig(k_start=0.25, decay=0.5)).tolist() == expected
    one_block, everything = StemConfig(k_start=1, decay=1.0), StemConfig(k_start=1.0, decay=1.0)
    for config in (one_block, everything, one_block):  # equal as dictionary keys, so a cache must not mix them up
        assert int(stem.block_budget(n, config)[-1]) == (1 if config is one_block else n)


def test_a_k_start_beyond_the_length_is_everything():
    assert stem.block_budget(6, StemConfig(k_start=100, decay=1.0)).tolist() == [1, 2, 3, 4, 5, 6]


def test_the_budget_of_a_prompt_does_not_depend_on_its_length_when_k_start_is_constant():
    config = StemConfig(k_start=5, decay=1.0)
    assert torch.equal(stem.block_budget(64, config)[:20], stem.block_budget(20, config))


def test_decay_spends_most_on_early_rows():
    flat, decayed = (stem.block_budget(256, StemConfig(density=0.25, decay=decay)) for decay in (1.0, 0.5))
    assert (decayed[:100] >= flat[:100]).all() and (decayed[200:] < flat[200:]).all()
    assert abs(int(flat.sum() - decayed.sum())) <= 1


def test_the_budget_is_on_the_cpu_whatever_the_default_device():
    with torch.device("meta"):
        assert stem.block_budget(5, StemConfig(k_start=2)).tolist() == [1, 1, 1, 1, 1]


def test_dense_last_blocks_keep_everything():
    budget = stem.block_budget(50, StemConfig(k_start=4, dense_last_blocks=3))
    assert budget[-3:].tolist() == [48, 49, 50] and budget[-4] < 5


def test_dense_first_blocks_keep_everything():
    budget = stem.block_budget(50, StemConfig(k_start=4, dense_first_blocks=9))
    assert budget[:9].tolist() == list(range(1, 10))
    assert budget[9:].tolist() == stem.block_budget(50, StemConfig(k_start=4))[9:].tolist()


@pytest.mark.parametrize("density", [0.3, 0.5])
def test_dense_first_blocks_are_inside_a_density(density):
    budget = stem.block_budget(50, StemConfig(density=density, dense_first_blocks=20))
    assert budget[:20].tolist() == list(range(1, 21))
    assert int(budget.sum()) == round(density * 50 * 51 / 2)


def test_adaptive_budgets_are_the_bound():
    config = StemConfig(allocation="adaptive", threshold=0.1)
    assert stem.block_budget(5, config).tolist() == [1, 2, 3, 4, 5]


def test_causal_pairs_are_counted():
    assert causal_pairs(7) == sum(1 for i in range(7) for j in range(7) if j <= i)


@pytest.mark.parametrize("decay", [0.5, 0.7, 1.0])
def test_costs_of_the_paper_approximate_the_exact_count(decay):
    n, k = 2000, 200
    exact = sum(max(1, min(i, math.floor(k - k * (1 - decay) / n * i))) for i in range(1, n + 1))
    assert decay_cost(n, k, decay) == pytest.approx(exact, rel=0.04)
    if decay == 1.0:
        assert decay_cost(n, k, decay) == uniform_cost(n, k)


@pytest.mark.parametrize(
    ("n", "config", "error", "words"),
    [
        (0, StemConfig(), ValueError, "num_kv_blocks.*>= 1.*0"),
        (-3, StemConfig(), ValueError, "num_kv_blocks.*>= 1.*-3"),
        (8.0, StemConfig(), TypeError, "num_kv_blocks.*int.*8.0"),
        (True, StemConfig(), TypeError, "num_kv_blocks.*int.*True"),
        (8, {"density": 0.5}, TypeError, "config.*StemConfig.*density"),
        (8, None, TypeError, "config.*StemConfig.*None"),
    ],
    ids=["zero", "negative", "float", "bool", "dict", "none"],
)
def test_bad_input(n, config, error, words):
    with pytest.raises(error, match=words):
        stem.block_budget(n, config)


def test_min_blocks_is_a_floor_under_a_density():
    asked = StemConfig(density=0.1, decay=1.0)
    assert stem.block_budget(64, asked).max() < 20
    assert stem.block_budget(64, asked.replace(min_blocks=20)).tolist() == [min(i + 1, 20) for i in range(64)]


@pytest.mark.parametrize(
    "config",
    [
        StemConfig(),
        StemConfig(density=0.1),
        StemConfig(k_start=3, decay=1.0, sink_blocks=1, local_blocks=2),
        StemConfig(k_start=3, sink_blocks=0, local_blocks=0),
        StemConfig(k_start=1, sink_blocks=0, local_blocks=0),
        StemConfig(density=1.0),
        StemConfig.preset("paper"),
        StemConfig.preset("hpc_ops"),
        StemConfig.preset("hpc_ops", k_start=2),
    ],
    ids=str,
)
def test_scored_rows_are_those_where_other_scores_select_other_blocks(config):
    for nk, nq in ((1, 1), (4, 4), (8, 8), (9, 3), (20, 20), (40, 7), (60, 60)):
        budget = block_budget(nk, config)
        future = torch.ones(nq, nk, dtype=torch.bool).triu(nk - nq + 1)
        scores = torch.randn(1, 64, nq, nk).masked_fill(future, -torch.inf)
        mask = select_blocks(scores, budget, config, impl="torch").to_mask()
        differ = (mask != mask[:, :1]).any(-1).any(1)[0].nonzero().flatten().tolist()
        expected = range(differ[0], differ[-1] + 1) if differ else range(0)
        assert scored_rows(BlockRows(nk - nq, nk, nk, nk), config) == expected, (nk, nq)


def test_scores_matter_to_a_threshold():
    config = StemConfig(allocation="adaptive", threshold=0.1, dense_first_blocks=4)
    assert [bool(scored_rows(BlockRows(0, n, n, n), config)) for n in (4, 5)] == [False, True]


@pytest.mark.parametrize("budget", [dict(k_start=4), dict(density=0.5), dict(allocation="adaptive", threshold=1.0)])
def test_short_prompts_keep_everything(budget):
    config = StemConfig(block_size=16, sink_blocks=1, local_blocks=1, dense_up_to=160, **budget)
    assert block_budget(10, config).tolist() == list(range(1, 11))
    for tokens, dense in ((150, True), (160, True), (161, False)):
        rows = BlockRows.of(tokens, tokens, 16)
        assert keeps_every_block(rows, config) is dense and bool(scored_rows(rows, config)) is not dense
    q = torch.randn(1, 1, 161, 8, device=DEVICE)
    for impl in ("torch", "triton"):
        for prompt in (150, 161):  # the chunks of a prompt are dense if it is
            of = [
                stem.stem_attention(x, y, y, config, impl=impl, prompt_length=prompt, return_selection=True)[1]
                for x, y in ((q[:, :, :96],) * 2, (q[:, :, 96:prompt], q[:, :, :prompt]))
            ]
            whole = stem.stem_attention(*(q[:, :, :prompt],) * 3, config, impl=impl, return_selection=True)[1]
            assert (whole.density() == 1) is (prompt == 150)
            lists = torch.cat([selection.kv_num_blocks for selection in of], 2)
            assert torch.equal(lists, whole.kv_num_blocks)


@pytest.mark.parametrize(
    ("config", "first", "stop", "expected"),
    [
        (StemConfig.preset("paper"), 0, 12, 9),  # floor(12 - 0.3 r) reaches r up to row 9
        (StemConfig.preset("paper"), 7, 12, 2),
        (StemConfig.preset("paper"), 10, 12, 0),
        (StemConfig(k_start=1, dense_first_blocks=4, dense_last_blocks=2), 0, 12, 4),
        (StemConfig.preset("angelslim"), 0, 12, 12),
        (StemConfig.preset("adaptive", dense_up_to=0, dense_first_blocks=5), 3, 12, 2),
        (StemConfig.preset("adaptive", dense_up_to=0, dense_first_blocks=5), 6, 12, 0),
        (StemConfig.preset("adaptive"), 3, 12, 9),
    ],
)
def test_rows_that_keep_everything(config, first, stop, expected):
    assert full_rows(BlockRows(first, stop, 12, 12), config) == expected


def test_rows_of_a_chunk():
    rows = BlockRows.of(q_len=50, kv_len=150, block_size=16, prompt_length=200)
    assert rows == (6, 10, 13, 13)
    config = StemConfig(k_start=5, decay=0.5, dense_last_blocks=2)
    assert rows.budget(config).tolist() == block_budget(13, config)[:10].tolist()
    assert rows.at_the_end(config).dense_last_blocks == 0
    config = StemConfig(reduction="softmax", dense_last_blocks=4, exact_last_blocks=5)
    here = rows.at_the_end(config)
    assert (here.dense_last_blocks, here.exact_last_blocks) == (1, 2)
    here = BlockRows.of(50, 150, 16, 196).at_the_end(config)  # the thirteenth block holds 4 of its 16 tokens
    assert (here.dense_last_blocks, here.exact_last_blocks) == (1, 3)
    assert BlockRows.of(50, 150, 16).at_the_end(config) is config

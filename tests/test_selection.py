"""Selection against a loop over rows, and BlockSelection's conversions."""

import oracles
import pytest
import torch
from devices import on_its_device

import stem
from stem import BlockSelection, StemConfig

select_blocks = on_its_device(stem.select_blocks)

IMPLS = ("torch", "triton")
INF = float("inf")


def causal_scores(batch, heads, nq, nk):
    return oracles.hide_future(torch.randn(batch, heads, nq, nk))


def lists(selection):
    """[B][Hq][nq] lists of kept blocks, read the way a kernel reads them."""
    counts = selection.kv_num_blocks
    rows = torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist()
    return [selection.kv_indices[b, h, r, : counts[b, h, r]].tolist() for b, h, r in rows]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("forced", ["inside", "on_top"])
@pytest.mark.parametrize(
    ("sink", "local", "budget"),
    [(4, 4, 0.3), (4, 4, 3), (0, 0, 2), (1, 0, 1), (0, 5, 0.5), (20, 2, 7), (2, 20, 7), (30, 30, 0.2)],
    ids=lambda value: str(value),
)
def test_rows_match_the_definition(sink, local, budget, forced, impl):
    config = StemConfig(block_size=16, k_start=budget, sink_blocks=sink, local_blocks=local, forced=forced)
    rows = stem.block_budget(17, config)
    scores = causal_scores(1, 2, 7, 17)
    selection = select_blocks(scores, rows, config, impl=impl)
    expected = oracles.selection_mask(scores, rows, sink, local, on_top=forced == "on_top")
    assert torch.equal(selection.to_mask(), expected)
    assert lists(selection) == [row.nonzero().flatten().tolist() for row in expected.flatten(0, 2)]


@pytest.mark.parametrize("impl", IMPLS)
def test_a_budget_smaller_than_the_forced_set_is_spent_from_the_ends(impl):
    """Diagonal, sink 0, diagonal - 1, sink 1, ...: the order of design.md's priorities, by hand for row 9."""
    expected = {1: [9], 2: [0, 9], 3: [0, 8, 9], 4: [0, 1, 8, 9], 5: [0, 1, 7, 8, 9], 6: [0, 1, 2, 7, 8, 9]}
    for budget, kept in expected.items():
        config = StemConfig(block_size=16, k_start=budget, decay=1.0, sink_blocks=4, local_blocks=4)
        selection = select_blocks(torch.randn(1, 1, 1, 10), stem.block_budget(10, config), config, impl=impl)
        assert lists(selection) == [kept]


def test_requested_density_is_realised_whatever_is_forced():
    for sink, local in ((0, 1), (4, 4), (40, 40)):
        config = StemConfig(block_size=16, density=0.2, sink_blocks=sink, local_blocks=local)
        selection = select_blocks(causal_scores(1, 1, 64, 64), stem.block_budget(64, config), config)
        assert selection.density() == pytest.approx(0.2, abs=0.01)


def test_forced_on_top_costs_more_than_requested():
    config = StemConfig(block_size=16, density=0.2, forced="on_top")
    selection = select_blocks(causal_scores(1, 1, 64, 64), stem.block_budget(64, config), config)
    assert selection.density() > 0.25


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("row", "kept"),
    [
        ([1.0, 1.0, 1.0, 1.0, 1.0, 1.0], [0, 1, 5]),
        ([0.0, -0.0, 0.0, -0.0, 0.0, 9.0], [0, 1, 5]),
        ([-0.0, 0.0, 1.0, -0.0, 0.0, 9.0], [0, 2, 5]),
        ([float("nan"), 1.0, float("nan"), 0.5, 0.0, 9.0], [1, 3, 5]),
        ([float("nan")] * 6, [0, 1, 5]),
        ([-INF, -INF, -3e38, -INF, -INF, -INF], [0, 2, 5]),
        ([INF, 3e38, INF, 0.0, 0.0, 0.0], [0, 2, 5]),
        ([1e-45, 0.0, -1e-45, 0.0, 0.0, 0.0], [0, 1, 5]),
    ],
    ids=["equal", "signed-zeros", "zeros-behind-one", "nan", "all-nan", "minus-inf", "inf", "denormal"],
)
def test_ties_and_special_values(row, kept, impl):
    config = StemConfig(block_size=16, k_start=3, decay=1.0, sink_blocks=0, local_blocks=1)
    scores = torch.tensor(row).view(1, 1, 1, 6)
    selection = select_blocks(scores, stem.block_budget(6, config), config, impl=impl)
    assert lists(selection) == [kept]


def test_adaptive_keeps_what_exceeds_the_threshold():
    config = StemConfig(block_size=16, allocation="adaptive", threshold=0.05, sink_blocks=1, local_blocks=2)
    scores = 3 * causal_scores(1, 2, 20, 20)
    scores[0, 0, 7, 3] = float("nan")
    kept = select_blocks(scores, stem.block_budget(20, config), config).to_mask()
    for head in range(2):
        for i in range(20):
            shares = scores[0, head, i, : i + 1].nan_to_num(nan=-INF).double().softmax(-1)
            expected = [j == 0 or i - j < 2 or float(shares[j]) > 0.05 for j in range(i + 1)]
            assert kept[0, head, i, : i + 1].tolist() == expected
    assert not kept.triu(1).any()


def random_mask(batch, heads, nq, nk, share=0.4):
    return (torch.rand(batch, heads, nq, nk) < share).tril(nk - nq)


LENGTHS = {"whole": (160, 160), "ragged": (150, 150), "chunk": (70, 150), "unaligned": (97, 160), "one": (1, 150)}


@pytest.mark.parametrize("lengths", LENGTHS)
def test_mask_round_trip(lengths):
    q_len, kv_len = LENGTHS[lengths]
    nq = 5 - (kv_len - q_len) // 32
    mask = random_mask(2, 3, nq, 5)
    selection = BlockSelection.from_mask(mask, 32, q_len=q_len, kv_len=kv_len)
    assert torch.equal(selection.to_mask(), mask)
    assert lists(selection) == [row.nonzero().flatten().tolist() for row in mask.flatten(0, 2)]
    assert selection.kv_indices.dtype == selection.kv_num_blocks.dtype == torch.int32
    unused = torch.arange(selection.kv_indices.shape[-1]) >= selection.kv_num_blocks[..., None]
    assert not selection.kv_indices[unused].any()
    assert (selection.q_len, selection.kv_len, selection.num_q_blocks) == (q_len, kv_len, nq)
    assert selection.density() == pytest.approx(int(mask.sum()) / (6 * sum(range(5 - nq + 1, 6))))
    assert torch.equal(selection.to_token_mask(), oracles.token_mask(mask, 32, q_len, kv_len))


@pytest.mark.parametrize("lengths", LENGTHS)
def test_block_mask_says_the_same(lengths):
    q_len, kv_len = LENGTHS[lengths]
    nq = 5 - (kv_len - q_len) // 32
    mask = random_mask(2, 3, nq, 5)
    selection = BlockSelection.from_mask(mask, 32, q_len=q_len, kv_len=kv_len)
    block_mask = selection.to_block_mask()
    assert torch.equal(block_mask.to_dense()[..., :nq, :5].bool(), mask)
    assert (block_mask.kv_num_blocks <= 1).all()  # partial blocks: the diagonal alone
    front = (kv_len - q_len) % 32
    b, h, row, column = torch.meshgrid(
        torch.arange(2), torch.arange(3), torch.arange(front, front + q_len), torch.arange(kv_len), indexing="ij"
    )
    assert torch.equal(block_mask.mask_mod(b, h, row, column), selection.to_token_mask())


def test_lengths_default_to_whole_blocks():
    selection = BlockSelection.from_mask(random_mask(1, 1, 3, 5), 64)
    assert (selection.q_len, selection.kv_len) == (192, 320)
    config = StemConfig(block_size=64, k_start=2)
    selected = select_blocks(causal_scores(1, 1, 3, 5), stem.block_budget(5, config), config)
    assert (selected.q_len, selected.kv_len, selected.num_kv_blocks) == (192, 320, 5)


def test_an_empty_selection_has_density_zero():
    selection = BlockSelection.from_mask(torch.zeros(1, 1, 4, 4, dtype=torch.bool), 16)
    assert selection.density() == 0.0 and selection.kv_indices.shape[-1] == 1


CONFIG = StemConfig(block_size=16, k_start=2)
SCORES, BUDGET = torch.zeros(1, 1, 3, 5), torch.full((5,), 2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (dict(scores=SCORES.numpy()), TypeError, "scores.*Tensor.*ndarray"),
        (dict(scores=SCORES[0]), ValueError, r"scores.*\[B, Hq, nq, nk\].*\(1, 3, 5\)"),
        (dict(scores=SCORES.mT), ValueError, r"scores.*nq <= nk.*\(1, 1, 5, 3\)"),
        (dict(scores=SCORES.half()), TypeError, "scores.*float32.*float16"),
        (dict(scores=SCORES.int()), TypeError, "scores.*float32.*int32"),
        (dict(budget=[2] * 5), TypeError, "budget.*Tensor.*list"),
        (dict(budget=BUDGET.float()), TypeError, "budget.*integer.*float32"),
        (dict(budget=BUDGET[:3]), ValueError, r"budget.*\[5\].*\(3,\)"),
        (dict(budget=BUDGET - 2), ValueError, "budget.*>= 1.*0"),
        (dict(config=None), TypeError, "config.*StemConfig.*None"),
        (dict(impl="numpy"), ValueError, "impl.*'torch', 'triton'.*'numpy'"),
        (dict(kv_len=100), ValueError, "kv_len.*5 blocks of 16.*100"),
        (dict(q_len=49), ValueError, "q_len.*3 of 5 blocks of 16.*49"),
        (dict(q_len=0), ValueError, "q_len.*3 of 5 blocks of 16.*0"),
        (dict(q_len=90, kv_len=80), ValueError, "q_len.*3 of 5.*90"),
    ],
    ids=[
        "numpy", "3d", "nq>nk", "half", "int", "list", "float-budget", "short-budget", "zero-budget", "no-config",
        "impl", "kv_len", "q_len", "no-query", "q_len>kv_len",
    ],
)  # fmt: skip
def test_bad_input(arguments, error, words):
    with pytest.raises(error, match=words):
        select_blocks(**{"scores": SCORES, "budget": BUDGET, "config": CONFIG, **arguments})


@pytest.mark.parametrize(
    ("mask", "block_size", "lengths", "error", "words"),
    [
        (torch.ones(1, 1, 3, 3), 16, {}, TypeError, "block_mask.*bool.*float32"),
        ([[True]], 16, {}, TypeError, "block_mask.*bool.*list"),
        (torch.ones(3, 3, dtype=torch.bool), 16, {}, ValueError, r"block_mask.*\[B, Hq, nq, nk\].*\(3, 3\)"),
        (torch.ones(1, 1, 3, 3, dtype=torch.bool), 16, {}, ValueError, "block_mask.*future"),
        (torch.eye(3).bool()[None, None], 0, {}, ValueError, "block_size.*>= 1.*0"),
        (torch.eye(3).bool()[None, None], 16, dict(kv_len=64), ValueError, "kv_len.*3 blocks of 16.*64"),
        (torch.eye(3).bool()[None, None], 16, dict(q_len=10), ValueError, "q_len.*3 of 3.*10"),
    ],
    ids=["float", "list", "2d", "future", "block_size", "kv_len", "q_len"],
)
def test_bad_masks(mask, block_size, lengths, error, words):
    with pytest.raises(error, match=words):
        BlockSelection.from_mask(mask, block_size, **lengths)

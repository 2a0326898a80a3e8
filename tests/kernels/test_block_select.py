"""Selection against a loop over rows that sorts."""

import math

import pytest
import torch
from stem.kernels.block_select import empty_lists, select_topk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("poisoned_empty")


def naive_row(scores, q_block, budget, sink_blocks, local_blocks, on_top):
    """Ascending list of the blocks that one row keeps, from the definition."""
    causal = list(range(q_block + 1))
    value = {j: -math.inf if math.isnan(scores[j]) else scores[j] for j in causal}
    by_score = sorted(causal, key=lambda j: (-value[j], j))
    forced_in_order = []
    for rank in range(q_block + 1):
        if rank < max(local_blocks, 1):
            forced_in_order.append(q_block - rank)
        if rank < sink_blocks:
            forced_in_order.append(rank)
    if on_top:
        return sorted(set(by_score[:budget]) | set(forced_in_order))
    return sorted(list(dict.fromkeys(forced_in_order + by_score))[:budget])


def check(scores, budget, sink_blocks, local_blocks, on_top):
    """Compare every row of select_topk with naive_row, and the unused entries with 0."""
    num_q_blocks, num_kv_blocks = scores.shape[2:]
    extra = max(local_blocks, 1) + sink_blocks if on_top else 0
    max_blocks = min(num_kv_blocks, int(budget.max()) + extra)
    kv_indices, kv_num_blocks = select_topk(
        scores.to(DEVICE), budget.to(DEVICE), sink_blocks, local_blocks, on_top, max_blocks
    )
    assert kv_indices.dtype == kv_num_blocks.dtype == torch.int32
    assert kv_indices.shape == (*scores.shape[:3], max_blocks) and kv_num_blocks.shape == scores.shape[:3]
    for batch, head, row in torch.cartesian_prod(*(torch.arange(size) for size in scores.shape[:3])).tolist():
        q_block = num_kv_blocks - num_q_blocks + row
        expected = naive_row(
            scores[batch, head, row].tolist(), q_block, int(budget[row]), sink_blocks, local_blocks, on_top
        )
        count = int(kv_num_blocks[batch, head, row])
        assert kv_indices[batch, head, row, :count].tolist() == expected
        assert not kv_indices[batch, head, row, count:].any()


def causal_scores(*shape):
    """Normal scores, -inf in the future of the last shape[-2] query blocks."""
    num_q_blocks, num_kv_blocks = shape[-2:]
    future = torch.ones(num_q_blocks, num_kv_blocks, dtype=torch.bool).triu(num_kv_blocks - num_q_blocks + 1)
    return torch.randn(*shape).masked_fill(future, float("-inf"))


@pytest.mark.parametrize("on_top", [False, True], ids=["inside", "on_top"])
@pytest.mark.parametrize(("sink_blocks", "local_blocks"), [(0, 0), (4, 4), (1, 3), (5, 1), (40, 2), (2, 40)])
def test_rows_match_the_definition(sink_blocks, local_blocks, on_top):
    budget = torch.randint(1, 36, (33,), dtype=torch.int32)  # some rows ask for more than they have
    check(causal_scores(1, 2, 33, 33), budget, sink_blocks, local_blocks, on_top)


@pytest.mark.parametrize("on_top", [False, True], ids=["inside", "on_top"])
@pytest.mark.parametrize(("num_q_blocks", "num_kv_blocks"), [(1, 1), (1, 63), (3, 129), (17, 17)])
def test_chunks_and_odd_sizes(num_q_blocks, num_kv_blocks, on_top):
    budget = torch.randint(1, num_kv_blocks + 1, (num_q_blocks,), dtype=torch.int32)
    check(causal_scores(2, 1, num_q_blocks, num_kv_blocks), budget, 2, 2, on_top)


@pytest.mark.parametrize("forced", [0, 3])
def test_ties_go_to_the_lower_index(forced):
    scores = causal_scores(1, 1, 40, 40)
    scores = torch.where(scores > float("-inf"), scores.round(), scores)  # a handful of values, and both zeros
    assert (scores == 0).any() and scores[scores == 0].signbit().any()
    check(scores, torch.full((40,), 9, dtype=torch.int32), forced, forced, on_top=False)


def test_special_values_keep_their_order():
    row = [
        0.0,
        -0.0,
        1e-45,
        -1e-45,
        float("inf"),
        float("-inf"),
        float("nan"),
        3.4e38,
        -3.4e38,
        1.0,
        -1.0,
        float("nan"),
    ]
    scores = torch.tensor(row).expand(1, 1, 12, 12).clone()
    for budget in range(1, 13):
        check(scores, torch.full((12,), budget, dtype=torch.int32), 0, 0, on_top=True)
        check(scores, torch.full((12,), budget, dtype=torch.int32), 1, 2, on_top=False)


def test_forced_blocks_outrank_infinite_scores():
    scores = torch.full((1, 1, 6, 6), float("inf"))
    kv_indices, _ = select_topk(
        scores.to(DEVICE), torch.full((6,), 3, dtype=torch.int32, device=DEVICE), 1, 2, False, 3
    )
    assert kv_indices[0, 0, 5].tolist() == [0, 4, 5]


def test_future_scores_are_never_read():
    scores = causal_scores(1, 1, 20, 20)
    leaking = torch.where(scores == float("-inf"), float("inf"), scores)
    check(leaking, torch.full((20,), 25, dtype=torch.int32), 2, 2, on_top=False)


def test_a_row_of_8192_blocks():
    scores = torch.randn(1, 1, 2, 8192)
    check(scores, torch.tensor([1000, 8192], dtype=torch.int32), 4, 4, on_top=False)
    check(scores.round(), torch.tensor([1, 1701], dtype=torch.int32), 4, 4, on_top=True)


def test_non_contiguous_scores_and_budget():
    scores = causal_scores(1, 9, 9, 2)[..., 0][:, None].contiguous()
    strided = torch.stack([scores, scores], dim=-1)[..., 0]
    budget = torch.tensor([3, 7] * 9, dtype=torch.int32)[::2]
    check(strided, budget, 1, 1, on_top=False)


@pytest.mark.parametrize("on_top", [False, True], ids=["inside", "on_top"])
def test_rows_that_are_not_consecutive(on_top):
    scores, budget = torch.randn(1, 2, 21, 40, device=DEVICE), torch.randint(1, 9, (21,), device=DEVICE).int()
    whole = select_topk(scores, budget, 2, 1, on_top, 12)  # of query blocks 19 to 39
    rows = torch.tensor([0, 3, 4, 5, 9, 19, 20], device=DEVICE)
    options = dict(lists=[torch.empty_like(x[:, :, rows]) for x in whole], q_blocks=(rows + 19).int())
    for first in (0, 4):  # some rows at a time
        part = scores[:, :, rows[first:][:4]]
        found = select_topk(part, budget[rows], 2, 1, on_top, 12, first_row=first, **options)
    assert all(torch.equal(x, y[:, :, rows]) for x, y in zip(found, whole, strict=True))


@pytest.mark.parametrize("blocks", [10, 40])
def test_rows_without_scores_keep_everything_or_forced_blocks(blocks):
    scores = torch.randn(2, 3, 8, blocks)
    full, forced = torch.arange(blocks - 7, blocks - 4), torch.tensor([4, 3])
    budget = torch.cat([full, torch.tensor([6, 5, 6]), forced]).int().to(DEVICE)
    expected = select_topk(scores.to(DEVICE), budget, 2, 2, False, blocks - 5)
    lists = empty_lists(2, 3, 8, blocks - 5, scores.to(DEVICE).device)
    found = select_topk(scores[:, :, 3:6].to(DEVICE), budget, 2, 2, False, blocks - 5, lists, 3, written=range(8))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)

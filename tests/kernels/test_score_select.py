"""Scores and selection in one kernel are those of the two kernels."""

import pytest
import torch
from stem.kernels.block_scores import score_blocks
from stem.kernels.block_select import empty_lists, select_topk
from stem.kernels.score_inputs import block_sums, score_inputs
from stem.kernels.score_select import score_select

import stem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("poisoned_empty")


@pytest.mark.parametrize(("on_top", "dtype"), [(False, torch.float32), (True, torch.bfloat16)], ids=str)
@pytest.mark.parametrize(
    ("num_q_heads", "num_kv_heads", "num_queries", "num_keys"),
    [(1, 1, 5, 5), (4, 2, 40, 40), (3, 1, 40, 150)],
)
def test_it_selects_what_two_kernels_select(num_q_heads, num_kv_heads, num_queries, num_keys, on_top, dtype):
    q = torch.randn(1, num_q_heads, num_queries, 16, device=DEVICE).to(dtype)
    k, v = torch.randn(2, 1, num_kv_heads, num_keys, 16, device=DEVICE).to(dtype)
    num_kv_blocks = -(-num_keys // 16)
    num_q_blocks = num_kv_blocks - (num_keys - num_queries) // 16
    budget = torch.randint(1, num_kv_blocks + 1, (num_q_blocks,), dtype=torch.int32, device=DEVICE)
    width = min(num_kv_blocks, int(budget.max()) + (4 if on_top else 0))
    inputs = score_inputs(q, k, v, 16, 8, "log", 0.2)
    expected = select_topk(score_blocks(*inputs, 0.01), budget, 1, 3, on_top, width)
    lists = empty_lists(1, num_q_heads, num_q_blocks, width, q.device)
    found = score_select(*inputs, 0.01, budget, 1, 3, on_top, lists)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("on_top", [False, True])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(150, 150), (70, 150)])
def test_query_blocks_that_keep_everything_need_no_scores(num_queries, num_keys, on_top):
    """Budgets of all causal blocks, whose rows have no sums."""
    q = torch.randn(2, 6, num_queries, 16, device=DEVICE)
    k, v = torch.randn(2, 2, 2, num_keys, 16, device=DEVICE)
    causal = torch.arange(1, 11, dtype=torch.int32, device=DEVICE)[-(10 - (num_keys - num_queries) // 16) :]
    full = len(causal) - 3
    budget = torch.cat([causal[:full], causal[full:] - 2])
    expected = select_topk(score_blocks(*score_inputs(q, k, v, 16, 8, "log", 0.2), 0.01), budget, 1, 2, on_top, 10)
    inputs = score_inputs(q, k, v, 16, 8, "log", 0.2, first_q_block=full)
    lists = empty_lists(2, 6, len(budget), 10, q.device)
    found = score_select(*inputs, 0.01, budget, 1, 2, on_top, lists)
    assert inputs[0].shape[2] == 3
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("value_norm", ["log", "zscore", "zscore_padded"])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(20, 20), (20, 45)])
def test_score_inputs_are_the_sums_and_the_value_term(num_queries, num_keys, value_norm):
    q, k, v = (
        torch.randn(2, heads, n, 24, device=DEVICE) for heads, n in ((4, num_queries), (2, num_keys), (2, num_keys))
    )
    config = stem.StemConfig(block_size=16, score_stride=4, value_norm=value_norm)
    q_sums, k_sums, value_bonus = score_inputs(q, k, v, 16, 4, value_norm, 0.3)
    assert torch.equal(q_sums, block_sums(q, 16, 4, reverse=True, offset=num_keys - num_queries))
    assert torch.equal(k_sums, block_sums(k, 16, 4, reverse=False))
    expected = 0.3 * stem.scores.value_term(v.cpu().double(), config)
    torch.testing.assert_close(value_bonus.cpu().double(), expected, rtol=1e-5, atol=1e-5)
    some, *_ = score_inputs(q, k, v, 16, 4, value_norm, 0.3, num_q_blocks=1)
    assert torch.equal(some, q_sums[:, :, :1])
    some, *_ = score_inputs(q, k, v, 16, 4, value_norm, 0.3, first_q_block=1)
    assert torch.equal(some, q_sums[:, :, 1:])


@pytest.mark.parametrize("value_norm", ["log", "zscore"])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(190, 190), (100, 190)])
def test_only_rows_and_key_blocks_that_scores_decide_about_are_read(num_queries, num_keys, value_norm):
    """The first rows keep everything, the last ones forced blocks only; forced key blocks have no sums."""
    q = torch.randn(2, 6, num_queries, 16, device=DEVICE)
    k, v = torch.randn(2, 2, 2, num_keys, 16, device=DEVICE)
    first = (num_keys - num_queries) // 16
    budget = torch.tensor([1, 2, 3, 4, 5, 6, 7, 6, 6, 5, 3, 3], dtype=torch.int32, device=DEVICE)[first:]
    scored, read = range(7 - first, 10 - first), range(1, 8)
    everything = score_inputs(q, k, v, 16, 8, value_norm, 0.2)
    expected = select_topk(score_blocks(*everything, 0.01), budget, 1, 2, False, 7)
    inputs = score_inputs(q, k, v, 16, 8, value_norm, 0.2, scored.start, len(scored), kv_blocks=read)
    assert torch.equal(inputs[0], everything[0][:, :, scored])
    assert torch.equal(inputs[2][:, :, read], everything[2][:, :, read])
    lists = empty_lists(2, 6, len(budget), 7, q.device)
    found = score_select(*inputs, 0.01, budget, 1, 2, False, lists, scored.start)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)

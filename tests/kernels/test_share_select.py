"""Selection by share: the kernel keeps what the definition says, row by row."""

import pytest
import torch
from stem.kernels import cell_pairs as cell_kernels
from stem.kernels.cell_scores import Cells, cell_scores
from stem.kernels.share_select import pool_select, select_above

from stem import StemConfig, block_budget, select_blocks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def keep_above(scores, threshold, sink_blocks, local_blocks, dense_first_blocks, dense_last_blocks):
    """Block mask from the definition, one row at a time."""
    nq, nk = scores.shape[-2:]
    mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    for row in range(nq):
        q_block = nk - nq + row
        shares = scores[..., row, : q_block + 1].nan_to_num(nan=-torch.inf, neginf=-torch.inf).double().softmax(-1)
        mask[..., row, : q_block + 1] = shares > threshold
        mask[..., row, q_block - min(q_block, max(local_blocks, 1) - 1) : q_block + 1] = True
        mask[..., row, : min(sink_blocks, q_block + 1)] = True
        if q_block < dense_first_blocks or row >= nq - dense_last_blocks:
            mask[..., row, : q_block + 1] = True
    return mask


RULES = [(0.05, (1, 1, 0, 0)), (0.2, (0, 0, 0, 2)), (1.0, (2, 3, 8, 1)), (1e-9, (0, 1, 0, 0))]


@pytest.mark.parametrize("nq, nk", [(1, 1), (5, 5), (3, 9), (17, 40)])
@pytest.mark.parametrize("threshold, rules", RULES)
def test_lists_are_those_of_the_definition(nq, nk, threshold, rules):
    scores = 3 * torch.randn(2, 3, nq, nk, device=DEVICE)
    scores[0, 0, 0, 0] = torch.nan
    expected = keep_above(scores, threshold, *rules)
    kv_indices, kv_num_blocks = select_above(scores, threshold, *rules)
    assert torch.equal(kv_num_blocks.long(), expected.sum(-1))
    for index in torch.cartesian_prod(*map(torch.arange, (2, 3, nq))).tolist():
        count = int(kv_num_blocks[*index])
        assert kv_indices[*index, :count].tolist() == expected[*index].nonzero()[:, 0].tolist()
        assert not kv_indices[*index, count:].any()


@pytest.mark.parametrize("dense", [(0, 0), (0, 3), (5, 0)])
def test_both_implementations_of_select_blocks_agree(dense):
    scores = 2 * torch.randn(1, 4, 12, 12, device=DEVICE)
    config = StemConfig(
        block_size=16, score_stride=4, allocation="adaptive", threshold=0.08, sink_blocks=1, local_blocks=2
    )
    config = config.replace(dense_first_blocks=dense[0], dense_last_blocks=dense[1])
    budget = block_budget(12, config)
    torch_mask, triton_mask = (
        select_blocks(scores, budget, config, impl=impl).to_mask() for impl in ("torch", "triton")
    )
    assert torch.equal(torch_mask, triton_mask)
    assert 0 < int((~torch_mask).sum())


WHOLE, CHUNK, LONG = (120, 120), (43, 123), (48, 528)  # the last row of LONG is the first with all 64 lanes
PEAKS, MEANS = (1, 0.3, True), (2, 0.0, False)  # stride, peak, rms
CELLS_ALONE, EXACT_END, EXACT = (False, 1, 0), (True, 0, 2), (True, 1, 99)  # weighted, dense_last, exact_last
PAIRS = [(WHOLE, PEAKS, CELLS_ALONE), (CHUNK, MEANS, CELLS_ALONE), (WHOLE, MEANS, EXACT_END)]
PAIRS += [(CHUNK, PEAKS, EXACT_END), (WHOLE, PEAKS, EXACT), (CHUNK, MEANS, EXACT)]  # each beside each
PAIRS += [(LONG, MEANS, CELLS_ALONE)]


@pytest.mark.parametrize("lengths, features, ends", PAIRS)
def test_pooling_and_selecting_at_once_is_one_after_the_other(lengths, features, ends, monkeypatch):
    (q_len, kv_len), (stride, peak, rms), (weighted, dense_last, exact_last) = lengths, features, ends
    monkeypatch.setattr(cell_kernels, "BUFFER_BYTES", 1024)  # some rows at a time
    q, k = torch.randn(2, 2, q_len, 16, device=DEVICE), torch.randn(2, 1, kv_len, 16, device=DEVICE)
    cells = Cells(16, query_cells=4, key_cells=2, stride=stride, peak=peak, rms=rms, q_len=q_len, kv_len=kv_len)
    bonus = 4 * torch.rand(2, 1, cells.num_kv_blocks, device=DEVICE) if weighted else None
    rules = 0.08, 1, 2, 3, dense_last
    expected = select_above(cell_scores(q, k, bonus, cells, 0.5, exact_last), *rules)
    found = pool_select(q, k, bonus, cells, 0.5, *rules, exact_last)
    kept = int(found[1].sum())
    assert q_len // 16 * 4 < kept < 4 * cells.num_q_blocks * cells.num_kv_blocks
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b)

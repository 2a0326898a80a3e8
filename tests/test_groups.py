"""Lists that the query heads of a group share: which blocks they keep, and who takes them."""

import oracles
import pytest
import torch

import stem
from stem import StemConfig
from stem.budget import BlockRows
from stem.choose import choose_scores
from stem.planning import plan_for, select

CONFIGS = {
    "mean": StemConfig(
        block_size=16, score_stride=4, density=0.6, decay=1.0, sink_blocks=1, local_blocks=1, value_weight=0.5
    ),
    "softmax": StemConfig(
        block_size=16, score_stride=4, density=0.6, decay=1.0, sink_blocks=1, local_blocks=1, reduction="softmax"
    ),
    "adaptive": StemConfig.preset("adaptive", block_size=16, threshold=0.1, dense_up_to=0),
}


def draw(q_heads=4, kv_heads=2, q_len=150, kv_len=150, batch=1):
    q, k, v = (
        torch.randn(batch, heads, n, 16) for heads, n in ((q_heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len))
    )
    return 2 * q, k, v


def chosen(q, k, v, config, impl):
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    return select(*(x.to(device) for x in (q, k, v)), config, None, impl).to_mask().cpu()


def corner_shares(q, k, config):
    """Shares of blocks [Hkv, nq, nk] by loops: corners of cells over the queries of all heads of a group."""
    size, cells, peak, group = config.block_size, config.score_cells, config.score_peak, q.shape[1] // k.shape[1]
    cell, q_start, kv_len = size // cells, k.shape[2] - q.shape[2], k.shape[2]
    first, nk = q_start // size, -(-kv_len // size)
    shares = torch.zeros(k.shape[1], nk - first, nk, dtype=torch.float64)

    def corners(rows):  # [rows, D] -> upper and lower
        mean = rows.mean(0)
        return mean + peak * (rows.amax(0) - mean), mean + peak * (rows.amin(0) - mean)

    for head in range(k.shape[1]):
        queries, keys = q[0, head * group : (head + 1) * group].double(), k[0, head].double()
        k_corners = [corners(keys[start : start + cell]) for start in range(0, kv_len, cell)]
        for block in range(first, nk):
            of_cells = []
            for start in range(block * size, min((block + 1) * size, kv_len), cell):
                rows = range(max(start, q_start), min(start + cell, kv_len))
                if not rows:
                    continue
                upper, lower = corners(queries[:, rows.start - q_start : rows.stop - q_start].flatten(0, 1))
                upper, lower = upper.clamp_min(0), lower.clamp_max(0)
                seen = k_corners[: (rows.stop - 1) // cell + 1]
                weights = torch.stack([(upper @ a + lower @ b) * q.shape[3] ** -0.5 for a, b in seen]).softmax(0)
                of_cells.append([weights[i * cells : (i + 1) * cells].sum() for i in range(nk)])
            pooled = torch.tensor(of_cells, dtype=torch.float64).square().mean(0).sqrt()
            shares[head, block - first] = pooled / pooled.sum()
    return shares


def group_scores(q, k, v, config):
    """Scores [B, Hkv, nq, nk] that decide about the blocks of a group; without a peak, those of its mean query."""
    if not config.score_peak:
        return stem.block_scores(q.double().unflatten(1, (k.shape[1], -1)).mean(2), k.double(), v.double(), config)
    shares, exact = corner_shares(q, k, config), 2  # a last block that is less than half full, and the one before
    nk = shares.shape[2]
    begin = (nk - exact) * config.block_size - (k.shape[2] - q.shape[2])
    logits = q[:, :, begin:].double() @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).double().mT
    positions = torch.arange(k.shape[2] - logits.shape[2], k.shape[2])
    logits = logits.masked_fill(torch.arange(k.shape[2]) > positions[:, None], -torch.inf) * q.shape[3] ** -0.5
    for row in range(nk - exact, nk):
        rows = logits[0, :, positions // config.block_size == row].softmax(-1)  # [Hq, queries, keys]
        of_blocks = torch.stack([x.sum(-1) for x in rows.split(config.block_size, -1)], -1)
        of_heads = of_blocks.square().mean(1).sqrt()
        of_heads /= of_heads.sum(-1, keepdim=True)
        shares[:, row - nk] = of_heads.unflatten(0, (k.shape[1], -1)).mean(1)
    return shares[None]


def expected_mask(q, k, v, config):
    """Blocks by the scores of pooled queries: above the threshold, or the best of each row's budget."""
    shares, groups = group_scores(q, k, v, config), k.shape[1]
    nq, nk = shares.shape[2:]
    mask = torch.zeros_like(shares, dtype=torch.bool)
    budget = stem.block_budget(nk, config) if config.threshold is None else None
    for row in range(nq):
        end = nk - nq + row + 1
        forced = {end - 1, *range(min(config.sink_blocks, end)), *range(max(0, end - config.local_blocks), end)}
        for batch, head in ((b, h) for b in range(q.shape[0]) for h in range(groups)):
            here = shares[batch, head, row, :end]
            if config.threshold is None:
                rest = sorted(set(range(end)) - forced, key=lambda block, here=here: -here[block])
                kept = [*forced, *rest[: max(0, int(budget[nk - nq + row]) - len(forced))]]
            else:
                kept = [*forced, *(here > config.threshold).nonzero().flatten().tolist()]
            mask[batch, head, row, kept] = True
    return mask.repeat_interleave(q.shape[1] // groups, 1)


@pytest.mark.parametrize("impl, lengths", [("torch", (150, 150)), ("torch", (40, 150)), ("triton", (40, 150))])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_group_keeps_the_blocks_of_its_pooled_queries(name, impl, lengths):
    q, k, v = draw(q_len=lengths[0], kv_len=lengths[1])
    config = CONFIGS[name]
    found = chosen(q, k, v, config.replace(lists="group"), impl)
    expected = expected_mask(q, k, v, config)
    assert (found == expected).float().mean() > 0.999  # shares that differ by rounding may change places
    assert (found != chosen(q, k, v, config, "torch")).float().mean() > 0.01


@pytest.mark.parametrize("name", ["mean", "adaptive"])
def test_three_heads_and_a_few_rows_at_a_time(name, monkeypatch):
    monkeypatch.setattr("stem.choose.CHUNK_SCORES", 40)
    q, k, v = draw(q_heads=6, q_len=60)
    config = CONFIGS[name]
    found = chosen(q, k, v, config.replace(lists="group"), "triton")
    assert (found == expected_mask(q, k, v, config)).float().mean() > 0.999


@pytest.mark.parametrize("name", CONFIGS)
def test_attention_is_that_of_the_blocks(name):
    q, k, v = draw(batch=2)
    config = CONFIGS[name].replace(lists="group")
    out, selection = stem.stem_attention(q, k, v, config, return_selection=True)
    expected, _ = oracles.attention(q, k, v, oracles.token_mask(selection.to_mask(), 16, 150, 150))
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_head_alone_keeps_its_own_blocks(name):
    q, k, v = draw(3, 3)
    config = CONFIGS[name]
    own, group = (
        stem.stem_attention(q, k, v, config.replace(lists=x), return_selection=True)[1].to_mask()
        for x in ("head", "group")
    )
    assert (own == group).float().mean() > 0.999


def test_a_block_of_nan_keys_leaves_the_other_scores():
    q, k, v = draw()
    config, rows = CONFIGS["mean"].replace(lists="group"), BlockRows.of(150, 150, 16, None)
    clean = choose_scores(q, k, v, config, rows, 0.25, "torch").to_mask()
    k[0, 0, 100:104] = float("nan")
    found = choose_scores(q, k, v, config, rows, 0.25, "torch").to_mask()
    assert torch.equal(found[:, 2:], clean[:, 2:])  # the other group
    without = [block for block in range(10) if block != 100 // 16]
    assert (found | ~clean)[0, 0, -1, without].all()


def test_gradients_flow_to_the_blocks_of_the_group():
    q, k, v = (x.requires_grad_() for x in draw())
    config = CONFIGS["mean"].replace(lists="group")
    out, selection = stem.stem_attention(q, k, v, config, return_selection=True)
    expected, _ = oracles.attention(q, k, v, oracles.token_mask(selection.to_mask(), 16, 150, 150))
    for one, other in zip(*(torch.autograd.grad(x.sin().sum(), (q, k, v)) for x in (out, expected)), strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-4, atol=1e-5)


def test_where_nothing_is_chosen_the_option_changes_nothing():
    q, k, v = draw()
    full = StemConfig(block_size=16, density=1.0)
    assert plan_for(q, k, v, full.replace(lists="group")).path == plan_for(q, k, v, full).path == "dense"
    with pytest.raises(ValueError, match="lists must be one of 'head', 'group', got 'groups'"):
        StemConfig(lists="groups")

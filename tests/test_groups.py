"""Lists that the query heads of a group share: which blocks they keep, and who takes them."""

import oracles
import pytest
import torch

import stem
from stem import StemConfig, distributed
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


def expected_mask(q, k, v, config):
    """Blocks by the mean of the heads' softmaxes over scores: above the threshold, or the best of each row's budget."""
    shares = stem.block_scores(q, k, v, config).double().softmax(-1)
    groups = k.shape[1]
    shares = torch.stack([x.mean(1) for x in shares.chunk(groups, dim=1)], dim=1)  # [B, Hkv, nq, nk]
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
def test_a_group_keeps_the_blocks_of_its_mean_shares(name, impl, lengths):
    q, k, v = draw(q_len=lengths[0], kv_len=lengths[1])
    config = CONFIGS[name]
    found = chosen(q, k, v, config.replace(lists="group"), impl)
    expected = expected_mask(q, k, v, config)
    assert (found == expected).float().mean() > 0.999  # shares that differ by rounding may change places
    assert (found != chosen(q, k, v, config, "torch")).float().mean() > 0.01


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
    with pytest.raises(ValueError, match="lists='head' where GPUs share a prompt, got 'group'"):
        distributed.stem_attention(q, k, v, CONFIGS["mean"].replace(lists="group"), mesh=None)

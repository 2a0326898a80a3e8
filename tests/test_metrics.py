"""Metrics against their definitions in float64."""

import oracles
import pytest
import torch

from stem import BlockSelection, metrics

LENGTHS = {"whole": (96, 96), "ragged": (83, 83), "chunk": (32, 96), "unaligned": (41, 83), "one": (1, 83)}


def draw(q_len, kv_len):
    q = torch.randn(2, 4, q_len, 16, dtype=torch.float64)
    return q, *(torch.randn(2, 2, kv_len, 16, dtype=torch.float64) for _ in range(2))


def random_selection(q_len, kv_len):
    nk = -(-kv_len // 32)
    nq = nk - (kv_len - q_len) // 32
    mask = (torch.rand(2, 4, nq, nk) < 0.5).tril(nk - nq)
    return BlockSelection.from_mask(mask, 32, q_len=q_len, kv_len=kv_len)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_block_attention_mass(lengths):
    q, k, v = draw(*LENGTHS[lengths])
    probabilities = oracles.probabilities(q, k)
    mass = metrics.block_attention_mass(q, k, 32)
    torch.testing.assert_close(mass, oracles.block_means(probabilities, 32))
    torch.testing.assert_close(mass.sum(-1), torch.ones_like(mass[..., 0]))
    norms = oracles.repeat_heads(v, 4).norm(dim=-1)[:, :, None]
    torch.testing.assert_close(metrics.block_output_mass(q, k, v, 32), oracles.block_means(probabilities * norms, 32))


@pytest.mark.parametrize("lengths", LENGTHS)
def test_attention_recall(lengths):
    q, k, _ = draw(*LENGTHS[lengths])
    selection = random_selection(*LENGTHS[lengths])
    kept = oracles.block_means(oracles.probabilities(q, k), 32) * selection.to_mask()
    recall = metrics.attention_recall(q, k, selection)
    torch.testing.assert_close(recall, kept.sum(-1).mean(-1))
    nq, nk = kept.shape[-2:]
    everything = BlockSelection.from_mask(
        torch.ones(2, 4, nq, nk).bool().tril(nk - nq), 32, q_len=q.shape[2], kv_len=k.shape[2]
    )
    torch.testing.assert_close(metrics.attention_recall(q, k, everything), torch.ones(2, 4, dtype=torch.float64))


def test_scale_is_that_of_the_softmax():
    q, k, _ = draw(64, 64)
    torch.testing.assert_close(
        metrics.block_attention_mass(2 * q, k, 32), metrics.block_attention_mass(q, k, 32, scale=2 * 16**-0.5)
    )


def test_rel_l2_error():
    dense = torch.tensor([3.0, 4.0])
    assert metrics.rel_l2_error(dense + torch.tensor([0.0, 0.5]), dense) == pytest.approx(0.1)
    assert metrics.rel_l2_error(dense, dense) == 0.0


def test_attention_flops_count_the_pairs():
    mask = torch.ones(5, 5).bool().tril()[None, None]
    assert metrics.attention_flops(BlockSelection.from_mask(mask, 32), 64) == 2 * 160 * 161 * 64
    mask[0, 0, 4, 1:4] = False
    pairs = int(oracles.token_mask(mask, 32, 160, 160).sum())
    assert metrics.attention_flops(BlockSelection.from_mask(mask, 32), 64) == 4 * 64 * pairs


def test_scoring_flops_are_those_of_one_matrix_product():
    assert metrics.scoring_flops(3, 5, 16, 64) == 2 * 3 * 5 * (16 * 64)

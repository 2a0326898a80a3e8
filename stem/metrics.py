"""Measures of a selection: recall, error and cost."""

import torch
from torch import Tensor

from stem.reference import attention_probabilities
from stem.selection import BlockSelection


def block_attention_mass(q: Tensor, k: Tensor, block_size: int, scale: float | None = None) -> Tensor:
    """True attention probability that each query block puts on each key block, averaged over its rows.

    q is [B, Hq, Nq, D], the last Nq positions, k is [B, Hkv, Nkv, D], and query blocks are aligned to the key grid.
    Returns fp32 (fp64 for fp64 inputs) [B, Hq, nq, nk] in [0, 1]; rows sum to 1. Memory O(block_size * Nkv) per head.
    """
    return block_output_mass(q, k, None, block_size, scale)


def block_output_mass(q: Tensor, k: Tensor, v: Tensor | None, block_size: int, scale: float | None = None) -> Tensor:
    """Sum of P_ij * norm(V_j) over each block pair, mean over its rows (Eq. 9; norm 1 without v). Shapes as above."""
    kv_len, offset = k.shape[2], k.shape[2] - q.shape[2]
    first, nk = offset // block_size, -(-kv_len // block_size)
    kv_position = torch.arange(kv_len, device=q.device)
    blocks = []
    for block in range(first, nk):  # one query block at a time
        start, stop = max(block * block_size, offset), min((block + 1) * block_size, kv_len)
        causal = torch.arange(start, stop, device=q.device)[:, None] >= kv_position
        mass, _ = attention_probabilities(q[:, :, start - offset : stop - offset], k, causal, scale)
        if v is not None:
            norms = v.to(mass.dtype).norm(dim=-1).repeat_interleave(q.shape[1] // k.shape[1], 1)  # [B, Hq, Nkv]
            mass = mass * norms[:, :, None]
        mass = torch.nn.functional.pad(mass.mean(2), (0, nk * block_size - kv_len))
        blocks.append(mass.unflatten(-1, (nk, block_size)).sum(-1))
    return torch.stack(blocks, 2)


def attention_recall(q: Tensor, k: Tensor, selection: BlockSelection, scale: float | None = None) -> Tensor:
    """Share of the true attention probability on the kept blocks, mean over query blocks: [B, Hq] in [0, 1]."""
    mass = block_attention_mass(q, k, selection.block_size, scale)
    return (mass * selection.to_mask()).sum(-1).mean(-1)


def rel_l2_error(out: Tensor, dense: Tensor) -> float:
    """norm(out - dense) / norm(dense), in fp64."""
    return float((out.double() - dense.double()).norm() / dense.double().norm())


def attention_flops(selection: BlockSelection, head_dim: int) -> int:
    """Operations of QK^T and PV over the kept token pairs, 4 * head_dim each; the diagonal block is counted half."""
    size, nq = selection.block_size, selection.num_q_blocks
    rows = selection.kv_num_blocks.shape[0] * selection.kv_num_blocks.shape[1] * nq
    full_pairs = int(selection.kv_num_blocks.sum(dtype=torch.int64)) - rows
    return 4 * head_dim * (full_pairs * size**2 + rows * size * (size + 1) // 2)


def scoring_flops(num_q_blocks: int, num_kv_blocks: int, score_stride: int, head_dim: int) -> int:
    """Operations of the factorised score GEMM of one head: 2 * nq * nk * S * D."""
    return 2 * num_q_blocks * num_kv_blocks * score_stride * head_dim

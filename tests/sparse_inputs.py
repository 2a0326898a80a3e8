"""Inputs, lists and oracles of the block-sparse attention kernels."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_inputs(num_q_heads, num_kv_heads, num_queries, num_keys, head_dim, dtype=torch.float32, batch=1):
    """q, k, v as strided views of NaN-filled memory, so that a read outside of them spoils the result."""

    def view(heads, tokens):
        storage = torch.full((batch, tokens + 140, heads, head_dim + 24), float("nan"), dtype=dtype, device=DEVICE)
        x = storage[:, 70 : 70 + tokens, :, :head_dim].transpose(1, 2)  # [B, H, N, D]
        return x.copy_(torch.randn(batch, heads, tokens, head_dim))

    return view(num_q_heads, num_queries), view(num_kv_heads, num_keys), view(num_kv_heads, num_keys)


def random_mask(batch, num_heads, num_queries, num_keys, block_size, diagonal=True, keep=0.5):
    """bool [B, H, nq, nk]: causal, about `keep` of the blocks; every row lists its diagonal, if asked to."""
    num_kv_blocks = -(-num_keys // block_size)
    q_blocks = torch.arange((num_keys - num_queries) // block_size, num_kv_blocks)[:, None]
    kv_blocks = torch.arange(num_kv_blocks)[None, :]
    mask = torch.rand(batch, num_heads, len(q_blocks), num_kv_blocks) < keep
    return (mask | (diagonal & (kv_blocks == q_blocks))) & (kv_blocks <= q_blocks)


def lists_of(mask):
    """kv_indices and kv_num_blocks of a block mask; entries past the count hold what must not be read."""
    counts = mask.sum(-1)
    indices = torch.full(mask.shape, 2**30)
    for row in mask.any(-1).nonzero().tolist():
        indices[tuple(row)][: counts[tuple(row)]] = mask[tuple(row)].nonzero().flatten()
    return indices.int().to(DEVICE), counts.int().to(DEVICE)


def masked_logits(q, k, mask, block_size, scale):
    """[B, Hq, Nq, Nkv] in the dtype of q, -inf where the token mask is False."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    positions = torch.arange(num_keys - num_queries, num_keys)[:, None]
    rows = (positions // block_size - (num_keys - num_queries) // block_size).flatten()
    token_mask = mask.repeat_interleave(block_size, 3)[:, :, rows, :num_keys] & (torch.arange(num_keys) <= positions)
    logits = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * scale
    return logits.masked_fill(~token_mask, float("-inf"))


def oracle(q, k, v, mask, block_size, scale):
    """fp64 out and log-sum-exp; an empty row gives 0 and -inf."""
    q, k, v = (x.cpu().double() for x in (q, k, v))
    logits = masked_logits(q, k, mask, block_size, scale)
    weights = logits.softmax(-1).nan_to_num(0.0)
    return weights @ v.repeat_interleave(q.shape[1] // v.shape[1], 1), logits.logsumexp(-1)


def eager(q, k, v, mask, block_size, scale):
    """Logits and softmax in fp32, the probabilities and the output rounded to the dtype of q."""
    weights = masked_logits(q.cpu().float(), k.cpu().float(), mask, block_size, scale).softmax(-1).nan_to_num(0.0)
    values = v.cpu().float().repeat_interleave(q.shape[1] // v.shape[1], 1)
    return (weights.to(q.dtype).float() @ values).to(q.dtype)


def inputs_with_late_maxima(boost, num_tokens, head_dim, dtype):
    """q, k, v whose keys in the middle have `boost` times the logits of the others, which are around 0."""
    q, k, v = random_inputs(2, 1, num_tokens, num_tokens, head_dim, dtype)
    k[:, :, num_tokens // 2 : num_tokens // 2 + 5] *= boost
    return q, k, v

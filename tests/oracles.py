"""Stem as loops in float64, written from the paper and the descriptions of its two public implementations.

Nothing here imports the library. A test against an oracle compares two independent readings of the sources.
"""

import math
from fractions import Fraction

import torch


def repeat_heads(x, num_q_heads):
    """Repeat each KV head for its Hq / Hkv consecutive query heads: [B, Hkv, ...] -> [B, Hq, ...]."""
    return x.repeat_interleave(num_q_heads // x.shape[1], 1)


def antidiagonal_sums(q, k, block, stride):
    """Sum q_r . k_c over the sampled token pairs of every block pair, pair by pair: float64 [B, Hq, nq, nk].

    A pair is sampled if it lies on the antidiagonal of its cell: r % stride + c % stride == stride - 1. Future blocks
    are summed too.
    """
    products = q.double() @ repeat_heads(k, q.shape[1]).double().mT
    offset = k.shape[2] - q.shape[2]
    row, column = torch.arange(offset, k.shape[2]), torch.arange(k.shape[2])
    products = products * ((row[:, None] % stride + column % stride) == stride - 1)
    first, nk = offset // block, math.ceil(k.shape[2] / block)
    in_row = (row // block == torch.arange(first, nk)[:, None]).double()  # [nq, Nq]
    in_column = (column // block == torch.arange(nk)[:, None]).double()  # [nk, Nkv]
    return in_row @ products @ in_column.T


def log_value_term(v, block):
    """Return max(0, log of the largest value norm in the block), Eq. 7: float64 [B, Hkv, nk]."""
    norms = v.double().norm(dim=-1)
    blocks = range(0, v.shape[2], block)
    return torch.stack([norms[..., start : start + block].amax(-1).log().clamp_min(0) for start in blocks], -1)


def zscored_value_term(v, block, stride, *, padded):
    """Return the mean over a block's stride groups of ReLU(z-score of log(largest norm + 1e-6)): float64 [B, Hkv, nk].

    Mean and unbiased deviation of the z-score are over the groups that hold a token, or over all groups if `padded`.
    """
    norms = v.double().norm(dim=-1)
    nk, per_block = math.ceil(v.shape[2] / block), block // stride
    term = torch.zeros(*v.shape[:2], nk, dtype=torch.float64)
    for b in range(v.shape[0]):
        for h in range(v.shape[1]):
            row = norms[b, h].tolist() + [0.0] * (nk * block - v.shape[2])
            logs = [math.log(max(row[g * stride : (g + 1) * stride]) + 1e-6) for g in range(nk * per_block)]
            sample = logs if padded else logs[: math.ceil(v.shape[2] / stride)]
            mean = sum(sample) / len(sample)
            deviation = math.sqrt(sum((x - mean) ** 2 for x in sample) / (len(sample) - 1))
            for j in range(nk):
                group = range(j * per_block, (j + 1) * per_block)
                scores = [max(0.0, (logs[g] - mean) / deviation) for g in group if g < len(sample)]
                term[b, h, j] = sum(scores) / per_block
    return term


def preset_scores(name, q, k, v, block):
    """Return the block scores of a preset: float64 [B, Hq, nq, nk], -inf in the future."""
    head_dim, stride = q.shape[3], 8 if name == "angelslim" else 16
    sums, samples = antidiagonal_sums(q, k, block, stride), block * block // stride
    if name == "paper":
        routing, term = sums / math.sqrt(head_dim) / samples, 0.2 * log_value_term(v, block)
    elif name == "angelslim":
        cells = (block // stride) ** 2
        routing = sums / (math.sqrt(head_dim) * stride) / cells
        term = 0.2 * zscored_value_term(v, block, stride, padded=False)
    else:
        routing = sums / (block // stride) ** 2
        term = 0.3 * zscored_value_term(v, block, stride, padded=True)
    return hide_future(routing + repeat_heads(term, q.shape[1])[:, :, None])


def softmax_scores(q, k, v, block, stride, cells, value_weight, peak=0.0, power=1):
    """Return the log of each block's share of its row, computed cell by cell: float64 [B, Hq, nq, nk].

    Each row of cells is a softmax. The cells of a query block are pooled by a power mean; cells without a query do not
    count. The logit of a cell pair is the mean of q.k over its antidiagonal samples, corrected for missing tokens. With
    a peak the logit is a product of cell summaries, shifted by the share `peak` from a cell's mean towards its largest
    and smallest value in each dimension.

    Args:
        cells: Number of cells of a query block and of a key block.
        power: Exponent of the power mean, 1 or 2.
    """
    (size, key_size), scale = (block // of for of in cells), 1 / math.sqrt(q.shape[3])
    kv_len, q_start, nk = k.shape[2], k.shape[2] - q.shape[2], math.ceil(k.shape[2] / block)
    first = q_start // block
    k = repeat_heads(k, q.shape[1])
    term = repeat_heads(log_value_term(v, block), q.shape[1])
    scores = torch.full((*q.shape[:2], nk - first, nk), -math.inf, dtype=torch.float64)
    products = q.double() @ k.double().mT
    for i in range(first, nk):
        shares, counted = torch.zeros(*q.shape[:2], nk, dtype=torch.float64), 0
        for start in range(i * block, (i + 1) * block, size):
            queries = range(max(start, q_start), min(start + size, kv_len))
            if not queries:
                continue
            counted += 1
            weights = torch.zeros(*q.shape[:2], nk, dtype=torch.float64)
            for key_start in range(0, queries[-1] + 1, key_size):
                keys = range(key_start, min(key_start + key_size, kv_len))
                sampled = torch.tensor([[(a - start + b - key_start + 1) % stride == 0 for b in keys] for a in queries])
                cell = products[:, :, queries[0] - q_start : queries[-1] + 1 - q_start, keys[0] : keys[-1] + 1]
                logit = (cell * sampled).sum((-2, -1)) * scale * stride / (len(queries) * len(keys))
                if peak:
                    cells_rows = (
                        q[:, :, queries[0] - q_start : queries[-1] + 1 - q_start],
                        k[:, :, keys[0] : keys[-1] + 1],
                    )
                    (q_high, q_low), (k_high, k_low) = (
                        [
                            (1 - peak) * x.double().mean(2) + peak * extreme(x.double(), 2)
                            for extreme in (torch.amax, torch.amin)
                        ]
                        for x in cells_rows
                    )
                    q_high, q_low = torch.where(q_high > 0, q_high, 0), torch.where(q_low < 0, q_low, 0)
                    logit = (q_high * k_high + q_low * k_low).sum(-1) * scale
                weights[..., key_start // block] += (logit + value_weight * term[..., key_start // block]).exp()
            shares += (weights / weights.sum(-1, keepdim=True)) ** power
        shares = (shares / counted) ** (1 / power)
        scores[:, :, i - first] = (shares / shares.sum(-1, keepdim=True)).log()
    return hide_future(scores)


def hide_future(scores):
    """Set -inf where the key block comes after the query block; the rows are the last query blocks."""
    nq, nk = scores.shape[-2:]
    scores = scores.clone()
    for row in range(nq):
        scores[..., row, nk - nq + row + 1 :] = -math.inf
    return scores


def paper_schedule(n, decay=Fraction(7, 10), floor=54):
    """Return the budgets of Eq. 3 in exact arithmetic; k_start is a share of the blocks, at least `floor` blocks."""
    k_start = min(n, max(floor, Fraction(1, 5) * n if n <= 128 else Fraction(1, 10) * n))
    return [max(1, min(i, math.floor(k_start - k_start * (1 - decay) / n * i))) for i in range(1, n + 1)]


def three_regime_schedule(n, decay=Fraction(7, 10)):
    """Return the budgets of the public implementations: constant up to row k, then linear down to decay * k."""
    k = n if n < 56 else n // 5 + 30 if n < 160 else n // 10 + 30
    kept = []
    for row in range(n):
        fall = k * (1 - decay) * Fraction(row - k, max(1, n - k - 1)) if row > k else 0
        kept.append(max(1, min(row + 1, k, math.floor(k - fall))))
    return kept


def row_selection(scores, q_block, budget, sink, local, *, on_top=False):
    """Return the key blocks that one row keeps, ascending; scores is a list, budget, sink and local are in blocks."""
    value = [-math.inf if math.isnan(x) else x for x in scores]
    by_score = sorted(range(q_block + 1), key=lambda j: (-value[j], j))
    forced = []
    for rank in range(q_block + 1):
        forced += [q_block - rank] * (rank < max(local, 1)) + [rank] * (rank < sink)
    if on_top:
        return sorted({*by_score[:budget], *forced})
    return sorted(list(dict.fromkeys(forced + by_score))[:budget])


def selection_mask(scores, budget, sink, local, *, on_top=False):
    """Return `row_selection` of every row as a mask: bool [B, Hq, nq, nk]; budget has an entry for each key block."""
    nq, nk = scores.shape[-2:]
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    for b, h, r in torch.cartesian_prod(*map(torch.arange, scores.shape[:3])).tolist():
        i = nk - nq + r
        mask[b, h, r, row_selection(scores[b, h, r].tolist(), i, int(budget[i]), sink, local, on_top=on_top)] = True
    return mask


def token_mask(block_mask, block, q_len, kv_len):
    """Return the token mask of kept blocks without the future: bool [B, Hq, q_len, kv_len]."""
    first = (kv_len - q_len) // block
    row, column = torch.arange(kv_len - q_len, kv_len), torch.arange(kv_len)
    return block_mask[:, :, row // block - first][..., column // block] & (column <= row[:, None])


def attention(q, k, v, allowed, scale=None):
    """Return attention over the allowed tokens and its log-sum-exp, float64; 0 and -inf in a row without any."""
    q, k, v = q.double(), repeat_heads(k, q.shape[1]).double(), repeat_heads(v, q.shape[1]).double()
    logits = q @ k.mT * (q.shape[3] ** -0.5 if scale is None else scale)
    logits = torch.where(allowed, logits, -math.inf)
    largest = logits.amax(-1, keepdim=True).clamp_min(-1e300)
    weights = torch.exp(logits - largest)
    total = weights.sum(-1, keepdim=True)
    return (weights / total.clamp_min(1e-300)) @ v, (total.log() + largest).squeeze(-1)


def attention_with_stand_ins(q, k, v, block_mask, block, tokens, scale=None):
    """Return attention to the kept blocks and to a mean for every `tokens` tokens of dropped blocks, and its lse.

    Dropped blocks are those before the diagonal that block_mask [B, Hq, nq, nk] does not keep. A mean's logit is raised
    by ln(tokens). The result is float64 and differentiable; rows without any key give 0 and -inf.
    """
    (q_len, heads), kv_len, nk = (q.shape[2], q.shape[1]), k.shape[2], block_mask.shape[3]
    first, allowed = (kv_len - q_len) // block, token_mask(block_mask, block, q_len, kv_len)
    q, k, v = q.double(), repeat_heads(k, heads).double(), repeat_heads(v, heads).double()
    keys, values, visible = [k], [v], [allowed]
    for start in range(0, (nk - 1) * block, tokens):
        keys.append(k[:, :, start : start + tokens].mean(2, keepdim=True))
        values.append(v[:, :, start : start + tokens].mean(2, keepdim=True))
        block_of = torch.arange(kv_len - q_len, kv_len) // block
        dropped = ~block_mask[:, :, block_of - first, start // block] & (start // block < block_of)
        visible.append(dropped[..., None])
    keys, values, visible = torch.cat(keys, 2), torch.cat(values, 2), torch.cat(visible, 3)
    logits = q @ keys.mT * (q.shape[3] ** -0.5 if scale is None else scale)
    logits[..., kv_len:] += math.log(tokens)
    weights = torch.where(visible, logits, -math.inf).clamp_min(-1e300).exp() * visible
    total = weights.sum(-1, keepdim=True)
    return (weights / total.clamp_min(1e-300)) @ values, total.log().squeeze(-1)


def causal(q_len, kv_len):
    """Return the token mask of dense causal attention: bool [q_len, kv_len]."""
    return torch.arange(kv_len) <= torch.arange(kv_len - q_len, kv_len)[:, None]


def constant_rows(pairs, n):
    """Return the widest constant budget of at most `pairs` block pairs; the first rows get one more to use them up."""
    width = max(w for w in range(1, n + 1) if sum(min(i, w) for i in range(1, n + 1)) <= pairs)
    counts = [min(i, width) for i in range(1, n + 1)]
    for row in range(n):
        if sum(counts) < pairs and counts[row] < row + 1:
            counts[row] += 1
    return counts


def probabilities(q, k):
    """Return dense causal attention probabilities: float64 [B, Hq, Nq, Nkv]."""
    logits = q.double() @ repeat_heads(k, q.shape[1]).double().mT * q.shape[3] ** -0.5
    return torch.where(causal(q.shape[2], k.shape[2]), logits, -math.inf).softmax(-1)


def block_means(x, block):
    """Sum over a block's keys and average over its queries, on the key grid: [B, Hq, Nq, Nkv] -> [B, Hq, nq, nk]."""
    q_len, kv_len = x.shape[2:]
    row, column = torch.arange(kv_len - q_len, kv_len) // block, torch.arange(kv_len) // block
    rows = [x[:, :, row == i].mean(2) for i in range(int(row[0]), int(row[-1]) + 1)]
    columns = [torch.stack(rows, 2)[..., column == j].sum(-1) for j in range(int(column[-1]) + 1)]
    return torch.stack(columns, -1)

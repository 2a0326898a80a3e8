"""Correctness gate of the timings: results must agree with an fp64 reference on sampled rows before they are timed."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from stem.config import StemConfig
from stem.scores import routing_scale, value_term
from stem.selection import BlockSelection

# Largest relative L2 error of one sampled row: twice the rounding of the output, and room for float32 sums.
TOLERANCE = {torch.bfloat16: 1.6e-2, torch.float16: 2e-3, torch.float32: 1e-4}
FP8_TOLERANCE = 0.12  # of attention on q, k and v in e4m3, which keeps 4 significant bits
GRADIENT_FACTOR = 2  # times TOLERANCE: a gradient rounds the weights, their gradient and the output
SHARE_ROUNDING = 1.001  # a share this close to the threshold may fall on either side
GUARD_ROWS = 64  # rows of NaN before and after each input
GRADIENT_CHUNK = 1 << 25  # weights that the reference of a gradient holds at a time, 256 MiB in fp64


class WrongResult(AssertionError):
    """Raised when an implementation disagrees with its reference."""


def guarded_normal(size: tuple[int, ...], dtype: torch.dtype, device: str, generator: torch.Generator) -> Tensor:
    """Random normal tensor between two guard bands of NaN, which make reads out of bounds visible."""
    count, guard = torch.Size(size).numel(), GUARD_ROWS * size[-1]
    buffer = torch.full((count + 2 * guard,), float("nan"), dtype=dtype, device=device)
    return buffer[guard : guard + count].normal_(generator=generator).view(size)


@contextmanager
def poisoned_buffers() -> Iterator[None]:
    """Fill uninitialised tensors with NaN (integers: the largest value), which makes missing writes visible."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # only the filling is wanted, not deterministic operators
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def sampled_rows(tokens: int, block_size: int, seed: int = 0, drawn: int = 12) -> Tensor:
    """Query rows to check: both ends, both sides of block boundaries, and random ones; int64 [R], ascending."""
    middle = tokens // 2 // block_size * block_size
    edges = [0, 1, block_size - 1, block_size, middle - 1, middle, tokens - block_size, tokens - 1]
    random = torch.randint(tokens, (drawn,), generator=torch.Generator().manual_seed(seed)).tolist()
    return torch.tensor(sorted({min(max(row, 0), tokens - 1) for row in edges + random}))


def check_output(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    selection: BlockSelection | None = None,
    allowed: float | None = None,
) -> float:
    """Largest relative L2 error of the sampled output rows, int64 [R], against `reference_rows`.

    `out` [B, Hq, N, D] is the output of a whole prompt, Nq = Nkv = N; no selection means dense causal attention.

    Raises:
        WrongResult: If shape or dtype differ from q's, or a row's error is NaN or above `allowed`, by default TOLERANCE
            of the dtype.
    """
    if out.shape != q.shape or out.dtype != q.dtype:
        raise WrongResult(f"output is {out.dtype} {tuple(out.shape)}, expected {q.dtype} {tuple(q.shape)}")
    rows = rows.to(q.device)
    allowed = TOLERANCE[q.dtype] if allowed is None else allowed
    return _within(out[:, :, rows], reference_rows(q, k, v, rows, selection), allowed, "output rows")


def reference_rows(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, selection: BlockSelection | None = None) -> Tensor:
    """Attention of some query rows over the causal keys of their selected blocks, in fp64: [B, Hq, R, D].

    Dropped blocks before a row's block stand in by their means where the selection says so.
    """
    batch, q_heads, tokens, dim = q.shape
    group = q_heads // k.shape[1]
    per_mean = selection.stand_in_tokens if selection else 0
    expected = torch.empty(batch, q_heads, len(rows), dim, dtype=torch.float64, device=q.device)
    for b in range(batch):
        for h in range(q_heads):
            keep = _kept_keys(selection, b, h, rows, tokens)
            keys, values = k[b, h // group].double(), v[b, h // group].double()
            if per_mean:
                keep, keys, values = _with_means(keep, keys, values, rows, selection)
            logits = q[b, h, rows].double() @ keys.T * dim**-0.5  # [R, N + means]
            if per_mean:
                logits[:, tokens:] += math.log(per_mean)
            expected[b, h] = logits.masked_fill(~keep, -torch.inf).softmax(-1) @ values
    return expected


def _with_means(
    keep: Tensor, keys: Tensor, values: Tensor, rows: Tensor, selection: BlockSelection
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [N, D] and the bool mask [R, N], each followed by its part for the stand-ins of whole blocks."""
    size, per_mean = selection.block_size, selection.stand_in_tokens
    whole = (selection.num_kv_blocks - 1) * size
    block = torch.arange(0, whole, per_mean, device=keys.device) // size  # of each stand-in
    dropped = (block < (rows // size)[:, None]) & ~keep[:, block * size]
    k_means, v_means = (x[:whole].unflatten(0, (-1, per_mean)).mean(1) for x in (keys, values))
    return torch.cat([keep, dropped], 1), torch.cat([keys, k_means]), torch.cat([values, v_means])


def check_gradients(
    gradients: tuple[Tensor, Tensor, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    rows: Tensor,
    selection: BlockSelection | None = None,
) -> float:
    """Largest relative L2 error of sampled rows of the last KV head's gradients against `reference_gradients`.

    Errors are relative to the root mean square norm of the sampled rows, because a single row may be zero. `gradients`
    are dq, dk and dv of a whole prompt, and `dout` is the gradient of its output.

    Raises:
        WrongResult: If a shape or dtype is not the input's, or an error is NaN or over GRADIENT_FACTOR * TOLERANCE.
    """
    rows, allowed, errors = rows.to(q.device), GRADIENT_FACTOR * TOLERANCE[q.dtype], []
    expected = reference_gradients(q, k, v, dout, rows, selection)
    for name, gradient, x, exact in zip(("dq", "dk", "dv"), gradients, (q, k, v), expected, strict=True):
        if gradient.shape != x.shape or gradient.dtype != x.dtype:
            raise WrongResult(f"{name} is {gradient.dtype} {tuple(gradient.shape)}, expected that of its input")
        actual = gradient[:, -exact.shape[1] :, rows]
        errors.append(_within(actual, exact, allowed, name, exact.square().sum(-1).mean().sqrt()))
    return max(errors)


def reference_gradients(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, rows: Tensor, selection: BlockSelection | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of sampled rows in fp64, for the last KV head: dq [B, G, R, D], dk and dv [B, 1, R, D]."""
    batch, q_heads, tokens, dim = q.shape
    group, scale = q_heads // k.shape[1], dim**-0.5
    dq = torch.zeros(batch, group, tokens, dim, dtype=torch.float64, device=q.device)
    dk, dv = torch.zeros(2, batch, 1, len(rows), dim, dtype=torch.float64, device=q.device)
    every = torch.arange(tokens, device=q.device)
    for b in range(batch):
        keys, values = k[b, -1].double(), v[b, -1].double()
        for g in range(group):
            h = q_heads - group + g
            for chunk in every.split(max(1, GRADIENT_CHUNK // tokens)):
                keep = _kept_keys(selection, b, h, chunk, tokens)
                queries, arriving = q[b, h, chunk].double(), dout[b, h, chunk].double()
                weights = (queries @ keys.T * scale).masked_fill(~keep, -torch.inf).softmax(-1)
                dweights = arriving @ values.T
                dlogits = weights * (dweights - (weights * dweights).sum(-1, keepdim=True)) * scale
                dq[b, g, chunk] = dlogits @ keys
                dk[b, 0] += dlogits[:, rows].T @ queries
                dv[b, 0] += weights[:, rows].T @ arriving
    return dq[:, :, rows], dk, dv


def check_scores(scores: Tensor, q: Tensor, k: Tensor, v: Tensor, config: StemConfig) -> float:
    """Largest relative L2 error of the middle and the last row of block scores against `reference_score_row`.

    Raises:
        WrongResult: If an error is NaN or above TOLERANCE, or the entries of -inf are not exactly the future blocks.
    """
    nq, nk = scores.shape[-2:]
    future = torch.ones(nq, nk, dtype=torch.bool, device=scores.device).triu(1)
    if not torch.equal(scores.isneginf(), future.expand_as(scores)):
        raise WrongResult("scores must be -inf exactly in the future blocks")
    errors = []
    for i in (nq // 2, nq - 1):
        expected = reference_score_row(q, k, v, config, i)
        errors.append(_within(scores[:, :, i, : i + 1], expected, TOLERANCE[q.dtype], f"scores of row {i}"))
    return max(errors)


def reference_score_row(q: Tensor, k: Tensor, v: Tensor, config: StemConfig, i: int) -> Tensor:
    """Scores of query block i in fp64, summed sample by sample without the factorisation: [B, Hq, i + 1]."""
    size, stride = config.block_size, config.score_stride
    group = q.shape[1] // k.shape[1]
    q_rows, k_rows = q[:, :, i * size : (i + 1) * size], k[:, :, : (i + 1) * size]
    slot = [torch.arange(x.shape[2], device=q.device) % stride for x in (q_rows, k_rows)]
    sampled = slot[0][:, None] + slot[1] == stride - 1  # [rows, keys]
    expected = (config.value_weight * value_term(v.double(), config)[..., : i + 1]).repeat_interleave(group, 1)
    block = torch.arange(k_rows.shape[2], device=q.device) // size
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            products = q_rows[b, h].double() @ k_rows[b, h // group].double().T
            total = (products * sampled).sum(0)  # [keys]
            expected[b, h].index_add_(0, block, total, alpha=routing_scale(q.shape[-1], config))
    return expected


def check_selection(
    selection: BlockSelection, scores: Tensor, budget: Tensor, config: StemConfig, rows: Tensor
) -> float:
    """Check that the sampled rows keep the best-scoring blocks within the budget, forced blocks aside; returns 0.0.

    With a threshold in place of a budget, each dropped block's share of its row must be at most the threshold.

    Raises:
        WrongResult: If a list is not ascending up to its diagonal block, misses the budget or the threshold, or keeps
            a block that scores less than one it drops.
    """
    indices, counts = selection.kv_indices.flatten(0, 1), selection.kv_num_blocks.flatten(0, 1)
    for i in sorted(set((rows // config.block_size).tolist())):
        sink, first_local = min(config.sink_blocks, i + 1), max(0, i + 1 - max(1, config.local_blocks))
        low = int(budget[i]) if config.threshold is None else 1
        high = int(budget[i]) + (sink + i + 1 - first_local if config.forced == "on_top" else 0)
        free = set(range(sink, first_local))  # blocks that only their score can keep
        row_scores = scores[:, :, i].flatten(0, 1).cpu()
        for head, (entries, count) in enumerate(zip(indices[:, i].tolist(), counts[:, i].tolist(), strict=True)):
            kept = entries[:count]
            where = f"selection of head {head}, row {i}"
            if kept != sorted(set(kept)) or not kept or kept[0] < 0 or kept[-1] != i:
                raise WrongResult(f"{where} does not ascend from a past block to the diagonal one: {kept}")
            if not low <= count <= high:
                raise WrongResult(f"{where} keeps {count} blocks, expected {low} to {high}")
            chosen, dropped = sorted(free & set(kept)), sorted(free - set(kept))
            if chosen and dropped and row_scores[head, chosen].min() < row_scores[head, dropped].max():
                raise WrongResult(f"{where} drops a block that scores more than one it keeps")
            if config.threshold is not None and dropped:
                shares = row_scores[head].double().softmax(-1)
                largest, smallest = shares[dropped].max(), shares[chosen].min() if chosen else 1.0
                if not largest / SHARE_ROUNDING <= config.threshold <= smallest * SHARE_ROUNDING:
                    raise WrongResult(
                        f"{where} has threshold {config.threshold:g}, drops a share of {largest:.3g} and keeps one of "
                        f"{smallest:.3g}"
                    )
    return 0.0


def _kept_keys(selection: BlockSelection | None, b: int, h: int, rows: Tensor, tokens: int) -> Tensor:
    """Causal keys in the selected blocks of some rows of a whole prompt: bool [R, N], True = attend."""
    causal = torch.arange(tokens, device=rows.device) <= rows[:, None]
    if selection is None:
        return causal
    q_block = rows // selection.block_size
    indices, counts = selection.kv_indices[b, h, q_block], selection.kv_num_blocks[b, h, q_block]
    unused = torch.arange(indices.shape[-1], device=rows.device) >= counts[:, None]
    keep = torch.zeros(len(rows), selection.num_kv_blocks + 1, dtype=torch.bool, device=rows.device)
    keep.scatter_(1, indices.long().masked_fill(unused, selection.num_kv_blocks), True)
    return causal & keep[:, :-1].repeat_interleave(selection.block_size, 1)[:, :tokens]


def _within(actual: Tensor, expected: Tensor, allowed: float, what: str, size: Tensor | None = None) -> float:
    """Largest L2 error of a row, relative to `size` or the row's own norm; WrongResult if it is over `allowed`."""
    size = expected.norm(dim=-1) if size is None else size
    error = ((actual.double() - expected).norm(dim=-1) / size).max().item()
    if not error <= allowed:  # also catches NaN
        raise WrongResult(f"{what}: relative error {error:.3g} against fp64, at most {allowed:.3g} accepted")
    return error

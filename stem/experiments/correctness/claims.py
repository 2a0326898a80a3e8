"""Claims of notebook 03: each function measures one claim and returns rows.

A row holds claim, case, impl, dtype, error (largest absolute difference), tolerance, passed and seed. `tolerance`
derives the tolerance from the error of plain torch code.
"""

from __future__ import annotations

import math
import random
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from stem import patterns
from stem.attention import block_sparse_attention, stem_attention
from stem.config import StemConfig
from stem.reference import dense_attention, masked_attention
from stem.scores import block_scores
from stem.selection import BlockSelection

HEAD_DIMS = (16, 32, 40, 64, 80, 96, 128, 256)
BLOCK_SIZES = (16, 32, 64, 128)
HEADS = ((1, 1), (4, 2), (3, 1), (9, 3))


class Shape(NamedTuple):
    """Shape of one input: query and KV heads, query and key tokens, head dimension, tokens per block."""

    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    block_size: int

    @property
    def longest_sum(self) -> int:
        """Number of terms of the longest sum in attention: over keys, or over the head dimension."""
        return max(self.kv_len, self.head_dim)

    def __str__(self) -> str:
        heads = f"{self.q_heads}/{self.kv_heads} heads"
        return f"{heads}, {self.q_len} of {self.kv_len} x {self.head_dim}, block {self.block_size}"


def qkv(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random normal q [1, Hq, Nq, D], k and v [1, Hkv, Nkv, D], rounded to `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(shape.q_heads, shape.q_len)] + 2 * [(shape.kv_heads, shape.kv_len)]
    return tuple(
        torch.randn(1, heads, tokens, shape.head_dim, generator=generator).to(device, dtype) for heads, tokens in sizes
    )


def random_blocks(q: Tensor, k: Tensor, v: Tensor, block_size: int, density: float = 0.5) -> BlockSelection:
    """Random blocks beside the first and the diagonal one, others for each head."""
    config = StemConfig(block_size=block_size, density=density, sink_blocks=0, local_blocks=1)
    return patterns.select("random", q, k, v, config)


def eager_attention(q: Tensor, k: Tensor, v: Tensor, token_mask: Tensor) -> Tensor:
    """Masked attention in plain torch, every step in the dtype of the inputs."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    logits = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~token_mask, -torch.inf)
    return logits.softmax(-1) @ v


def tolerance(eager: Tensor, oracle: Tensor, reduction: int) -> float:
    """Largest allowed error: that of eager code in the same dtype, plus sqrt(reduction) roundings of the largest value.

    Args:
        eager: Result of plain torch in the tested dtype.
        oracle: Result in fp64.
        reduction: Number of terms of the longest sum.
    """
    rounding = torch.finfo(eager.dtype).eps * float(oracle.abs().max())
    return float((eager.double() - oracle).abs().max()) + math.sqrt(reduction) * rounding


def row(claim: str, case: object, impl: str, dtype: torch.dtype, error: Tensor, allowed: float, seed: int) -> dict:
    """Row of one measured case."""
    error = float(error)
    name = str(dtype).removeprefix("torch.")
    passed = error <= allowed
    return dict(
        claim=claim, case=str(case), impl=impl, dtype=name, error=error, tolerance=allowed, passed=passed, seed=seed
    )


def runs(impl: str, q: Tensor, block_size: int) -> bool:
    """Return True if an implementation takes these queries; "hopper" and FlexAttention on CUDA do not take all."""
    if impl == "hopper" and q.is_cuda:
        from stem.kernels.hopper_forward import supports

        return supports(q, block_size)
    return impl != "hopper" and not (impl == "flex" and q.is_cuda and block_size < 128)


def attention_errors(shapes, impls, dtypes, device, seed: int = 0, claim: str = "equals the fp64 oracle") -> list[dict]:
    """Rows of attention over random blocks against masked attention in fp64, per shape, dtype and implementation."""
    rows = []
    for shape in shapes:
        for dtype in dtypes:
            q, k, v = qkv(shape, dtype, device, seed)
            selection = random_blocks(q, k, v, shape.block_size)
            mask = selection.to_token_mask()
            oracle = masked_attention(q.double(), k.double(), v.double(), mask)
            allowed = tolerance(eager_attention(q, k, v, mask), oracle, shape.longest_sum)
            for impl in impls:
                if runs(impl, q, shape.block_size):
                    out = block_sparse_attention(q, k, v, selection, impl=impl)
                    rows.append(row(claim, shape, impl, dtype, (out.double() - oracle).abs().max(), allowed, seed))
    return rows


def dense_errors(shapes, impls, dtypes, device, seed: int = 0) -> list[dict]:
    """Rows of the whole operator at density 1 against dense causal attention in fp64."""
    rows = []
    for shape in shapes:
        for dtype in dtypes:
            q, k, v = qkv(shape, dtype, device, seed)
            oracle = dense_attention(q.double(), k.double(), v.double())
            causal = torch.ones(shape.q_len, shape.kv_len, dtype=torch.bool, device=device)
            eager = eager_attention(q, k, v, causal.tril(shape.kv_len - shape.q_len))
            allowed = tolerance(eager, oracle, shape.longest_sum)
            config = StemConfig(block_size=shape.block_size, density=1.0)
            for impl in impls:
                if runs(impl, q, shape.block_size):
                    error = (stem_attention(q, k, v, config, impl=impl).double() - oracle).abs().max()
                    rows.append(row("full budget equals dense", shape, impl, dtype, error, allowed, seed))
    return rows


def score_errors(shapes, device, seed: int = 0, impls=("torch", "triton")) -> list[dict]:
    """Rows of the factorised block score against the sum over all antidiagonal token pairs in fp64."""
    rows = []
    for shape in shapes:
        config = StemConfig(block_size=shape.block_size, value_weight=0.0)
        q, k, v = qkv(shape, torch.float32, device, seed)
        products = q.double() @ k.double().repeat_interleave(shape.q_heads // shape.kv_heads, 1).mT
        row_at = torch.arange(shape.kv_len - shape.q_len, shape.kv_len, device=device)[:, None]
        column_at = torch.arange(shape.kv_len, device=device)
        stride = config.score_stride
        products = products * (row_at % stride + column_at % stride == stride - 1)
        in_row, in_column = (
            torch.nn.functional.one_hot(x // shape.block_size).double() for x in (row_at.flatten(), column_at)
        )
        sums = in_row[:, (shape.kv_len - shape.q_len) // shape.block_size :].mT @ products @ in_column
        oracle = sums * shape.head_dim**-0.5 / (shape.block_size**2 // stride)
        for impl in impls:
            scores = block_scores(q, k, v, config, impl=impl)
            past = scores.isfinite()
            allowed = tolerance(oracle[past].float(), oracle[past], shape.block_size * shape.head_dim)
            error = (scores.double() - oracle)[past].abs().max()
            rows.append(row("factorised score equals the sum", shape, impl, torch.float32, error, allowed, seed))
    return rows


def influence(config: StemConfig, blocks: int, device, seed: int = 0, impl: str | None = None) -> Tensor:
    """Largest change of each output block after new tokens in one block: fp32 [blocks, blocks].

    Entry (i, j) is the change in output block i after new q, k and v in block j. Causal means exactly zero above the
    diagonal.
    """
    size = config.block_size
    shape = Shape(2, 1, blocks * size, blocks * size, 32, size)
    q, k, v = qkv(shape, torch.float32, device, seed)
    before = stem_attention(q, k, v, config, impl=impl)
    columns = []
    for block in range(blocks):
        tokens = slice(block * size, (block + 1) * size)
        other = qkv(shape, torch.float32, device, seed + 1 + block)
        changed = [x.clone() for x in (q, k, v)]
        for x, new in zip(changed, other, strict=True):
            x[:, :, tokens] = 3 * new[:, :, tokens]
        change = (stem_attention(*changed, config, impl=impl) - before).abs()
        columns.append(change.unflatten(2, (blocks, size)).amax((0, 1, 3, 4)))
    return torch.stack(columns, 1)


def causality_errors(config: StemConfig, impls, dtype, device, seed: int = 0) -> list[dict]:
    """Rows of the change in outputs before a block after new tokens from that block on; the tolerance is zero."""
    size = config.block_size
    shape = Shape(2, 1, 5 * size - 3, 5 * size - 3, 64, size)
    q, k, v = qkv(shape, dtype, device, seed)
    later = [3 * x for x in qkv(shape, dtype, device, seed + 1)]
    changed = [torch.cat((x[:, :, : 3 * size], y[:, :, 3 * size :]), 2) for x, y in zip((q, k, v), later, strict=True)]
    rows = []
    for impl in impls:
        if runs(impl, q, shape.block_size):
            before, after = (stem_attention(*tensors, config, impl=impl) for tensors in ((q, k, v), changed))
            error = (before - after)[:, :, : 3 * size].abs().max()
            rows.append(row("no output before a block depends on it", shape, impl, dtype, error, 0.0, seed))
    return rows


def unread_errors(shape: Shape, impls, dtype, device, seed: int = 0) -> list[dict]:
    """Rows of the change in each query block after its unselected keys and values became NaN; the tolerance is zero."""
    q, k, v = qkv(shape._replace(q_heads=1, kv_heads=1), dtype, device, seed)
    selection = random_blocks(q, k, v, shape.block_size)
    kept = selection.to_mask()[0, 0].repeat_interleave(shape.block_size, 1)[:, : shape.kv_len, None]  # [nq, Nkv, 1]
    rows = []
    for impl in (impl for impl in impls if runs(impl, q, shape.block_size)):
        out = block_sparse_attention(q, k, v, selection, impl=impl)
        error = 0.0
        for block in range(selection.num_q_blocks):
            poisoned = (x.where(kept[block], torch.nan) for x in (k, v))
            queries = slice(block * shape.block_size, (block + 1) * shape.block_size)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of NaN in Triton's interpreter
                change = (block_sparse_attention(q, *poisoned, selection, impl=impl) - out)[:, :, queries]
            error = max(error, float(change.abs().nan_to_num(nan=torch.inf).max()))
        rows.append(row("unselected blocks are not read", shape, impl, dtype, error, 0.0, seed))
    return rows


def chunk_errors(
    config: StemConfig, ends, impls, device, seed: int = 0, prompt_length: int | None = None
) -> list[dict]:
    """Rows of a prompt in chunks that end at `ends` [tokens] against the whole prompt, in fp32.

    prompt_length: Given to each chunk; None gives none.
    """
    shape = Shape(2, 1, ends[-1], ends[-1], 32, config.block_size)
    q, k, v = qkv(shape, torch.float32, device, seed)
    oracle = stem_attention(q.double(), k.double(), v.double(), config, impl="reference")
    case = f"ends {ends}, {config.allocation}" + (", told the length" if prompt_length else "")
    rows = []
    for impl in impls:
        if runs(impl, q, shape.block_size):
            whole = stem_attention(q, k, v, config, impl=impl)
            starts = (0, *ends[:-1])
            options = dict(impl=impl, prompt_length=prompt_length)
            chunks = [
                stem_attention(q[:, :, start:end], k[:, :, :end], v[:, :, :end], config, **options)
                for start, end in zip(starts, ends, strict=True)
            ]
            allowed = tolerance(whole, oracle, shape.longest_sum)
            error = (torch.cat(chunks, 2).double() - oracle).abs().max()
            rows.append(row("chunks equal the whole prompt", case, impl, torch.float32, error, allowed, seed))
    return rows


def gradient_errors(shapes, impls, dtypes, device, seed: int = 0) -> list[dict]:
    """Rows of the gradients of q, k and v against autograd through masked attention in fp64, one per tensor."""
    rows = []
    for shape in shapes:
        for dtype in dtypes:
            inputs = qkv(shape, dtype, device, seed)
            selection = random_blocks(*inputs, shape.block_size)
            mask = selection.to_token_mask()
            oracle = _gradients(lambda *x, mask=mask: masked_attention(*x, mask), [x.double() for x in inputs])
            eager = _gradients(lambda *x, mask=mask: eager_attention(*x, mask), inputs)
            for impl in (impl for impl in impls if runs(impl, inputs[0], shape.block_size)):
                found = _gradients(
                    lambda *x, selection=selection, impl=impl: block_sparse_attention(*x, selection, impl=impl), inputs
                )
                for name, one, plain, exact in zip("qkv", found, eager, oracle, strict=True):
                    allowed = tolerance(plain, exact, shape.longest_sum)
                    error = (one.double() - exact).abs().max()
                    rows.append(row("gradients", f"d{name}, {shape}", impl, dtype, error, allowed, seed))
    return rows


def _gradients(function, inputs) -> tuple[Tensor, ...]:
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=torch.float64).view_as(out)
    return torch.autograd.grad(out, inputs, weights.to(out.dtype))


def fuzzed_shapes(count: int, longest: int, seed: int = 0) -> list[Shape]:
    """Random shapes with Nq <= Nkv <= longest; heads, head dimension and block size come from the lists above."""
    draw = random.Random(seed)
    shapes = []
    for _ in range(count):
        kv_len = draw.randint(1, longest)
        q_len = draw.choice((kv_len, draw.randint(1, kv_len)))
        shapes.append(Shape(*draw.choice(HEADS), q_len, kv_len, draw.choice(HEAD_DIMS), draw.choice(BLOCK_SIZES)))
    return shapes

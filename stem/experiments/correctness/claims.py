"""Claims of notebook 03: each function measures one claim and returns rows, one per case and implementation.

A row holds claim, case, impl, dtype, error, tolerance, roundings, most_roundings, passed and seed. `error` is the norm
of the difference over the norm of the exact result. `roundings` is the largest single difference, in roundings of its
row: the precision of the format times the row's largest value. `tolerance` and `most_roundings` bound the two, see
`bounds`. A claim of exact equality has tolerance 0, its `error` is the largest absolute difference (or the number of
wrong block pairs), and it has no roundings.
"""

import math
import random
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from stem import patterns
from stem.attention import block_sparse_attention, stem_attention
from stem.config import StemConfig
from stem.planning import select
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


class Bounds(NamedTuple):
    """Largest allowed errors against an fp64 oracle."""

    error: float  # norm of the difference over the norm of the oracle
    roundings: float  # largest difference in roundings of its row


def errors_of(result: Tensor, oracle: Tensor) -> Bounds:
    """Relative L2 error of a result, and its largest error in roundings of its row.

    A row is the last dimension. One rounding is the precision of the result's format times the row's largest absolute
    value, or times the root mean square of all rows where that is larger (a gradient can be exactly zero in a row).
    """
    difference, least = result.double() - oracle, torch.finfo(torch.float64).tiny  # the oracle may be zero
    size = oracle.abs().amax(-1, keepdim=True).clamp_min(oracle.square().mean().sqrt()).clamp_min(least)
    roundings = difference.abs() / (torch.finfo(result.dtype).eps * size)
    return Bounds(float(difference.norm() / oracle.norm().clamp_min(least)), float(roundings.max()))


def bounds(eager: Tensor, oracle: Tensor, reduction: int) -> Bounds:
    """Largest errors that an implementation may have: those of eager code in its precision, and a little more.

    The norm may exceed eager code's by a quarter of a rounding, a single value twice eager code's by one rounding. Both
    get sqrt(reduction) roundings of fp32 for another order of summation, reduction = terms of the longest sum.
    """
    own, eps = errors_of(eager, oracle), torch.finfo(eager.dtype).eps
    order = math.sqrt(reduction) * torch.finfo(torch.float32).eps
    return Bounds(own.error + eps / 4 + order, 2 * own.roundings + 1 + order / eps)


def results(impls: Iterable[str], q: Tensor, block_size: int, call: Callable[..., Any]) -> dict[str, Any]:
    """Implementation -> call(impl=...); "hopper" and FlexAttention on CUDA do not take all queries."""
    left_out = {"hopper": not q.is_cuda, "flex": q.is_cuda and block_size < 128}
    if q.is_cuda:
        from stem.kernels.hopper_forward import supports

        left_out["hopper"] = not supports(q, block_size)
    return {impl: call(impl=impl) for impl in impls if not left_out.get(impl)}


def compile_in_fp32(calls: Iterable[partial]) -> None:
    """Compile the Triton kernels of the calls with fp32 inputs, all at the same time.

    One kernel takes 5 to 20 s, because fp32 products do not run on tensor cores. Kernels of other formats take a second
    or two, and the first call times their tiles.
    """
    from stem.kernels.launch import compiling_together

    with compiling_together():
        for call in calls:
            if call.args[0].dtype == torch.float32:
                call(impl="triton")


def rows_of(claim: str, case: object, found: Mapping[str, Tensor], oracle: Tensor, allowed: Bounds, seed: int) -> list:
    """One row per implementation: the errors of its result against the oracle, and whether both are allowed."""
    rows = []
    for impl, result in found.items():
        error, roundings = errors_of(result, oracle)
        about = dict(claim=claim, case=str(case), impl=impl, dtype=str(result.dtype).removeprefix("torch."))
        told = dict(error=error, tolerance=allowed.error, roundings=roundings, most_roundings=allowed.roundings)
        passed = error <= allowed.error and roundings <= allowed.roundings
        rows.append(about | told | dict(passed=passed, seed=seed))
    return rows


def exact_rows(claim: str, case: object, found: Mapping[str, Tensor], seed: int) -> list[dict]:
    """One row per implementation, whose result must be zero everywhere."""
    rows = []
    for impl, result in found.items():
        error, dtype = float(result.double().abs().max()), str(result.dtype).removeprefix("torch.")
        about = dict(claim=claim, case=str(case), impl=impl, dtype=dtype, error=error, tolerance=0.0)
        rows.append(about | dict(roundings=None, most_roundings=None, passed=error == 0, seed=seed))
    return rows


def oracle_and_bounds(q, k, v, selection: BlockSelection, shape: Shape) -> tuple[Tensor, Bounds]:
    """Attention over kept blocks by its definition in fp64, and what an implementation may differ from it."""
    mask = selection.to_token_mask()
    oracle = masked_attention(q.double(), k.double(), v.double(), mask)
    return oracle, bounds(eager_attention(q, k, v, mask), oracle, shape.longest_sum)


def attention_errors(shapes, impls, dtypes, device, seed: int = 0, claim: str = "equals the fp64 oracle") -> list[dict]:
    """Rows of attention over random blocks against masked attention in fp64, per shape, dtype and implementation."""
    rows, problems = [], []
    for shape, dtype in product(shapes, dtypes):
        inputs = qkv(shape, dtype, device, seed)
        problems.append((shape, inputs, random_blocks(*inputs, shape.block_size)))
    if "triton" in impls:
        compile_in_fp32(partial(block_sparse_attention, *inputs, selection) for _, inputs, selection in problems)
    for shape, inputs, selection in problems:
        oracle, allowed = oracle_and_bounds(*inputs, selection, shape)
        found = results(impls, inputs[0], shape.block_size, partial(block_sparse_attention, *inputs, selection))
        rows += rows_of(claim, shape, found, oracle, allowed, seed)
    return rows


def dense_errors(shapes, impls, dtypes, device, seed: int = 0) -> list[dict]:
    """Rows of the whole operator at density 1 against dense causal attention in fp64."""
    rows = []
    for shape, dtype in product(shapes, dtypes):
        q, k, v = qkv(shape, dtype, device, seed)
        oracle = dense_attention(q.double(), k.double(), v.double())
        causal = torch.ones(shape.q_len, shape.kv_len, dtype=torch.bool, device=device)
        eager = eager_attention(q, k, v, causal.tril(shape.kv_len - shape.q_len))
        config = StemConfig(block_size=shape.block_size, density=1.0)
        found = results(impls, q, shape.block_size, partial(stem_attention, q, k, v, config))
        allowed = bounds(eager, oracle, shape.longest_sum)
        rows += rows_of("full budget equals dense", shape, found, oracle, allowed, seed)
    return rows


def score_errors(shapes, device, seed: int = 0, impls=("torch", "triton")) -> list[dict]:
    """Rows of the factorised block score against the sum over all antidiagonal token pairs in fp64."""
    rows = []
    for shape in shapes:
        config = StemConfig(block_size=shape.block_size, value_weight=0.0)
        q, k, v = qkv(shape, torch.float32, device, seed)
        products = q.double() @ k.double().repeat_interleave(shape.q_heads // shape.kv_heads, 1).mT
        offset, stride = shape.kv_len - shape.q_len, config.score_stride
        row_at, column_at = torch.arange(offset, shape.kv_len, device=device), torch.arange(shape.kv_len, device=device)
        products = products * (row_at[:, None] % stride + column_at % stride == stride - 1)
        in_row, in_column = (one_hot(x // shape.block_size).double() for x in (row_at, column_at))
        sums = in_row[:, offset // shape.block_size :].mT @ products @ in_column
        past = torch.ones_like(sums[0, 0], dtype=torch.bool).tril(offset // shape.block_size)
        oracle = sums[..., past] * shape.head_dim**-0.5 / (shape.block_size**2 // stride)
        allowed = bounds(oracle.float(), oracle, shape.block_size * shape.head_dim)
        found = {impl: block_scores(q, k, v, config, impl=impl)[..., past] for impl in impls}
        rows += rows_of("factorised score equals the sum", shape, found, oracle, allowed, seed)
    return rows


def influence(config: StemConfig, blocks: int, device, seed: int = 0, impl: str | None = None) -> Tensor:
    """Largest change of each output block after new q, k and v in one block: fp32 [output blocks, changed blocks].

    Causal means exactly zero above the diagonal.
    """
    size = config.block_size
    shape = Shape(2, 1, blocks * size, blocks * size, 32, size)
    inputs = qkv(shape, torch.float32, device, seed)
    before = stem_attention(*inputs, config, impl=impl)
    columns = []
    for block in range(blocks):
        changed = _changed(inputs, shape, slice(block * size, (block + 1) * size), seed + 1 + block)
        change = (stem_attention(*changed, config, impl=impl) - before).abs()
        columns.append(change.unflatten(2, (blocks, size)).amax((0, 1, 3, 4)))
    return torch.stack(columns, 1)


def _changed(inputs: Sequence[Tensor], shape: Shape, tokens: slice, seed: int) -> list[Tensor]:
    """q, k and v with other values, three times as large, in some tokens."""
    changed = [x.clone() for x in inputs]
    for x, new in zip(changed, qkv(shape, inputs[0].dtype, inputs[0].device, seed), strict=True):
        x[:, :, tokens] = 3 * new[:, :, tokens]
    return changed


def causality_errors(config: StemConfig, impls, dtype, device, seed: int = 0) -> list[dict]:
    """Rows of the change in outputs before a block after new tokens from that block on; the tolerance is zero."""
    size = config.block_size
    shape = Shape(2, 1, 5 * size - 3, 5 * size - 3, 64, size)
    inputs = qkv(shape, dtype, device, seed)
    changed = _changed(inputs, shape, slice(3 * size, None), seed + 1)

    def change(impl: str) -> Tensor:
        before, after = (stem_attention(*tensors, config, impl=impl) for tensors in (inputs, changed))
        return (before - after)[:, :, : 3 * size]

    found = results(impls, inputs[0], size, change)
    return exact_rows("no output before a block depends on it", shape, found, seed)


def unread_errors(shape: Shape, impls, dtype, device, seed: int = 0) -> list[dict]:
    """Rows of the change in each query block after its unselected keys and values became NaN; the tolerance is zero."""
    size = shape.block_size
    q, k, v = qkv(shape._replace(q_heads=1, kv_heads=1), dtype, device, seed)
    selection = random_blocks(q, k, v, size)
    kept = selection.to_mask()[0, 0].repeat_interleave(size, 1)[:, : shape.kv_len, None]  # [nq, Nkv, 1]

    def change(impl: str) -> Tensor:
        out = block_sparse_attention(q, k, v, selection, impl=impl)
        poisoned = [[x.where(mask, torch.nan) for x in (k, v)] for mask in kept]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of NaN in Triton's interpreter
            after = [block_sparse_attention(q, *kv, selection, impl=impl) for kv in poisoned]
        own = [x[:, :, block * size : (block + 1) * size] for block, x in enumerate(after)]
        return torch.cat(own, 2) - out

    found = results(impls, q, size, change)
    return exact_rows("unselected blocks are not read", shape, found, seed)


def adaptive_errors(shapes, impls, device, threshold: float = 0.05, seed: int = 0) -> list[dict]:
    """Rows of wrong block pairs in the selection of the preset "adaptive", against its definition in fp64.

    Shapes are whole prompts of whole blocks. Shares within a thousandth of the threshold may fall on either side.
    """
    rows = []
    for shape in shapes:
        config = StemConfig.preset("adaptive", block_size=shape.block_size, threshold=threshold, dense_up_to=0)
        q, k, v = qkv(shape, torch.float32, device, seed)
        q = 3 * q  # peaks, as real attention has them
        shares = adaptive_shares(q.double(), k.double(), config)
        row, column = (torch.arange(shares.shape[-1], device=device) for _ in range(2))
        distance = row[:, None] - column
        forced = (column < config.sink_blocks) | (distance < config.local_blocks)
        expected = ((shares > threshold) | forced) & (distance >= 0)
        sure = (shares / threshold - 1).abs() > 1e-3
        found = {impl: select(q, k, v, config, shape.head_dim**-0.5, impl).to_mask() for impl in impls}
        wrong = {impl: ((mask != expected) & sure).sum(-1, dtype=torch.int32) for impl, mask in found.items()}
        rows += exact_rows("adaptive keeps the blocks of its definition", shape, wrong, seed)
    return rows


def adaptive_shares(q: Tensor, k: Tensor, config: StemConfig) -> Tensor:
    """Shares of `StemConfig.preset("adaptive")` for a whole prompt of whole blocks, by their definition: [1, Hq, n, n].

    A cell has an upper and a lower corner, shifted from its mean by `score_peak` towards its extremes. The logit of two
    cells bounds their products from above. A softmax over the cells before the end of a query cell, summed over blocks,
    root mean square over the query cells. The last block of queries has cells of one token.
    """
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    size, blocks = config.block_size, q.shape[2] // config.block_size

    def corners(x: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        cells, peak = x.unflatten(2, (-1, tokens)), config.score_peak
        return tuple((1 - peak) * cells.mean(3) + peak * of for of in (cells.amax(3), cells.amin(3)))

    def shares(tokens: int) -> Tensor:
        (q_high, q_low), (k_high, k_low) = corners(q, tokens), corners(k, tokens)
        logits = q_high.clamp_min(0) @ k_high.mT + q_low.clamp_max(0) @ k_low.mT
        future = torch.ones_like(logits[0, 0], dtype=torch.bool).triu(1)
        weights = (logits * q.shape[-1] ** -0.5).masked_fill(future, -torch.inf).softmax(-1)
        pooled = weights.unflatten(3, (blocks, -1)).sum(-1).unflatten(2, (blocks, -1)).square().mean(3).sqrt()
        return pooled / pooled.sum(-1, keepdim=True)

    found = shares(size // config.score_cells)
    found[:, :, -config.exact_last_blocks :] = shares(1)[:, :, -config.exact_last_blocks :]
    return found


def chunk_errors(config, ends, impls, device, seed: int = 0, prompt_length: int | None = None, name="") -> list[dict]:
    """Rows of a prompt in chunks that end at `ends` [tokens], each told `prompt_length`, against the whole prompt."""
    shape = Shape(2, 1, ends[-1], ends[-1], 32, config.block_size)
    q, k, v = qkv(shape, torch.float32, device, seed)
    oracle = stem_attention(q.double(), k.double(), v.double(), config, impl="reference")
    case = f"ends {ends}, {name or config.allocation}" + (", told the length" if prompt_length else "")

    def in_chunks(impl: str) -> Tensor:
        attend = partial(stem_attention, config=config, impl=impl, prompt_length=prompt_length)
        spans = zip((0, *ends), ends, strict=False)
        return torch.cat([attend(q[:, :, start:end], k[:, :, :end], v[:, :, :end]) for start, end in spans], 2)

    rows = []
    for impl, found in results(impls, q, shape.block_size, in_chunks).items():
        allowed = bounds(stem_attention(q, k, v, config, impl=impl), oracle, shape.longest_sum)
        rows += rows_of("chunks equal the whole prompt", case, {impl: found}, oracle, allowed, seed)
    return rows


def gradient_errors(shapes, impls, dtypes, device, seed: int = 0) -> list[dict]:
    """Rows of the gradients of q, k and v against autograd through masked attention in fp64, one per tensor."""
    rows = []
    for shape, dtype in product(shapes, dtypes):
        inputs = qkv(shape, dtype, device, seed)
        selection = random_blocks(*inputs, shape.block_size)
        mask = selection.to_token_mask()
        oracle = _gradients([x.double() for x in inputs], partial(masked_attention, token_mask=mask))
        eager = _gradients(inputs, partial(eager_attention, token_mask=mask))
        sparse = partial(_gradients, inputs, block_sparse_attention, selection=selection)
        found = results(impls, inputs[0], shape.block_size, sparse)
        for i, name in enumerate("qkv"):
            allowed = bounds(eager[i], oracle[i], shape.longest_sum)
            of = {impl: gradients[i] for impl, gradients in found.items()}
            rows += rows_of("gradients", f"d{name}, {shape}", of, oracle[i], allowed, seed)
    return rows


def _gradients(inputs, attend, **options) -> tuple[Tensor, ...]:
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = attend(*inputs, **options)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=torch.float64).view_as(out)
    return torch.autograd.grad(out, inputs, weights.to(out.dtype))


def fuzzed_shapes(count: int, longest: int, seed: int = 0) -> list[Shape]:
    """Random shapes with Nq <= Nkv <= longest; heads, head dimension and block size come from the lists above."""
    draw = random.Random(seed)
    shapes = []
    for kv_len in (draw.randint(1, longest) for _ in range(count)):
        q_len = draw.choice((kv_len, draw.randint(1, kv_len)))
        shapes.append(Shape(*draw.choice(HEADS), q_len, kv_len, draw.choice(HEAD_DIMS), draw.choice(BLOCK_SIZES)))
    return shapes

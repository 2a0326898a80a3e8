"""Gradients of block-sparse attention, against fp64 autograd of masked attention.

Compilation without a GPU needs a process of its own, as in test_kernels_compile.py: this file is both.
"""

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from sparse_inputs import DEVICE, lists_of, random_inputs, random_mask
from stem.kernels import sparse_backward as kernels
from stem.kernels.common import TRITON_DTYPES
from stem.kernels.sparse_forward import sparse_forward
from torch.utils._python_dispatch import TorchDispatchMode

from stem.reference import masked_attention

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHARED_MEMORY_BYTES = {90: 227 * 1024, 80: 163 * 1024}  # what one program may use
COMPILED = [  # compute capability, dtype, head_dim, block_size, whether tiles are loaded by descriptors
    (90, torch.bfloat16, 128, 128, True), (90, torch.bfloat16, 40, 32, True),
    (90, torch.bfloat16, 256, 128, True), (80, torch.bfloat16, 64, 128, False),
]  # fmt: skip
pytestmark = pytest.mark.usefixtures("poisoned_empty")


@dataclass
class Case:
    """Inputs and block mask of one problem, and gradients that arrive at its outputs."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor
    block_size: int
    dout: torch.Tensor
    dlse: torch.Tensor | None
    scale: float

    @property
    def token_mask(self):
        num_queries, num_keys = self.q.shape[2], self.k.shape[2]
        positions = torch.arange(num_keys - num_queries, num_keys)
        rows = positions // self.block_size - int(positions[0]) // self.block_size
        kept = self.mask.repeat_interleave(self.block_size, 3)[:, :, rows, :num_keys]
        return kept & (torch.arange(num_keys) <= positions[:, None])


def make_case(
    num_q_heads, num_kv_heads, num_queries, num_keys, head_dim, block_size,
    dtype=torch.float32, batch=1, keep=0.5, diagonal=True, dlse=True, scale=None,
):  # fmt: skip
    q, k, v = random_inputs(num_q_heads, num_kv_heads, num_queries, num_keys, head_dim, dtype, batch)
    mask = random_mask(batch, num_q_heads, num_queries, num_keys, block_size, diagonal, keep)
    dout = torch.randn(q.shape).to(dtype).to(DEVICE)
    dlse = torch.randn(q.shape[:3]).to(DEVICE) if dlse else None
    return Case(q, k, v, mask, block_size, dout, dlse, head_dim**-0.5 if scale is None else scale)


def kernel_gradients(case):
    problem = (*lists_of(case.mask), case.block_size, case.scale)
    out, lse = sparse_forward(case.q, case.k, case.v, *problem)
    return kernels.sparse_backward(case.q, case.k, case.v, out, lse, case.dout, case.dlse, *problem)


def autograd_gradients(case, attention, dtype):
    """Gradients of `attention` of q, k, v in a dtype; rows that attend to nothing have none."""
    inputs = [x.detach().cpu().to(dtype).requires_grad_() for x in (case.q, case.k, case.v)]
    out, lse = attention(*inputs, case.token_mask, case.scale)
    empty = ~case.token_mask.any(-1)
    value = (out * case.dout.cpu()).masked_fill(empty[..., None], 0).sum(dtype=lse.dtype)
    if case.dlse is not None:
        value = value + (lse * case.dlse.cpu()).masked_fill(empty, 0).sum()
    return torch.autograd.grad(value, inputs)


def reference(q, k, v, token_mask, scale):
    return masked_attention(q, k, v, token_mask | ~token_mask.any(-1, keepdim=True), scale, return_lse=True)


def eager(q, k, v, token_mask, scale):
    """Gradients by the same formula in plain torch, in the dtype of the inputs: the tolerance is derived from them."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    token_mask = token_mask | ~token_mask.any(-1, keepdim=True)
    logits = (q @ k.mT * scale).masked_fill(~token_mask, -math.inf)
    return logits.softmax(-1) @ v, logits.float().logsumexp(-1)


@pytest.fixture
def check(assert_close_to_oracle):
    """Run the kernels on a case and compare all gradients with fp64 autograd."""

    def run(case, terms=0.0):
        found = kernel_gradients(case)
        expected = autograd_gradients(case, reference, torch.float64)
        of_eager = autograd_gradients(case, eager, case.q.dtype)
        for x, gradient, oracle, simple in zip((case.q, case.k, case.v), found, expected, of_eager, strict=True):
            assert gradient.dtype == x.dtype and gradient.device == x.device
            longest_sum = case.k.shape[2] * case.q.shape[1] + x.shape[3]  # over queries and heads; over dimensions
            assert_close_to_oracle(gradient, oracle, simple, longest_sum, terms)

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [8, 16, 32, 40, 64, 80, 96, 128, 256], ids=lambda d: f"D{d}")
def test_head_dimensions(check, head_dim, dtype):
    check(make_case(2, 1, 50, 50, head_dim, 32 if head_dim < 256 else 64, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [16, 32, 64, 128], ids=lambda size: f"block{size}")
def test_block_sizes(check, block_size, dtype):
    tokens = 2 * block_size + 10
    check(make_case(1, 1, tokens, tokens, 64, block_size, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_token(check, dtype):
    """The products of dout with v and with out, which is v here, cancel in the gradients of q and k."""
    case = make_case(2, 1, 1, 1, 32, 128, dtype)
    products = (case.dout.float() * case.v.float()).sum(-1).abs().max()
    check(case, terms=(case.scale * products * max(case.q.abs().max(), case.k.abs().max())).item())


@pytest.mark.parametrize("num_tokens", [63, 129, 400], ids=lambda n: f"N{n}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_odd_lengths(check, num_tokens, dtype):
    check(make_case(2, 1, num_tokens, num_tokens, 32, 128, dtype))


@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 300), (70, 333), (64, 128), (7, 100)])
def test_chunks_of_queries(check, num_queries, num_keys):
    check(make_case(2, 1, num_queries, num_keys, 32, 64))


@pytest.mark.parametrize(("num_q_heads", "num_kv_heads"), [(9, 3), (4, 2), (1, 1), (3, 1)])
def test_grouped_heads_and_batches(check, num_q_heads, num_kv_heads):
    check(make_case(num_q_heads, num_kv_heads, 40, 40, 16, 32, batch=2 if num_q_heads < 9 else 1))


@pytest.mark.parametrize("seed", range(5))
def test_random_shapes(check, seed):
    generator = torch.Generator().manual_seed(seed)

    def pick(*values):
        return values[int(torch.randint(len(values), (1,), generator=generator))]

    num_kv_heads, num_keys = pick(1, 2), pick(50, 97, 128, 190)
    check(
        make_case(
            num_kv_heads * pick(1, 2, 3),
            num_kv_heads,
            pick(1, 33, 50),
            num_keys,
            pick(16, 24, 48, 72),
            pick(16, 32, 64),
            pick(*DTYPES),
            pick(1, 2),
            pick(0.2, 0.6),
            pick(True, False),
            pick(True, False),
        )  # fmt: skip
    )


def test_rows_without_the_diagonal_and_without_any_block_have_no_gradient(check):
    case = make_case(2, 2, 160, 160, 32, 32, diagonal=False, keep=0.4)
    case.mask[:, :, 3], case.mask[..., 1] = False, False
    assert not case.mask.diagonal(dim1=2, dim2=3).all() and case.mask.any()
    check(case)
    dq, dk, dv = kernel_gradients(case)
    assert not dq[:, :, 96:128].any() and not dk[:, :, 32:64].any() and not dv[:, :, 32:64].any()


def test_the_gradient_of_the_log_sum_exp_counts():
    case = make_case(2, 1, 90, 90, 32, 32)
    with_lse = kernel_gradients(case)
    case.dlse = torch.zeros_like(case.dlse)
    zero = kernel_gradients(case)
    case.dlse = None
    without = kernel_gradients(case)
    assert all(torch.equal(x, y) for x, y in zip(zero, without, strict=True))
    assert not torch.equal(with_lse[0], zero[0]) and not torch.equal(with_lse[1], zero[1])
    assert torch.equal(with_lse[2], zero[2])  # the values do not enter it


@pytest.mark.parametrize("splits", [2, 7])
def test_key_blocks_computed_in_parts(check, splits, monkeypatch):
    monkeypatch.setattr(kernels, "num_splits", lambda k, max_blocks: splits)
    check(make_case(2, 1, 80, 140, 16, 32, torch.float16))


@pytest.mark.parametrize("scale", [0.01, 1.0, -0.3])
def test_scale(check, scale):
    check(make_case(1, 1, 90, 90, 32, 32, scale=scale))


@pytest.mark.filterwarnings("ignore:Input #")
def test_gradcheck():
    """Numerical differentiation of both kernels; in fp32, which is all they have, so steps and tolerance are wide."""
    case = make_case(2, 1, 11, 19, 8, 16, keep=0.7)
    lists = (*lists_of(case.mask), case.block_size, case.scale)

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *qkv):
            out, lse = sparse_forward(*qkv, *lists)
            ctx.save_for_backward(*qkv, out, lse)
            return out, lse

        @staticmethod
        def backward(ctx, dout, dlse):
            return kernels.sparse_backward(*ctx.saved_tensors, dout, dlse, *lists)

    inputs = [x.contiguous().requires_grad_() for x in (case.q, case.k, case.v)]
    assert torch.autograd.gradcheck(Attention.apply, inputs, eps=1e-2, atol=2e-3, rtol=1e-2, fast_mode=True)


@pytest.mark.parametrize("change", ["expanded", "no-unit-stride", "token-major"])
def test_strides(check, change):
    case = make_case(4, 4, 70, 70, 24, 32)
    if change == "expanded":
        case.k, case.v = (x[:, :1].expand(1, 4, -1, -1) for x in (case.k, case.v))
        case.dout = case.dout[:, :, :1, :1].expand(1, 4, 70, 24)
    elif change == "no-unit-stride":
        case.q, case.k, case.v, case.dout = (
            x.contiguous().mT.contiguous().mT for x in (case.q, case.k, case.v, case.dout)
        )
    else:
        case.dout = case.dout.transpose(1, 2).contiguous().transpose(1, 2)
        case.dlse = case.dlse.mT.contiguous().mT
    check(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_agree_bit_for_bit(dtype):
    case = make_case(4, 2, 70, 80, 32, 32, dtype)
    first, second = kernel_gradients(case), kernel_gradients(case)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_blocks_off_the_lists_change_nothing():
    case = make_case(1, 1, 128, 128, 32, 32)
    case.mask[..., 1] = False
    before = kernel_gradients(case)
    case.k[:, :, 32:64], case.v[:, :, 32:64] = float("nan"), float("nan")
    after = kernel_gradients(case)
    assert torch.equal(before[0], after[0])
    for x, y in zip(before[1:], after[1:], strict=True):
        assert torch.equal(x, y)


def test_transposed_lists():
    mask = random_mask(2, 3, 200, 333, 32, keep=0.4)
    q_indices, starts = kernels.transpose_lists(*lists_of(mask), mask.shape[3])
    assert q_indices.dtype == torch.int32 and starts.shape == (2 * 3 * mask.shape[3] + 1,)
    lists = [q_indices[a:b].tolist() for a, b in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)]
    columns = mask.flatten(0, 1).mT.flatten(0, 1)  # [B * Hq * nk, nq]
    assert lists == [column.nonzero().flatten().tolist() for column in columns]


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that an operator returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return result


def test_nothing_of_size_n_squared_is_made(monkeypatch):
    """With lists of four blocks; the kernels themselves allocate nothing, so they need not run."""
    for name in ("row_statistics_kernel", "dq_kernel", "dkv_kernel"):
        monkeypatch.setattr(kernels, name, _Nothing())
    elements = []
    for length in (1024, 2048, 4096):
        q, k, v, out, dout = torch.randn(5, 1, 1, length, 16, device=DEVICE)
        indices = torch.zeros(1, 1, length // 16, 4, dtype=torch.int32, device=DEVICE)
        counts = torch.full((1, 1, length // 16), 4, dtype=torch.int32, device=DEVICE)
        with LargestTensor() as largest:
            kernels.sparse_backward(q, k, v, out, q[..., 0], dout, None, indices, counts, 16, 0.25)
        elements.append(largest.elements)
        copies = kernels.num_splits(k, 4)  # of dK and dV, with more than one
        assert largest.elements <= length * 16 * (2 * copies if copies > 1 else 1)
    assert elements[2] <= 2 * elements[1] <= 4 * elements[0]


class _Nothing:
    """A kernel that does nothing on any grid."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


@pytest.mark.skipif(DEVICE == "cpu", reason="needs 24 GB of device memory")
def test_offsets_beyond_32_bits(check):
    storage = torch.zeros(3, 300, 2**23, dtype=torch.bfloat16, device=DEVICE)  # the last row starts past 2**31
    case = make_case(1, 1, 300, 300, 64, 128, torch.bfloat16)
    case.q, case.k, case.v = (
        x[None, None, :, :64].copy_(y) for x, y in zip(storage, (case.q, case.k, case.v), strict=True)
    )
    check(case)


def compile_for(capability, dtype, head_dim, block_size, descriptors):
    """Compile both kernels as the library launches them; bytes of shared memory of each."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    x, block_d = TRITON_DTYPES[dtype].name, triton.next_power_of_2(head_dim)
    common = dict(HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_SIZE=block_size, DESCRIPTORS=descriptors)
    common["DTYPE"] = TRITON_DTYPES[dtype]
    shared = []
    for kernel, moving, tiles, tile_rows in zip(
        (kernels.dq_kernel, kernels.dkv_kernel),
        (("k", "v"), ("q", "dout", "lse_log2", "delta")),
        kernels.tile_sizes(head_dim, block_size, dtype, descriptors),
        ("BLOCK_N", "BLOCK_M"),
        strict=True,
    ):
        options = {name: tiles.pop(name) for name in tiles.keys() - {"BLOCK_M", "BLOCK_N"}}
        constants, rows = common | tiles, tiles[tile_rows]

        def type_of(name, moving=moving, constants=constants, rows=rows):
            if name in constants:
                return "constexpr"
            if name in ("q", "k", "v", "dout"):
                return f"tensordesc<{x}[1, 1, {rows}, {block_d}]>" if descriptors and name in moving else f"*{x}"
            if name in ("lse_log2", "delta"):
                return f"tensordesc<fp32[1, {rows}]>" if descriptors else "*fp32"
            if name.endswith("_ptr"):
                pointed = {"list_starts_ptr": "i64", "lse_log2_ptr": "fp32", "delta_ptr": "fp32"}.get(name)
                return "*" + (pointed or (x if name[0] == "d" else "i32"))
            return "fp32" if name == "scale" else "i32"

        names = kernel.arg_names
        types = {name: type_of(name) for name in names}
        aligned = [name for name in names if types[name][0] == "*" or name.startswith("stride")]
        source = ASTSource(
            kernel,
            types,
            {(names.index(name),): value for name, value in constants.items()},
            {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        shared.append(compiled.metadata.shared)
    return shared


@pytest.mark.slow
def test_kernels_compile_without_a_gpu(tmp_path):
    pytest.importorskip("triton.backends.nvidia")
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    process = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr[-3000:]
    for case, shared in zip(COMPILED, json.loads(process.stdout), strict=True):
        assert max(shared) <= SHARED_MEMORY_BYTES[case[0]], f"{case} needs {shared} bytes"


if __name__ == "__main__":
    print(json.dumps([compile_for(*case) for case in COMPILED]))

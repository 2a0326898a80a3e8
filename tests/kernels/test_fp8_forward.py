"""FP8: quantisation against torch, the forward for sm_90 against attention to the same quantised tensors.

Its compilation needs a process of its own, as in test_compile.py: this file is both the tests and that process.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sparse_inputs import DEVICE, lists_of, random_inputs, random_mask

import stem

SIZE = 128
LARGEST = 448.0
SHARED_MEMORY_BYTES = 227 * 1024  # what one program may use on sm_90
IS_SM90 = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
needs_sm90 = pytest.mark.skipif(not IS_SM90, reason="needs a GPU of compute capability 9.0")
pytestmark = pytest.mark.usefixtures("poisoned_empty")
# A thread holds the weights of tokens 2t, 2t+1, 8+2t and 8+2t+1 of 16 side by side.
ORDER = torch.arange(SIZE).reshape(8, 2, 4, 2).transpose(1, 2).flatten()


def rounded(x):
    """x [fp32] as e4m3 holds it."""
    return x.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float()


def quantised_by_torch(q, k, v):
    """q, k - mean key and v as FP8 with their scales holds them, fp32; and the mean key [B, Hkv, 1, D]."""
    q, k, v = q.float(), k.float(), v.float()
    mean = k.mean(2, keepdim=True)

    def by_block(x, offset):
        blocks = (torch.arange(x.shape[2], device=x.device) + offset) // SIZE - offset // SIZE
        scales = torch.zeros(*x.shape[:2], int(blocks[-1]) + 1, device=x.device)
        scales.scatter_reduce_(2, blocks.expand(x.shape[:3]), x.abs().amax(-1), "amax")
        scales = (scales / LARGEST)[..., blocks, None]
        return rounded(x / scales) * scales

    v_scales = v.abs().amax(2, keepdim=True) / LARGEST
    return by_block(q, k.shape[2] - q.shape[2]), by_block(k - mean, 0), rounded(v / v_scales) * v_scales, mean


@pytest.mark.parametrize("num_queries, num_keys, head_dim", [(300, 300, 64), (100, 261, 128), (1, 130, 64)])
def test_quantisation_equals_torch(num_queries, num_keys, head_dim):
    from stem.kernels.fp8_quantize import quantize

    q, k, v = random_inputs(4, 2, num_queries, num_keys, head_dim, batch=2)
    k[..., 0] += 30  # an outlier that all keys share
    lse = torch.empty(q.shape[:3], device=DEVICE)
    (q8, q_scales), (k8, k_scales), (v8, v_scales) = quantize(q, k, v, SIZE, 0.3, lse)
    expected_q, expected_k, expected_v, mean = quantised_by_torch(q, k, v)
    offset = num_keys - num_queries
    q_blocks = (torch.arange(num_queries, device=DEVICE) + offset) // SIZE - offset // SIZE
    k_blocks = torch.arange(num_keys, device=DEVICE) // SIZE
    found_q = q8.float() * q_scales[..., q_blocks, None] / (0.3 * math.log2(math.e))
    found_k = k8.float() * k_scales[..., k_blocks, None]
    tiles = v8.float().reshape(2, 2, -1, head_dim, SIZE)[..., ORDER.argsort()]
    found_v = tiles.transpose(3, 4).reshape(2, 2, -1, head_dim) * v_scales[:, :, None]
    assert not found_v[:, :, num_keys:].any(), "missing tokens are 0"
    for found, expected in ((found_q, expected_q), (found_k, expected_k), (found_v[:, :, :num_keys], expected_v)):
        errors = (found - expected).abs()
        if DEVICE == "cpu":  # Triton's interpreter halves what rounds up to a power of two
            halved = torch.isclose(found * 2, expected, rtol=1e-5) & (expected != 0)
            assert halved.float().mean() < 0.05
            errors = errors.where(~halved, 0)
        steps = errors / expected.abs().amax()
        assert (steps > 1e-6).float().mean() < 1e-3, "all but ties at a rounding step are equal"
        assert steps.max() < 2**-4
    assert k_scales.max() < 0.1, "the shared outlier costs no bits"
    by_mean = 0.3 * (q * mean.repeat_interleave(2, 1)).sum(-1)
    torch.testing.assert_close(lse, by_mean, rtol=1e-4, atol=1e-4)


@needs_sm90
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "batch, heads, kv_heads, num_queries, num_keys, head_dim",
    [(1, 4, 2, 1024, 1024, 128), (2, 6, 2, 777, 2001, 128), (1, 3, 1, 3000, 3000, 64), (1, 2, 2, 1, 129, 64)],
)
def test_it_attends_to_the_quantised_tensors(batch, heads, kv_heads, num_queries, num_keys, head_dim, dtype):
    from stem.kernels.fp8_forward import sparse_forward

    q, k, v = random_inputs(heads, kv_heads, num_queries, num_keys, head_dim, dtype, batch)
    k[..., :3] += 8
    mask = random_mask(batch, heads, num_queries, num_keys, SIZE)
    lists = lists_of(mask)
    out, lse = sparse_forward(q, k, v, *lists, SIZE, head_dim**-0.5)
    selection = stem.BlockSelection(*lists, SIZE, mask.shape[-1], num_queries, num_keys)
    quantised = quantised_by_torch(q, k, v)
    expected, expected_lse = stem.block_sparse_attention(*quantised[:3], selection, impl="torch", return_lse=True)
    mean = quantised[3].repeat_interleave(heads // kv_heads, 1)
    expected_lse = expected_lse + (q.float() * mean).sum(-1) * head_dim**-0.5
    error = (out.float() - expected).norm() / expected.norm()
    assert error < 0.03, f"weights round to 3 bits, their sum does not: {error}"
    assert (lse - expected_lse).abs().max() < 0.01
    exact = stem.block_sparse_attention(q.float(), k.float(), v.float(), selection, impl="torch")
    assert (out.float() - exact).norm() / exact.norm() < 0.07


@needs_sm90
def test_peaks_and_empty_rows():
    from stem.kernels.fp8_forward import sparse_forward

    q, k, v = random_inputs(2, 1, 1024, 1024, 128, torch.bfloat16)
    k[:, :, 300] = q[:, :1, 900] * 4  # one key takes nearly all weight of some rows
    mask = torch.ones(1, 2, 8, 8, dtype=torch.bool, device=DEVICE).tril()
    mask[0, 1, 3] = False
    out, lse = sparse_forward(q, k, v, *lists_of(mask), SIZE, 128**-0.5)
    assert not out[0, 1, 384:512].any() and (lse[0, 1, 384:512] == -math.inf).all()
    torch.testing.assert_close(out[0, 0, 900].float(), v[0, 0, 300].float(), rtol=0.1, atol=0.05)


@needs_sm90
def test_config_runs_it_and_replays_it():
    config = stem.StemConfig(density=0.5, compute="fp8")
    q, k, v = random_inputs(8, 2, 2048, 2048, 128, torch.bfloat16)
    outs = [stem.stem_attention(q, k, v, config) for _ in range(4)]
    assert all(torch.equal(outs[0], out) for out in outs)
    plain = stem.stem_attention(q, k, v, config.replace(compute="input"))
    assert 1e-3 < (outs[0] - plain).norm() / plain.norm() < 0.07
    selection = stem.stem_attention(q, k, v, config, return_selection=True)[1]
    assert torch.equal(outs[0], stem.block_sparse_attention(q, k, v, selection, impl="hopper_fp8"))
    with pytest.raises(NotImplementedError, match="no backward"):
        stem.stem_attention(q.requires_grad_(), k, v, config)


def test_what_it_does_not_cover():
    q, k, v = random_inputs(2, 1, 128, 128, 64)
    fp8 = stem.StemConfig(compute="fp8")
    with pytest.raises(ValueError, match="hopper_fp8.*does not cover"):
        stem.stem_attention(q, k, v, fp8)
    with pytest.raises(ValueError, match="impl='torch' does not compute in FP8"):
        stem.stem_attention(q, k, v, fp8, impl="torch")
    with pytest.raises(ValueError, match="compute must be one of 'input', 'fp8'"):
        stem.StemConfig(compute="int8")


def test_plan(monkeypatch):
    from stem.kernels import hopper_forward

    from stem.planning import Plan, Problem

    monkeypatch.setattr(hopper_forward, "is_sm90", lambda device: True)
    sizes = 1, 32, 8, 1024, 1024, 128
    options = dict(dtype=torch.bfloat16, device=torch.device("cuda:0"), scale=1.0, dense_kernel="cudnn")
    for compute, path, impl in (("input", "dense", "hopper"), ("fp8", "lists", "hopper_fp8")):
        config = stem.StemConfig(density=1.0, compute=compute, dense_up_to=512)
        plan = Plan(Problem(*sizes[:3], 512, 512, 128, config=config, **options))
        assert (plan.path, plan.impl) == (path, impl)
    assert 'impl="hopper_fp8" attends' in plan.explain() and plan.is_repeatable


def compile_for_sm90(head_dim):
    """Compile ahead of time; bytes of shared memory, and whether registers spill."""
    import triton
    from stem.kernels import fp8_forward, hopper_forward
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    def tile(rows, columns):
        return f"tensordesc<fp8e4nv[1, 1, {rows}, {columns}],{fp8_forward.LAYOUTS[columns]!r}>"

    kernel = fp8_forward.fp8_forward_kernel
    types = dict(
        q_desc=tile(64, head_dim), k_desc=tile(128, head_dim), v_desc=tile(head_dim, 128), out_ptr="*bf16",
        kv_indices_ptr="*i32", kv_num_blocks_ptr="*i32", scratch_ptr="*i32",
    )  # fmt: skip
    names = kernel.arg_names
    types = {name: types.get(name, "*fp32" if name.endswith("_ptr") else "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name.endswith("_ptr")}
    source = GluonASTSource(kernel, types, {}, aligned)
    options = {"num_warps": 4, "maxnreg": hopper_forward.LAUNCH_REGISTERS}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return compiled.metadata.shared, ".local" in compiled.asm["ptx"]


@pytest.mark.slow
def test_it_compiles_for_sm90(tmp_path):
    pytest.importorskip("triton.backends.nvidia")
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    process = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr[-3000:]
    shared, local = zip(*json.loads(process.stdout), strict=True)
    assert max(shared) <= SHARED_MEMORY_BYTES and not any(local)


if __name__ == "__main__":
    print(json.dumps([compile_for_sm90(head_dim) for head_dim in (64, 128)]))

"""Blocks of 64 on sm_90, where the two heads of a pair share their lists: against the oracle, and ahead of time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sparse_inputs import DEVICE, inputs_with_late_maxima, lists_of, oracle, random_inputs, random_mask

import stem
from stem.planning import plan_for

IS_SM90 = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
needs_sm90 = pytest.mark.skipif(not IS_SM90, reason="needs a GPU of compute capability 9.0")
CASES = {  # q heads, KV heads, queries, keys, D, share of the blocks
    "whole": (4, 2, 1024, 1024, 128, 0.4),
    "odd-lengths": (4, 1, 1001, 1001, 128, 0.4),
    "narrow": (8, 2, 900, 900, 64, 0.3),
    "chunk": (2, 1, 333, 2001, 128, 0.3),
    "one-block": (2, 1, 50, 50, 128, 1.0),
    "everything": (4, 2, 700, 700, 128, 1.0),
    "many-tasks": (16, 4, 5000, 5000, 128, 0.1),
}


def check(q, k, v, mask, scale, rtol):
    from stem.kernels.pairs_forward import sparse_forward

    lists = lists_of(mask.repeat_interleave(q.shape[1] // mask.shape[1], 1))
    expected, expected_lse = oracle(q, k, v, mask.repeat_interleave(q.shape[1] // mask.shape[1], 1), 64, scale)
    for _ in range(2):  # the second launch finds the counters as the first one left them
        out, lse = (x.cpu().double() for x in sparse_forward(q, k, v, *lists, 64, scale))
        finite = expected_lse.isfinite()
        assert torch.equal(lse.isfinite(), finite) and out.isfinite().all()
        assert (out - expected).norm() <= rtol * expected.norm()
        torch.testing.assert_close(lse[finite], expected_lse[finite], rtol=1e-5, atol=1e-3)


@needs_sm90
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("poisoned_empty")
def test_equals_the_oracle(case, dtype):
    *sizes, keep = CASES[case]
    _, kv_heads, queries, keys, head_dim = sizes
    mask = random_mask(1, kv_heads, queries, keys, 64, diagonal=keep == 1.0, keep=keep)
    if queries > 64:
        mask[:, 0, 0] = False  # a row without blocks
    check(*random_inputs(*sizes, dtype), mask, head_dim**-0.5, 1e-3 if dtype == torch.float16 else 6e-3)


@needs_sm90
@pytest.mark.parametrize("boost, scale", [(1.0, -0.1), (100.0, 0.3)])
def test_negative_scales_and_late_maxima(boost, scale):
    q, k, v = inputs_with_late_maxima(boost, 1024, 128, torch.bfloat16)
    check(q, k, v, random_mask(1, 1, 1024, 1024, 64, keep=0.6), scale, 6e-3)


@needs_sm90
@pytest.mark.parametrize("preset", ["paper", "adaptive"])
def test_a_plan_of_groups_runs_it(preset):
    q, k, v = (torch.randn(1, heads, 6000, 128, device=DEVICE, dtype=torch.bfloat16) for heads in (8, 2, 2))
    options = dict(density=0.3) if preset == "paper" else dict(threshold=0.01, dense_up_to=0)
    for dropped in ("skip", "mean"):
        config = stem.StemConfig.preset(preset, block_size=64, lists="group", dropped=dropped, **options)
        assert plan_for(q, k, v, config).impl == "hopper"
        expected = stem.stem_attention(q, k, v, config, impl="triton").float()
        for _ in range(3):  # replayed
            found = stem.stem_attention(q, k, v, config).float()
            assert (found - expected).norm() < 1e-2 * expected.norm()


def compile_for_sm90(head_dim):
    """Compile ahead of time, as a launch with aligned pointers would; bytes of shared memory."""
    import triton
    from stem.kernels import hopper_forward, pairs_forward
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    tile = f"tensordesc<bf16[1, 1, 64, {head_dim}],{hopper_forward.TMA_LAYOUT!r}>"
    kernel = pairs_forward.pairs_forward_kernel
    types = dict(
        q_desc=tile, k_desc=tile, v_desc=tile, out_ptr="*bf16", lse_ptr="*fp32", kv_indices_ptr="*i32",
        kv_num_blocks_ptr="*i32", scratch_ptr="*i32", scale="fp32",
    )  # fmt: skip
    names = kernel.arg_names
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types.get(name, "").startswith("*")}
    source = GluonASTSource(kernel, {name: types.get(name, "i32") for name in names}, {}, aligned)
    options = {"num_warps": 4, "maxnreg": hopper_forward.LAUNCH_REGISTERS}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).metadata.shared


def test_it_compiles_for_sm90(tmp_path):
    pytest.importorskip("triton.backends.nvidia")
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": path}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert all(0 < shared <= 232_448 for shared in json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    print(json.dumps([compile_for_sm90(head_dim) for head_dim in (64, 128)]))

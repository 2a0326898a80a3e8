"""No kernel reads or writes outside its tensors: small prompts of odd shapes under NVIDIA's compute-sanitizer.

The tool runs a process of its own: this file is both the test and that process. Each tensor is an allocation of its own
there, so that a step over its end is seen.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SHAPES = [((14, 2, 64), 1000), ((12, 2, 128), 333), ((64, 8, 128), 650), ((9, 3, 64), 129), ((4, 4, 80), 77)]
CONFIGS = {
    "density": dict(density=0.4),
    "paper": dict(preset="paper", min_blocks=2),
    "adaptive": dict(preset="adaptive", dense_up_to=0, threshold=0.2),
    "adaptive, means": dict(preset="adaptive", dense_up_to=0, threshold=0.2, dropped="mean"),
    "cells": dict(density=0.4, dropped="cells"),
    "blocks of 64": dict(density=0.4, block_size=64),
    "groups, blocks of 64": dict(density=0.4, block_size=64, lists="group"),
    "FP8": dict(density=0.4, compute="fp8"),
    "every block": dict(density=1.0),
}
FOUND = Path(shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer")


def run(name: str) -> None:
    """Prefill three times, the last one replayed, then a chunk, and gradients where there are some."""
    import stem

    changes = dict(sink_blocks=1, local_blocks=1) | CONFIGS[name]
    preset = changes.pop("preset", None)
    config = stem.StemConfig.preset(preset, **changes) if preset else stem.StemConfig(**changes)
    for (q_heads, kv_heads, head_dim), tokens in SHAPES:
        if config.compute == "fp8" and head_dim not in (64, 128):
            continue
        heads = q_heads, kv_heads, kv_heads
        q, k, v = (torch.randn(1, number, tokens, head_dim, device="cuda").bfloat16() for number in heads)
        outs = [stem.stem_attention(q, k, v, config) for _ in range(3)]
        assert all(torch.equal(out, outs[0]) for out in outs) and outs[0].isfinite().all()
        assert stem.stem_attention(q[:, :, -50:], k, v, config).isfinite().all()
        if config.compute == "input" and config.dropped == "skip":
            inputs = [x.requires_grad_() for x in (q, k, v)]
            found = torch.autograd.grad(stem.stem_attention(*inputs, config).sum(), inputs)
            assert all(x.isfinite().all() for x in found)


@pytest.mark.skipif(not torch.cuda.is_available() or not FOUND.is_file(), reason="needs a GPU and compute-sanitizer")
@pytest.mark.parametrize("name", CONFIGS)
def test_no_access_outside_a_tensor(name):
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    tool = [FOUND, "--tool", "memcheck", "--target-processes", "all", "--error-exitcode", "9"]
    command = [*tool, sys.executable, __file__, name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    told = done.stdout + done.stderr
    if "Device not supported" in told:
        pytest.skip("compute-sanitizer does not support this machine")
    assert done.returncode == 0 and "ERROR SUMMARY: 0 errors" in told, told[-3000:]


if __name__ == "__main__":
    run(sys.argv[1])

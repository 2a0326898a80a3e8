"""Kernels are compiled again for rows of another size, a power of two, or another alignment, and no other length.

The variants are counted as Triton would choose them on an H100, without a GPU and without compiling. That needs a
process of its own, because Triton interprets or compiles, and decides when it is imported: this file is both the test
and that process.
"""

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from collections import defaultdict

import pytest
import torch

PRESETS = ("paper", "angelslim", "hpc_ops", "adaptive")
ADDED = {"adaptive": dict(dense_up_to=0)}  # else short prompts choose nothing
# Tokens, in blocks of 128: at and beside multiples of 16 tokens, 65 to 127 blocks but no multiple of 16; all others.
SAME_ROWS = (8320, 9001, 10368, 12007, 12416, 14464, 15999)
OTHERS = (1000, 1237, 2048, 2500, 4097, 5503, 8191, 16384, 20011, 24593, 32768, 40009, 65537)
TWICE = ("pair_cells_kernel", "pair_tokens_kernel", "pool_select_kernel")  # for flagged tiles; for cells and tokens
MOST = dict(select_topk_kernel=5, pool_select_kernel=16, score_select_kernel=2)  # rows of 8 to 1024 blocks
MOST |= dict(score_blocks_kernel=4, pair_cells_kernel=4, pair_tokens_kernel=2)  # two tiles, or flags, and alignments


def count_variants(preset, *several_lengths):
    """Variants by kernel, so far, after the calls of each tuple of lengths, with launches that only note them."""
    import stem.kernels
    import triton
    from stem.kernels.launch import with_descriptors
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import compute_cache_key

    import stem
    import stem.planning

    class Hopper:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = staticmethod(lambda: 0)

    def note(kernel, grid, tensors, numbers, *, overlap=False, **constants):
        *_, binder = kernel.device_caches[0]
        options = constants | dict(debug=False, instrumentation_mode=triton.knobs.compilation.instrumentation_mode)
        _, specialization, options = binder(*with_descriptors(tensors), *numbers, **options)
        variants[kernel.fn.__name__].add(compute_cache_key({}, specialization, options))

    variants = defaultdict(set)
    driver.set_active(Hopper())
    stand_ins = dict(launch=note, at_least_sm90=lambda device: True, num_multiprocessors=lambda device: 132)
    stand_ins |= dict(current_stream=lambda device: 0, unsupported=lambda *problem: "")
    for module in pkgutil.iter_modules(stem.kernels.__path__):
        module = importlib.import_module(f"stem.kernels.{module.name}")
        for name in stand_ins.keys() & vars(module).keys():
            setattr(module, name, stand_ins[name])
    torch.cuda.is_current_stream_capturing = lambda: False
    stem.planning.check_finite = lambda **tensors: None  # of memory that nobody writes
    for lengths in several_lengths:
        for tokens in lengths:
            q, k, v = (torch.empty(1, heads, tokens, 128, dtype=torch.bfloat16) for heads in (4, 2, 2))
            stem.stem_attention(q, k, v, stem.StemConfig.preset(preset, **ADDED.get(preset, {})), impl="hopper")
        yield {name: len(found) for name, found in variants.items()}


@pytest.mark.parametrize("preset", PRESETS)
def test_lengths_do_not_compile_again(preset):
    command, environment = [sys.executable, __file__, preset], os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    same_rows, everything = json.loads(done.stdout)
    assert same_rows == {name: 2 if name in TWICE else 1 for name in same_rows} and "hopper_forward_kernel" in same_rows
    assert all(count <= MOST.get(name, 1) for name, count in everything.items()), everything


if __name__ == "__main__":
    print(json.dumps(list(count_variants(sys.argv[1], SAME_ROWS, OTHERS))))

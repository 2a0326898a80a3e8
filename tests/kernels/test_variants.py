"""A first call compiles every variant of its kernels that prompts of other lengths need.

The variants are those that Triton would choose on an H100, without a GPU and without compiling. That needs a process of
its own, because Triton interprets or compiles, and decides when it is imported: this file is both the test and that
process.
"""

import importlib
import json
import os
import pkgutil
import subprocess
import sys

import pytest
import torch

CHOOSES = dict(dense_up_to=0)  # else short prompts of "adaptive" choose nothing
CONFIGS = {name: (name, {}) for name in ("paper", "angelslim", "hpc_ops")} | {
    "adaptive": ("adaptive", CHOOSES),
    "adaptive, groups": ("adaptive", CHOOSES | dict(lists="group")),
    "adaptive, means": ("adaptive", CHOOSES | dict(dropped="mean")),
    "means": ("paper", dict(dropped="mean")),
    "cells": ("paper", dict(dropped="cells")),
    "FP8": ("paper", dict(compute="fp8")),
    "groups": ("paper", dict(lists="group")),
    "groups, blocks of 64": ("paper", dict(lists="group", block_size=64)),
}
LENGTHS = 1000, 1237, 2048, 2500, 4097, 5503, 8191, 8320, 9001, 10368, 12007, 15999, 16384, 20011, 32768, 40009, 65537
LENGTHS += (131072,)
LONGER = 131073, 200_000  # tokens; more than 1,024 blocks, so that kernels of rows of 2,048 are added once
FIRST = 2500, 8191, 12007  # tokens; scores choose blocks from there on
OF_VALUES = "means_kernel", "masks_kernel", "statistics_kernel", "reduce_kernel", "quantize_kernel"  # of means, of FP8
CASES = [(name, first) for name in CONFIGS for first in FIRST if first == 12007 or name in ("paper", "adaptive")]
CASES += [("angelslim", 8191), ("hpc_ops", 8191)]


def variants_of(name, *lengths):
    """Variants by kernel that the first of these lengths compiles, and those that each of the others adds.

    Lengths are of blocks of 128; for blocks of 64 they are halved.
    """
    import stem.kernels
    import triton
    from stem.kernels.launch import COMPILE, with_descriptors
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import compute_cache_key

    import stem
    import stem.planning

    class Hopper:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = staticmethod(lambda: 0)

    def note(kernel, grid, tensors, numbers, *, overlap=False, also=None, **constants):
        *_, binder = kernel.device_caches[0]
        for of_length, others in ((numbers, constants), *(also() if also and COMPILE.get() else ())):
            options = others | dict(debug=False, instrumentation_mode=triton.knobs.compilation.instrumentation_mode)
            _, specialization, options = binder(*with_descriptors(tensors), *of_length, **options)
            found.add((kernel.fn.__name__, compute_cache_key({}, specialization, options)))

    driver.set_active(Hopper())
    stand_ins = dict(launch=note, at_least_sm90=lambda device: True, num_multiprocessors=lambda device: 132)
    stand_ins |= dict(current_stream=lambda device: 0, unsupported=lambda *problem: "", is_sm90=lambda device: True)
    for module in pkgutil.iter_modules(stem.kernels.__path__):
        module = importlib.import_module(f"stem.kernels.{module.name}")
        for attribute in stand_ins.keys() & vars(module).keys():
            setattr(module, attribute, stand_ins[attribute])
    torch.cuda.is_current_stream_capturing = lambda: False
    stem.planning.check_finite = lambda **tensors: None  # of memory that nobody writes
    known, token = set(), COMPILE.set(note)
    preset, changes = CONFIGS[name]
    config = stem.StemConfig.preset(preset, **changes)
    for tokens in lengths:
        found, tokens = set(), -(-tokens * config.block_size // 128)
        q, k, v = (torch.empty(1, heads, tokens, 128, dtype=torch.bfloat16) for heads in (4, 2, 2))
        stem.stem_attention(q, k, v, config, impl="hopper_fp8" if config.compute == "fp8" else "hopper")
        yield [name for name, _ in sorted(found - known)]
        known |= found
        if token:
            COMPILE.reset(token)
            token = None


@pytest.mark.parametrize("name, first", CASES)
def test_lengths_do_not_compile_again(name, first):
    command, environment = [sys.executable, __file__, name, str(first)], os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    at_first, *later = json.loads(done.stdout)
    assert {"hopper_forward_kernel", "pairs_forward_kernel", "fp8_forward_kernel"} & set(at_first)
    assert len([kernel for kernel in at_first if kernel not in OF_VALUES]) < 16
    *later, added, again = later
    assert [(tokens, new) for tokens, new in zip(LENGTHS, later, strict=True) if new] == []
    assert {"select_topk_kernel", "pool_select_kernel"} & set(added) and len(added) <= 2 and again == []


def test_score_select_has_two_sizes_of_rows():
    from stem.kernels.common import row_size
    from stem.kernels.score_select import select_constants

    sizes = [select_constants(blocks, 2, torch.device("cpu"))["ROW_SIZE"] for blocks in (1, 16, 17, 32, 33, 5000)]
    assert sizes == [16, 16, 32, 32, 32, 32]
    blocks = (1, 64, 65, 256, 257, 1024, 1025, 2048, 2049, 8192, 8193)
    assert [row_size(n) for n in blocks] == [64, 64, 256, 256, 1024, 1024, 2048, 2048, 4096, 8192, 16384]


if __name__ == "__main__":
    print(json.dumps(list(variants_of(sys.argv[1], int(sys.argv[2]), *LENGTHS, *LONGER))))

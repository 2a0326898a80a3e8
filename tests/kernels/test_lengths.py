"""A first call compiles what prompts of all lengths need."""

import pytest
import torch
from stem.kernels import launch as module

import stem
from stem.planning import Plan, Problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = 700, 1500, 2304, 4096, 5500, 8192, 12007, 40009, 100_000  # tokens


def compiled(config, tokens):
    """Kernels and constants that a first call compiles, and whether 16 divides the number of key blocks."""
    q, k, v = (torch.zeros(1, heads, tokens, 64, dtype=torch.float16, device=DEVICE) for heads in (4, 2, 2))
    found = set()

    def note(key, kernel, grid, tensors, numbers, constants):
        name = kernel.fn.__name__
        blocks = {"score_blocks_kernel": 2, "pair_cells_kernel": 4}
        aligned = name in blocks and numbers[blocks[name]] % 16 == 0
        found.add((name, tuple(constants.items()), aligned))

    token = module.COMPILE.set(note)
    try:
        Plan(Problem.of(q, k, v, config, None, "triton", None, True, False, False)).choose(q, k, v)
    finally:
        module.COMPILE.reset(token)
    return found


@pytest.mark.parametrize("name", ["paper", "angelslim", "hpc_ops", "adaptive"])
def test_no_length_needs_another_kernel(name):
    config = stem.StemConfig.preset(name).replace(dense_up_to=0) if name == "adaptive" else stem.StemConfig.preset(name)
    of_lengths = [compiled(config, tokens) for tokens in LENGTHS]
    of_lengths = [found for found in of_lengths if found]  # others keep every block
    assert len(of_lengths) > 3 and all(found == of_lengths[-1] for found in of_lengths)

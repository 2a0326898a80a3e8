"""Time of the adaptive selection beside the whole operator, on a GPU: writes results/long_context/selection_cost/."""

from __future__ import annotations

import argparse
from functools import partial

import torch

from stem.attention import stem_attention
from stem.config import StemConfig
from stem.experiments import records
from stem.planning import select
from stem.scores import block_scores


@torch.no_grad()
def rows(lengths: tuple[int, ...] = (2**15, 2**17), density: float = 0.25, seed: int = 0) -> list[dict]:
    """Time and memory of the preset "adaptive" at the attention shape of Llama-3.1-8B, on random normal inputs.

    Returns:
        A row per length: tokens, block_size, density, threshold (of a block's share; `density` of the causal blocks
        exceed it), selection_ms (scores and selection), operator_ms (all of stem_attention), share (selection_ms /
        operator_ms), peak_memory_mib of the selection.
    """
    from triton.testing import do_bench

    found = []
    for tokens in lengths:
        generator = torch.Generator("cuda").manual_seed(seed)
        q, k, v = (
            torch.randn(1, heads, tokens, 128, device="cuda", dtype=torch.bfloat16, generator=generator)
            for heads in (32, 8, 8)
        )
        config = StemConfig.preset("adaptive")
        shares = block_scores(q, k, v, config)[0, ::8].exp()
        shares = shares[shares > 0]  # of the causal blocks
        config = config.replace(threshold=shares[:: len(shares) // 2**20 + 1].quantile(1 - density).item())

        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        choose = partial(select, q, k, v, config, q.shape[3] ** -0.5, None)
        realised = choose().density()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        selection = do_bench(choose, rep=200, return_mode="median")
        operator = do_bench(partial(stem_attention, q, k, v, config), rep=400, return_mode="median")
        times = dict(selection_ms=selection, operator_ms=operator, share=selection / operator)
        about = dict(tokens=tokens, block_size=config.block_size, density=realised, threshold=config.threshold)
        found.append(about | times | dict(peak_memory_mib=peak, seed=seed))
    return found


def main(options: argparse.Namespace) -> None:
    """Measure and write results/long_context/selection_cost/, or say that there is no GPU."""
    if torch.cuda.is_available():
        print("wrote", records.write_rows("long_context/selection_cost", rows(), options.profile))
    else:
        print("selection_cost is left out: it needs a CUDA GPU")

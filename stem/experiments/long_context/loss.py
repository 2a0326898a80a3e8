"""Selection quality: the loss that each method's blocks cost on documents, every layer sparse, beside its density.

`python -m stem.experiments.long_context.loss --profile full` writes results/long_context/loss/. Methods get the same
densities, and the settings and forced blocks of the published method; "adaptive" is this repository's selection
(StemConfig.preset "adaptive"), whose one threshold is solved on texts that no row reads.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from stem import hf, patterns, pretrained
from stem.attention import select, stem_attention
from stem.config import StemConfig
from stem.experiments import documents, records
from stem.experiments.long_context import comparison
from stem.hf.calibration import calibrate
from stem.scores import block_scores

PUBLISHED = "stem"  # the method of the paper: mean score, value term, Token Position-Decay
ADAPTIVE = "adaptive"
SAME = ("method", "block_size", "asked", "text", "tokens", "model")  # name what a row measured


@dataclass(frozen=True)
class Plan:
    """What to measure; `PLANS` holds the profiles."""

    names: tuple[str, ...]
    """Patterns, and "adaptive"."""

    tokens: int
    """Of each document window."""

    windows: int
    """Of each kind of document."""

    densities: tuple[float, ...]
    block_sizes: tuple[int, ...]
    kinds: tuple[str, ...] = tuple(documents.KINDS)

    adaptive_densities: tuple[float, ...] = ()
    """Densities of "adaptive" beside the common ones: half of what the published method gets."""


PLANS = {
    "smoke": Plan((PUBLISHED, "xattention", ADAPTIVE), 1024, 1, (0.31,), (32,), ("python source", "prose")),
    "full": Plan(
        tuple(name for name in patterns.names() if name != "dense") + (ADAPTIVE,),
        8192,
        1,
        (0.1, 0.16, 0.25, 0.31, 0.5),
        (128, 64, 32),
        adaptive_densities=(0.08, 0.155),
    ),
}


@torch.no_grad()
def rows(plan: Plan, model, tokenizer, name: str, seed: int = 0, show=print) -> Iterator[dict]:
    """A row per method, density, block size and kind of document.

    Args:
        plan: What to measure.
        model, tokenizer: From `stem.pretrained.load`.
        name: Of the model, for the rows.
        seed: Written into the rows; nothing here is drawn at random but the pattern "random", which has its own.
        show: Called with a progress line after each block size.
    Returns:
        Dicts with method, block_size, asked (density), density (realised), text (kind of document), windows, tokens,
        loss and dense_loss (mean over all positions), gap, gap_late (of the last three quarters) [nats per token].
    """
    started = time.monotonic()
    windows = comparison.document_windows(tokenizer, plan.tokens, plan.windows, plan.kinds)
    ids = torch.cat(list(windows.values()))
    with hf.stem_prefill(model, StemConfig(density=1.0)):  # through the same kernels as the sparse passes
        dense = comparison.document_losses(model, ids)
    prompts = calibration_prompts(tokenizer, plan.tokens, plan.windows)
    for block_size in plan.block_sizes:
        for method in plan.names:
            densities = plan.densities + (plan.adaptive_densities if method == ADAPTIVE else ())
            for asked in densities:
                try:
                    attention = selector(method, asked, block_size, model, prompts)
                except ValueError as error:  # the forced blocks alone cost more at this length
                    show(f"{method} at density {asked}, blocks of {block_size}: {error}")
                    continue
                with hf.stem_prefill(model, attention) as report:
                    losses = comparison.document_losses(model, ids)
                about = dict(method=method, block_size=block_size, asked=asked, density=round(report.density(), 4))
                threshold = getattr(attention, "threshold", None)
                for index, kind in enumerate(windows):
                    of = slice(index * plan.windows, (index + 1) * plan.windows)
                    gap = losses[of] - dense[of]
                    late = gap[:, plan.tokens // 4 :]
                    numbers = dict(loss=losses[of], dense_loss=dense[of], gap=gap, gap_late=late)
                    numbers = {key: round(value.mean().item(), 5) for key, value in numbers.items()}
                    where = dict(text=kind, windows=plan.windows, tokens=plan.tokens)
                    yield {**about, **where, **numbers, "threshold": threshold, "model": name, "seed": seed}
        show(f"blocks of {block_size}: {time.monotonic() - started:.0f} s")


def selector(method: str, density: float, block_size: int, model, prompts) -> StemConfig | hf.Selector:
    """What `stem.hf.enable` takes for a method at a density; "adaptive" is calibrated on the prompts."""
    if method == ADAPTIVE:
        config = StemConfig.preset(ADAPTIVE, block_size=block_size, dense_up_to=0)
        return calibrate(model, prompts, density, config).config
    config = StemConfig.preset("paper", block_size=block_size, density=density)
    return config if method == PUBLISHED else partial(patterns.select, method, config=config)


def calibration_prompts(tokenizer, tokens: int, count: int) -> list[torch.Tensor]:
    """Windows int64 [count, tokens] of each text that no row reads."""
    texts = [tokenizer(text, verbose=False).input_ids for text in comparison.calibration_texts()]
    return [torch.tensor(documents.windows(of, tokens, count)) for of in texts]


@torch.no_grad()
def cost_rows(lengths: tuple[int, ...] = (2**15, 2**17), density: float = 0.25, seed: int = 0) -> list[dict]:
    """What the adaptive selection costs on a GPU, at the attention shape of Llama-3.1-8B and random normal inputs.

    Returns:
        A row per length: tokens, block_size, density, threshold (the share that `density` of the blocks exceed),
        selection_ms (scores and selection), operator_ms (all of stem_attention), share of the one in the other,
        peak_memory_mib of the selection.
    """
    from triton.testing import do_bench

    found = []
    for tokens in lengths:
        generator = torch.Generator("cuda").manual_seed(seed)
        q, k, v = (
            torch.randn(1, heads, tokens, 128, device="cuda", dtype=torch.bfloat16, generator=generator)
            for heads in (32, 8, 8)
        )
        config = StemConfig.preset(ADAPTIVE)
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


def main() -> None:
    """Measure and write results/long_context/loss/ and, on a GPU, results/long_context/selection_cost/.

    With only some methods or block sizes, the rows of the others stay.
    """
    parser = argparse.ArgumentParser(
        prog="python -m stem.experiments.long_context.loss", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--profile", choices=records.PROFILES, default="smoke")
    parser.add_argument("--model", default="smollm2", help="a name for stem.pretrained.load")
    only = dict(nargs="+", help="only these; other rows stay")
    parser.add_argument("--methods", metavar="NAME", choices=PLANS["full"].names, **only)
    parser.add_argument("--block_sizes", metavar="TOKENS", type=int, choices=PLANS["full"].block_sizes, **only)
    options = parser.parse_args()
    plan, same = PLANS[options.profile], SAME if options.methods or options.block_sizes else None
    names, block_sizes = tuple(options.methods or plan.names), tuple(options.block_sizes or plan.block_sizes)
    plan = replace(plan, names=names, block_sizes=block_sizes)
    write = partial(records.write_rows, "long_context/loss", profile=options.profile, same=same)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model, tokenizer = pretrained.load(options.model, dtype=dtype)
    if torch.cuda.is_available():
        print("wrote", records.write_rows("long_context/selection_cost", cost_rows(), options.profile))
    found = []
    for row in rows(plan, model, tokenizer, Path(model.name_or_path).name):
        found.append(row)
        if len(found) % 25 == 0:  # a run that is cut short leaves what it measured
            write(found)
    print("wrote", write(found))


if __name__ == "__main__":
    main()

"""Loss of every method on documents, beside the density that it computed: writes results/long_context/loss/.

Every layer is sparse. All methods get the same densities, and the settings and forced blocks of the published method.
"adaptive" is this repository's selection, `StemConfig.preset("adaptive")`; its one threshold is solved on texts that no
row reads.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from stem import hf, patterns
from stem.config import StemConfig
from stem.experiments import documents, records
from stem.experiments.long_context.measures import document_losses, load
from stem.experiments.long_context.samples import calibration_windows, document_windows
from stem.hf.calibration import calibrate

PUBLISHED = "stem"  # the method of the paper: mean score, value term, Token Position-Decay
ADAPTIVE = "adaptive"
SAME = ("method", "block_size", "asked", "text", "tokens", "model")  # columns that name a row


@dataclass(frozen=True)
class LossStudy:
    """Methods, windows, densities and block sizes to measure."""

    names: tuple[str, ...]  # patterns, and "adaptive"
    tokens: int  # length of a document window [tokens]
    windows: int  # windows of each kind of document
    densities: tuple[float, ...]
    block_sizes: tuple[int, ...]
    kinds: tuple[str, ...] = tuple(documents.KINDS)

    adaptive_densities: tuple[float, ...] = ()  # further densities of "adaptive": half of the published method's


STUDIES = {
    "smoke": LossStudy((PUBLISHED, "xattention", ADAPTIVE), 1024, 1, (0.31,), (32,), ("python source", "prose")),
    "full": LossStudy(
        (*(name for name in patterns.names() if name != "dense"), ADAPTIVE), 8192, 1, (0.1, 0.16, 0.25, 0.31, 0.5),
        (128, 64, 32), adaptive_densities=(0.08, 0.155),
    ),
}  # fmt: skip


@torch.no_grad()
def rows(study: LossStudy, model, tokenizer, name: str, seed: int = 0, show: Callable = print) -> Iterator[dict]:
    """A row per method, density, block size and kind of document.

    Args:
        model, tokenizer, name: From `stem.pretrained.load`, and the model's name in the rows.
        seed: Written into the rows. Only the pattern "random" draws at random, from its own seed.
    Returns:
        Dicts with method, block_size, asked (density), density (computed), text (kind of document), windows, tokens,
        loss and dense_loss (means over all positions), gap (their difference), gap_late (gap of the last three
        quarters) [nats per token], threshold, model, seed.
    """
    started = time.monotonic()
    windows = document_windows(tokenizer, study.tokens, study.windows, study.kinds)
    ids = torch.cat(list(windows.values()))
    with hf.stem_prefill(model, StemConfig(density=1.0)):  # through the same kernels as the sparse passes
        dense = document_losses(model, ids)
    prompts = calibration_windows(tokenizer, study.tokens, study.windows)
    for block_size in study.block_sizes:
        for method in study.names:
            for asked in study.densities + (study.adaptive_densities if method == ADAPTIVE else ()):
                try:
                    attention = selector(method, asked, block_size, model, prompts)
                except ValueError as error:  # the forced blocks alone exceed the density at this length
                    show(f"{method} at density {asked}, blocks of {block_size}: {error}")
                    continue
                with hf.stem_prefill(model, attention) as report:
                    losses = document_losses(model, ids)
                about = dict(method=method, block_size=block_size, asked=asked, density=round(report.density(), 4))
                last = dict(threshold=getattr(attention, "threshold", None), model=name, seed=seed)
                for kind, *of in zip(windows, losses.split(study.windows), dense.split(study.windows), strict=True):
                    gap = of[0] - of[1]
                    numbers = dict(loss=of[0], dense_loss=of[1], gap=gap, gap_late=gap[:, study.tokens // 4 :])
                    numbers = {key: round(value.mean().item(), 5) for key, value in numbers.items()}
                    yield about | dict(text=kind, windows=study.windows, tokens=study.tokens) | numbers | last
        show(f"blocks of {block_size}: {time.monotonic() - started:.0f} s")


def selector(
    method: str, density: float, block_size: int, model, prompts: Sequence[Tensor]
) -> StemConfig | hf.Selector:
    """A method at a density, as `stem.hf.enable` takes it; "adaptive" is calibrated on the prompts."""
    if method == ADAPTIVE:
        config = StemConfig.preset(ADAPTIVE, block_size=block_size, dense_up_to=0)
        return calibrate(model, prompts, density, config).config
    config = StemConfig.preset("paper", block_size=block_size, density=density)
    return config if method == PUBLISHED else partial(patterns.select, method, config=config)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    full = STUDIES["full"]
    parser.add_argument("--model", default="smollm2", help="name for stem.pretrained.load (default: %(default)s)")
    parser.add_argument("--methods", metavar="NAME", nargs="+", choices=full.names, help="measure only these methods")
    sizes = dict(metavar="TOKENS", nargs="+", type=int, choices=full.block_sizes)
    parser.add_argument("--block-sizes", **sizes, help="measure only these sizes")


def main(options: argparse.Namespace) -> None:
    """Measure and write results/long_context/loss/; with --methods or --block-sizes, the other rows stay."""
    chosen = dict(names=options.methods, block_sizes=options.block_sizes)
    chosen = {name: tuple(values) for name, values in chosen.items() if values}
    study, same = replace(STUDIES[options.profile], **chosen), SAME if chosen else None
    write = partial(records.write_rows, "long_context/loss", profile=options.profile, same=same)
    found = []
    for row in rows(study, *load(options.model)):
        found.append(row)
        if len(found) % 25 == 0:  # a run that is cut short leaves what it measured
            write(found)
    print("wrote", write(found))

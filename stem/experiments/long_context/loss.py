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
from pathlib import Path

import torch
from torch import Tensor

from stem import hf, patterns, pretrained
from stem.config import StemConfig
from stem.experiments import documents, records
from stem.experiments.long_context.measures import document_losses
from stem.experiments.long_context.samples import calibration_windows, document_windows
from stem.experiments.losses import check_output_embedding
from stem.hf.calibration import calibrate

PUBLISHED = "stem"  # the method of the paper: mean score, value term, Token Position-Decay
ADAPTIVE = "adaptive"
SAME = ("method", "block_size", "asked", "text", "tokens", "model")  # columns that name a row


@dataclass(frozen=True)
class LossStudy:
    """Methods, windows, densities and block sizes to measure."""

    names: tuple[str, ...]
    """Patterns, and "adaptive"."""

    tokens: int
    """Length of a document window [tokens]."""

    windows: int
    """Windows of each kind of document."""

    densities: tuple[float, ...]
    block_sizes: tuple[int, ...]
    kinds: tuple[str, ...] = tuple(documents.KINDS)

    adaptive_densities: tuple[float, ...] = ()
    """Further densities of "adaptive": half of the published method's."""


STUDIES = {
    "smoke": LossStudy((PUBLISHED, "xattention", ADAPTIVE), 1024, 1, (0.31,), (32,), ("python source", "prose")),
    "full": LossStudy(
        tuple(name for name in patterns.names() if name != "dense") + (ADAPTIVE,),
        8192,
        1,
        (0.1, 0.16, 0.25, 0.31, 0.5),
        (128, 64, 32),
        adaptive_densities=(0.08, 0.155),
    ),
}


@torch.no_grad()
def rows(study: LossStudy, model, tokenizer, name: str, seed: int = 0, show: Callable = print) -> Iterator[dict]:
    """A row per method, density, block size and kind of document.

    Args:
        study: Measurements to take.
        model, tokenizer: From `stem.pretrained.load`.
        name: Name of the model in the rows.
        seed: Written into the rows. Only the pattern "random" draws at random, from its own seed.
        show: Called with a progress line after each block size.
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
            densities = study.densities + (study.adaptive_densities if method == ADAPTIVE else ())
            for asked in densities:
                try:
                    attention = selector(method, asked, block_size, model, prompts)
                except ValueError as error:  # the forced blocks alone exceed the density at this length
                    show(f"{method} at density {asked}, blocks of {block_size}: {error}")
                    continue
                with hf.stem_prefill(model, attention) as report:
                    losses = document_losses(model, ids)
                about = dict(method=method, block_size=block_size, asked=asked, density=round(report.density(), 4))
                threshold = getattr(attention, "threshold", None)
                for index, kind in enumerate(windows):
                    of = slice(index * study.windows, (index + 1) * study.windows)
                    gap = losses[of] - dense[of]
                    late = gap[:, study.tokens // 4 :]
                    numbers = dict(loss=losses[of], dense_loss=dense[of], gap=gap, gap_late=late)
                    numbers = {key: round(value.mean().item(), 5) for key, value in numbers.items()}
                    where = dict(text=kind, windows=study.windows, tokens=study.tokens)
                    yield {**about, **where, **numbers, "threshold": threshold, "model": name, "seed": seed}
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
    """Add the options of this part to its parser."""
    full = STUDIES["full"]
    parser.add_argument("--model", default="smollm2", help="name for stem.pretrained.load (default: %(default)s)")
    parser.add_argument("--methods", metavar="NAME", nargs="+", choices=full.names, help="measure only these methods")
    parser.add_argument(
        "--block-sizes",
        metavar="TOKENS",
        nargs="+",
        type=int,
        choices=full.block_sizes,
        help="measure only these sizes",
    )


def main(options: argparse.Namespace) -> None:
    """Measure and write results/long_context/loss/; with --methods or --block-sizes, the other rows stay."""
    study, same = STUDIES[options.profile], SAME if options.methods or options.block_sizes else None
    names, block_sizes = tuple(options.methods or study.names), tuple(options.block_sizes or study.block_sizes)
    study = replace(study, names=names, block_sizes=block_sizes)
    write = partial(records.write_rows, "long_context/loss", profile=options.profile, same=same)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model, tokenizer = pretrained.load(options.model, dtype=dtype)
    check_output_embedding(model)
    found = []
    for row in rows(study, model, tokenizer, Path(model.name_or_path).name):
        found.append(row)
        if len(found) % 25 == 0:  # a run that is cut short leaves what it measured
            write(found)
    print("wrote", write(found))

"""Logits: errors on long texts, the paper's Table 1 and Fig. 3 where scores have a choice; see `rows`, `value_rows`.

Writes results/long_context/logits/. Every row is one window of text, so that differences are paired. `error` is the
mean squared difference of the logits to dense attention over all positions, `error_last` over the last quarter. Pruning
an earlier quarter reaches the last one only through what later layers read, so `error_last` is what travelled.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from stem import hf
from stem.config import StemConfig
from stem.experiments import records
from stem.experiments.long_context import measures, samples
from stem.experiments.theory.evidence import value_effect
from stem.experiments.theory.flow import captures, select_in_rows

SPANS = 4  # Fig. 3 prunes one quarter of the query blocks at a time
POSITIONS = 2048  # whose logits are in memory at the same time
KINDS = ("python source", "reStructuredText", "C++ headers")  # texts long enough for 8 windows of 16K tokens
SAME = ("claim", "method", "text", "sample", "tokens", "block_size", "asked", "model")  # columns that name a row
Attention = StemConfig | hf.Selector


def table_1(density: float, block_size: int) -> dict[str, Attention]:
    """The two metrics of Table 1 at one budget: without and with the value term, one sink and two local blocks."""
    config = StemConfig(density=density, block_size=block_size, sink_blocks=1, local_blocks=2)
    return {"score-aware": config.replace(value_weight=0.0), "output-aware": config}


def figure_3(density: float, block_size: int, blocks: int) -> dict[str, Attention]:
    """Selections that keep the share `density` of the blocks in one quarter of the query blocks, and all elsewhere."""
    config = StemConfig(block_size=block_size, sink_blocks=1, local_blocks=2)
    edges = [blocks * i // SPANS for i in range(SPANS + 1)]
    rows = [dict(first_row=first, last_row=last) for first, last in pairwise(edges)]
    prune = partial(select_in_rows, config=config, keep=density)
    return {f"quarter {i + 1}": partial(prune, **of) for i, of in enumerate(rows)}


@torch.no_grad()
def errors(model, ids: Tensor, attentions: Mapping[str, Attention]) -> dict[str, tuple[float, float, float]]:
    """Name -> mean squared error of the logits over all positions of int64 [1, N], over the last quarter, and density.

    The logits of `POSITIONS` positions at a time are in memory.
    """
    dense, _ = _hidden(model, ids, None)
    head, last, found = model.get_output_embeddings(), ids.shape[1] * (SPANS - 1) // SPANS, {}
    for name, attention in attentions.items():
        hidden, density = _hidden(model, ids, attention)
        squares = torch.cat(
            [
                (head(ours).float() - head(theirs).float()).square().mean(-1)
                for ours, theirs in zip(hidden.split(POSITIONS), dense.split(POSITIONS), strict=True)
            ]
        )
        found[name] = squares.mean().item(), squares[last:].mean().item(), density
    return found


def _hidden(model, ids: Tensor, attention: Attention | None) -> tuple[Tensor, float]:
    with nullcontext() if attention is None else hf.stem_prefill(model, attention) as report:
        hidden = model.get_decoder()(ids, use_cache=False).last_hidden_state[0]
    return hidden, 1.0 if report is None else report.density()


def rows(
    model,
    name: str,
    windows: Mapping[str, Tensor],
    block_size: int = 128,
    budget: float = 0.125,
    pruned: float = 0.25,
    seed: int = 0,
    show: Callable = print,
) -> Iterator[dict]:
    """Rows of both claims for windows int64 [n, N] of each kind of text.

    Args:
        model, name: A model on its device, and its name in the rows.
        budget: Density of both metrics of Table 1; the paper keeps an eighth.
        pruned: Share of the blocks that a pruned quarter keeps in Fig. 3.
        seed: Written into the rows; nothing is drawn.
    """
    device = next(model.parameters()).device
    for kind, of in windows.items():
        for sample, ids in enumerate(of[:, None].to(device)):
            blocks = -(-ids.shape[1] // block_size)
            claims = {"Table 1": (table_1(budget, block_size), budget)}
            claims["Fig. 3"] = (figure_3(pruned, block_size, blocks), pruned)
            for claim, (attentions, asked) in claims.items():
                for method, (error, error_last, density) in errors(model, ids, attentions).items():
                    about = dict(claim=claim, method=method, text=kind, sample=sample, tokens=ids.shape[1])
                    about |= dict(block_size=block_size, asked=asked, density=round(density, 4), model=name, seed=seed)
                    yield about | dict(error=float(f"{error:.5g}"), error_last=float(f"{error_last:.5g}"))
        show(f"logits of {kind}: {len(of)} windows")


@torch.no_grad()
def value_rows(
    model, name: str, windows: Mapping[str, Tensor], block_size: int = 128, budget: float = 0.125, seed: int = 0
) -> Iterator[dict]:
    """Rows of Eq. 6 and 7, with the arguments of `rows`: `value_effect` of the output-aware metric of Table 1.

    `spread` is the median of all layers and `changed` their mean; `spread_most` and `changed_most` are the largest.
    """
    config, layers = table_1(budget, block_size)["output-aware"], range(model.config.num_hidden_layers)
    for kind, of in windows.items():
        for sample, ids in enumerate(of[:, None].to(next(model.parameters()).device)):
            found = value_effect(captures(model, ids, layers), config)
            about = dict(claim="Eq. 6 and 7", method="output-aware", text=kind, sample=sample, tokens=ids.shape[1])
            about |= dict(block_size=block_size, asked=budget, model=name, seed=seed)
            values = dict(spread=found.spread.median(), spread_most=found.spread.max())
            values |= dict(changed=found.changed.mean(), changed_most=found.changed.max())
            yield about | {key: float(f"{value:.5g}") for key, value in values.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2", help="name for stem.pretrained.load (default: %(default)s)")
    parser.add_argument("--length", type=int, help="of a window [tokens] (default: 8192, smoke 1024)")


def main(options: argparse.Namespace) -> None:
    """Measure and write results/long_context/logits/; rows of other models and lengths stay."""
    full = options.profile == "full"
    model, tokenizer, name = measures.load(options.model)
    length, kinds = options.length or (8192 if full else 1024), KINDS if full else KINDS[:1]
    windows = samples.document_windows(tokenizer, length, 8 if full else 1, kinds)
    found = [*rows(model, name, windows, 128 if full else 32), *value_rows(model, name, windows, 128 if full else 32)]
    print("wrote", records.write_rows("long_context/logits", found, options.profile, same=SAME))

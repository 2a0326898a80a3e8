"""Tuning: fields of `adaptive` at a low density, on samples that no other table reports.

Writes results/long_context/tuning/.
The search is greedy: each of CHANGES alone, pairs of the best three, then the best setting reused by 2 and 3 layers.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations

import torch

import stem
from stem import hf, patterns
from stem.experiments import records
from stem.experiments.long_context import measures, samples
from stem.experiments.long_context.report import NEEDLES
from stem.planning import select

START = dict(dense_last_blocks=0, dropped="cells")
CHANGES = (
    *(dict(exact_last_blocks=blocks) for blocks in (2, 4, 8)),
    *(dict(score_cells=cells) for cells in (4, 16, 32)),
    *(dict(score_peak=peak) for peak in (0.15, 0.5)),
    dict(local_blocks=2),
    dict(score_pooling="mean"),
)
ORACLE = dict(exact_last_blocks=1 << 20, score_pooling="mean")  # exact shares under the same allocation
SEED = 2000  # of the needles
NATS, NATS_PER_TOKEN = 0.25, 0.005  # losses on needles and documents that add 1 to a score
SAME = ("changes", "anchors", "asked", "length", "block_size")  # columns that name a row


class Search:
    """Losses of settings at one density, each measured once; prompts: needles, documents: int64 [1, N] and longer."""

    def __init__(self, model, prompts, documents: torch.Tensor, density: float, block_size: int) -> None:
        self.model, self.prompts, self.documents = model, prompts, documents
        self.density, self.block_size, self.rows = density, block_size, {}
        self.answers = measures.answer_distributions(model, prompts)
        self.losses = measures.document_losses(model, documents)

    def _right(self, answers: list[torch.Tensor]) -> torch.Tensor:
        """Log-likelihood of each right answer, fp32 [needles] [nats]."""
        ids = self.prompts.ids.cpu()
        return torch.stack([of.gather(1, row[-len(of) :, None]).sum() for row, of in zip(ids, answers, strict=True)])

    def score(self, changes: dict, anchors: int = 1) -> float:
        """Loss on needles over NATS plus loss on documents over NATS_PER_TOKEN; inf where no threshold fits."""
        told = " ".join(f"{name}={value}" for name, value in sorted(changes.items()))
        if (told, anchors) not in self.rows:
            self.rows[told, anchors] = self._row(changes, anchors) | dict(changes=told, anchors=anchors)
        return self.rows[told, anchors].get("score", float("inf"))

    def _row(self, changes: dict, anchors: int) -> dict:
        fields = dict(dense_up_to=0, sink_blocks=1, local_blocks=1) | changes
        config = stem.StemConfig.preset("adaptive", block_size=self.block_size, **fields)
        try:
            config = stem.calibrate(self.model, [self.documents], self.density, config).config
        except ValueError:  # what is always kept exceeds the density
            return {}
        attention, layers = config, self.model.config.num_hidden_layers
        if anchors > 1:

            def choose(q, k, v):
                return replace(select(q, k, v, config, q.shape[3] ** -0.5, None), dropped=config.dropped)

            attention = patterns.reuse(choose, range(0, layers, anchors), layers)
        with hf.stem_prefill(self.model, attention) as report:
            answers, of_needles = measures.answer_distributions(self.model, self.prompts), report.density()
        with hf.stem_prefill(self.model, attention) as report:
            losses, of_documents = measures.document_losses(self.model, self.documents), report.density()
        needles, documents = self._right(answers) - self._right(self.answers), float((losses - self.losses).mean())
        low, high = measures.interval(needles)
        score = max(0.0, -float(needles.mean())) / NATS + max(0.0, documents) / NATS_PER_TOKEN
        about = dict(asked=self.density, length=self.documents.shape[1], block_size=self.block_size)
        about |= dict(threshold=config.threshold, density_documents=of_documents, density_needles=of_needles)
        about |= dict(divergence=measures.divergence(self.answers, answers))  # of the answers' tokens from dense
        about |= dict(needles=float(needles.mean()), low=low, high=high, documents=documents, score=score)
        return about | dict(count=len(needles), values=" ".join(f"{x:.4g}" for x in needles.tolist()))


def rows(search: Search, changes=CHANGES, show: Callable = print) -> Iterator[dict]:
    """Rows of all settings that the search tries."""
    search.score(START | dict(dropped="skip"))
    alone = sorted(changes, key=lambda change: search.score(START | change))
    better = [change for change in alone[:3] if search.score(START | change) < search.score(START)]
    tried = [START, *(START | a for a in better), *(START | a | b for a, b in combinations(better, 2))]
    best = min(tried, key=search.score)
    search.score(best | ORACLE)
    for anchors in (2, 3):
        search.score(best, anchors)
    show(f"best at {search.density:.0%}: {best}")
    yield from (row for row in search.rows.values() if "score" in row)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2", help="name for stem.pretrained.load (default: %(default)s)")
    parser.add_argument("--length", type=int, help="of a prompt [tokens] (default: 8192, smoke 512)")
    parser.add_argument("--density", type=float, help="default: 0.08, smoke 0.5")


def main(options: argparse.Namespace) -> None:
    """Search and write results/long_context/tuning/; rows of other lengths and densities stay."""
    full = options.profile == "full"
    model, tokenizer, _ = measures.load(options.model)
    length, density = options.length or (8192 if full else 512), options.density or (0.08 if full else 0.5)
    needles = samples.exact_prompts(NEEDLES, tokenizer, length, 12 if full else 2, SEED)
    documents = torch.cat(samples.calibration_windows(tokenizer, length, 1))
    search = Search(model, needles, documents, density, 128 if full else 32)
    found = list(rows(search, CHANGES if full else CHANGES[:1]))
    print("wrote", records.write_rows("long_context/tuning", found, options.profile, same=SAME))

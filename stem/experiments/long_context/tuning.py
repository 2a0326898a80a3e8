"""Tuning: fields of `adaptive` at a low density, searched on samples that no other table reports.

Writes results/long_context/tuning/.
The search is greedy: each of CHANGES alone, pairs of the best three, then the best setting reused by 2 and 3 layers, or
with a threshold of its own for the last block, for each layer, and both. All of the last are measured again on the
samples of "answers" and "loss", beside the same with exact shares.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import combinations, product

import torch

import stem
from stem import hf, patterns
from stem.experiments import records
from stem.experiments.long_context import measures, samples
from stem.experiments.long_context.methods import LOW_DENSITY
from stem.experiments.long_context.report import NEEDLES
from stem.experiments.long_context.thresholds import LAST, MULTIPLES, Thresholds, by_layer, calibrated
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
TUNING, REPORTED = "tuning", "reported"  # samples of the search, and those of "answers" and "loss"
KINDS = ("python source", "C++ headers")  # of reported documents, long enough for 8 windows of 32K tokens
NATS, NATS_PER_TOKEN = 0.25, 0.005  # losses on needles and documents that add 1 to a score
SAME = ("changes", "anchors", "thresholds", "samples", "asked", "length", "block_size", "model")  # they name a row
ONE, FEW = Thresholds(), 4  # one threshold for all; needles on which single layers are measured
SHORT = 16_384  # tokens of the longest prompts on which single layers are measured


class Search:
    """Losses of settings at one density, each measured once.

    Args:
        prompts, documents: Needles; int64 [n, N].
        windows: int64 [n, N], on which thresholds are calibrated; default the documents.
    """

    def __init__(self, model, prompts, documents: torch.Tensor, density: float, block_size: int, windows=None) -> None:
        self.model, self.prompts, self.documents = model, prompts, documents
        self.windows = (documents if windows is None else windows).to(next(model.parameters()).device)
        self.layers = model.config.get_text_config().num_hidden_layers
        self.density, self.block_size, self.rows = density, block_size, {}
        self.guess = block_size / documents.shape[1]  # first threshold that a calibration tries
        self.answers = measures.answer_distributions(model, prompts)
        self.losses = measures.document_losses(model, documents)

    def _right(self, answers: list[torch.Tensor]) -> torch.Tensor:
        """Log-likelihood of each right answer, fp32 [needles] [nats]."""
        ids = self.prompts.ids.cpu()
        return torch.stack([of.gather(1, row[-len(of) :, None]).sum() for row, of in zip(ids, answers, strict=True)])

    def score(self, changes: dict, anchors: int = 1, thresholds: Thresholds = ONE) -> float:
        """Loss on needles over NATS plus loss on documents over NATS_PER_TOKEN; inf where no threshold fits."""
        told, key = " ".join(f"{name}={value}" for name, value in sorted(changes.items())), (anchors, str(thresholds))
        if (told, *key) not in self.rows:
            names = dict(changes=told, anchors=anchors, thresholds=str(thresholds))
            self.rows[told, *key] = self._row(changes, anchors, thresholds) | names
        return self.rows[told, *key].get("score", float("inf"))

    def config(self, changes: dict, thresholds: Thresholds = ONE) -> stem.StemConfig:
        """A setting with the threshold of the density; raises ValueError where none fits."""
        fields = dict(dense_up_to=0, sink_blocks=1, local_blocks=1) | changes
        config = stem.StemConfig.preset("adaptive", block_size=self.block_size, threshold=self.guess, **fields)
        config = calibrated(self.model, self.windows, self.density, config, thresholds)
        self.guess = config.threshold
        return config

    def thresholds(self, changes: dict) -> Thresholds:
        """Multiples of the layers of a setting, from the errors of the model with one sparse layer at a time."""
        config = self.config(changes)
        found = [self.one_layer(config, layer) for layer in range(self.layers)]
        densities, errors = zip(*(zip(*of, strict=True) for of in found), strict=True)
        return by_layer(densities, errors, self.density)

    def one_layer(self, config: stem.StemConfig, layer: int) -> list[tuple[float, float]]:
        """(density, error) at each of MULTIPLES of the threshold of one layer; the others are dense.

        The error is the divergence of the answers' tokens over NATS, on FEW needles, plus that of the next tokens of
        documents over NATS_PER_TOKEN: half the mean square of what their log-likelihoods change by.
        """
        few, found = self.prompts.first(FEW), []
        for multiple in MULTIPLES:
            sparse = {layer: config.replace(threshold=min(1.0, config.threshold * multiple))}
            with hf.stem_prefill(self.model, sparse) as report:
                answers = measures.answer_distributions(self.model, few)
                change = measures.document_losses(self.model, self.documents) - self.losses
            error = measures.divergence(self.answers[: len(answers)], answers) / NATS
            error += float(change.square().mean()) / 2 / NATS_PER_TOKEN
            found.append((report.layer(layer)["density"], error))
        return found

    def _row(self, changes: dict, anchors: int, thresholds: Thresholds) -> dict:
        try:
            config = self.config(changes, thresholds)
        except ValueError:  # what is always kept exceeds the density
            return {}
        attention = thresholds.attention(config, self.layers)
        if anchors > 1:

            def choose(q, k, v):
                return replace(select(q, k, v, config, q.shape[3] ** -0.5, None), dropped=config.dropped)

            attention = patterns.reuse(choose, range(0, self.layers, anchors), self.layers)
        with hf.stem_prefill(self.model, attention) as report:
            answers, of_needles = measures.answer_distributions(self.model, self.prompts), report.density()
        with hf.stem_prefill(self.model, attention) as report:
            losses, of_documents = measures.document_losses(self.model, self.documents), report.density()
        needles, documents = self._right(answers) - self._right(self.answers), (losses - self.losses).mean(1)
        low, high = measures.interval(needles)
        score = max(0.0, -float(needles.mean())) / NATS + max(0.0, float(documents.mean())) / NATS_PER_TOKEN
        about = dict(asked=self.density, length=self.documents.shape[1], block_size=self.block_size)
        about |= dict(threshold=config.threshold, density_documents=of_documents, density_needles=of_needles)
        about |= dict(divergence=measures.divergence(self.answers, answers))  # of the answers' tokens from dense
        about |= dict(needles=float(needles.mean()), low=low, high=high, documents=float(documents.mean()), score=score)
        return about | dict(count=len(needles), values=_told(needles), document_values=_told(documents))


def _told(values: torch.Tensor) -> str:
    return " ".join(f"{x:.4g}" for x in values.tolist())


def rows(search: Search, reported: Search, short: Search, changes=CHANGES, show: Callable = print) -> Iterator[dict]:
    """Rows of all settings that the search tries, and of the best ones on reported samples.

    Single layers are measured on the samples of `short`, the search itself for prompts of at most SHORT tokens.
    """
    search.score(START | dict(dropped="skip"))
    alone = sorted(changes, key=lambda change: search.score(START | change))
    better = [change for change in alone[:3] if search.score(START | change) < search.score(START)]
    tried = [START, *(START | a for a in better), *(START | a | b for a, b in combinations(better, 2))]
    best = min(tried, key=search.score)
    for anchors in (2, 3):
        search.score(best, anchors)
    layers = short.thresholds(best)
    show(f"best at {search.density:.0%}: {best}, {layers}")
    for of, where in product((search, reported), several(layers)):
        of.score(best, thresholds=where)
        of.score(best | ORACLE, thresholds=where)
    for of, name in ((search, TUNING), (reported, REPORTED)):
        yield from (row | dict(samples=name) for row in of.rows.values() if "score" in row)


def several(layers: Thresholds) -> list[Thresholds]:
    """One threshold for all, one for the last block, those by layer, and both."""
    return [ONE, Thresholds(last=LAST), layers, replace(layers, last=LAST)]


def known(reported: Search, thresholds: Thresholds) -> Iterator[list[dict]]:
    """Rows on reported samples of the setting of `methods.TUNED`, then with its oracle's too, without a search."""
    for changes in (ORACLE, {}):
        reported.score(START | LOW_DENSITY | changes, thresholds=thresholds)
        if found := [row | dict(samples=REPORTED) for row in reported.rows.values() if "score" in row]:
            yield found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2", help="name for stem.pretrained.load (default: %(default)s)")
    parser.add_argument("--length", type=int, help="of a prompt [tokens] (default: 8192, smoke 512)")
    parser.add_argument("--density", type=float, help="default: 0.08, smoke 0.5")
    about = "multiples of thresholds, as in the column `thresholds`: no search, only `methods.TUNED` and its oracle"
    parser.add_argument("--thresholds", metavar="TEXT", type=Thresholds.parse, help=about)


def main(options: argparse.Namespace) -> None:
    """Search and write results/long_context/tuning/; rows of other models, lengths and densities stay."""
    full = options.profile == "full"
    model, tokenizer, name = measures.load(options.model)
    length, density = options.length or (8192 if full else 512), options.density or (0.08 if full else 0.5)
    block_size, needles = (128, 16) if full else (32, 1)

    def of(length: int, seed: int, documents: torch.Tensor | None = None) -> Search:
        prompts = samples.exact_prompts(NEEDLES, tokenizer, length, needles, seed)
        windows = torch.cat(samples.calibration_windows(tokenizer, length, 1))[: None if full else 1]
        documents = windows if documents is None else documents
        return Search(model, prompts, documents, density, block_size, windows)

    write = partial(records.write_rows, "long_context/tuning", profile=options.profile, same=SAME)
    documents = torch.cat([*samples.document_windows(tokenizer, length, 8 if full else 1, KINDS).values()])
    reported = of(length, 0, documents)
    if options.thresholds is not None:
        for found in known(reported, options.thresholds):
            print("wrote", write([row | dict(model=name) for row in found]), flush=True)
        return
    search = of(length, SEED)
    short = search if length <= SHORT else of(SHORT, SEED)
    found = [row | dict(model=name) for row in rows(search, reported, short, CHANGES if full else CHANGES[:1])]
    print("wrote", write(found))

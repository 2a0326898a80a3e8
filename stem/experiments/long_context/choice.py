"""Densities: samples on which each method's density is chosen. Writes results/long_context/choice/.

They are needles of their own and the calibration texts. `matched_report` takes a method's lowest density within its
bounds here, and shows what the method loses at that density on the samples of "answers" and "loss".
"""

import argparse

from stem.experiments.long_context import comparison
from stem.experiments.long_context.comparison import DOCUMENTS, Study
from stem.experiments.long_context.report import NEEDLES

__all__ = ["STUDIES", "add_arguments", "main"]

SEED = 2000  # of the needles
CHOICE = dict(tasks=(NEEDLES, DOCUMENTS), windows=1, calibrates=True)
STUDIES = {
    "smoke": Study((512,), names=("adaptive",), densities=(0.5,), block_sizes=(32,), samples=2, **CHOICE),
    "full": Study((8192,), densities=(0.08, 0.15, 0.25, 0.3, 0.4, 0.5, 0.7), **CHOICE),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `comparison.add_arguments`."""
    comparison.add_arguments(parser)
    parser.set_defaults(seed=SEED)


def main(options: argparse.Namespace) -> None:
    """Measure and write results/long_context/choice/; rows that were not measured again stay."""
    comparison.measure(STUDIES[options.profile], "choice", options)

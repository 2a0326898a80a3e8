"""Documents: loss of every method on five kinds of text, see comparison.py. Writes results/long_context/loss/."""

import argparse

from stem.experiments.long_context import comparison
from stem.experiments.long_context.comparison import DOCUMENTS, Study, add_arguments

__all__ = ["STUDIES", "add_arguments", "main"]

KINDS = ("python source", "prose")
STUDIES = {
    "smoke": Study((512,), (DOCUMENTS,), ("stem", "xattention", "adaptive"), (0.31,), (32,), windows=1, kinds=KINDS),
    "full": Study((8192,), (DOCUMENTS,), densities=(0.1, 0.16, 0.25), block_sizes=(128, 64), presets=True),
}


def main(options: argparse.Namespace) -> None:
    """Measure and write results/long_context/loss/; rows that were not measured again stay."""
    comparison.measure(STUDIES[options.profile], "loss", options)

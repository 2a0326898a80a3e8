"""Needles: answers of every method on one model, see comparison.py. Writes results/long_context/answers/."""

import argparse

from stem.experiments.long_context import comparison
from stem.experiments.long_context.comparison import Study, add_arguments

__all__ = ["STUDIES", "add_arguments", "main"]

TASKS = ("niah_multikey_1", "niah_multiquery", "ruler_vt")
STUDIES = {
    "smoke": Study((512,), TASKS[:1], ("stem", "xattention"), (0.5,), (32,), samples=2),
    "full": Study((4096, 8192), TASKS, densities=(0.1, 0.25), block_sizes=(64, 128), samples=50, presets=True),
}


def main(options: argparse.Namespace) -> None:
    """Measure and write results/long_context/answers/; rows that were not measured again stay."""
    comparison.measure(STUDIES[options.profile], "answers", options)

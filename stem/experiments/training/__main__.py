"""Command line of the experiment in notebook 05; `python -m stem.experiments.training.train` trains one model."""

import argparse

from stem.experiments.training import experiment


def main() -> None:
    """Run a profile; an experiment that cannot start, or whose parts failed, ends with one line and status 1."""
    parser = argparse.ArgumentParser(
        prog="python -m stem.experiments.training", description="Train small models with several kinds of attention."
    )
    parser.add_argument("--profile", choices=experiment.STUDIES, default="smoke")
    parser.add_argument("--folder", default="runs/training", help="where finished parts are kept (runs/training)")
    options = parser.parse_args()
    try:
        experiment.run(options.profile, options.folder)
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"stem.experiments.training: {error}") from error


if __name__ == "__main__":
    main()

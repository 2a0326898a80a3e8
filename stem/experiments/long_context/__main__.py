"""`python -m stem.experiments.long_context [PART]`: measure one part, or all, and write its rows."""

import argparse

from stem.experiments import records
from stem.experiments.long_context import answers, choice, extension, logits, loss, matched, selection_cost, tuning

PARTS = dict(
    answers=answers, loss=loss, logits=logits, selection_cost=selection_cost, choice=choice, matched=matched,
    tuning=tuning, extension=extension,
)  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Run one part with its options, or without a part's name all parts with their defaults."""
    parser = argparse.ArgumentParser(
        prog="python -m stem.experiments.long_context",
        description="The experiment of notebook 06. Without PART, all parts run with their default options. "
        "Rows go to results/long_context/PART/.",
    )
    profile = dict(choices=records.PROFILES, help="size of the run (default: smoke)")
    parser.add_argument("--profile", default="smoke", **profile)
    parts = parser.add_subparsers(dest="part", metavar="PART", title="parts")
    for name, part in PARTS.items():
        title = part.__doc__.partition(": ")[0]
        of = parts.add_parser(name, help=title, description=title + ".")
        of.add_argument("--profile", default=argparse.SUPPRESS, **profile)  # keeps the value given before PART
        if hasattr(part, "add_arguments"):
            part.add_arguments(of)
    options = parser.parse_args(arguments)
    for name in [options.part] if options.part else PARTS:
        PARTS[name].main(options if options.part else parser.parse_args(["--profile", options.profile, name]))


if __name__ == "__main__":
    main()

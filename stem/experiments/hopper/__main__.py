"""Time the stages of the Hopper kernels and write results/hopper/: `python -m stem.experiments.hopper`."""

import argparse

import torch

from stem.experiments import records
from stem.experiments.hopper import measure

PARTS = dict(stages=measure.stage_rows, timeline=measure.timeline_rows, bounds=measure.bound_rows)


def main() -> None:
    """Measure and write the rows, or say that there is no Hopper GPU."""
    parser = argparse.ArgumentParser(prog="python -m stem.experiments.hopper", description=__doc__)
    parser.add_argument("--profile", choices=records.PROFILES, default="full", help="which file is written")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="measure these only")
    options = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        print("hopper is left out: it needs a GPU of compute capability 9.0")
        return
    for part in options.parts:
        print("wrote", records.write_rows(f"hopper/{part}", PARTS[part](), options.profile), flush=True)


if __name__ == "__main__":
    main()

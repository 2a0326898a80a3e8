"""Time the stages of the Hopper kernels and write results/hopper/: `python -m stem.experiments.hopper`."""

import argparse

import torch

from stem.experiments import records
from stem.experiments.hopper import measure


def main() -> None:
    """Measure and write the rows, or say that there is no Hopper GPU."""
    parser = argparse.ArgumentParser(prog="python -m stem.experiments.hopper", description=__doc__)
    parser.add_argument("--profile", choices=records.PROFILES, default="full", help="which file is written")
    profile = parser.parse_args().profile
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        print("hopper is left out: it needs a GPU of compute capability 9.0")
        return
    for part, rows in (("stages", measure.stage_rows), ("timeline", measure.timeline_rows)):
        print("wrote", records.write_rows(f"hopper/{part}", rows(), profile), flush=True)


if __name__ == "__main__":
    main()

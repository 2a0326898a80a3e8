"""Measure vLLM with and without Stem and write results/serving/: `python -m stem.experiments.serving`."""

import argparse

import torch

from stem.experiments import records
from stem.experiments.serving import engines, first_token

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", choices=records.PROFILES, default="smoke")
    options = parser.parse_args()
    if not engines.is_installed():
        parser.exit(message="serving is left out: vLLM is not installed (`make serve-test` installs its CPU build)\n")
    measure = first_token.large_model_rows if torch.cuda.is_available() else first_token.small_model_rows
    print("wrote", records.write_rows("serving", measure(), options.profile))

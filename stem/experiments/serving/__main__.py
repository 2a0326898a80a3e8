"""Measure vLLM with and without Stem and write results/serving/: `python -m stem.experiments.serving`."""

import argparse

import torch

from stem.experiments import records
from stem.experiments.serving import accuracy, engines, first_token

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", choices=records.PROFILES, default="smoke")
    parser.add_argument("--accuracy", metavar="MODEL", help="measure only what FP8 changes in this model's answers")
    options = parser.parse_args()
    if not engines.is_installed():
        parser.exit(message="serving is left out: vLLM is not installed (`make serve-test` installs its CPU build)\n")
    name = "serving/accuracy" if options.accuracy else "serving"
    if options.accuracy:
        cases = ([row] for row in accuracy.accuracy_rows(options.accuracy))
    elif torch.cuda.is_available():
        cases = first_token.large_model_rows()
    else:
        cases = [first_token.small_model_rows(1500 if options.profile == "smoke" else 3000)]
    rows = []
    for case in cases:  # what is measured stays if the run is stopped
        rows += case
        print("wrote", records.write_rows(name, rows, options.profile), flush=True)

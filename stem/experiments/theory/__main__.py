"""Run notebook 01 and write results/theory/: `python -m stem.experiments.theory --profile full`."""

from stem.experiments.notebook import run_from_shell

if __name__ == "__main__":
    run_from_shell("01", "theory")

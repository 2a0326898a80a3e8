"""Run notebook 03 and write results/correctness/: `python -m stem.experiments.correctness --profile full`."""

from stem.experiments.notebook import run_from_shell

if __name__ == "__main__":
    run_from_shell("03", "correctness")

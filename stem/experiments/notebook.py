"""Helpers of the notebooks: set up a run, check a claim, check an exercise; and run one notebook from a shell."""

import argparse
import dataclasses
import inspect
import random
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from stem.experiments import figures, records
from stem.experiments.exercises import difference


@dataclasses.dataclass(frozen=True)
class Run:
    """Profile, seed, device and dtype of a notebook's run."""

    profile: str  # "smoke" (a CPU, minutes) or "full" (the published numbers, one GPU)
    seed: int  # of every generator
    device: torch.device  # "cuda" where there is one, else "cpu"
    dtype: torch.dtype  # bfloat16 on CUDA, float32 on the CPU

    @property
    def full(self) -> bool:
        return self.profile == "full"


def setup(profile: str, seed: int) -> Run:
    """Seed Python, NumPy and torch, choose the device, and print device, commit and versions."""
    facts, cuda = records.provenance(profile), torch.cuda.is_available()
    for set_seed in (random.seed, np.random.seed, torch.manual_seed):
        set_seed(seed)
    figures.use_in_notebook()
    print(f"{profile} profile on {facts['device']}, commit {facts['git_commit']}")
    print(", ".join(f"{name} {facts[name]}" for name in ("python", "torch", "triton", "transformers")))
    return Run(profile, seed, torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32)


def check(claim: str, condition: Any) -> None:
    """Print a claim of the text that holds; AssertionError if the condition (bool, 0-d tensor, NumPy bool) is false."""
    if not condition:
        raise AssertionError(f"does not hold: {claim}")
    print(f"ok: {claim}")


def exercise(
    fn: Callable, against: Callable, args: tuple | list[tuple] = (), mistakes: Mapping[str, Callable] | None = None
) -> None:
    """Compare a reader's solution `fn` with the answer of `against` on the same arguments, and print the result.

    A solution is not attempted if it returns None, or a tensor of NaN only, into which no kernel has written.

    Args:
        args: Arguments of one call, or a list with those of several calls.
        mistakes: Hint -> function that makes this mistake; a solution with the same results gets the hint.
    Raises:
        AssertionError: If the solution was attempted and differs from the answer, or names the function that gives it;
            the text says which.
    """
    calls = args if isinstance(args, list) else [args]

    def answers(of: Callable) -> list:
        return [of(*call) for call in calls]

    found = answers(fn)
    if all(map(_is_untouched, found)):
        print("not attempted")
        return
    if copied := _functions(against) & _named_by(_functions(fn) - _functions(against)):
        raise AssertionError(f"not yet: write it without {', '.join(of.__name__ for of in copied)}")
    reasons = list(map(difference, found, answers(against)))
    if any(reasons):
        hints = [
            hint for hint, mistake in (mistakes or {}).items() if not any(map(difference, found, answers(mistake)))
        ]
        first = next(place for place, reason in enumerate(reasons) if reason)
        shown = repr(calls[first])
        where = f" (arguments {shown})" if len(shown) < 60 else f" (call {first + 1} of {len(calls)})"
        raise AssertionError(f"not yet: {'; '.join(hints) or reasons[first] + where * (len(calls) > 1)}")
    print("correct")


def _functions(of: Any) -> set[Callable]:
    """Python functions of a function or a partial one and its arguments."""
    parts = (of.func, *of.args) if isinstance(of, partial) else (of,)
    return set(filter(inspect.isfunction, parts))


def _named_by(functions: set[Callable]) -> set[Callable]:
    """Python functions among the variables that these functions read from outside."""
    variables = map(inspect.getclosurevars, functions)
    return {x for of in variables for x in (*of.globals.values(), *of.nonlocals.values()) if inspect.isfunction(x)}


def _is_untouched(answer: Any) -> bool:
    return answer is None or (isinstance(answer, torch.Tensor) and answer.numel() > 0 and bool(answer.isnan().all()))


def run_from_shell(number: str, experiment: str, arguments: Sequence[str] | None = None) -> None:
    """Run the notebook that writes results/<experiment>/, through scripts/reproduce.py; exit as that script does."""
    told = f"Run notebook {number}, which writes results/{experiment}/."
    parser = argparse.ArgumentParser(prog=f"python -m stem.experiments.{experiment}", description=told)
    parser.add_argument("--profile", choices=[*records.PROFILES, "auto"], default="auto", help="auto: full on CUDA")
    profile = parser.parse_args(arguments).profile
    script = records.repository_root() / "scripts" / "reproduce.py"
    if not script.is_file():
        parser.error(f"{script} does not exist: notebooks are in a checkout of the repository, not in the package")
    command = [sys.executable, str(script), "--only", number, "--profile", profile, "--force"]
    sys.exit(subprocess.run(command).returncode)

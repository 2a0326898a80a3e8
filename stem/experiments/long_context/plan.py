"""What a comparison measures, in which order, and how its measurements are dealt to processes that share a GPU."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

LATE = 4  # priority from which on a run may well be cut off
TASKS = ("niah_multikey_1", "niah_single_2", "ruler_vt")


class Job(NamedTuple):
    """One measurement of one method."""

    priority: int
    """0 is measured first."""

    what: str
    """"answers", "loss", "generated" or "time"."""

    length: int
    """Tokens of every sample."""

    task: str | None
    """RULER's; None for "loss"."""

    method: str
    block_size: int | None
    """None for dense attention."""

    asked: float | None
    """Density; None for dense attention, the control and the presets."""

    samples: int


@dataclass(frozen=True)
class Plan:
    """What to measure. Names of methods are those that `stem.experiments.long_context.comparison.methods` takes.

    At `asked_at` every method answers all tasks, reads documents, generates and is timed. At the other densities and
    block sizes it reads documents and answers the first tasks; the other tasks follow there when all that is done.
    """

    lengths: tuple[int, ...]
    """Tokens of every sample."""

    samples: tuple[int, ...]
    """Of each task, for each length."""

    tasks: tuple[str, ...] = TASKS
    """Most important first."""

    everywhere: int = 1
    """How many tasks, from the first, are asked early at every density and block size."""

    windows: int = 2
    """Documents of each kind."""

    names: tuple[str, ...] = ()
    """Methods, in the order of their importance; empty means `compare.all_names()`."""

    densities: tuple[float, ...] = (0.16, 0.25, 0.4)
    block_sizes: tuple[int, ...] = (64, 128)
    asked_at: tuple[float, int] = (0.25, 64)
    """(density, block size)."""

    curves: tuple[str, ...] = ()
    """Methods measured at other densities and block sizes as well; empty means all."""

    costly: tuple[str, ...] = ("oracle_mass", "oracle_output")
    """Methods that compute all of attention, and answer at the first length only."""

    presets: bool = False
    """Whether to measure `compare.presets()` as well."""

    generates: str | None = "niah_single_2"
    """Task whose answers are also generated: one answer, so that prompts are equally long. None generates nothing."""

    def jobs(self, method: str, block_size: int | None, asked: float | None) -> list[Job]:
        """All measurements of a method at one density and block size."""
        costly, found = method in self.costly, []
        headline = asked is None or (asked, block_size) == self.asked_at
        if not headline and self.curves and method not in self.curves:
            return []
        for length, samples in zip(self.lengths, self.samples, strict=True):
            tasks = self.tasks if length == self.lengths[0] or not costly else ()
            for place, task in enumerate(tasks):
                late = LATE if asked == self.asked_at[0] else LATE + 1
                priority = (1 if costly else 0) if headline else 2 if place < self.everywhere and not costly else late
                found.append(Job(priority, "answers", length, task, method, block_size, asked, samples))
            reads = Job(1 if headline else 3, "loss", length, None, method, block_size, asked, 5 * self.windows)
            found.append(reads)
            own = block_size in (None, self.asked_at[1])
            if self.generates and headline and own and not costly:
                found.append(Job(1, "generated", length, self.generates, method, block_size, asked, samples))
            if asked in (None, self.asked_at[0]) and not costly:
                found.append(Job(1, "time", length, self.tasks[0], method, block_size, asked, 4))
        return found


PLANS = {
    "smoke": Plan((1024,), (2,), TASKS[:1], 1, 1, ("stem", "xattention"), (0.5,), (32,), (0.5, 32)),
    "full": Plan((4096, 8192), (100, 100), windows=4),
    "large": Plan((4096, 8192), (20, 20), densities=(0.25,), block_sizes=(128,), asked_at=(0.25, 128), generates=None),
}


def deal(jobs: Sequence[Job], part: str | None) -> list[Job]:
    """The jobs of one part, most important first.

    Jobs on the same samples stay together, because dense attention is measured on these as well; the costliest such
    groups are dealt first, each to the part that has least to do. Three parts get about as much of the full plan.

    Args:
        jobs: All of them.
        part: "2/3" is the second of three; "0/3" what has to be measured alone, the times, which the others then leave
            out. None is everything.
    Raises:
        ValueError: If part is not such a text.
    """
    if part is None:
        return sorted(jobs, key=lambda job: job.priority)
    match = re.fullmatch(r"(\d+)/([1-9]\d*)", part)
    if not match or int(match[1]) > int(match[2]):
        raise ValueError(f"part must be 'i/n' with 0 <= i <= n and n >= 1, got {part!r}")
    number, parts = int(match[1]), int(match[2])
    if number == 0:
        return sorted((job for job in jobs if job.what == "time"), key=lambda job: job.priority)
    groups: dict[tuple, list[Job]] = {}
    for job in jobs:
        if job.what != "time":
            groups.setdefault((job.what, job.length, job.task), []).append(job)
    dealt: list[list[Job]] = [[] for _ in range(parts)]
    loads = [0.0] * parts
    for group in sorted(groups.values(), key=_tokens, reverse=True):
        lightest = loads.index(min(loads))
        dealt[lightest] += group
        loads[lightest] += _tokens(group)
    return sorted(dealt[number - 1], key=lambda job: job.priority)


def _tokens(jobs: Sequence[Job]) -> float:
    """What jobs cost, in tokens that a model reads; those that come last are likely to be cut off, and count less."""
    return sum(job.samples * job.length / (1 if job.priority < LATE else 4) for job in jobs)

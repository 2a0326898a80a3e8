"""Studies: the measurements that a comparison takes, their order, and their split into parts that share a GPU."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

LATE = 4  # from this priority on, a time limit is likely to end the run before the measurement
TASKS = ("niah_multikey_1", "niah_single_2", "ruler_vt")
COSTLY = ("oracle_mass", "oracle_output")  # they compute full attention, so they answer at the first length only


class Job(NamedTuple):
    """One measurement of one method."""

    priority: int  # 0 is measured first
    what: str  # "answers", "loss", "generated" or "time": a method of `Comparison`
    length: int  # length of every sample [tokens]
    task: str | None  # RULER task; None for "loss"
    method: str
    block_size: int | None  # None for dense attention
    asked: float | None  # density asked for; None for dense attention, the control and the presets
    samples: int


@dataclass(frozen=True)
class Study:
    """Models answer, read, generate and are timed with every method at the headline density and block size.

    At the other densities and block sizes a method reads documents and answers the first task. Its other tasks follow
    there at the end of the run.
    """

    lengths: tuple[int, ...]  # lengths of the samples [tokens]
    samples: int  # samples of each task
    tasks: tuple[str, ...] = TASKS  # RULER tasks, most important first
    windows: int = 2  # documents of each kind
    names: tuple[str, ...] = ()  # names of `methods.methods`, most important first; empty means `methods.all_names()`
    densities: tuple[float, ...] = (0.16, 0.25, 0.4)
    block_sizes: tuple[int, ...] = (64, 128)
    asked_at: tuple[float, int] = (0.25, 64)  # headline density and block size
    curves: tuple[str, ...] = ()  # names that are also measured at the other densities and block sizes; empty means all
    presets: bool = False  # True also measures `methods.presets()`
    generates: str | None = "niah_single_2"  # task with one answer and prompts of one length; None generates nothing

    def jobs(self, method: str, block_size: int | None, asked: float | None) -> list[Job]:
        """All measurements of one method at one density and block size."""
        costly, found = method in COSTLY, []
        headline = asked is None or (asked, block_size) == self.asked_at
        if not headline and self.curves and method not in self.curves:
            return []

        def add(priority: int, what: str, length: int, task: str | None, samples: int) -> None:
            found.append(Job(priority, what, length, task, method, block_size, asked, samples))

        late = LATE if asked == self.asked_at[0] else LATE + 1
        for length in self.lengths:
            for task in self.tasks if length == self.lengths[0] or not costly else ():
                early = task == self.tasks[0] and not costly
                add(int(costly) if headline else 2 if early else late, "answers", length, task, self.samples)
            add(1 if headline else 3, "loss", length, None, 5 * self.windows)
            if self.generates and headline and block_size in (None, self.asked_at[1]) and not costly:
                add(1, "generated", length, self.generates, self.samples)
            if asked in (None, self.asked_at[0]) and not costly:
                add(1, "time", length, self.tasks[0], 4)
        return found


STUDIES = {
    "smoke": Study(
        (1024,), 2, TASKS[:1], 1, ("stem", "xattention"), densities=(0.5,), block_sizes=(32,), asked_at=(0.5, 32)
    ),
    "full": Study((4096, 8192), 100, windows=4),
    "large": Study((4096, 8192), 20, densities=(0.25,), block_sizes=(128,), asked_at=(0.25, 128), generates=None),
}


def deal(jobs: Sequence[Job], part: tuple[int, int] | None = None) -> list[Job]:
    """Jobs of one part of a run, most important first.

    Jobs on the same samples stay in one part, because they share the dense measurement. The costliest groups are dealt
    first, each to the part with the least work.

    Args:
        jobs: All jobs of the run.
        part: (2, 3) is the second of three parts. (0, 3) holds the times, which are taken while nothing else runs; the
            other parts leave them out. None is the whole run.
    """
    if part:
        groups: dict[tuple, list[Job]] = defaultdict(list)
        for job in jobs:
            if job.what != "time":
                groups[job.what, job.length, job.task].append(job)
        dealt: list[list[Job]] = [[] for _ in range(part[1])]
        for group in sorted(groups.values(), key=_cost, reverse=True):
            min(dealt, key=_cost).extend(group)
        jobs = [[job for job in jobs if job.what == "time"], *dealt][part[0]]
    return sorted(jobs, key=lambda job: job.priority)


def _cost(jobs: Sequence[Job]) -> float:
    """Cost of jobs as the number of tokens that a model reads; late jobs may be cut off and count a quarter."""
    return sum(job.samples * job.length / (1 if job.priority < LATE else 4) for job in jobs)

"""Studies: what is asked of whom, in which order, and how it is dealt to processes."""

import pytest

from stem.experiments.long_context import methods
from stem.experiments.long_context.study import LATE, STUDIES, Study, deal

STUDY = Study((1024, 2048), 2, ("a", "b"), windows=3, generates="a")
EARLY = ("answers", "loss", "generated", "time")


def found(jobs, *names):
    return [tuple(getattr(job, name) for name in names) for job in jobs]


def test_the_headline_answers_everything_and_is_timed():
    for method, size, asked in (("random", 64, 0.25), ("dense", None, None), ("window", 64, None)):
        jobs = STUDY.jobs(method, size, asked)
        assert {job.what for job in jobs} == set(EARLY) and max(job.priority for job in jobs) == 1
        tasks = [(length, task, 0) for length in STUDY.lengths for task in "ab"]
        assert found([job for job in jobs if job.what == "answers"], "length", "task", "priority") == tasks
        assert [job.samples for job in jobs if job.what == "loss"] == [15, 15]
    assert "generated" not in {job.what for job in STUDY.jobs("window", 128, None)}


def test_other_densities_and_sizes_ask_the_first_tasks_early_and_all_in_the_end():
    beside, elsewhere = STUDY.jobs("stem", 128, 0.25), STUDY.jobs("stem", 64, 0.4)
    of = [(length, what) for length in STUDY.lengths for what in ((2, "a"), (4, "b"), (3, None))]
    assert [(job.length, (job.priority, job.task)) for job in beside if job.what != "time"] == of
    assert {job.what for job in beside} - {job.what for job in elsewhere} == {"time"}
    assert [job.priority for job in elsewhere] == [2, 5, 3] * 2
    assert Study((1024,), 1, ("a", "b"), curves=("other",)).jobs("stem", 64, 0.4) == []


def test_costly_methods_answer_at_the_first_length_after_the_others():
    jobs = STUDY.jobs("oracle_mass", 64, 0.25)
    assert found(jobs, "what", "length", "priority") == [
        ("answers", 1024, 1), ("answers", 1024, 1), ("loss", 1024, 1), ("loss", 2048, 1),
    ]  # fmt: skip


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("parts", [1, 3, 4])
def test_parts_hold_every_job_once_and_about_as_much(name, parts):
    study = STUDIES[name]
    every = [
        job
        for method in methods.all_names()[:: 1 if name == "full" else 5]
        for size in study.block_sizes
        for density in study.densities
        for job in study.jobs(method, size, density)
    ]
    dealt = [deal(every, (i, parts)) for i in range(parts + 1)]
    assert sorted(sum(dealt, []), key=str) == sorted(every, key=str) == sorted(deal(every, None), key=str)
    assert {job.what for job in dealt[0]} == {"time"}
    for part in dealt:
        assert [job.priority for job in part] == sorted(job.priority for job in part)
    if name == "full" and parts == 3:
        weights = {job: 1 if job.priority < LATE else 1 / 4 for job in every}
        costs = [sum(job.samples * job.length * weights[job] for job in part) for part in dealt[1:]]
        assert max(costs) < 1.2 * min(costs)
    groups = [{(job.what, job.length, job.task) for job in part} for part in dealt]
    assert sum(map(len, groups)) == len(set().union(*groups))  # what shares its samples shares the dense pass

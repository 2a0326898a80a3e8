"""Prompts shared by 2 and 3 gloo processes; see tests/distributed_cases.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import distributed_cases
import pytest

LIMIT = 900  # seconds of one start of processes; it catches hangs only
CASES = Path(distributed_cases.__file__)


@pytest.fixture(scope="module", params=[2, 3], ids="{} processes".format)
def outcomes(request, tmp_path_factory):
    """Outcomes of all cases by name, one for each rank; a rank that ended has none."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", CASES, str(rank), str(request.param), folder], env=environment
        )
        for rank in range(request.param)
    ]
    try:
        for rank in ranks:
            rank.wait(LIMIT)
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 13, *[0] * (request.param - 2)]
    found = {}
    for rank in range(request.param):
        for line in (folder / f"{rank}.jsonl").read_text().splitlines():
            name, outcome, seconds = json.loads(line)
            found.setdefault(name, {})[rank] = outcome
    return found


@pytest.mark.parametrize("name", sorted(distributed_cases.CASES))
def test_ranks_compute_the_prompt_of_one_process(outcomes, name):
    ranks = 1 if name.startswith("z_") else len(next(iter(outcomes.values())))
    assert name in outcomes and len(outcomes[name]) >= ranks
    for rank, outcome in outcomes[name].items():
        assert outcome is None, f"rank {rank}: {outcome}"

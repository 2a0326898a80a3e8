"""Prompts shared by 2 and 3 gloo processes on CPUs, and by two GPUs; see tests/distributed_cases.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import distributed_cases
import pytest
import torch
from torch.nn.functional import pad

import stem
from stem.distributed import Layout
from stem.distributed.shards import Shard, as_pages

LIMIT = 900  # seconds of one start of processes; it catches hangs only
CASES = Path(distributed_cases.__file__)
ON_GPUS = [f"lists_and_outputs_{name}" for name in distributed_cases.CONFIGS]
ON_GPUS += [f"blocks_of_128_{name}" for name in ("default", "paper", "angelslim", "hpc_ops", "adaptive")]
ON_GPUS += ["chunks", "gradients", "any_layout", "a_mesh_of_two_dimensions", "kept_blocks_are_balanced", "dtensors"]
ON_GPUS += ["only_named_blocks_travel", "layout_is_found_from_lengths", "models", "tensor_parallel"]
ON_GPUS += ["repeated_calls_replay_their_launches", "copy_engines_write_what_nccl_gathers"]


def run(folder, world, device, names=()):
    """Outcomes of cases by name, one for each rank, a rank that ended has none; and the exit codes."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", CASES, str(rank), str(world), folder, device, *names], env=environment
        )
        for rank in range(world)
    ]
    try:
        for rank in ranks:
            rank.wait(LIMIT)
    finally:
        for rank in ranks:
            rank.kill()
    found = {}
    for rank in range(world):
        for line in (folder / f"{rank}.jsonl").read_text().splitlines():
            name, outcome, seconds = json.loads(line)
            found.setdefault(name, {})[rank] = outcome
    return found, [rank.returncode for rank in ranks]


@pytest.fixture(scope="module", params=[2, 3], ids="{} processes".format)
def outcomes(request, tmp_path_factory):
    found, codes = run(tmp_path_factory.mktemp("ranks"), request.param, "cpu")
    assert codes == [0, 13, *[0] * (request.param - 2)]
    return found


@pytest.fixture(scope="module")
def outcomes_on_gpus(tmp_path_factory):
    return run(tmp_path_factory.mktemp("ranks"), 2, "cuda", ON_GPUS)[0]


@pytest.mark.parametrize("tokens, batch, start", [(333, 1, 0), (100, 2, 0), (20, 1, 0), (250, 1, 100)])
def test_gathered_keys_in_order_and_as_pages(tokens, batch, start):
    size, dim = distributed_cases.SIZE, 4
    layout = Layout.zigzag(start or tokens, 3, size)
    layout = (layout.extended(tokens - start, size) if start else layout).aligned(size)
    k = torch.randn(batch, 2, tokens, dim)
    shards = [Shard.of(layout, rank, size) for rank in range(3)]
    rows = shards[0].slots[1] * size
    parts = [layout.shard(k, rank) for rank in range(3)]
    gathered = torch.stack([pad(part, (0, 0, 0, rows - part.shape[2])) for part in parts])
    seen = []
    for shard in shards:
        assert torch.equal(shard.in_order(gathered), k)
        pages, memory = shard.pages(2 * batch, k.device), as_pages(gathered)
        for block, page in enumerate(pages.tolist()):
            block = k[:, :, block * size :][:, :, :size]
            assert torch.equal(memory[:, :, page * size :][:, :, : block.shape[2]], block)
        queries = layout.positions(shard.rank)
        lists = torch.zeros(batch, 2, len(shard.q_blocks), 1, dtype=torch.int32)
        for part, chunk in shard.chunks(lists, lists[..., 0], "mean"):
            found = queries[queries >= start][part]
            assert list(found) == list(range(chunk.kv_len - chunk.q_len, chunk.kv_len)) and chunk.dropped == "mean"
            first = (chunk.kv_len - chunk.q_len) // size
            assert chunk.num_kv_blocks == -(-chunk.kv_len // size) == first + chunk.num_q_blocks
            seen.extend(found)
    assert sorted(seen) == list(range(start, tokens))


@pytest.mark.parametrize("world", [1, 2, 3, 7, 8])
@pytest.mark.parametrize(
    "config", [stem.StemConfig(density=0.08), stem.StemConfig.preset("paper")], ids=["8 %", "paper"]
)
def test_a_layout_for_a_config_gives_ranks_equally_many_blocks_and_even_work(config, world):
    for blocks in (1, 2, 5, 40, 1000):
        layout = Layout.for_config(config, blocks * 128 - 28, world)
        owners = layout.owners[::128]
        counts = [int((owners == rank).sum()) for rank in range(world)]
        work = torch.minimum(stem.block_budget(blocks, config), torch.arange(1, blocks + 1)).double()
        loads = torch.stack([work[owners == rank].sum() for rank in range(world)])
        assert loads.max() <= 1.05 * loads.mean() + work.max()
        if blocks == 1000:
            assert loads.max() <= 1.01 * loads.mean()
            assert max(counts) - min(counts) <= 1 and sum(len(pieces) for pieces in layout.pieces) <= 3 * world * 16
        assert sum(counts) == blocks


@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("density", [0.08, 0.207])
def test_a_layout_for_a_config_spreads_rows_of_every_kind_evenly(world, density):
    """Blocks of late rows take longer, because neighbouring rows share few of them, and so does scoring these rows."""
    config, blocks = stem.StemConfig(density=density), 1024
    owners = Layout.for_config(config, blocks * 128, world).owners[::128]
    rows = torch.arange(1, blocks + 1).double()
    kept = torch.minimum(stem.block_budget(blocks, config), rows)
    for cost in (kept, kept * (2 - kept / rows), rows):
        loads = torch.stack([cost[owners == rank].sum() for rank in range(world)])
        assert loads.max() <= 1.015 * loads.mean()  # 1.03 to 1.4 where a rank has one run of rows


@pytest.mark.parametrize("name", sorted(distributed_cases.CASES))
def test_ranks_compute_the_prompt_of_one_process(outcomes, name):
    ranks = 1 if name.startswith("z_") else len(next(iter(outcomes.values())))
    assert name in outcomes and len(outcomes[name]) >= ranks
    for rank, outcome in outcomes[name].items():
        assert outcome is None, f"rank {rank}: {outcome}"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", ON_GPUS)
def test_two_gpus_compute_the_prompt_of_one_process(outcomes_on_gpus, name):
    assert outcomes_on_gpus[name] == {0: None, 1: None}

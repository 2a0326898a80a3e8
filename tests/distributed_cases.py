"""Cases that several processes run together, on CPUs (gloo) or GPUs (NCCL); tests/distributed/ reads their outcome."""

import json
import os
import sys
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import stem
from stem.distributed import Layout, PeerError, attention, exchange, landing, layout, shards, stem_attention
from stem.distributed.exchange import Peers

SIZE = 16
DEVICE = sys.argv[4] if len(sys.argv) > 4 else "cpu"  # "cpu", or "cuda": one GPU for each rank
IMPL = None if DEVICE == "cpu" else "torch"  # of small blocks in fp32, whose kernels take minutes to compile
TIMEOUT = 60.0  # of the collectives, long enough for a busy machine [s]
GRID = dict(block_size=SIZE, sink_blocks=1, local_blocks=2)
REGIMES = dict(k_start_regimes=((0, 0.3, 1),))
ADAPTIVE = stem.StemConfig.preset("adaptive", block_size=SIZE, score_cells=4, dense_up_to=0, threshold=0.03)
PLAIN = stem.StemConfig(density=0.4, score_stride=4, **GRID)
CONFIGS = {
    "plain": PLAIN,
    "paper": stem.StemConfig.preset("paper", score_stride=4, min_blocks=3, **GRID),
    "angelslim": stem.StemConfig.preset("angelslim", **REGIMES, **GRID),
    "hpc_ops": stem.StemConfig.preset("hpc_ops", score_stride=8, **REGIMES, **GRID),
    "adaptive": ADAPTIVE,
    "exact": ADAPTIVE.replace(exact_last_blocks=5, value_weight=0.3, value_norm="zscore", dense_first_blocks=2),
    "last": PLAIN.replace(dense_last_blocks=3, dense_first_blocks=1),
    "cells": stem.StemConfig(reduction="softmax", density=0.3, score_stride=2, score_cells=4, **GRID),
    "shares": PLAIN.replace(density=None, allocation="adaptive", threshold=0.05),
    "dense": PLAIN.replace(density=1.0),
    "forced": PLAIN.replace(density=None, k_start=3, decay=1.0),
    "means": PLAIN.replace(density=0.2, dropped="mean"),
    "cell_means": PLAIN.replace(density=0.3, dropped="cells", block_size=2 * SIZE, score_stride=8),
    "group": PLAIN.replace(lists="group"),
    "group_cells": ADAPTIVE.replace(lists="group", exact_last_blocks=3),
    "adaptive_means": ADAPTIVE.replace(dropped="mean", threshold=0.06),
}
LENGTHS = (400, 333, 20)  # 25 blocks; a ragged last block; fewer blocks than pieces
CASES = {}


def case(function):
    """Register a function of (rank, mesh) as a case."""
    CASES[function.__name__] = function
    return function


def inputs(tokens, q_heads=4, kv_heads=2, dim=16, batch=1, dtype=torch.float32):
    """Random q, k and v, equal on all ranks."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((batch, heads, tokens, dim) for heads in (q_heads, kv_heads, kv_heads))
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def assert_same_lists(selection, expected):
    """The lists of a RowSelection are those of the rows of a BlockSelection, bit by bit."""
    rows = selection.q_blocks.to(DEVICE) - (expected.num_kv_blocks - expected.num_q_blocks)
    indices, counts = expected.kv_indices[:, :, rows], expected.kv_num_blocks[:, :, rows]
    assert torch.equal(selection.kv_num_blocks, counts)
    width = int(counts.max()) if counts.numel() else 0
    assert torch.equal(selection.kv_indices[..., :width], indices[..., :width])


def compare(rank, mesh, config, q, k, v, where=None, **options):
    """Compare a call of all ranks with a call of one process: lists, output and log-sum-exp."""
    where = where or Layout.zigzag(k.shape[2], mesh.size(), config.block_size)
    everything = dict(return_selection=True, return_lse=True, impl=IMPL) | options
    out, selection, lse = stem.stem_attention(q, k, v, config, **everything)
    mine = (where.shard(x, rank) for x in (q, k, v))
    found = stem_attention(*mine, config, mesh=mesh, layout=where, timeout=TIMEOUT, **everything)
    assert_same_lists(found[1], selection)
    tolerance = dict(atol=2e-2, rtol=2e-2) if q.dtype == torch.bfloat16 else dict(atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(found[0], where.shard(out, rank), **tolerance)
    torch.testing.assert_close(found[2], where.shard(lse, rank), atol=1e-5, rtol=1e-5)
    return found


@contextmanager
def changed(module, name, value):
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def register_configs():
    for name, config in CONFIGS.items():

        def run(rank, mesh, config=config):
            for tokens in LENGTHS:
                compare(rank, mesh, config, *inputs(tokens), impl="torch")

        CASES[f"lists_and_outputs_{name}"] = run
    for name in ("plain", "angelslim", "hpc_ops", "adaptive", "cells", "shares", "means", "group", "group_cells"):

        def run_kernels(rank, mesh, config=CONFIGS[name]):
            compare(rank, mesh, config, *inputs(90, 2, 1), impl="triton")

        CASES[f"triton_{name}"] = run_kernels


register_configs()


def register_blocks_of_128():
    """Presets as they are, in bf16, on kernels of the GPU: lists bit by bit, outputs up to their rounding."""
    configs = {name: stem.StemConfig.preset(name) for name in ("paper", "angelslim", "hpc_ops")}
    configs["default"] = stem.StemConfig(density=0.2)
    configs["adaptive"] = stem.StemConfig.preset("adaptive", dense_up_to=0, threshold=0.02)  # drops noise, too
    for name, config in configs.items():

        def run(rank, mesh, config=config, lengths=(9000, 33000) if name == "default" else (9000,)):
            for tokens in lengths:  # each takes kernels of its own
                q, k, v = inputs(tokens, 8, 2, 128, dtype=torch.bfloat16)
                where = Layout.zigzag(tokens, mesh.size(), config.block_size)
                everything = dict(return_selection=True, return_lse=True)
                out, selection, lse = stem.stem_attention(q, k, v, config, **everything)
                mine = (where.shard(x, rank) for x in (q, k, v))
                found = stem_attention(*mine, config, mesh=mesh, layout=where, timeout=TIMEOUT, **everything)
                assert_same_lists(found[1], selection)
                assert selection.density() < 0.95
                error = stem.metrics.rel_l2_error(found[0].float(), where.shard(out, rank).float())
                assert error < 5e-3, (tokens, error)
                torch.testing.assert_close(found[2], where.shard(lse, rank), atol=1e-3, rtol=0)

        CASES[f"blocks_of_128_{name}"] = run


def repeated_calls_replay_their_launches(rank, mesh):
    """On other tensors; results of earlier calls stay."""
    from stem.kernels.replay import Recording

    config, replayed, before = stem.StemConfig(density=0.3), [], []
    repeat, (q, k, v) = Recording.repeat, inputs(9000, 8, 2, 128, dtype=torch.bfloat16)
    where = Layout.for_config(config, 9000, mesh.size())

    def counted(*args):
        replayed.append(1)
        return repeat(*args)

    for call in range(6):
        q, k, v = (x.roll(1000 + call, 2) for x in (q, k, v))
        out, selection, lse = stem.stem_attention(q, k, v, config, return_selection=True, return_lse=True)
        with changed(Recording, "repeat", counted):
            mine = (where.shard(x, rank) for x in (q, k, v))
            found = stem_attention(*mine, config, mesh=mesh, layout=where, return_selection=True, return_lse=True)
        before.append((found, selection, where.shard(out, rank), where.shard(lse, rank)))
    assert len(replayed) >= 4 * 5, len(replayed)  # sums of keys and of queries, their order, lists, attention
    for (out, mine, lse), selection, expected, expected_lse in before:
        assert_same_lists(mine, selection)
        assert stem.metrics.rel_l2_error(out.float(), expected.float()) < 5e-3
        torch.testing.assert_close(lse, expected_lse, atol=1e-3, rtol=0)


def copy_engines_write_what_nccl_gathers(rank, mesh):
    """Landings of growing prompts, several calls that wait for nothing, another stream, and prompts too large."""
    timeout, config, found = TIMEOUT + 1, stem.StemConfig(density=0.3), []
    peers = Peers.of(mesh, timeout)  # of its own, without landings
    prompts, calls = [inputs(tokens, 8, 2, 128, dtype=torch.bfloat16) for tokens in (6500, 9000, 6000)], []
    for call in range(9):
        where = Layout.for_config(config, prompts[call % 3][1].shape[2], mesh.size())
        calls.append((where, [where.shard(x, rank) * (1 + call // 3) for x in prompts[call % 3]]))
    torch.cuda.synchronize()
    for sizes in ((0, 1 << 30), (0, 1 << 30), (0, 0)):
        with changed(landing, "SIZES", sizes):
            received, outs = peers.received, []
            for call, (where, mine) in enumerate(calls):
                with torch.cuda.stream(torch.cuda.Stream() if call == 4 else torch.cuda.current_stream()):
                    outs.append(stem_attention(*mine, config, mesh=mesh, layout=where, timeout=timeout))
            torch.cuda.synchronize()
            found.append((outs, peers.received - received))
    *by_engines, (expected, received_by_nccl) = found
    landings = landing.Landings.of(peers)
    assert landings.is_usable and landings.size == 1 << 24
    assert by_engines[1][1] == received_by_nccl + 9 * landings.token.nbytes * (mesh.size() - 1)
    for outs, _ in by_engines:
        assert all(map(torch.equal, outs, expected))


if DEVICE == "cuda":
    register_blocks_of_128()
    case(copy_engines_write_what_nccl_gathers)
    case(repeated_calls_replay_their_launches)


@case
def triton_of_long_rows(rank, mesh):
    """More than 32 key blocks take other kernels, here for the last six query blocks."""
    q, k, v = inputs(32 * SIZE + 3, 1, 1)
    start = 27 * SIZE
    where = Layout.zigzag(start, mesh.size(), SIZE).extended(k.shape[2] - start, SIZE)
    compare(rank, mesh, PLAIN, q[:, :, start:], k, v, where, impl="triton")


@case
def implementations_dtypes_and_batches(rank, mesh):
    compare(rank, mesh, PLAIN, *inputs(200), impl="reference")
    if DEVICE == "cpu" and mesh.size() == 2:  # on CUDA, flex has no blocks of 16; its import takes seconds
        compare(rank, mesh, PLAIN, *inputs(200), impl="flex")
    compare(
        rank, mesh, PLAIN, *inputs(200, batch=2), scale=0.4, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0], device=DEVICE)
    )
    compare(rank, mesh, ADAPTIVE, *inputs(200, dtype=torch.float64))
    compare(rank, mesh, ADAPTIVE, *inputs(200, dtype=torch.bfloat16))


@case
def chunks(rank, mesh):
    """Chunks of a prompt: budgets and last blocks are those of the whole prompt; also a chunk inside a block."""
    world = mesh.size()
    for config in (PLAIN, ADAPTIVE, CONFIGS["last"], CONFIGS["adaptive_means"]):
        q, k, v = inputs(368)
        where = Layout.zigzag(128, world, SIZE)
        compare(rank, mesh, config, q[:, :, :128], k[:, :, :128], v[:, :, :128], where, prompt_length=368)
        for start, stop in ((128, 272), (272, 368)):
            where = where.extended(stop - start, SIZE)
            part = q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop]
            compare(rank, mesh, config, *part, where, prompt_length=368)
        where = Layout.zigzag(100, world, SIZE).extended(150, SIZE)
        compare(rank, mesh, config, q[:, :, 100:250], k[:, :, :250], v[:, :, :250], where)


@case
def gradients(rank, mesh):
    for config, share in ((PLAIN, 0.5), (PLAIN, 0.0), (ADAPTIVE, 1.0), (CONFIGS["adaptive_means"], 0.5)):
        with changed(shards, "GATHER_SHARE", share), changed(layout, "IMBALANCE", 1.0):
            tensors = [x.requires_grad_() for x in inputs(333)]
            out, lse = stem.stem_attention(*tensors, config, impl="torch", return_lse=True)
            weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)
            ((out * weights).sum() + (lse * weights[..., 0]).sum()).backward()
            where = Layout.zigzag(333, mesh.size(), SIZE).chunked()
            mine = [where.shard(x.detach(), rank).requires_grad_() for x in tensors]
            here, there = stem_attention(*mine, config, mesh=mesh, layout=where, impl="torch", return_lse=True)
            part = where.shard(weights, rank)
            ((here * part).sum() + (there * part[..., 0]).sum()).backward()
            for x, expected in zip(mine, tensors, strict=True):
                torch.testing.assert_close(x.grad, where.shard(expected.grad, rank), atol=1e-5, rtol=1e-4)


@case
def dtensors(rank, mesh):
    """DTensors with Shard(2), of even and ragged lengths, give DTensors whose full tensor is the prompt's."""
    for tokens in (64 * mesh.size(), 333):
        q, k, v = inputs(tokens)
        out, lse = stem.stem_attention(q, k, v, PLAIN, return_lse=True)
        where = Layout.zigzag(tokens, mesh.size(), SIZE)
        order = where._generate_indices()[0]
        split = where.chunked()
        mine = [
            DTensor.from_local(split.shard(x, rank), mesh, [Shard(2)], shape=x.shape, stride=x.stride())
            for x in (q, k, v)
        ]
        found, found_lse = stem_attention(*mine, PLAIN, mesh=mesh, return_lse=True)
        assert found.placements == (Shard(2),) and found.shape == q.shape and found_lse.shape == q.shape[:3]
        torch.testing.assert_close(found.full_tensor(), out[:, :, order], atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(found_lse.full_tensor(), lse[:, :, order], atol=1e-5, rtol=1e-5)


@case
def a_mesh_of_two_dimensions(rank, mesh):
    """The sequence over one dimension, the heads over another, as DTensors."""
    mesh = init_device_mesh(DEVICE, (mesh.size(), 1), mesh_dim_names=("context", "heads"))
    q, k, v = inputs(333)
    split = Layout.zigzag(333, mesh.size(0), SIZE).chunked()
    placements = [Shard(2), Shard(1)]
    mine = [
        DTensor.from_local(split.shard(x, rank), mesh, placements, shape=x.shape, stride=x.stride()) for x in (q, k, v)
    ]
    out = stem_attention(*mine, PLAIN, mesh=mesh["context"])
    assert list(out.placements) == placements
    expected = split.shard(stem.stem_attention(q, k, v, PLAIN), rank)
    torch.testing.assert_close(out.to_local(), expected, atol=2e-6, rtol=1e-5)
    for config in (PLAIN, ADAPTIVE, CONFIGS["means"]):  # one rank alone
        alone = stem_attention(q, k, v, config, mesh=mesh["heads"], return_selection=True)
        out, selection = stem.stem_attention(q, k, v, config, return_selection=True)
        assert_same_lists(alone[1], selection)
        torch.testing.assert_close(alone[0], out, atol=2e-6, rtol=1e-5)


@case
def layout_is_found_from_lengths(rank, mesh):
    q, k, v = inputs(333)
    where = Layout.zigzag(333, mesh.size(), SIZE)
    out = stem_attention(*(where.shard(x, rank) for x in (q, k, v)), PLAIN, mesh=mesh)
    torch.testing.assert_close(out, where.shard(stem.stem_attention(q, k, v, PLAIN), rank), atol=2e-6, rtol=1e-5)


@case
def torch_context_parallel(rank, mesh):
    """Shards of torch's context_parallel, its load balancers, and its way back."""
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import _context_parallel_shard, context_parallel_unshard

    tokens = 2 * mesh.size() * 51  # not whole blocks
    q, k, v = inputs(tokens)
    expected = stem.stem_attention(q, k, v, PLAIN)
    where = Layout.zigzag(tokens, mesh.size(), 1)
    buffers = [x.clone() for x in (q, k, v)]
    with context_parallel(mesh, buffers=buffers, buffer_seq_dims=[2, 2, 2]):
        for x, buffer in zip((q, k, v), buffers, strict=True):
            assert torch.equal(buffer, where.shard(x, rank))
        out = stem_attention(*buffers, PLAIN, mesh=mesh, layout=where)
    (out,) = context_parallel_unshard(mesh, [out], [2], load_balancer=where)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
    mine = _context_parallel_shard(mesh, [q, k, v], [2, 2, 2], load_balancer=where)
    assert all(torch.equal(a, where.chunked().shard(b, rank)) for a, b in zip(mine, (q, k, v), strict=True))


@case
def any_layout(rank, mesh):
    """Contiguous shards and single tokens: outputs come back where the queries were."""
    tokens, world = 150, mesh.size()
    edges = [tokens * i // world for i in range(world + 1)]
    contiguous = Layout(tuple(((a, b),) for a, b in zip(edges[:-1], edges[1:], strict=True)))
    compare(rank, mesh, PLAIN, *inputs(tokens), contiguous)
    dealt = Layout(tuple(tuple((i, i + 1) for i in range(r, tokens, world)) for r in range(world)))
    compare(rank, mesh, ADAPTIVE, *inputs(tokens), dealt)
    few = Layout(tuple(tuple((i, i + 1) for i in range(r, 40, world)) for r in range(world)))
    compare(rank, mesh, ADAPTIVE, *inputs(40, 1, 1), few, impl=IMPL or "triton")  # a rank without a block


@case
def kept_blocks_are_balanced(rank, mesh):
    """Late queries that attend to everything, early ones to little: blocks move until ranks compute about the same."""
    q, k, v = inputs(640)
    q[:, :, :560] *= 6
    q[:, :, 560:] *= 0.1
    where = Layout.zigzag(640, mesh.size(), SIZE)
    work = stem.stem_attention(q, k, v, ADAPTIVE, return_selection=True)[1].kv_num_blocks.sum((0, 1))
    before = [int(work[where.owners[::SIZE] == r].sum()) for r in range(mesh.size())]
    assert max(before) > 1.2 * sum(before) / mesh.size()
    computed = []

    def counted(*args, **options):
        computed.append(int(args[3].kv_num_blocks.sum()))
        return stem.block_sparse_attention(*args, **options)

    with changed(attention, "block_sparse_attention", counted):
        compare(rank, mesh, ADAPTIVE, q, k, v, where)
    loads = Peers.of(mesh, TIMEOUT).gather(torch.tensor(computed, device=DEVICE).sum()[None], "the test")()
    assert loads.sum() == work.sum() and loads.max() <= 1.06 * loads.float().mean(), loads


@case
def a_layout_for_a_config_moves_nothing(rank, mesh):
    """Budgets that do not depend on the data are balanced before the call, for which no queries travel."""
    peers = Peers.of(mesh, TIMEOUT)
    config = PLAIN.replace(density=0.3)
    where = Layout.for_config(config, 100 * SIZE, mesh.size())
    assert where != Layout.zigzag(100 * SIZE, mesh.size(), SIZE)
    work = stem.block_budget(100, config)
    loads = torch.tensor([float(work[where.owners[::SIZE] == r].sum()) for r in range(mesh.size())])
    assert loads.max() <= 1.05 * loads.mean()
    owners = Layout.for_config(PLAIN.replace(density=0.1), 512 * SIZE, mesh.size()).owners[::SIZE]
    work = stem.block_budget(512, PLAIN.replace(density=0.1)).double()
    loads = torch.stack([work[owners == r].sum() for r in range(mesh.size())])
    assert loads.max() <= 1.01 * loads.mean()  # 1.03 with the plain zigzag of two ranks
    asked = []
    real = peers.exchange

    def exchange(*args):
        asked.append(args[-1])
        return real(*args)

    with changed(peers, "exchange", exchange):
        compare(rank, mesh, config, *inputs(100 * SIZE), where)
    assert not [what for what in asked if "balance" in what or "return" in what], asked
    assert Layout.for_config(ADAPTIVE, 640, 2) == Layout.zigzag(640, 2, SIZE)


@case
def all_keys_travel_while_blocks_are_chosen(rank, mesh):
    """Where budgets let the lists name nearly all blocks; not for gradients, few blocks, or counts that data decide."""
    started, peers = [], Peers.of(mesh, TIMEOUT)
    real = peers.gather_together

    def gather_together(tensors, what):
        if len(tensors) == 2:
            started.append([x.shape[1] for x in tensors])
        return real(tensors, what)

    few = stem.StemConfig(k_start=2, decay=1.0, block_size=SIZE, sink_blocks=1, local_blocks=1)
    for config, expected in ((PLAIN.replace(density=0.6), [[3, 3]]), (few, []), (ADAPTIVE, [])):
        started.clear()
        with changed(peers, "gather_together", gather_together):
            compare(rank, mesh, config, *inputs(400, 6, 3, batch=2))
        assert started == expected, config


@case
def only_named_blocks_travel(rank, mesh):
    """A row that keeps one sink and its diagonal fetches one block; where most are named, all travel."""
    config = stem.StemConfig(k_start=2, decay=1.0, block_size=SIZE, sink_blocks=1, local_blocks=1)
    peers, world = Peers.of(mesh, TIMEOUT), mesh.size()
    q, k, v = inputs(20 * SIZE * world)
    where = Layout.zigzag(k.shape[2], world, SIZE)
    received = []
    for share in (1.0, 0.0):
        with changed(shards, "GATHER_SHARE", share):
            before = peers.received
            compare(rank, mesh, config, q, k, v, where)
            received.append(peers.received - before)
    block = 2 * SIZE * 16 * 4  # bytes of keys and values of one block of a head
    sinks = 0 if rank == 0 else 2 * block
    everything = 20 * (world - 1) * 2 * block
    assert received[1] - received[0] == everything - sinks
    for x, index in ((q, 0), (k, 20)):  # what nobody names does not matter, and what somebody names does
        x[:, :, 24 * SIZE : 25 * SIZE] += index
    compare(rank, mesh, config, q, k, v, where)


@case
def bad_arguments(rank, mesh):
    q, k, v = inputs(64)
    good = Layout.zigzag(64, mesh.size(), SIZE)
    q, k, v = (good.shard(x, rank) for x in (q, k, v))

    def refused(kind, words, *args, **options):
        try:
            stem_attention(*args, **{"mesh": mesh, "layout": good, **options})
        except kind as error:
            assert words in str(error), error
        else:
            raise AssertionError(f"no {kind.__name__} with {words!r}")

    refused(ValueError, "tokens that the layout gives rank", q[:, :, 1:], k, v, PLAIN)
    refused(TypeError, "config must be a StemConfig", q, k, v, 0.5)
    refused(TypeError, "mesh must be a DeviceMesh of one dimension", q, k, v, PLAIN, mesh=None)
    refused(ValueError, "timeout must be positive", q, k, v, PLAIN, timeout=0)
    refused(ValueError, "q must be finite", q * float("nan"), k, v, PLAIN)
    refused(ValueError, "impl must be", q, k, v, PLAIN, impl="fast")
    refused(ValueError, "prompt_length must be at least", q, k, v, PLAIN, prompt_length=10)
    refused(ValueError, "ranks", q, k, v, PLAIN, layout=Layout.zigzag(64, mesh.size() + 1, SIZE))


@case
def models(rank, mesh):
    """Logits, caches, chunks, decoding and the report of transformers models."""
    import tiny_models
    import transformers

    for family in ("Llama", "Qwen3", "GptOss"):
        overrides = {"layer_types": ["full_attention"] * 3} if family == "GptOss" else {}
        model, ids = tiny_models.build(family, **overrides).to(DEVICE), tiny_models.tokens(150).to(DEVICE)
        for config in (tiny_models.SPARSE, [ADAPTIVE, None, tiny_models.SPARSE.replace(dropped="mean")]):
            with stem.hf.stem_prefill(model, config, impl="torch") as report:
                expected = tiny_models.logits(model, ids)
                kept = [row["head_density"] for row in report if config is tiny_models.SPARSE]
                text = model.generate(ids, max_new_tokens=4, do_sample=False)
            stem.hf.enable(model, config, impl="torch", mesh=mesh)
            torch.testing.assert_close(tiny_models.logits(model, ids), expected, atol=2e-4, rtol=1e-4)
            assert [row["head_density"] for row in stem.hf.density(model)][: len(kept)] == kept
            few = tiny_models.logits(model, ids, logits_to_keep=5)
            torch.testing.assert_close(few, expected[:, -5:], atol=2e-4, rtol=1e-4)
            assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), text)
            stem.hf.disable(model)
    model = tiny_models.build("Llama").to(DEVICE)
    config = tiny_models.FIXED
    with stem.hf.stem_prefill(model, config, impl="torch"):
        expected = tiny_models.logits(model, ids)
    hooks = len(model._forward_hooks)
    with stem.hf.stem_prefill(model, config, impl="torch", mesh=mesh):
        cache = transformers.DynamicCache(config=model.config)
        parts = [tiny_models.logits(model, part, past_key_values=cache) for part in ids.split(64, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), expected, atol=2e-4, rtol=1e-4)
        held = torch.tensor([cache.get_seq_length()], device=DEVICE)
        assert Peers.of(mesh, attention.TIMEOUT).gather(held, "the test")().sum() == 150
        for bad, words in (
            (dict(labels=ids), "labels"),
            (dict(output_hidden_states=True), "output_hidden_states"),
            (dict(attention_mask=torch.arange(150, device=DEVICE)[None] > 3), "padding"),
            (dict(logits_to_keep=torch.tensor([1])), "logits_to_keep"),
        ):
            try:
                model(ids, **bad)
            except ValueError as error:
                assert words in str(error), error
            else:
                raise AssertionError(f"{words} was not refused")
    assert len(model._forward_hooks) == hooks
    for family, options, words in (
        ("Gemma3Text", {}, "sliding_attention"),
        ("Llama", dict(config=lambda q, k, v: None), "a Selector"),
    ):
        try:
            stem.hf.enable(tiny_models.build(family), mesh=mesh, **options)
        except ValueError as error:
            assert words in str(error), error
        else:
            raise AssertionError(f"{family} was not refused")


@case
def tensor_parallel(rank, mesh):
    """Two ranks hold half of the heads each: logits, text and the report of all heads are those of one process."""
    if mesh.size() != 2:
        return
    import tiny_models
    import transformers

    model = tiny_models.build("Llama", vocab_size=98)  # some versions of transformers refuse an odd number of rows
    ids = tiny_models.tokens(150).to(DEVICE)
    folder = Path(sys.argv[3], "model")
    if rank == 0:
        model.save_pretrained(folder)
    dist.barrier()
    model.to(DEVICE)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    split = transformers.AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
    assert split.model.layers[0].self_attn.q_proj.weight.to_local().shape[0] == 32
    for config in (tiny_models.SPARSE, ADAPTIVE):
        with stem.hf.stem_prefill(model, config) as report:
            expected, heads = tiny_models.logits(model, ids), [row["head_density"] for row in report]
            text = model.generate(ids, max_new_tokens=4, do_sample=False)
        with stem.hf.stem_prefill(split, config) as report:
            torch.testing.assert_close(tiny_models.logits(split, ids), expected, atol=2e-4, rtol=1e-4)
            assert [row["head_density"] for row in report] == heads
            assert torch.equal(split.generate(ids, max_new_tokens=4, do_sample=False), text)


def sabotaged(found):
    """A result, or one whose output and lists differ from it."""
    if not isinstance(found, tuple):
        return found
    out, selection = found
    return 2 * out, selection._replace(kv_num_blocks=selection.kv_num_blocks + 1)


@case
def measurement(rank, mesh):
    """Rows of stem.experiments.speed.shared hold the density, the bytes and the agreement with one rank."""
    if mesh.size() != 2:  # imports take seconds
        return
    from stem.experiments.speed import shared
    from stem.experiments.speed.candidates import Shape

    shape = Shape(960, q_heads=2, kv_heads=1, head_dim=16, dtype="float32")
    few = stem.StemConfig(k_start=2, decay=1.0, block_size=SIZE, sink_blocks=1, local_blocks=1)
    shared.PAIRS = shared.MODEL_PAIRS = 1, 1
    row, dense = (shared.operator_row(shape, config, mesh) for config in (few, PLAIN.replace(density=1.0)))
    ring = 2 * 960 * 16 * 4 * (mesh.size() - 1) / mesh.size() / 2**20
    assert (
        row["ring_mib"] == dense["ring_mib"] == ring
        and row["received_mib"] < 0.2 * ring < ring <= dense["received_mib"]
    )
    assert dense["density"] == 1 and row["density"] < 0.1
    for found in (row, dense):
        assert found["same_lists"] and found["difference"] < 1e-5
        assert 0 < found["speedup_low"] <= found["speedup"] <= found["speedup_high"]
        assert found["efficiency"] == found["speedup"] / mesh.size() and found["attention_ms"] > 0
    with changed(shared, "stem_attention", lambda *args, **options: sabotaged(stem_attention(*args, **options))):
        bad = shared.operator_row(shape, few, mesh)
    assert not bad["same_lists"] and bad["difference"] > 0.1
    gather, exchange = shared.bandwidth_rows(mesh, (2**16,))
    assert gather["received_mib"] == exchange["received_mib"] == (mesh.size() - 1) / 16 and gather["gb_per_s"] > 0
    settings = dict(shared.TINY, hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2)
    model = shared.random_llama(settings, "cpu", torch.float32)
    row = shared.model_row(model, 200, PLAIN, mesh)
    assert row["operation"] == "ttft" and row["difference"] < 1e-4 and 0 < row["received_mib"] and row["density"] < 0.45


@case
def a_late_rank_is_named(rank, mesh):
    """The others wait as long as the time-out says, not longer, and say who is missing."""
    q, k, v = inputs(64)
    where = Layout.zigzag(64, mesh.size(), SIZE)
    mine = [where.shard(x, rank) for x in (q, k, v)]
    for timeout in (TIMEOUT, 1.5):  # first calls take longer, on a busy machine not everywhere equally long
        dist.barrier()
        stem_attention(*mine, PLAIN, mesh=mesh, layout=where, timeout=timeout)
    begin = time.monotonic()
    if rank == 1:
        time.sleep(6)
        return
    try:
        with changed(exchange, "PATIENCE", 2.0):
            stem_attention(*mine, PLAIN, mesh=mesh, layout=where, timeout=1.5)
    except PeerError as error:
        assert error.ranks == [1] and "rank 1 did not take part in" in str(error), error
        assert 1 < time.monotonic() - begin < 6
    else:
        raise AssertionError("no PeerError")


@case
def the_host_waits_until_everything_has_arrived(rank, mesh):
    """Under NCCL, where streams wait for collectives, an event tells what has arrived; here it is a stand-in."""

    class Event:
        arrives, queries = True, 0

        def record(self):
            pass

        def query(self):
            self.queries += 1
            return self.arrives

    peers, event = Peers(mesh, 1.0), Event()  # of its own, which no other case uses
    where = Layout.zigzag(400, mesh.size(), SIZE)
    q, k, v = (where.shard(x, rank).requires_grad_() for x in inputs(400))
    with (
        changed(peers, "arrived", event),
        changed(peers, "name", "the host waits"),  # under which no rank has said that it waits
        changed(Peers, "of", lambda mesh, timeout: peers),
        changed(torch.cuda, "is_current_stream_capturing", lambda: False),  # needs CUDA
    ):
        for config in (PLAIN, ADAPTIVE):  # all keys travel at once, or those that lists name
            for tensors in ((q.detach(), k.detach(), v.detach()), (q, k, v)):
                before = event.queries
                out = stem_attention(*tensors, config, mesh=mesh, layout=where)
                assert event.queries == before + 1
        out.sum().backward()
        assert event.queries == before + 2
        event.arrives = False
        if rank == 0:
            with changed(exchange, "PATIENCE", 0.2):
                try:
                    peers.settle()
                except PeerError as error:
                    assert error.ranks == list(range(1, mesh.size())) and peers.last in str(error), error
                else:
                    raise AssertionError("no PeerError")


@case
def z_a_dead_rank_is_named(rank, mesh):
    """The last case, because a rank dies in it; it dies before the first call if no other case has run."""
    q, k, v = inputs(64)
    where = Layout.zigzag(64, mesh.size(), SIZE)
    if rank == 1:
        os._exit(13)
    begin = time.monotonic()
    try:
        with changed(exchange, "PATIENCE", 2.0):
            stem_attention(*(where.shard(x, rank) for x in (q, k, v)), PLAIN, mesh=mesh, layout=where, timeout=TIMEOUT)
    except PeerError as error:
        assert error.ranks == [1] and "rank 1 did not take part in" in str(error), error
        assert time.monotonic() - begin < TIMEOUT / 2
    else:
        raise AssertionError("no PeerError")


def main(rank, world, folder, names):
    """Run the named cases, or all, on one rank; each outcome, null or a traceback, goes to a file of JSON lines."""
    torch.set_num_threads(1)
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=world)
    mesh = init_device_mesh(DEVICE, (world,), mesh_dim_names=("context",))
    with Path(folder, f"{rank}.jsonl").open("w", buffering=1) as file:
        for name in sorted(names or CASES):
            torch.manual_seed(0)
            begin, outcome = time.monotonic(), None
            try:
                CASES[name](rank, mesh)
            except Exception:
                outcome = traceback.format_exc()[-3000:]
            file.write(json.dumps([name, outcome, round(time.monotonic() - begin, 2)]) + "\n")
    os._exit(0)  # a rank is missing; torch would wait for it


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[5:])

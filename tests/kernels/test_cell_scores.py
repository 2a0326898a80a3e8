"""Scores of cells: logits far above those of the first tile of keys lose nothing."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from stem.kernels import cell_pairs as cell_kernels
from stem.kernels.cell_features import Cells
from stem.kernels.launch import COMPILE
from stem.kernels.share_select import pool_select

from stem import BlockSelection, StemConfig, block_budget, block_scores, select_blocks
from stem.cells import kernel_cells
from stem.scores import cell_bonus

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IS_SM90 = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
SIZE, BLOCKS = 16, 24
CONFIG = StemConfig.preset("adaptive", block_size=SIZE, dense_up_to=0, threshold=0.02, exact_last_blocks=0)
# logit that each kind adds to all keys of a block
LOGITS = {
    "many blocks tie at 100, one is at 200": [0.0] * 8 + [100.0] * 8 + [200.0] + [100.0] * 7,
    "one block at 1500": [0.0] * 16 + [1500.0] + [0.0] * 7,
    "ascending by 40 a block": [40.0 * block for block in range(24)],
    "descending from 1500 in the third block": [0.0, 700.0] + [1500.0 - 40.0 * block for block in range(22)],
    "a few blocks close to each other": [0.0] * 9 + [80.0, 81.0] + [0.0] * 8 + [81.5] + [0.0] * 4,
    "in the last block only": [0.0] * 23 + [300.0],
}


def inputs(kind, num_q_heads=1, num_kv_heads=1, num_queries=SIZE * BLOCKS, peak_heads=None, head_dim=16):
    """q, k and v: logits of about 1, to which keys add LOGITS[kind]; in the first `peak_heads` query heads only."""
    q = torch.randn(1, num_q_heads, num_queries, head_dim)
    k, v = torch.randn(2, 1, num_kv_heads, SIZE * BLOCKS, head_dim)
    q[..., 0] = 0.0
    q[:, :peak_heads, :, 0] = 4.0  # times the key's and the scale of 0.25: the logit
    k[..., 0] = torch.tensor(LOGITS[kind]).repeat_interleave(SIZE)
    return q.to(DEVICE), k.to(DEVICE), v.to(DEVICE)


def kept_by(impl, q, k, v, config):
    """Block mask of the selection by share."""
    cells = kernel_cells(q.shape[2], k.shape[2], config)
    rules = config.threshold, config.sink_blocks, config.local_blocks, 0, config.dense_last_blocks
    if impl == "triton":
        bonus = cell_bonus(v, config, "triton")
        lists = pool_select(q, k, bonus, cells, q.shape[-1] ** -0.5, *rules, config.exact_last_blocks)
        return BlockSelection(*lists, SIZE, cells.num_kv_blocks, q.shape[2], k.shape[2]).to_mask()
    scores = block_scores(q, k, v, config, impl="torch")
    lengths = dict(q_len=q.shape[2], kv_len=k.shape[2])
    budget = block_budget(cells.num_kv_blocks, config)
    return select_blocks(scores, budget, config, impl="torch", **lengths).to_mask()


@pytest.mark.parametrize("exact_last_blocks", [0, 2])
@pytest.mark.parametrize("kind", LOGITS)
def test_blocks_far_above_the_first_tile_are_kept_as_by_torch(kind, exact_last_blocks):
    q, k, v = inputs(kind)
    config = CONFIG.replace(exact_last_blocks=exact_last_blocks)
    expected, found = (kept_by(impl, q, k, v, config) for impl in ("torch", "triton"))
    assert torch.equal(found, expected)
    best = torch.tensor(LOGITS[kind])[None].expand(BLOCKS, -1).tril().argmax(-1)
    assert found[0, :, torch.arange(BLOCKS), best].all()


@pytest.mark.parametrize("programs", [1, 64])
@pytest.mark.parametrize(
    "change",
    [
        dict(num_queries=200),
        dict(num_q_heads=4, num_kv_heads=2, peak_heads=1),
        dict(config=dict(value_weight=60.0)),
        dict(config=dict(score_pooling="mean", score_peak=0.0, score_cells=4)),
        dict(config=dict(score_cells=16, score_peak=0.0)),
        dict(buffer_bytes=1 << 15),
    ],
    ids=["chunk", "GQA, one head has peaks", "value bonus", "means", "one-token cells", "query blocks in parts"],
)
def test_peaks_in_every_variant_of_the_kernels(programs, change, monkeypatch):
    if DEVICE == "cuda":
        pytest.skip("a compiled kernel cannot be given another number of programs")
    monkeypatch.setattr(cell_kernels, "PROGRAMS", cell_kernels.tl.constexpr(programs))
    monkeypatch.setattr(cell_kernels, "BUFFER_BYTES", change.pop("buffer_bytes", cell_kernels.BUFFER_BYTES))
    config = CONFIG.replace(exact_last_blocks=1, **change.pop("config", {}))
    q, k, v = inputs("many blocks tie at 100, one is at 200", **change)
    expected, found = (kept_by(impl, q, k, v, config) for impl in ("torch", "triton"))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("logit, flagged", [(0.0, 0), (4.0, 1)])
def test_only_peaks_are_computed_again(logit, flagged, monkeypatch):
    flags = []

    def keep_flags(kernel, grid, tensors, numbers, *, REDO=None, **constants):
        if REDO:
            heads, row_tiles, splits = tensors[-1].shape
            assert grid == (heads, -(-row_tiles // cell_kernels.REDO_TILES), splits)
            flags.append(tensors[-1].cpu().clone())
        launch(kernel, grid, tensors, numbers, REDO=REDO, **constants)

    launch = cell_kernels.launch
    monkeypatch.setattr(cell_kernels, "launch", keep_flags)
    config = CONFIG.replace(exact_last_blocks=1)
    q, k, v = inputs("one block at 1500")
    q[..., 0] = logit
    kept_by("triton", q, k, v, config)
    assert len(flags) == 2  # of cells and of tokens
    for of_kernel in flags:
        assert int(of_kernel.max()) == flagged


def shares_of_cells(features, cells, seen):
    """Shares [heads, query cells, nk] from the sums of pair_cells, in fp64."""
    chunks = cell_kernels.pair_cells(*features, None, cells)
    parts = [sums[:, : rows * cells.query_cells].double() for rows, sums, _ in chunks]
    sums = torch.cat(parts, 1).where(seen, 0.0)
    return sums / sums.sum(-1, keepdim=True)


ON_SM90 = {  # queries, keys, query heads, KV heads, cells of a key block, height of a peak, bytes of sums
    "whole": (17_000, 17_000, 32, 8, 8, 0.0, 1 << 30),
    "peaks": (16_500, 16_500, 32, 8, 8, 6.0, 1 << 30),
    "chunk": (9_001, 17_007, 64, 8, 8, 6.0, 1 << 30),
    "query blocks in parts": (17_000, 17_000, 64, 8, 16, 0.0, 1 << 23),
    "small key cells": (16_385, 16_385, 32, 8, 32, 6.0, 1 << 30),
}


@pytest.mark.skipif(not IS_SM90, reason="needs a GPU of compute capability 9.0")
@pytest.mark.parametrize("case", ON_SM90)
@pytest.mark.usefixtures("poisoned_empty")
def test_sums_on_sm90_are_as_close_to_fp64_as_those_of_triton(case, monkeypatch):
    from stem.kernels import cell_pairs_sm90
    from stem.kernels.cell_features import cell_features

    q_len, kv_len, num_q_heads, num_kv_heads, key_cells, peak, buffer_bytes = ON_SM90[case]
    q = torch.randn(1, num_q_heads, q_len, 128, device=DEVICE, dtype=torch.bfloat16)
    k = torch.randn(1, num_kv_heads, kv_len, 128, device=DEVICE, dtype=torch.bfloat16)
    q[:, :3] += 1  # logits of these heads are about 16 * peak there
    k[:, 0, kv_len // 3 : kv_len // 3 + 128] += peak
    cells = Cells(128, 8, key_cells, stride=1, peak=0.3, rms=True, q_len=q_len, kv_len=kv_len)
    features = cell_features(q, k, cells, 128**-0.5)
    ends = cells.first_position + cells.q_cell * torch.arange(1, features[0].shape[2] + 1, device=DEVICE)
    starts = cells.k_cell * torch.arange(features[1].shape[2], device=DEVICE)
    visible = starts < ends.clamp_max(kv_len)[:, None]
    keys = features[1][0].double().repeat_interleave(num_q_heads // num_kv_heads, 0)
    logits = (features[0][0].double() @ keys.mT).masked_fill(~visible, float("-inf"))
    expected = (logits * math.log(2)).softmax(-1).unflatten(-1, (-1, key_cells)).sum(-1)

    monkeypatch.setattr(cell_kernels, "BUFFER_BYTES", buffer_bytes)
    launches, launch = [], cell_pairs_sm90.launch
    monkeypatch.setattr(cell_pairs_sm90, "launch", lambda *given, **named: launches.append(launch(*given, **named)))
    seen = visible.unflatten(-1, (-1, key_cells)).any(-1)
    found = shares_of_cells(features, cells, seen)
    assert len(launches) == (2 if case == "query blocks in parts" else 1)
    monkeypatch.setattr(cell_kernels, "fits_sm90", lambda *features: False)
    by_triton = shares_of_cells(features, cells, seen)
    error, of_triton = ((x - expected).norm(dim=-1) / expected.norm(dim=-1) for x in (found, by_triton))
    assert error.max() < 0.01 and error.mean() < 1.02 * of_triton.mean()


@pytest.mark.parametrize("num_heads, tokens, on_sm90", [(8, 3000, False), (8, 65_536, True)])
def test_a_first_call_compiles_what_it_launches_and_what_other_lengths_do(num_heads, tokens, on_sm90, monkeypatch):
    happened = []
    for_sm90 = SimpleNamespace(pair_cells=lambda q, k, sums, first_cell, *of: happened.append((first_cell, sums.shape)))
    monkeypatch.setitem(sys.modules, "stem.kernels.cell_pairs_sm90", for_sm90)
    monkeypatch.setattr(cell_kernels, "fits_sm90", lambda *features: True)

    def note(kernel, grid, tensors, numbers, **constants):
        happened.append((numbers, constants["REDO"]))

    monkeypatch.setattr(cell_kernels, "launch", note)
    cells = Cells(128, 8, 16, stride=1, peak=0.3, rms=True, q_len=tokens, kv_len=tokens)
    q = torch.empty(1, num_heads, cells.num_q_blocks * 8, 256, dtype=torch.bfloat16)
    k = torch.empty(1, 2, cells.num_kv_blocks * 16, 256, dtype=torch.bfloat16)

    def launches():
        happened.clear()
        assert len(list(cell_kernels.pair_cells(q, k, None, cells))) == 1
        return list(happened)

    token = COMPILE.set(note)  # nothing runs
    try:
        compiled = launches()
    finally:
        COMPILE.reset(token)
    launched, of_sm90 = launches(), (0, (num_heads, q.shape[2], cells.num_kv_blocks))
    assert len(launched) == 2 and set(launched) < set(compiled) and len(compiled) == 3
    assert of_sm90 in compiled and (of_sm90 in launched) == on_sm90

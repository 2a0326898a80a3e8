"""Peers of the speed comparison, by stand-ins for their packages: found, named, checked, and compared with."""

import sys

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

import stem
from stem.experiments.speed import bench, candidates, figures, first_token, gate, peers, report

SHAPE = bench.Shape(300, q_heads=4, kv_heads=2, head_dim=16, dtype="bfloat16")
CONFIG = stem.StemConfig(density=0.5, block_size=16, sink_blocks=1, local_blocks=1)
FA3 = """
import torch
from torch.nn.functional import scaled_dot_product_attention

def flash_attn_func(q, k, v, softmax_scale=None, causal=False, q_descale=None, k_descale=None, v_descale=None):
    assert causal and q.is_cpu
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q_descale is not None:
        assert q.dtype == k.dtype == v.dtype == torch.float8_e4m3fn and q_descale.shape == k.shape[:2]
        q_descale = q_descale.repeat_interleave(q.shape[1] // k.shape[1], 1)
        q, k, v = (x.float() * s[..., None, None] for x, s in ((q, q_descale), (k, k_descale), (v, v_descale)))
    out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=softmax_scale)
    return out.bfloat16().transpose(1, 2) * FACTOR
FACTOR = 1.0
"""
FA4 = """
import stem
import torch
from stem.reference import masked_attention

def flash_attn_func(q, k, v, softmax_scale=None, causal=False, mask_mod=None, block_sparse_tensors=None, pack_gqa=None):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    position = torch.arange(q.shape[2])
    mask = position <= position[:, None]
    if block_sparse_tensors is not None:
        assert pack_gqa is False and not causal
        masked_count, masked, full_count, full, size = block_sparse_tensors
        assert mask_mod.is_jit and mask_mod(0, 0, 3, 3, None, None) and not mask_mod(0, 0, 3, 4, None, None)
        blocks = torch.zeros(*full.shape[:3], full.shape[3] + 1, dtype=torch.bool)
        for count, index in ((masked_count, masked), (full_count, full)):
            unused = torch.arange(index.shape[3]) >= count[..., None]
            blocks.scatter_(3, index.long().masked_fill(unused, full.shape[3]), True)
        tokens = blocks[..., :-1].repeat_interleave(size[0], 2).repeat_interleave(size[1], 3)
        mask = mask & tokens[:, :, : q.shape[2], : k.shape[2]]
    return masked_attention(q, k, v, mask, softmax_scale).transpose(1, 2), None
"""
BLOCKS = """
from typing import NamedTuple

class BlockSparseTensorsTorch(NamedTuple):
    mask_block_cnt: object
    mask_block_idx: object
    full_block_cnt: object
    full_block_idx: object
    block_size: tuple
"""
JIT = """
def jit(function):
    function.is_jit = True
    return function
"""
FILES = {
    "fa3_fwd_interface.py": FA3, "flash_attn/cute/interface.py": FA4, "flash_attn/cute/block_sparsity.py": BLOCKS,
    "cutlass/cute.py": JIT,
}  # fmt: skip


def forget():
    peers.attention_function.cache_clear()
    peers._causal_mask.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] in ("fa3_fwd_interface", "flash_attn", "cutlass")]:
        del sys.modules[name]


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Function that installs stand-ins: file names, or texts by file name."""
    monkeypatch.syspath_prepend(tmp_path)
    forget()

    def write(**texts):
        for name, text in (texts or FILES).items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    yield write
    forget()


@pytest.fixture
def problem():
    return bench.Problem(SHAPE, CONFIG, "cpu", "torch")


def candidate(provider):
    return candidates.attention_candidate(provider, candidates.dense_attends("cuda")[provider])


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(bench, "measure", lambda call, device: dict(latency_ms=2.0, peak_memory_mib=1.0))


def test_without_packages_there_are_no_peers(install):
    assert not peers.installed(peers.DENSE | peers.FP8 | peers.SPARSE)
    assert list(candidates.dense_attends("cuda")) == ["sdpa_cudnn", "sdpa_flash"]
    assert [found.provider for found in candidates.sparse_peers(flex=True)] == ["flex"]
    assert not candidates.sparse_peers(flex=False)


def test_another_flash_attn_is_not_the_fourth(install):
    install(**{"flash_attn/__init__.py": ""})
    assert not peers.installed(peers.DENSE)


def test_installed_packages_are_found(install):
    install(**{"fa3_fwd_interface.py": FA3})
    assert list(candidates.dense_attends("cuda")) == ["sdpa_cudnn", "sdpa_flash", "fa3", "fa3_fp8"]
    assert list(candidates.dense_attends("cpu")) == ["sdpa_cpu"]
    install()
    assert peers.installed(peers.DENSE | peers.FP8) == ["fa3", "fa4", "fa3_fp8"]
    assert [found.provider for found in candidates.sparse_peers(flex=True)] == ["fa4_sparse", "flex_flash", "flex"]
    assert [found.provider for found in candidates.sparse_peers(flex=False)] == ["fa4_sparse"]


@pytest.mark.parametrize("provider", ["fa3", "fa4", "fa3_fp8"])
def test_dense_peers_pass_the_gate(install, fast, problem, provider):
    install()
    row = bench.run(candidate(provider), problem, "small")
    assert row["error"] == "" and row["density"] == 1.0 and row["flop"] == SHAPE.dense_flops()
    in_fp8 = provider == "fa3_fp8"
    assert row["config"] == ("dense fp8" if in_fp8 else "dense")
    assert row["dtype"] == ("float8_e4m3fn" if in_fp8 else "bfloat16")
    assert (row["error_vs_fp64"] > 1.6e-2) == in_fp8


def test_block_sparse_peers_attend_to_stems_blocks(install, fast, problem):
    install()
    (sparse,) = candidates.sparse_peers(flex=False)
    row = bench.run(sparse, problem, "small")
    assert row["error"] == "" and row["config"] == "small" and row["density"] == problem.selection.density() < 0.6
    out = sparse.prepare(problem)[0]()
    torch.testing.assert_close(out, problem.attend(), atol=1e-2, rtol=1e-2)


def test_a_peer_that_computes_dense_attention_is_a_named_failure(install, fast, problem):
    install(**FILES | {"flash_attn/cute/interface.py": FA4.replace("mask = mask & tokens", "unused = tokens")})
    row = bench.run(candidates.sparse_peers(flex=False)[0], problem, "small")
    assert row["provider"] == "fa4_sparse" and row["error"].startswith("WrongResult: output rows: relative error")
    assert "latency_ms" not in row


@pytest.mark.parametrize("provider, factor", [("fa3", "1.03"), ("fa3_fp8", "1.2")])
def test_a_wrong_peer_is_a_named_failure(install, fast, problem, provider, factor):
    install(**{"fa3_fwd_interface.py": FA3.replace("FACTOR = 1.0", f"FACTOR = {factor}")})
    row = bench.run(candidate(provider), problem, "small")
    assert row["error"].startswith("WrongResult: output rows: relative error") and "latency_ms" not in row


def test_a_peer_that_cannot_be_imported_costs_its_row(install, problem):
    install(**{"fa3_fwd_interface.py": "raise OSError('libcuda.so is too old')"})
    row = bench.run(candidate("fa3"), problem, "small")
    assert row["provider"] == "fa3" and row["error"] == "OSError: libcuda.so is too old"


def test_rounding_to_fp8_uses_the_whole_range_of_each_head():
    q, k, v = (torch.randn(2, heads, 50, 16) * 10 for heads in (4, 2, 2))
    k[:, 1] *= 1e-3
    *rounded, q_scale, k_scale, v_scale = peers.rounded_to_fp8(q, k, v)
    for x, low, scale in zip((q, k, v), rounded, (q_scale, k_scale, v_scale), strict=True):
        assert low.dtype == torch.float8_e4m3fn and scale.shape == (2, 2) and low.is_contiguous()
        back = low.transpose(1, 2).float() * scale.repeat_interleave(x.shape[1] // 2, 1)[..., None, None]
        assert ((back - x).abs() <= x.abs() / 16 + scale.max() * 2**-9).all()
        assert low.float().abs().amax() == 448


def test_a_model_attends_by_a_peer_and_gets_its_own_attention_back(install):
    install()
    from tiny_models import build, logits, tokens

    model, ids = build(), tokens(40)
    expected = logits(model, ids)
    with peers.attention_of(model.bfloat16(), "fa3"):
        assert model.config._attn_implementation == "fa3"
        found = logits(model, ids)
    assert model.config._attn_implementation == "sdpa"
    assert list(first_token.dense_contexts(model, "cuda")) == ["sdpa_cudnn", "sdpa_flash", "fa3", "fa4"]
    assert list(first_token.dense_contexts(model, "cpu")) == ["sdpa_cpu"]
    assert (found.float() - expected).norm() < 0.05 * expected.norm()


def timed_rows(times):
    """Rows of one length by (operation, provider): milliseconds."""
    rows = []
    for (operation, provider), ms in times.items():
        config = "dense fp8" if provider in peers.FP8 else "dense" if provider in candidates.BASELINES else "default"
        rows.append(dict(operation=operation, provider=provider, config=config, tokens=131072, latency_ms=ms))
    return rows


TIMES = {
    ("attention", "sdpa_cudnn"): 250.0, ("attention", "fa3"): 210.0, ("attention", "fa3_fp8"): 150.0,
    ("graph attention", "sdpa_cudnn"): 240.0, ("operator", "stem"): 42.0, ("graph operator", "stem"): 40.0,
}  # fmt: skip


def test_speedups_name_the_fastest_dense_in_the_same_precision():
    *_, called, in_graph = bench.with_speedups(timed_rows(TIMES), 0)
    assert called["fastest_dense"] == "fa3" and called["speedup_vs_fa3"] == 5.0
    assert called["speedup_vs_fa3_fp8"] == pytest.approx(150 / 42) and called["speedup_vs_fa4"] is None
    assert in_graph["fastest_dense"] == "sdpa_cudnn" and in_graph["speedup_vs_sdpa_cudnn"] == 6.0
    assert {*called} - {"config", "tokens"} <= set(bench.COLUMNS) | {"operation"}
    assert report.best_ratio(called) == (5.0, "fa3")
    assert report.best_ratio({"speedup_vs_fa3": float("nan")})[1] == ""


def test_tables_and_figures_name_the_fastest_dense():
    rows = pd.DataFrame(bench.with_speedups(timed_rows(TIMES), 0))
    assert report.fastest_dense(rows).to_dict() == {131072: "FlashAttention-3"}
    assert report.fastest_dense(rows, graph=True).to_dict() == {131072: "cuDNN"}
    assert report.over_dense(rows, None).loc[131072, "default"] == 5.0
    assert report._against_dense(dict(rows.iloc[-2], density=0.2), ["fa3", "fa3_fp8"]) == [
        "20.0%", "210", "150", "42", "5× = 5.00 × 1.00 (FlashAttention-3)", "5×", "3.57×",
    ]  # fmt: skip
    (ax,) = figures.bars(rows[rows.operation != "operator"].replace("graph operator", "attention"), "attention",
                         "default").axes  # fmt: skip
    assert ax.get_title(loc="left") == "attention: 5.2× over FlashAttention-3 at 128K tokens"


def test_errors_allowed_in_fp8_are_larger_but_no_wrong_result_passes():
    q, k, v = (torch.randn(1, 2, 64, 16).bfloat16() for _ in range(3))
    rows, out = gate.sampled_rows(64, 16), F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert gate.check_output(out * 1.05, q, k, v, rows, allowed=gate.FP8_TOLERANCE) > 0.04
    for wrong in (out * 1.15, out.roll(1, 2)):
        with pytest.raises(gate.WrongResult):
            gate.check_output(wrong, q, k, v, rows, allowed=gate.FP8_TOLERANCE)


def test_others_over_the_same_blocks_have_a_table():
    rows = pd.DataFrame(timed_rows({("attention", "stem_triton"): 60.0, ("attention", "stem_hopper"): 41.0}))
    assert not report._same_blocks(rows.assign(config="released", density=0.2))
    more = timed_rows({("attention", "fa4_sparse"): 45.1, ("attention", "flex"): 70.0})
    text = report._same_blocks(pd.concat([rows, pd.DataFrame(more)]).assign(config="released", density=0.2))
    assert "FlashAttention-4 [ms] | FlexAttention Triton [ms] |" in text
    assert text.endswith("| 128K | 20.0% | 41 | 45.1 | 70 | 1.1× |")
    assert not report._same_blocks(pd.concat([rows, pd.DataFrame(more)]).assign(config="released", density=1.0))


def test_a_sentence_says_where_calls_wait_for_the_cpu():
    times = {("attention", "fa3"): 0.3, ("graph attention", "fa3"): 0.1}
    short, long = (pd.DataFrame(timed_rows(times)).assign(tokens=n) for n in (1024, 8192))
    long["latency_ms"] = 0.8
    text = report._waiting(pd.concat([short, long]))
    assert text.startswith("Up to 1K tokens a call of FlashAttention-3 takes 3 to 3 times as long as its replay,")
    assert not report._waiting(long)

"""stem.experiments.speed: wrong results are refused, rows hold their columns, failures cost one row."""

import dataclasses
import os
import time

import oracles
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from sparse_inputs import lists_of, random_inputs, random_mask

import stem
from stem.experiments.speed import bench, beyond, first_token, gate, peers, report
from stem.experiments.speed.__main__ import main

SMALL = bench.Shape(300, q_heads=4, kv_heads=2, head_dim=16, dtype="float32")
CONFIG = stem.StemConfig(density=0.5, block_size=16, sink_blocks=1, local_blocks=1)


@pytest.fixture(scope="module", params=[CONFIG, stem.StemConfig.preset("angelslim", k_start=6, block_size=16)])
def problem(request):
    return bench.Problem(SMALL, request.param, "cpu", "torch")


@pytest.fixture
def fast(monkeypatch):
    """Timing that costs nothing, for tests about everything else."""
    monkeypatch.setattr(bench, "measure", lambda call, device: dict(latency_ms=2.0, peak_memory_mib=1.0))


def test_inputs_lie_between_bands_of_nan(problem):
    for x in problem.qkv:
        assert x.isfinite().all() and x.is_contiguous()
        around = torch.as_strided(x, (gate.GUARD_ROWS * x.shape[-1],), (1,), 0)
        assert around.isnan().all()


def test_uninitialised_memory_is_poisoned_inside_the_gate_only():
    with gate.poisoned_buffers():
        assert torch.empty(100).isnan().all()
        assert (torch.empty(100, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
        assert torch.empty_like(torch.ones(100)).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("tokens", [1, 15, 16, 300, 4096])
def test_sampled_rows_hold_both_ends_and_stay_inside(tokens):
    rows = gate.sampled_rows(tokens, 16)
    assert rows[0] == 0 and rows[-1] == tokens - 1 and (rows.diff() > 0).all()


def test_reference_rows_are_attention(problem):
    rows = torch.tensor([0, 17, 150, 299])
    q, k, v = (x.double() for x in problem.qkv)
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(gate.reference_rows(*problem.qkv, rows), dense[:, :, rows])
    masked = stem.block_sparse_attention(q, k, v, problem.selection, impl="reference")
    torch.testing.assert_close(gate.reference_rows(*problem.qkv, rows, problem.selection), masked[:, :, rows])


@pytest.mark.parametrize("row", [0, 9, 18])
def test_reference_scores_are_block_scores(problem, row):
    expected = stem.block_scores(*(x.double() for x in problem.qkv), problem.config)[:, :, row, : row + 1]
    torch.testing.assert_close(gate.reference_score_row(*problem.qkv, problem.config, row), expected)


def test_right_results_pass(problem):
    assert gate.check_output(problem.attend(), *problem.qkv, problem.rows, problem.selection) < 1e-5
    assert gate.check_scores(problem.scores, *problem.qkv, problem.config) < 1e-5
    assert gate.check_selection(problem.selection, problem.scores, problem.budget, problem.config, problem.rows) == 0


def drop_one_block(selection):
    """Remove the first free block of each row that has more than four."""
    mask = selection.to_mask()
    mask[..., 1] &= mask.sum(-1) < 4
    return stem.BlockSelection.from_mask(mask, selection.block_size, q_len=selection.q_len, kv_len=selection.kv_len)


def one_nan(out):
    out = out.clone()
    out[0, -1, -1, 0] = torch.nan
    return out


WRONG_OUTPUTS = {
    "NaN": lambda p: one_nan(p.attend()),
    "one per cent off": lambda p: p.attend() * 1.01,
    "shifted by a row": lambda p: p.attend().roll(1, 2),
    "heads swapped": lambda p: p.attend().flip(1),
    "not causal": lambda p: F.scaled_dot_product_attention(*p.qkv, enable_gqa=True),
    "a block missing": lambda p: stem.block_sparse_attention(*p.qkv, drop_one_block(p.selection), impl="torch"),
    "other dtype": lambda p: p.attend().half(),
    "a row missing": lambda p: p.attend()[:, :, 1:],
}


@pytest.mark.parametrize("wrong", WRONG_OUTPUTS)
def test_wrong_outputs_are_refused(problem, wrong):
    with pytest.raises(gate.WrongResult):
        gate.check_output(WRONG_OUTPUTS[wrong](problem), *problem.qkv, problem.rows, problem.selection)


def test_wrong_scores_are_refused(problem):
    for wrong in (problem.scores * 1.01, problem.scores.nan_to_num(neginf=0), one_nan(problem.scores)):
        with pytest.raises(gate.WrongResult):
            gate.check_scores(wrong, *problem.qkv, problem.config)


def test_wrong_selections_are_refused(problem):
    q_len = kv_len = SMALL.tokens
    worst = stem.select_blocks(-problem.scores, problem.budget, problem.config, q_len=q_len, kv_len=kv_len)
    reverse = dataclasses.replace(problem.selection, kv_indices=problem.selection.kv_indices.flip(-1))
    for wrong in (worst, reverse, drop_one_block(problem.selection)):
        with pytest.raises(gate.WrongResult):
            gate.check_selection(wrong, problem.scores, problem.budget, problem.config, problem.rows)


def test_a_selection_by_another_threshold_is_refused():
    config = stem.StemConfig.preset("adaptive", dense_up_to=0, block_size=16, score_cells=4, threshold=0.055)
    problem = bench.Problem(SMALL, config, "cpu", "torch")
    arguments = problem.scores, problem.budget, config, problem.rows
    assert problem.selection.density() < 0.95 and gate.check_selection(problem.selection, *arguments) == 0
    for threshold in (0.05, 0.06):
        other = stem.select_blocks(problem.scores, problem.budget, config.replace(threshold=threshold), q_len=300)
        with pytest.raises(gate.WrongResult, match="threshold 0.055"):
            gate.check_selection(other, *arguments)


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    def forbidden(call, device):
        raise RuntimeError("timed before it was checked")

    monkeypatch.setattr(bench, "measure", forbidden)
    wrong = bench.Candidate(
        "attention",
        "stem_wrong",
        lambda p: (lambda: p.attend() * 1.1, lambda out: gate.check_output(out, *p.qkv, p.rows, p.selection)),
    )
    row = bench.run(wrong, bench.Problem(SMALL, CONFIG, "cpu", "torch"), "small")
    assert row["error"].startswith("WrongResult: output rows: relative error 0.1")
    assert "latency_ms" not in row and "tflops" not in row


def test_a_buffer_left_unwritten_is_refused():
    def forgets_last_row(problem):
        out = torch.empty_like(problem.q)
        out[:, :, :-1] = problem.attend()[:, :, :-1]
        return out

    candidate = bench.Candidate(
        "attention",
        "stem_forgets",
        lambda p: (lambda: forgets_last_row(p), lambda out: gate.check_output(out, *p.qkv, p.rows, p.selection)),
    )
    row = bench.run(candidate, bench.Problem(SMALL, CONFIG, "cpu", "torch"), "small")
    assert row["error"].startswith("WrongResult: output rows: relative error nan")


def test_rows_of_a_case(fast, monkeypatch):
    monkeypatch.setattr(bench, "CONFIGS", {"small": CONFIG})
    rows = bench.case(SMALL, "cpu", configs={"small": CONFIG}, impls=["torch"])
    assert [row["operation"] for row in rows] == ["attention", "scores", "selection", "attention", "operator"]
    assert [row["error"] for row in rows] == [""] * 5
    assert all(set(row) <= set(bench.COLUMNS) for row in rows)
    dense, *_, operator = rows
    assert dense["provider"] == "sdpa_cpu" and dense["density"] == 1.0 and dense["block_size"] is None
    assert operator["density"] == pytest.approx(0.5, abs=0.01) and operator["speedup_vs_sdpa_cpu"] == 1.0
    assert operator["speedup_vs_sdpa_flash"] is None and rows[1]["speedup_vs_sdpa_cpu"] is None
    assert operator["tflops"] == pytest.approx(operator["flop"] / 2e-3 / 1e12)
    assert 0.4 < operator["flop"] / dense["flop"] < 0.6


def test_configs_that_are_timed_briefly(fast, monkeypatch):
    monkeypatch.setattr(bench, "CONFIGS", {"small": CONFIG})
    monkeypatch.setattr(
        bench, "BRIEFLY", {"brief": (stem.StemConfig.preset("adaptive", dense_up_to=0, block_size=16), (300,))}
    )
    rows = bench.case(SMALL, "cpu", impls=["torch"], dense=["sdpa_cpu"], briefly=["brief"])
    found = [(row["operation"], row["provider"], row["error"]) for row in rows if row["config"] == "brief"]
    assert found == [("operator", "stem", "")]
    assert report.over_dense(rows, ["brief", "absent"]).to_dict() == {"brief": {300: 1.0}}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_of_the_operator_and_of_dense_attention_pass_their_gate(fast):
    rows = bench.case(
        dataclasses.replace(bench.Shape(1000), q_heads=8, kv_heads=2), "cuda", impls=["triton"], graphs=True
    )
    found = [(row["operation"], row["provider"]) for row in rows if row["operation"].startswith(bench.GRAPH)]
    assert {row["error"] for row in rows} == {""}
    dense = [name for name in bench.candidates.dense_attends("cuda") if name not in bench.peers.FP8]
    assert {"sdpa_cudnn", "sdpa_flash"} <= set(dense)
    expected = [("graph attention", name) for name in dense]
    assert found == expected + [("graph operator", "stem")] * len(bench.CONFIGS)


def test_interpreted_kernels_pass_the_gate(fast, monkeypatch):
    if stem.TRITON_MODE != "interpret":
        pytest.skip("the kernels are compiled here; python -m stem.experiments.speed is their test")
    monkeypatch.setattr(bench, "CONFIGS", {"small": CONFIG})
    shape = dataclasses.replace(SMALL, tokens=40, q_heads=2, kv_heads=1, dtype="float16")
    rows = bench.case(shape, "cpu", configs={"small": CONFIG}, impls=["triton"], dense=[])
    assert [row["error"] for row in rows] == [""] * 4


def test_one_failing_provider_costs_one_row(fast, monkeypatch):
    monkeypatch.setattr(bench, "CONFIGS", {"small": CONFIG})
    monkeypatch.setattr(stem, "block_sparse_attention", lambda *args, **options: 1 / 0)
    rows = bench.case(SMALL, "cpu", configs={"small": CONFIG}, impls=["torch"])
    assert [row["error"] for row in rows] == ["", "", "", "ZeroDivisionError: division by zero", ""]


def test_implementations_share_one_selection(fast, monkeypatch):
    monkeypatch.setattr(bench, "CONFIGS", {"small": CONFIG})
    rows = bench.case(SMALL, "cpu", configs={"small": CONFIG}, impls=["torch", "hopper"], dense=[])
    assert [(row["operation"], row["provider"]) for row in rows[4:]] == [
        ("attention", "stem_hopper"),
        ("operator", "stem_hopper"),
    ]
    assert all(row["error"].startswith("ValueError: impl") for row in rows[4:])  # it needs a Hopper GPU
    assert [row["error"] for row in rows[:4]] == [""] * 4


def test_long_dense_calls_are_skipped_and_say_so(fast, monkeypatch):
    monkeypatch.setattr(bench, "CONFIGS", {"small": CONFIG})
    monkeypatch.setitem(bench.LONGEST_CALL_MS, "cpu", 5)
    monkeypatch.setattr(bench, "ceilings", lambda device, dtype: [])
    monkeypatch.setitem(bench.SHAPES, "cpu", SMALL)
    found = dict(bench.sweep([64, 128], "cpu", impls=["torch"]))
    assert [row["error"] for row in found[64]] == [""] * 5
    (skipped,) = [row for row in found[128] if row["error"]]
    assert skipped["provider"] == "sdpa_cpu" and skipped["error"].startswith("skipped: about 0 s")


def gradients(problem, attend):
    inputs = [x.detach().requires_grad_() for x in problem.qkv]
    return torch.autograd.grad(attend(*inputs), inputs, problem.dout)


def test_right_gradients_pass_and_wrong_ones_are_refused(problem):
    selection = problem.selection
    found = gradients(problem, lambda *qkv: stem.block_sparse_attention(*qkv, selection, impl="torch"))
    dense = gradients(problem, lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True))
    arguments = (*problem.qkv, problem.dout, problem.rows)
    assert gate.check_gradients(found, *arguments, selection) < 1e-5
    assert gate.check_gradients(dense, *arguments) < 1e-5
    dq, dk, dv = found
    wrong = [dense, (dq * 1.01, dk, dv), (dq, one_nan(dk), dv), (dq, dk, dv.roll(1, 2)), (dq, dk.half(), dv)]
    for gradient in wrong:
        with pytest.raises(gate.WrongResult, match="d[qkv]"):
            gate.check_gradients(gradient, *arguments, selection)


def test_rows_of_training(fast, monkeypatch):
    monkeypatch.setitem(bench.CONFIGS, "default", CONFIG)
    dense, sparse = beyond.training_case(SMALL, "cpu", impls=["torch"], flex=False)
    assert dense["operation"] == sparse["operation"] == "forward+backward"
    assert (dense["config"], sparse["config"]) == ("dense", "default") and dense["error"] == sparse["error"] == ""
    assert sparse["speedup_vs_sdpa_cpu"] == 1.0 and dense["flop"] == 3.5 * SMALL.dense_flops()
    assert set(dense) | set(sparse) <= set(bench.COLUMNS)


@pytest.fixture(scope="module")
def tiny():
    settings = first_token.TINY | dict(hidden_size=48, intermediate_size=32, num_hidden_layers=2, head_dim=16)
    return first_token.random_llama(settings, "cpu", torch.float32)


def test_rows_of_captured_tensors(fast, monkeypatch, tiny):
    monkeypatch.setitem(bench.CONFIGS, "default", CONFIG)
    ids = torch.randint(1024, (1, 200))
    rows = beyond.captured_case(tiny, ids, [0, 1], "cpu", impls=["torch"])
    expected = [("captured attention", "sdpa_cpu"), ("captured attention", "stem_torch")]
    assert [(row["operation"], row["provider"]) for row in rows] == [*expected, ("captured operator", "stem_torch")]
    for row in rows:
        assert row["error"] == "" and row["tokens"] == 200 and row["head_dim"] == 16
        assert row["speedup_vs_sdpa_cpu"] == 1.0 and set(row) <= set(bench.COLUMNS)


def test_rows_of_the_break_even(fast, monkeypatch, tiny):
    monkeypatch.setattr(beyond, "BREAK_EVEN_TOKENS", (300, 400))
    ids = torch.randint(1024, (1, 320))
    ((label, (dense, sparse)),) = beyond.break_even_cases(tiny, "Tiny", ids, [0, 1], "cpu")  # 400 are not there
    assert label == "break-even on Tiny, 300 tokens"
    assert (dense["operation"], sparse["operation"]) == ("captured Tiny attention", "captured Tiny operator")
    assert (dense["config"], sparse["config"]) == ("dense", "adaptive, never dense")
    assert dense["error"] == sparse["error"] == "" and dense["tokens"] == sparse["tokens"] == 300
    assert sparse["speedup_vs_sdpa_cpu"] == pytest.approx(dense["latency_ms"] / sparse["latency_ms"])
    assert 0.5 < sparse["density"] <= 1


def test_the_threshold_of_the_first_token_is_calibrated(monkeypatch):
    def calibrate(model, prompts, density, config, *, tolerance):
        assert model.config.num_hidden_layers == 2 and [tuple(ids.shape) for ids in prompts] == [(1, 5300)]
        assert density == 0.08 and tolerance < 0.01
        return stem.hf.calibration.Calibration(config.replace(threshold=0.25), density)

    monkeypatch.setattr(stem, "calibrate", calibrate)
    config = beyond.calibrated(first_token.TINY, 5300, "cpu", torch.float32, 0)
    assert config == stem.StemConfig.preset("adaptive", threshold=0.25)


def test_rows_of_time_to_first_token(monkeypatch, tiny):
    monkeypatch.setattr(first_token, "CALLS", 1)
    dense, sparse = first_token.case(tiny, 100, "cpu", configs={"small": CONFIG})
    assert (dense["provider"], sparse["provider"]) == ("sdpa_cpu", "stem") and dense["error"] == sparse["error"] == ""
    assert dense["density"] == 1.0 and sparse["density"] == pytest.approx(0.5, abs=0.05)
    assert sparse["speedup_vs_sdpa_cpu"] == pytest.approx(dense["latency_ms"] / sparse["latency_ms"])
    assert (dense["operation"], dense["tokens"], dense["q_heads"]) == ("ttft", 100, 3)
    assert set(dense) | set(sparse) <= set(bench.COLUMNS)
    assert 0 < dense["outside_ms"] == sparse["outside_ms"]
    assert not hasattr(tiny.model.layers[0].self_attn, "stem_layer")


def test_without_attention_a_model_calls_none_and_is_itself_afterwards(tiny, monkeypatch):
    ids, called = torch.randint(1024, (1, 50)), []
    expected = tiny(ids).logits
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *_, **__: called.append(1))
    with peers.no_attention(tiny):
        assert tiny.config._attn_implementation == peers.NONE and tiny(ids).logits.isfinite().all()
    monkeypatch.undo()
    assert not called and torch.equal(tiny(ids).logits, expected)


def test_the_first_token_is_that_of_the_whole_model(tiny):
    ids = torch.randint(1024, (1, 50))
    torch.testing.assert_close(first_token.first_token(tiny, ids), tiny(ids).logits[:, -1])


def test_a_model_that_fails_costs_one_row(monkeypatch, tiny):
    monkeypatch.setattr(first_token, "first_token", lambda model, ids: torch.full((1, 8), torch.nan))
    for row in first_token.case(tiny, 64, "cpu", configs={"small": CONFIG}):
        assert row["error"].startswith("FloatingPointError: the logits") and "latency_ms" not in row


def test_measure_repeats_on_the_cpu():
    calls = []
    times = bench.measure(lambda: calls.append(time.sleep(0.01)), "cpu")
    assert len(calls) >= 3
    assert 0 < times["latency_ms_p20"] <= times["latency_ms"] <= times["latency_ms_p80"]


def test_turns_are_fair():
    order = []
    calls = [lambda i=i: order.append(time.sleep(0.004 * i) or i) for i in (1, 2, 3)]
    alike, other = bench.turns([calls[:2], calls[2:]], "cpu")
    turns = len(other)
    assert len(alike) == 2 * turns and len(order) == 3 + 6 * turns and turns >= bench.FEWEST_TURNS
    assert order[3::2] == order[4::2]  # each call runs twice in a row
    orders = {tuple(order[turn : turn + 6 : 2]) for turn in range(3, len(order), 6)}
    assert all(sorted(one) == [1, 2, 3] for one in orders) and len(orders) > 1
    assert min(alike) >= 4 and min(other) >= 12


def test_graphs_are_timed_after_all_are_checked():
    def candidate(factor):
        def prepare(problem):
            check = lambda out: gate.check_output(out, *problem.qkv, problem.rows, problem.selection)  # noqa: E731
            return lambda: problem.attend() * factor, check

        return bench.Candidate("graph operator", "stem", prepare)

    problem, later = bench.Problem(SMALL, CONFIG, "cpu", "torch"), []
    right, wrong = (bench.run(candidate(factor), problem, "small", later) for factor in (1, 1.1))
    assert [row for row, *_ in later] == [right] and "latency_ms" not in right | wrong
    assert len(later[0][1]) == bench.CAPTURES
    bench.time_in_turns(later, "cpu")
    assert right["timing"] == bench.IN_TURNS and right["tflops"] == right["flop"] / right["latency_ms"] / 1e9
    assert wrong["error"].startswith("WrongResult") and "latency_ms" not in wrong


def test_triton_chooses_where_hopper_attends():
    for impl, chooses in (("hopper", "triton"), ("torch", "torch")):
        assert bench.Problem(SMALL, CONFIG, "cpu", impl).chooses == chooses


def test_ceilings_are_plausible():
    matmul, copy = bench.ceilings("cpu", "float32")
    assert matmul["tflops"] > 1e-3 and copy["gb_per_s"] > 0.1


def test_command_line_writes_rows_and_prints_a_table(fast, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("STEM_RESULTS", os.fspath(tmp_path))
    monkeypatch.setattr(bench, "CONFIGS", {"small": CONFIG})
    monkeypatch.setitem(bench.SHAPES, "cpu", SMALL)
    monkeypatch.setitem(bench.LENGTHS, ("cpu", "smoke"), [64, 100])
    monkeypatch.setattr(beyond, "beyond_the_operator", lambda *args, **options: [("training", training)])
    training = [dict(operation="forward+backward", provider="stem_torch", tokens=128, latency_ms=1.0)]
    main(["--profile", "smoke", "--device", "cpu"])
    (written,) = (tmp_path / "speed").glob("*-smoke.csv")  # results/ may hold smoke rows of other machines
    rows = pd.read_csv(written)
    assert {64, 100, 128} <= set(rows["tokens"].dropna())
    assert "stem_torch" in capsys.readouterr().out.splitlines()[-2]
    main(["--lengths", "64", "--device", "cpu", "--seed", "1"])
    rows = pd.read_csv(written).set_index("tokens")
    assert set(rows.loc[[64], "seed"]) == {1} and set(rows.loc[[100], "seed"]) == {0} and 128 in rows.index


def test_lengths_and_model_reach_the_whole_models(made_up_machine, monkeypatch, tmp_path, capsys):
    def prefills(device, lengths, **options):
        yield "random", [dict(operation="prefill tiny", tokens=tokens, provider="stem") for tokens in lengths]

    monkeypatch.setattr(beyond.drop_in, "cases", prefills)
    main(["--parts", "drop-in", "--lengths", "96", "48", "--device", "cpu"])
    (written,) = (tmp_path / "results" / "speed").glob("*-smoke.csv")
    assert list(pd.read_csv(written).tokens) == [96, 48]
    with pytest.raises(SystemExit):
        main(["--model", "another", "--device", "cpu"])
    assert "--model needs --parts drop-in, break-even or both" in capsys.readouterr().err
    loaded = []
    monkeypatch.setattr(beyond.pretrained, "load", lambda name, **options: loaded.append(name) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(beyond.beyond_the_operator("cuda", "full", impls=["torch"], parts=["drop-in"], model="another"))
    assert loaded == ["another"]  # and no random weights before


@pytest.mark.parametrize("dropped", ["skip", "mean", "cells"])
def test_reference_rows_with_stand_ins_equal_the_oracle(dropped):
    q, k, v = (x.cpu() for x in random_inputs(4, 2, 200, 200, 16))
    mask, rows = random_mask(1, 4, 200, 200, 32, keep=0.3), torch.tensor([0, 31, 100, 199])
    selection = stem.BlockSelection(*(x.cpu() for x in lists_of(mask)), 32, 7, 200, 200, dropped)
    found = gate.reference_rows(q, k, v, rows, selection)
    if dropped == "skip":
        expected = stem.block_sparse_attention(q.double(), k.double(), v.double(), selection, impl="reference")
    else:
        expected, _ = oracles.attention_with_stand_ins(q, k, v, mask, 32, selection.stand_in_tokens)
    torch.testing.assert_close(found, expected[:, :, rows], rtol=1e-10, atol=1e-10)

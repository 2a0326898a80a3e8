"""Verdicts: each is computed from rows, and a wrong sign or an interval that holds zero changes it."""

import pytest

from stem.experiments import headline, records, scoreboard
from stem.experiments.long_context import verdicts
from stem.experiments.long_context.report import Difference

MODEL = "qwen2.5-coder-0.5b-0.9.0"
NOISE = (-0.02, 0.0, 0.01, 0.03)


@pytest.fixture(autouse=True)
def results(made_up_machine):
    """An empty results folder."""


def write(part, losses, lengths=(16384,), measure="loss", model=MODEL, chosen=0.5, task="prose"):
    rows = []
    for length in lengths:
        for method, values in {"dense": (1.0,) * 4, **losses}.items():
            about = dict(method=method, model=model, measure=measure, task=task, length=length, start=0, stop=length)
            about |= dict(block_size=None, asked=None) if method == "dense" else dict(block_size=128, asked=0.25)
            mean = sum(values) / len(values)
            about |= dict(value=mean, dense=1.0, difference=mean - 1, low=0, high=0, count=len(values), density=0.25)
            rows.append(about | {"chosen": chosen, "values": " ".join(map(str, values))})
    records.write_rows(f"long_context/{part}", rows, "full", same=("method", "length", "model", "measure", "task"))


def test_a_step_of_table_5_is_reproduced_only_where_the_interval_excludes_zero():
    assert not verdicts.ablation("decay") and verdicts.ablation("decay").verdict == "not testable here yet"
    uniform = [1.1 + noise for noise in NOISE]
    write("loss", {"uniform_topk": uniform, verdicts.NO_VALUE: [x - 0.01 for x in uniform], "stem": uniform})
    found = verdicts.ablation("decay")
    assert found.verdict == "reproduced" and "loss -0.010 [-0.010, -0.010], n = 4 windows of 16K" in found.ours
    assert verdicts.ablation("value").verdict == "not reproduced: the opposite sign"
    assert verdicts.ablation("both").verdict == "not reproduced: the interval holds zero"
    write("loss", {"uniform_topk": uniform, verdicts.NO_VALUE: uniform, "stem": uniform}, chosen=0.1)
    assert not verdicts.ablation("decay")  # blank rows


def test_a_step_of_table_5_counts_answers_beside_documents():
    write("loss", {"uniform_topk": [1.1] * 4, "stem": [1.2] * 4}, (32768,))
    assert "density 25%)" in verdicts.ablation("both").ours
    write("answers", {"uniform_topk": [-2.0] * 4, "stem": [-3.0] * 4}, (16384,), measure="answer", task="a")
    assert "lower in 1 of 1 cell)" in verdicts.ablation("both").ours
    write("answers", {"uniform_topk": [-2.0] * 4, "stem": [-3.0] * 4}, (16384, 32768), measure="answer", task="a")
    write("answers", {"uniform_topk": [-2.0] * 4, "stem": [-1.0] * 4}, (32768,), measure="answer", task="b")
    write("answers", {"uniform_topk": [-2.0] * 4, "stem": [x - 2 for x in NOISE]}, measure="answer", task="c")
    assert "25%; answers: higher in 1 and lower in 2 of 4 cells)" in verdicts.ablation("both").ours
    assert verdicts.on_answers("decay", "Qwen2.5-Coder-0.5B") == ""


def test_qwen_and_the_longest_windows_come_first():
    write("loss", {"uniform_topk": [1.1] * 4, "stem": [1.2] * 4}, (8192, 16384))
    write("loss", {"uniform_topk": [1.2] * 4, "stem": [1.1] * 4}, (32768,), model="smollm2-0.1.2")
    assert "windows of 16K (Qwen2.5-Coder-0.5B" in verdicts.ablation("both").ours


def test_each_of_qwens_models_is_told_and_a_verdict_that_differs():
    bigger = "qwen2.5-coder-1.5b-0.2.0"
    write("loss", {"uniform_topk": [1.1] * 4, "stem": [1.2] * 4}, (16384, 32768))
    write("loss", {"uniform_topk": [1.2] * 4, "stem": [1.1] * 4}, (16384,), model=bigger)
    found = verdicts.ablation("both")
    assert found.verdict == "not reproduced: the opposite sign; Qwen2.5-Coder-1.5B: reproduced"
    assert [told[:12] for told in found.ours.split("; ")] == ["loss +0.100 ", "loss -0.100 "]
    assert found.ours.count("windows of 16K") == found.ours.count("windows of 32K") == 1
    logits("Table 1", {"score-aware": (1.0, 2.0), "output-aware": (1.1, 2.2)}, "error")
    logits("Table 1", {"score-aware": (1.0, 2.0), "output-aware": (0.9, 1.8)}, "error", bigger)
    found = verdicts.value_term(-0.072)
    assert found.ours.startswith("+10.0%") and "; -10.0%" in found.ours and found.verdict.endswith("1.5B: reproduced")


def logits(claim, errors, column, model=MODEL):
    rows = []
    for method, values in errors.items():
        for sample, value in enumerate(values):
            rows.append(dict(claim=claim, method=method, text="a", sample=sample, tokens=16384, model=model))
            rows[-1] |= {"error": 1.0, "error_last": 1.0, column: value}
    records.write_rows("long_context/logits", rows, "full", same=("claim", "method", "sample", "model"))


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (-0.05, "reproduced"),
        (-0.02, "partly: the sign, at a smaller size"),
        (0.05, "not reproduced: the opposite sign"),
    ],
)
def test_the_value_term_is_judged_by_the_change_of_the_error(change, verdict):
    assert not verdicts.value_term(-0.072)
    plain = (1.0, 2.0, 3.0)
    logits("Table 1", {"score-aware": plain, "output-aware": [x * (1 + change) for x in plain]}, "error")
    found = verdicts.value_term(-0.072)
    assert found.verdict == verdict and f"{change:+.1%} [" in found.ours and "n = 3 windows of 16K" in found.ours


@pytest.mark.parametrize(
    ("quarters", "verdict"),
    [((4.0, 2.0, 1.0), "reproduced"), ((4.0, 1.0, 2.0), "partly"), ((1.0, 1.0, 2.0), "not reproduced")],
)
def test_pruning_is_judged_by_what_travels(quarters, verdict):
    errors = {f"quarter {i}": [x, 1.1 * x, 0.9 * x] for i, x in enumerate((*quarters, 50.0), 1)}
    logits("Fig. 3", errors, "error_last")
    assert verdicts.pruning().verdict == verdict


@pytest.mark.parametrize(
    ("most", "verdict"), [(0.049, "not reproduced: too small to matter"), (0.051, "partly: in some layers")]
)
def test_the_value_term_is_judged_by_the_blocks_that_it_replaces(most, verdict):
    assert not verdicts.value_size()
    about = dict(claim="Eq. 6 and 7", method="output-aware", tokens=16384, model="qwen2.5-coder-0.5b-0.9.0")
    rows = [
        about | dict(sample=i, spread=0.01, spread_most=0.03, changed=0.002, changed_most=x)
        for i, x in enumerate((0.01, most))
    ]
    records.write_rows("long_context/logits", rows, "full", same=("claim", "method", "sample", "model"))
    found = verdicts.value_size()
    assert found.verdict == verdict and "1.0% (at most 3.0%); it changes 0.2%" in found.ours
    assert f"(at most {most:.1%}; n = 2 windows of 16K, all layers of Qwen2.5-Coder-0.5B)" in found.ours


def test_a_verdict_needs_an_interval_without_zero():
    told = verdicts.of_difference(Difference(-0.1, -0.2, 0.1, 9), -1, "x").verdict
    assert told == "not reproduced: the interval holds zero"
    assert verdicts.of_difference(Difference(-0.1, -0.2, -0.05, 9), -1, "x").verdict == "reproduced"
    assert verdicts.of_difference(Difference(-0.1, -0.2, -0.05, 9), 1, "x").verdict.startswith("not reproduced")


def test_the_readmes_lines_are_the_claims_that_matter_most():
    lines, important = scoreboard.claims(), scoreboard.scoreboard().splitlines()[2:]
    assert len(lines) == 14 and len(important) == 8 == len(set(scoreboard.IMPORTANT))
    for name in ("Eq. 2", "Table 1", "Fig. 3", "Table 5", "Tables 2 and 4", "Fig. 1"):
        assert any(name in line for line in important)
    accepted = ("reproduced", "partly", "not reproduced", "not testable here")
    assert all(line[3].startswith(accepted) for line in lines)
    assert all(line in scoreboard.all_claims() for line in important)


def test_needles_and_documents_of_a_method_against_dense():
    write("answers", {"adaptive": [0.8] * 4, "stem": [-17.0] * 4}, measure="answer", task="niah_multikey_1")
    write("answers", {"adaptive": [9.0] * 4, "stem": [9.0] * 4}, measure="answer", task="ruler_vt")  # offsets no needle
    write("loss", {"adaptive": [1.0] * 4, "stem": [1.02] * 4})
    needles, documents = verdicts.against("stem")
    assert verdicts.against("adaptive", "stem")[0].difference.mean == pytest.approx(17.8)
    assert needles.difference.mean == pytest.approx(-18.0) and documents.difference.mean == pytest.approx(0.02)
    assert "needles -18.000" in verdicts.near_dense().ours and "8B" in verdicts.near_dense().verdict
    quality = headline.headline().splitlines()[-1]
    assert "on needles `adaptive` loses 0.20 [0.20, 0.20], published Stem 18.00 [18.00, 18.00]**" in quality
    assert "paired" not in quality
    write("answers", {"stem, last block dense": [0.5] * 4}, measure="answer", task="niah_multikey_1")
    assert headline.headline().splitlines()[-1] == quality  # documents are missing
    write("loss", {"stem, last block dense": [1.0] * 4})
    assert "`adaptive` minus the last, paired: +0.300 [+0.300, +0.300], n = 4." in headline.headline()

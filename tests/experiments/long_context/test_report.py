"""The report: blank rows, paired differences from samples, controls, and tables of whatever rows there are."""

import pandas as pd
import pytest

from stem.experiments import figures, records
from stem.experiments.long_context import methods, needle_report, report
from stem.experiments.long_context.figures import against
from stem.experiments.markdown import tokens_label

METHODS = {"dense": 0.0, "window": -18.0, "stem": -6.0, "xattention": -0.2, "random": -20.0}


def row(method, nats, measure="answer", task="a", length=4096, asked=0.25, size=64, **others):
    size, asked = (None, None) if method == "dense" else (size, None if method == "window" else asked)
    scale = {"answer": 1, "right": 0.05, "generated": 0.0, "loss": -0.01}[measure]
    ends = dict(difference=nats * scale, low=(nats - 1) * scale, high=(nats + 1) * scale)
    if measure == "loss":
        ends["low"], ends["high"] = ends["high"], ends["low"]
    values = " ".join(str(-3 + nats * scale + noise) for noise in (-0.5, 0.0, 0.5))
    about = dict(density=asked or 0.1, value=-3 + nats * scale, dense=-3.0, count=3, model="smollm2", start=None)
    about |= dict(stop=None, method=method, measure=measure, task=task, length=length, asked=asked, block_size=size)
    return about | ends | {"chosen": 0.5 if asked else None, "values": values} | others


@pytest.fixture
def rows(made_up_machine):
    answers, losses = [], []
    for length in (4096, 8192):
        for task in "ab":
            answers += [row(method, nats, task=task, length=length) for method, nats in METHODS.items()]
        answers += [row("stem", -1.0, length=length, asked=0.5), row("xattention", -0.1, length=length, asked=0.5)]
        answers.append(row("uniform_topk", 0.0, length=length, chosen=0.1))
        for method in ("dense", "window", "stem"):
            answers += [row(method, METHODS[method], measure, length=length) for measure in ("right", "generated")]
            spans = (("all", 0), ("all", length // 2), ("prose", 0), ("prose", length // 2), ("licences", 0))
            for task, start in spans:
                nats = METHODS[method] * (1 if start or task != "all" else 0)
                stop = length if start or task != "all" else length // 2
                losses.append(row(method, nats, "loss", task, length, start=start, stop=stop))
    records.write_rows("long_context/answers", answers, "full")
    records.write_rows("long_context/loss", losses, "full")
    records.write_rows("long_context/extension", [row("dense", 0, length=32768, model="smollm2-32k")], "full")
    return report.rows()


def test_rows_of_all_parts_or_one_device(rows):
    assert set(rows.model) == {"SmolLM2-135M", "SmolLM2-135M, extended"} and "a, 32K" in set(rows.cell)
    assert report.rows("another GPU").empty and len(report.rows("Made-up GPU")) == len(rows)
    assert report.rows(parts=("loss",)).measure.unique().tolist() == ["loss"]
    table = report.coverage(rows).loc[("SmolLM2-135M", "answer", 8192)]
    assert table.to_dict() == dict(methods=4, densities=2, block_sizes=1, tasks=2, samples=3)


def test_rows_in_which_scores_chose_too_little_are_blank_everywhere(rows):
    blank = rows[rows.method == "uniform_topk"]
    assert len(blank) == 2 and blank[["value", "difference", "low", "high", "values"]].isna().all(axis=None)
    assert "uniform_topk" not in report.differences(rows, "answer", 0.25, 64).index
    assert "uniform_topk" not in set(report.points(rows).method)
    assert report.paired(rows, "uniform_topk", block_size=64, asked=0.25).count == 0
    assert "uniform_topk" not in needle_report.evaluation()


def test_pairs_are_the_samples_of_both_methods_in_all_tasks(rows):
    of = rows[(rows.length == 4096) & (rows.measure == "answer")]
    found = report.paired(of, "stem", "xattention", block_size=64, asked=0.25)
    assert found.mean == pytest.approx(-5.8) and found.count == 6
    assert found.low == pytest.approx(-5.8) and found.excludes_zero  # every sample differs by the same
    assert report.paired(of, "stem", block_size=64, asked=0.5).mean == pytest.approx(-1.0)  # against dense
    missing = report.paired(of, "stem", block_size=128, asked=0.25)
    assert missing.count == 0 and not missing.excludes_zero
    noisy = report.Difference(0.1, -0.1, 0.3, 3)
    assert not noisy.excludes_zero and str(noisy) == "+0.100 [-0.100, +0.300], n = 3"
    assert str(report.Difference(4e-4, -1e-5, 8e-4, 3)) == "+0.00040 [-0.00001, +0.00080], n = 3"


def test_flips_group_samples_by_what_both_generate():
    made = [
        row("dense", 0, "generated", values="1 1 0 1"),
        row("stem", 0, "generated", values="0 1 1 0"),
        row("dense", 0, "answer", values="-1 -2 -3 -4"),
        row("stem", 0, "answer", values="-3 -2.5 -3 -4"),
        row("dense", 0, "right", values="1 1 1 0"),
        row("stem", 0, "right", values="0 1 0 0"),
    ]
    found = needle_report.flips(pd.DataFrame(made), "stem", 64, 0.25)
    assert found.columns.tolist() == ["before", "answer", "right", "samples"] and len(found) == 3
    assert found.loc[1, 0].tolist() == [-2.5, -1.0, -0.5, 2] and found.loc[1, 1].tolist() == [-2.0, -0.5, 0.0, 1]
    assert found.loc[0, 1].tolist() == [-3.0, 0.0, -1.0, 1]
    found = needle_report.flips(pd.DataFrame(made), "stem", 64, 0.25, by="right")
    assert found.loc[1, 0].tolist() == [-2.0, -1.0, -1.0, 2] and found.samples.tolist() == [1, 2, 1]


def test_controls_fail_where_the_measure_sees_them(rows):
    table = report.controls(rows)
    assert table.fails.groupby("measure").all().to_dict() == dict(answer=True, generated=False, loss=True, right=True)
    assert len(table.xs("loss", level="measure")) == 2  # the last span of each length, not the first
    better = rows.assign(high=rows.high.where(rows.measure != "answer", -4.0))
    assert not report.controls(better).fails.xs("answer", level="measure").any()


def test_documents_count_over_all_positions(rows):
    whole = report.whole(rows[(rows.measure == "loss") & (rows.task != "all")])
    assert set(whole.start) == {0} and set(whole.task) == {"prose", "licences"}
    losses = report.differences(rows, "loss", 0.25, 64, by="task")
    assert losses.loc["stem", "prose"] == pytest.approx(0.06)


def test_differences_are_best_first_and_hold_what_was_asked(rows):
    table = report.differences(rows, "answer", 0.25, 64)
    assert list(table.index) == ["xattention", "stem", "random"]
    assert list(table.columns) == ["density", "chosen", "mean", "a, 4K", "b, 4K", "a, 8K", "b, 8K"]
    assert table.loc["stem", "mean"] == -6 and table.density.iloc[0] == 0.25 and table.chosen.iloc[0] == 0.5
    fewer = report.differences(rows[(rows.method != "stem") | (rows.task != "b")], "answer", 0.25, 64)
    assert fewer.index[-1] == "stem" and pd.isna(fewer.loc["stem", "mean"])


def test_cells_of_fewer_kinds_of_documents_say_so(rows):
    documents = report.whole(rows[(rows.measure == "loss") & (rows.task != "all") & (rows.length == 4096)])
    assert "kinds" not in report.table_by_density(documents)
    fewer = documents[(documents.method != "stem") | (documents.task == "prose")]
    (line,) = [line for line in report.table_by_density(fewer).splitlines() if line.startswith("| stem")]
    assert "(1 of 2 kinds)" in line
    (line,) = [line for line in report.table_by_density(_preset_on(documents)).splitlines() if "hpc_ops" in line]
    assert line.endswith("(1 of 2 kinds) |")


def test_documents_of_fewer_kinds_are_in_no_table_or_figure_that_has_no_room_to_say_so(rows):
    documents = report.whole(rows[(rows.measure == "loss") & (rows.task != "all")])
    fewer = documents[(documents.method != "stem") | (documents.task == "prose") | (documents.length == 8192)]
    left_out = documents[(documents.method == "stem") & (documents.length == 4096) & (documents.task == "prose")]
    assert set(fewer.index) - set(report.complete(fewer).index) == set(left_out.index)
    assert report.complete(documents).equals(documents)
    stem = report.points(fewer, "loss").query("method == 'stem'")
    assert stem.length.tolist() == [8192]
    assert report.by_method(fewer, ["length"]).columns.tolist() == [8192]
    answers = rows[(rows.measure == "answer") & ((rows.method != "stem") | (rows.task == "a"))]
    assert report.complete(answers).equals(answers)


def test_rows_on_both_sides_of_dense_attention_are_counted_by_kind(rows):
    documents = report.whole(rows[(rows.measure == "loss") & (rows.task == "prose") & (rows.length == 4096)])
    ends = [(-0.2, -0.1), (-0.2, 0.1), (0.1, 0.2)]
    stem = documents[documents.method == "stem"]
    three = pd.concat([stem.assign(low=low, high=high, difference=(low + high) / 2) for low, high in ends])
    (line,) = report.sides(pd.concat([three, documents[documents.method == "dense"]])).to_dict("records")
    assert line == dict(below=1, above=1, rows=3, lowest=-0.15)


def _preset_on(documents):
    """The rows, and those of a preset without a density that was asked for, on one kind."""
    preset = documents[(documents.method == "stem") & (documents.task == "prose")]
    return pd.concat([documents, preset.assign(method="stem, hpc_ops", asked=float("nan"))])


def test_generated_answers_stand_beside_those_in_one_forward(rows):
    table = needle_report.generated(rows, 64)
    assert ("a, 4K", "window") in table.index and ("a, 4K", "dense") in table.index
    assert table.loc[("a, 4K", "stem")].to_dict() == dict(generated=-3.0, right=pytest.approx(-3.3))


def test_points_and_the_lowest_density_within_a_bound(rows):
    points = report.points(rows[rows.model == "SmolLM2-135M"])
    stem = points[(points.method == "stem") & (points.length == 4096)].set_index("asked")
    assert stem.nats.to_dict() == {0.25: -6.0, 0.5: -1.0} and set(points.n) == {3}
    assert set(report.points(rows, task="b").asked.dropna()) == {0.25}
    near = report.lowest_density(points, -1.0).loc[4096]
    assert near.density.to_dict() == {(64, "xattention"): 0.25, (64, "stem"): 0.5}
    documents = report.points(rows, "loss")
    assert documents[documents.method == "stem"].nats.tolist() == pytest.approx([0.06, 0.06])
    assert report.lowest_density(documents, 0.05).empty and len(report.lowest_density(documents, 0.07)) == 2


def test_a_panel_for_each_method(rows):
    points = report.points(rows[rows.model == "SmolLM2-135M"])
    figure = against(points, "answer", 64)
    shown = points[(points.block_size == 64) & points.asked.notna()]
    titles = [ax.get_title(loc="left") or ax.get_title() for ax in figure.axes]
    assert titles == list(shown.groupby("method").nats.mean().abs().sort_values().index) and "stem" in titles
    assert figure.get_supylabel() == report.UNITS["answer"] and report.UNITS["answer"] in figures.describe(figure)
    for ax, method in zip(figure.axes, titles, strict=True):
        own = {line.get_label(): line for line in ax.get_lines() if not line.get_label().startswith("_")}
        assert sorted(own) == sorted({tokens_label(n) for n in shown[shown.method == method].length})
        assert {line.get_color() for line in own.values()} == {figures.COLOURS[method]}
        assert ax.get_yscale() == "symlog" and len(ax.get_lines()) == 1 + len(shown.groupby(["method", "length"]))


def test_tables_hold_intervals_and_what_scores_chose(rows):
    text = needle_report.evaluation()
    assert "**SmolLM2-135M** on Made-up GPU, log-likelihood of the right answer minus dense" in text
    assert (
        "a, 4K tokens, 3 samples, dense -3.00 nats:\n\n| method | blocks of 64, 25% | blocks of 64, 50% | own density |"
        in text
    )
    # every sample differs by as much, so the intervals are those of the samples and not the ends that the rows hold
    stem, window = "| stem | -6.00 [-6.00, -6.00] |", "| window | – | – | -18.00 [-18.00, -18.00] (10.0%) |"
    assert text.index("| xattention |") < text.index(stem) < text.index(window)  # best first
    assert "extended" not in text  # it has dense rows only
    quality = report.quality()
    assert "windows of 8K tokens of each kind of text" in quality and "prose -3.00" in quality
    assert "| method | blocks of 64, 25% |" in quality and "| stem | +0.060 [+0.060, +0.060] |" in quality


def test_without_rows_the_tables_say_what_writes_them(made_up_machine):
    assert "`make quality PROFILE=full`" in report.quality()
    assert "PROFILE=full ONLY=06" in needle_report.evaluation()


def test_the_rule_for_a_verdict():
    assert [report.verdict(nats) for nats in (0.1, -0.4, -0.6, -5.1)] == [
        "close to dense", "close to dense", "worse than dense", "fails",
    ]  # fmt: skip
    assert report.verdict(-0.4, -0.45, -0.1) == "close to dense"
    assert report.verdict(-0.4, -0.6, -0.1) == "close to dense (or worse than dense)"
    assert report.verdict(-3.0, -6.0, 0.0) == "worse than dense (or fails or close to dense)"


def test_a_threshold_of_another_length_is_told_by_task_and_documents_together():
    whole, chunks = methods.TRANSFERRED
    about = dict(model="m", block_size=128.0, asked=0.25, length=8192)
    answer = about | dict(measure="answer", start=None)
    loss = about | dict(measure="loss", start=0)
    dense = dict(method="dense", asked=None, block_size=None, density=1.0, difference=0.0)
    frame = pd.DataFrame(
        [
            answer | dict(task="a", method=whole, density=0.2, difference=-2.0, values="-3.0 -5.0"),
            answer | dict(task="b", method=whole, density=0.3, difference=-1.0, values="-2.0 -2.0"),
            answer | dense | dict(task="a", values="-2.0 -2.0"),
            answer | dense | dict(task="b", values="-1.0 -1.0"),
            loss | dict(task="prose", method=chunks, density=0.2, difference=0.2, values="1.2"),
            loss | dict(task="source", method=chunks, density=0.4, difference=0.4, values="1.4"),
            loss | dict(task="all", method=chunks, density=0.9, difference=9.0, values="9.0"),
            loss | dense | dict(task="prose", values="1.0"),
            loss | dense | dict(task="source", values="1.0"),
            loss | dict(task="source", method="stem", density=0.4, difference=0.4, values="7.0"),
        ]
    ).assign(stop=8192)
    lines = [line.strip("| ").split(" | ") for line in needle_report.transfer(frame).splitlines()[4:]]
    assert lines == [
        ["a", "8K", "25%", "whole", "20.0%", "-2.000 [-3.000, -1.000], n = 2"],
        ["b", "8K", "25%", "whole", "30.0%", "-1.000 [-1.000, -1.000], n = 2"],
        ["documents", "8K", "25%", "chunks of 4K", "30.0%", "+0.300 [+0.200, +0.400], n = 2"],
    ]
    assert needle_report.transfer(frame[frame.method == "stem"]) == ""
    fewer = frame[(frame.method != chunks) | (frame.task != "prose")]
    assert "| documents (1 of 2 kinds) | 8K |" in needle_report.transfer(fewer)


def test_a_dense_last_block_is_compared_with_the_same_method_at_equal_density():
    about = dict(model="m", measure="answer", task="a", length=4096, start=None, stop=None, block_size=64)
    frame = pd.DataFrame(
        about | dict(method=method, asked=asked, values=values)
        for method, asked, values in (
            ("stem", 0.1, "-9.0 -7.0"), ("stem, last block dense", 0.1, "-1.0 -1.0"), ("stem", 0.2, "-5.0 -5.0"),
            ("xattention, last block dense", 0.1, "-1.0 -1.0"),
        )
    )  # fmt: skip
    told = "| stem | a | 4K | 10% | +7.000 [+6.000, +8.000], n = 2 |"
    assert needle_report.last_block(frame).splitlines()[4:] == [told]
    assert needle_report.last_block(frame[frame.method == "stem"]) == ""


def test_cells_above_dense_attention_are_named_with_their_number(rows):
    answers = rows[(rows.measure == "answer") & (rows.length == 4096)]
    assert needle_report.above_dense(answers) == "Above dense attention by an interval without zero in 0 of 8 cells."
    above = answers.assign(low=answers.low.where(answers.method != "xattention", 0.5))
    told = needle_report.above_dense(above[above.asked == 0.5])
    assert told.startswith("Above dense attention by an interval without zero in 1 of 2 cells: xattention on a at 4K")
    assert needle_report.above_dense(answers[answers.method == "dense"]) == ""
    better = answers.assign(values=answers["values"].where(answers.method != "xattention", "-2.5 -2.5 -2.0"))
    told = needle_report.above_dense(better)  # from the samples, as in the tables; their rows have a low end below 0
    assert told.count("+0.67 [+0.50, +1.00]") == 3 and "in 3 of 8 cells" in told


def test_a_method_is_ahead_only_where_an_interval_excludes_zero():
    frame = pd.DataFrame(
        [
            row("adaptive", -1.0), row("stem", -6.0), row("xattention", 2.0), row("dense", 0.0),
            row("adaptive", -1.0, task="b"), row("stem", -1.0, task="b"), row("stem", -9.0, length=8192),
        ]
    )  # fmt: skip
    told = "`adaptive` beside stem and xattention, by intervals without zero: "
    told += "a: above in 1 and below in 1 of 2 cells, -3.00 to +5.00 nats; "
    told += "b: above in 0 and below in 0 of 1 cell, +0.00 nats."
    assert needle_report.ahead(frame, "adaptive", ("stem", "xattention")) == told
    assert needle_report.ahead(frame, "adaptive", ["subblock"]) == ""


def test_methods_with_all_columns_come_first_and_each_group_is_sorted():
    frame = pd.DataFrame(
        [
            row("stem", -6.0), row("stem", -9.0, task="b"), row("xattention", -0.2), row("xattention", -1.0, task="b"),
            row("random", -0.1), row("dense", 0.0), row(next(iter(methods.TRANSFERRED)), -0.1),
        ]
    )  # fmt: skip
    table = report.by_method(frame, ["task", "asked"])
    assert table.index.tolist() == ["xattention", "stem", "random"] and table.loc["stem", ("b", 0.25)] == -9.0
    worse = pd.DataFrame([row("stem", -6.0, "loss"), row("xattention", -2.0, "loss")])
    assert report.by_method(worse, ["task"]).index.tolist() == ["xattention", "stem"]


def test_a_method_is_compared_with_its_oracle_at_one_density():
    frame = pd.DataFrame(
        [row("adaptive", -3.0), row("oracle", -1.0), row("dense", 0.0), row("adaptive", -9.0, asked=0.1)]
    )
    found = report.to_oracle(frame, {"adaptive": "oracle", "stem": "oracle"}, 0.25, 64)
    assert found.index.tolist() == [("adaptive", "4K")]
    assert found.iloc[0].tolist() == ["-2.000 [-2.000, -2.000], n = 3", "-1.000 [-1.000, -1.000], n = 3"]

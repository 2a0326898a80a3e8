"""The report: rows of any plan become tables, controls are judged, and times come from where nothing else ran."""

import pandas as pd
import pytest

from stem.experiments import records
from stem.experiments.long_context import report


def row(method, nats, measure="answer", task="a", length=4096, asked=0.25, size=64, **others):
    size, asked = (None, None) if method == "dense" else (size, None if method == "window" else asked)
    scale = {"answer": 1, "right": 0.05, "generated": 0.0, "loss": -0.01, "time": 1}[measure]
    ends = dict(difference=nats * scale, low=(nats - 1) * scale, high=(nats + 1) * scale)
    if measure == "loss":
        ends["low"], ends["high"] = ends["high"], ends["low"]
    about = dict(density=asked or 0.1, ms=9.0, value=-3 + nats, dense=-3.0, count=100, model="smollm2", start=None)
    about |= dict(stop=None, method=method, measure=measure, task=task, length=length, asked=asked, block_size=size)
    return about | ends | others


@pytest.fixture
def rows(monkeypatch, tmp_path):
    monkeypatch.setenv("STEM_RESULTS", str(tmp_path))
    monkeypatch.setattr(records, "device_name", lambda: "Made-up GPU")
    found = []
    for length in (4096, 8192):
        for task in "ab":
            found += [row(method, nats, task=task, length=length) for method, nats in METHODS.items()]
        found += [row("stem", -1.0, length=length, asked=0.5), row("xattention", -0.1, length=length, asked=0.5)]
        for method, ms, dense in (("dense", 20.0, 20.0), ("stem", 15.0, 30.0), ("window", 1.0, 20.0)):
            found.append(row(method, 0, "time", length=length, value=ms, dense=dense))
        for method in ("window", "stem"):
            found += [row(method, METHODS[method], m, length=length) for m in ("right", "generated")]
            for start, task in ((0, "all"), (length // 2, "all"), (length // 2, "prose")):
                spans = dict(start=start, stop=length if start else length // 2)
                found.append(row(method, METHODS[method] if start else 0, "loss", task, length, **spans))
    records.write_rows("long_context/answers", found, "full")
    records.write_rows("long_context/extension", [row("dense", 0, length=32768, model="smollm2-32k")], "full")
    return report.rows("Made-up GPU")


METHODS = {"dense": 0.0, "window": -18.0, "stem": -6.0, "xattention": -0.2, "random": -20.0}


def test_rows_of_both_experiments_of_one_device(rows):
    assert set(rows.model) == {"8K model", "extended model"} and "a, 32K" in set(rows.cell)
    assert report.rows("Made-up GPU", "another").model.unique().tolist() == ["8K model"]
    table = report.coverage(rows).loc[("8K model", "answer", 8192)]
    assert table.to_dict() == dict(methods=4, densities=2, block_sizes=1, tasks=2, samples=100)


def test_controls_fail_where_the_measure_sees_them(rows):
    table = report.controls(rows)
    assert table.fails.groupby("measure").all().to_dict() == dict(answer=True, generated=False, loss=True, right=True)
    assert len(table.xs("loss", level="measure")) == 2  # the last span of each length, not the first
    better = rows.assign(high=rows.high.where(rows.measure != "answer", -4.0))
    assert not report.controls(better).fails.xs("answer", level="measure").any()


def test_differences_are_best_first_and_hold_what_was_asked(rows):
    table = report.differences(rows, "answer", 0.25, 64)
    assert list(table.index) == ["xattention", "stem", "random"]
    assert list(table.columns) == ["density", "mean", "a, 4K", "b, 4K", "a, 8K", "b, 8K"]
    assert table.loc["stem", "mean"] == -6 and table.density.iloc[0] == 0.25
    fewer = report.differences(rows[(rows.method != "stem") | (rows.task != "b")], "answer", 0.25, 64)
    assert fewer.index[-1] == "stem" and pd.isna(fewer.loc["stem", "mean"])
    losses = report.differences(rows, "loss", 0.25, 64, by="task")
    assert losses.loc["stem", "prose"] == pytest.approx(0.06) and list(losses.columns) == ["density", "mean", "prose"]


def test_generated_answers_stand_beside_those_in_one_forward(rows):
    table = report.generated(rows, 64)
    assert list(table.index) == [(cell, method) for cell in ("a, 4K", "a, 8K") for method in ("window", "stem")]
    assert table.loc[("a, 4K", "window")].to_dict() == dict(generated=-21.0, right=-21.0)
    assert report.generated(rows, 128).empty


def test_points_take_the_task_of_most_methods_and_the_share_of_the_dense_pass_beside(rows):
    points = report.points(rows[rows.model == "8K model"])
    assert set(points.task) == {"a"} and len(points) == 2 * (len(METHODS) + 2)
    stem = points[(points.method == "stem") & (points.length == 4096)].set_index("asked")
    assert stem.ms.dropna().to_dict() == {0.25: 10.0}
    untimed = report.points(rows[(rows.model == "8K model") & (rows.measure != "time")])
    assert untimed.ms.isna().all() and list(untimed.nats) == list(points.nats)
    assert set(report.points(rows, "b").asked.dropna()) == {0.25}
    assert report.best(points, 1) == ["xattention", "stem", "window"]
    assert report.best(points, 2) == ["xattention", "stem", "window"]
    near = report.near_and_fast(points.assign(ms=points.ms.fillna(8.0)))
    assert set(near.method) == {"xattention"} and near.speedup.iloc[0] == pytest.approx(20 / 8)
    assert report.describe(near) == "xattention at 4K (2.50×), xattention at 8K (2.50×)"
    assert report.near_and_fast(points).empty  # not timed
    assert report.describe(near[:0]) == "none"


@pytest.mark.parametrize("x", report.UNITS)
def test_a_panel_for_each_length(rows, x):
    points = report.points(rows[rows.model == "8K model"])
    figure = report.against(points, x, report.best(points))
    assert [ax.get_title() for ax in figure.axes] == ["4K tokens", "8K tokens"]
    assert {ax.get_xlabel() for ax in figure.axes} == {report.UNITS[x]}
    labels = [text.get_text() for text in figure.axes[-1].get_legend().get_texts()]
    assert {"stem", "xattention", "window", "64"} <= set(labels)


def test_the_rule_for_a_verdict():
    assert [report.verdict(nats) for nats in (0.1, -0.4, -0.6, -5.1)] == [
        "close to dense", "close to dense", "worse than dense", "fails",
    ]  # fmt: skip

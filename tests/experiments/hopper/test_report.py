"""Tables and figures of notebook 08 from made-up rows, and the parts of sources that it shows."""

import pandas as pd
import pytest
from matplotlib.colors import to_rgba

from stem.experiments.figures import describe
from stem.experiments.hopper import figures, report, variants


def test_sources_are_shown_as_in_the_file():
    shown = report.source("hopper_forward", "NUM_STAGES", "ring_slot")
    assert shown.startswith("NUM_STAGES = gl.constexpr(2)") and "\n\n@gluon.jit\ndef ring_slot(tiles, step):" in shown
    assert shown.endswith("return step % STAGES, (step // STAGES) & 1")
    with pytest.raises(KeyError, match="no_such"):
        report.source("hopper_forward", "no_such")


def test_what_a_stage_adds_are_the_lines_that_differ():
    shown = report.added("hopper_forward", variants.HOPPER["overlap"], variants.HOPPER["persistent"])
    assert shown.split() == ["-", "tasks", "=", "tasks._replace(programs=tasks.number)"]
    assert "stamp(" not in report.added("hopper_forward", variants.HOPPER["one slot"], variants.HOPPER["first maximum"])


def test_gains_are_over_the_stage_before():
    rows = [
        dict(part="attention", stage=s, latency_ms=ms, tflops=1 / ms, error=0) for s, ms in (("a", 4.0), ("b", 2.0))
    ]
    table = report.times(pd.DataFrame([*rows, dict(rows[0], part="cells", stage="c")]), "attention")
    assert table.index.tolist() == ["a", "b"] and table.gain["b"] == 2 and table.gain.isna()["a"]
    part_of_b = dict(rows[0], stage="part of b", latency_ms=1.0, tflops=float("nan"))
    assert report.times(pd.DataFrame([*rows, part_of_b]), "attention").gain.isna().tolist() == [True, False, True]


def stamped(stage: str, cycles: int) -> pd.DataFrame:
    """Stamps of three groups over four steps, `cycles` apart."""
    rows = []
    for group in range(3):
        for step in range(22, 26):
            start = dict(part="attention", stage=stage, program=0, group=group, step=step, tile=step * cycles)
            marks = dict(issued=100, weights=400, logits=600, output=1000)
            rows.append(start | {mark: start["tile"] + after for mark, after in marks.items()})
    rows[5] |= dict(tile=rows[5]["tile"] + 999)  # one slow step does not change the median
    return pd.DataFrame(rows)


def test_cycles_of_a_block_and_the_share_that_tensor_cores_need():
    cycles = report.block_cycles(pd.concat([stamped("ring", 4096), stamped("fp8", 2048)], ignore_index=True))
    assert cycles.cycles.to_dict() == {"ring": 4096, "fp8": 2048}
    assert cycles.tensor_cores.to_dict() == {"ring": 0.5, "fp8": 0.5}


def bars(ax) -> dict[str, list[float]]:
    """Widths of the bars of each colour."""
    widths: dict[str, list[float]] = {}
    names = {figures.COLOURS[name]: name for name in ("until issued", "QKᵀ", "PV", "softmax", "softmax, PV")}
    for bar in ax.patches:
        name = next(n for c, n in names.items() if to_rgba(c) == bar.get_facecolor())
        widths.setdefault(name, []).append(bar.get_width())
    return widths


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("ring", {"until issued": 100, "QKᵀ": 500, "PV": 400, "softmax": 3000}),
        ("overlap", {"until issued": 100, "QKᵀ": 500, "softmax, PV": 400}),
        ("fp8", {"until issued": 100, "softmax": 300, "QKᵀ": 200, "softmax, PV": 400}),
    ],
)
def test_timelines_draw_the_time_between_marks(stage, expected):
    rows = stamped(stage, 4000)
    figure = figures.timelines(rows[rows.group == 0], [stage])
    found = bars(figure.axes[0])
    assert {name: widths[0] for name, widths in found.items()} == expected
    assert all(name in describe(figure) for name in expected)


def test_rates_start_at_zero_and_schedules_show_tasks():
    table = pd.DataFrame(dict(tflops=[300.0, 600.0], gain=[float("nan"), 2.0]), index=["a", "b"])
    (ax,) = figures.rates(table, "title").axes
    assert ax.get_xlim()[0] == 0 and [text.get_text() for text in ax.texts] == ["300", "600, 2.00×"]
    tasks = pd.DataFrame(dict(stage="overlap", sm=[0, 1], task=[0.0, 5.0]))
    tasks = tasks.assign(attended=tasks.task + 90, stored=tasks.task + 100)
    left, right = figures.schedule(pd.concat([tasks, tasks.assign(stage="persistent")]), ["overlap", "persistent"]).axes
    assert [bar.get_width() for bar in left.patches] == [90.0, 10.0, 90.0, 10.0] and len(right.patches) == 4

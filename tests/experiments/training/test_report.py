"""The report: what is averaged over what, when a difference counts, and figures that hold every arm."""

import pandas as pd
import pytest

from stem.experiments.training import report

NAN = float("nan")


def row(measure, trained, inferred, seed, value, *, task="recall", seq_len=64, start=0, count=1, place="distance"):
    span = dict(place=place, start=start, stop=start + 32, count=count)
    return dict(measure=measure, trained=trained, inferred=inferred, seed=seed, value=value, task=task) | dict(
        seq_len=seq_len, **span
    )


def test_one_number_a_seed_weighted_by_counts():
    rows = [
        row("correct", "stem", "stem", seed, value, start=start, count=count)
        for seed, value, start, count in [(0, 1.0, 0, 3), (0, 0.0, 32, 1), (1, 0.5, 0, 2), (1, 0.2, 32, 1)]
    ]
    rows += [row("correct", "stem", "dense", 0, 9.0), row("correct", "stem", "stem", 0, 9.0, seq_len=128)]
    rows = pd.DataFrame(rows)
    assert report.seeds_of(rows, "correct", "stem", "stem", seq_len=64).tolist() == pytest.approx([0.75, 0.4])
    assert report.seeds_of(rows, "correct", "stem", "stem", seq_len=64, shortest=32).tolist() == [0.0, 0.2]
    assert report.seeds_of(rows, "correct", "stem", "stem", seq_len=64, task="needle").empty


@pytest.mark.parametrize(
    ("values", "tolerance", "expected"),
    [
        ([1.19, 1.2, 1.21], 0.0, "higher"),
        ([1.19, 1.2, 1.21], 0.19, "level"),
        ([0.81, 0.8, 0.79], 0.05, "lower"),
        ([1.1, 1.2, 1.7], 0.0, "level"),  # all above, but another seed could lie below
        ([1.1, 0.9, 1.1], 0.0, "level"),
        ([1.1, NAN, NAN], 0.0, "higher (one seed)"),
        ([NAN, NAN, NAN], 0.0, "level"),
    ],
)
def test_a_difference_counts_if_the_seeds_show_it(values, tolerance, expected):
    assert report.verdict(pd.Series(values), pd.Series([1.0, 1.0, 1.0]), tolerance) == expected


def test_the_interval_is_student_s():
    """Differences of mean 0.1 and deviation 0.01: 95 % of three lie within 0.1 +- 4.303 * 0.01 / sqrt(3) = 0.0248."""
    values, than = pd.Series([0.09, 0.1, 0.11]), pd.Series([0.0, 0.0, 0.0])
    assert report.verdict(values, than, 0.075) == "higher" and report.verdict(values, than, 0.0753) == "level"


def test_span():
    assert report.span(pd.Series([0.1, 0.3])) == "0.200 (0.100 to 0.300)"
    assert report.span(pd.Series([0.1])) == "0.100"


@pytest.fixture
def adaptation() -> pd.DataFrame:
    """Dense 1.0 before; both tunings gain 0.2; Stem costs 0.1, of which 0.03 (seed 0) or 0.05 (seed 1) are left."""
    losses = {("pretrained", "dense", 0): 1.0, ("pretrained", "stem", 0): 1.1}
    for seed, left in ((0, 0.03), (1, 0.05)):
        losses |= {("adapt_dense", "dense", seed): 0.8, ("adapt_dense", "stem", seed): 0.9}
        losses |= {("adapt_stem", "dense", seed): 0.81, ("adapt_stem", "stem", seed): 0.8 + left}
    return pd.DataFrame(
        [
            row(
                "loss",
                *key,
                value + 5 * (start == 0),
                task=f"held_out_{name}",
                seq_len=8192,
                start=start,
                place="position",
            )
            for key, value in losses.items()
            for name in ("a", "b")
            for start in (0, 2048)
        ]
    )


def test_adaptation_removes_the_share_of_the_control_s_gap(adaptation):
    table = report.adaptation_table(adaptation)
    assert table.gap.tolist() == pytest.approx([0.1, 0.1]) and table.gap_left.tolist() == pytest.approx([0.03, 0.05])
    assert table.removed.tolist() == pytest.approx([0.7, 0.5])
    assert table["pretrained stem"].tolist() == pytest.approx([1.1, 1.1])


def test_figures_hold_every_arm(adaptation, tmp_path, monkeypatch):
    monkeypatch.setenv("STEM_RESULTS", str(tmp_path))
    rows = []
    for seed in (0, 1):
        for arm in ("dense", "stem"):
            for measure in ("loss_text", "loss_recall", "grad_norm"):
                rows += [
                    row(measure, arm, arm, seed, 1.0 + seed, task="text,recall", start=n, place="step") for n in (1, 33)
                ]
            for length in (64, 128):
                rows.append(row("loss", arm, arm, seed, 2.0, task="text", seq_len=length, place="position"))
                rows += [
                    row("correct", arm, how, seed, 0.5, seq_len=length, start=s)
                    for how in (arm, "dense")
                    for s in (1, 16)
                ]
    rows = pd.concat([pd.DataFrame(rows), adaptation])
    assert report.save_figures(rows) == ["curves.svg", "position.svg", "distance.svg", "adaptation.svg"]
    text = report.draw_curves(rows).axes[2].texts
    assert [label.get_text() for label in text] == ["dense", "stem"]
    (above, _) = report.draw_positions(rows.assign(value=rows.value + 0.5 * (rows.trained == "stem"))).axes[0].lines
    assert above.get_label() == "stem" and above.get_ydata() == pytest.approx(0.5)
    axis = report.draw_adaptation(rows).axes[0]
    assert axis.get_title(loc="left") == "Tuning with Stem removes 60 % of its cost from position 2048 on"
    gap = axis.lines[1]
    assert gap.get_label() == "tuned dense" and gap.get_ydata().tolist() == pytest.approx([0.1, 0.1])


def test_tables_have_a_row_an_arm_and_a_reading():
    rows = [
        row("grad_norm", arm, arm, seed, value, place="step", task="text", start=s)
        for arm, seed, value, s in [
            ("dense", 0, 9.0, 1),
            ("dense", 0, 1.5, 33),
            ("dense", 1, 2.5, 33),
            ("stem", 0, 1.0, 33),
        ]
    ]
    table = report.end_table(pd.DataFrame(rows))
    assert table.loc["dense", "grad_norm"] == "2.000 (1.500 to 2.500)" and list(table.index) == ["dense", "stem"]
    read = pd.DataFrame([row("correct", "dense", how, 0, 0.25) for how in ("dense", "stem")])
    assert report.reading_table(read, "correct", "recall")["64"].to_dict() == {
        "dense → dense": "0.250",
        "dense → stem": "0.250",
    }


def test_rows_of_this_machine_come_before_those_of_others(monkeypatch):
    rows = pd.DataFrame(dict(machine=["here", "there"], profile=["full", "full"], value=[1.0, 2.0]))
    monkeypatch.setattr(report.records, "read_rows", lambda name: rows)
    monkeypatch.setattr(report.records, "machine_name", lambda: "here")
    assert report.of_machine("full").value.tolist() == [1.0]
    monkeypatch.setattr(report.records, "machine_name", lambda: "elsewhere")
    assert report.of_machine("full").value.tolist() == [2.0] and report.of_machine("smoke").empty


def test_the_verdict_table_compares_every_arm_at_every_length(adaptation):
    rows = []
    for seed in (0, 1):
        for arm, right, loss in (("dense", 0.9, 1.0), ("stem", 0.7 + 0.01 * seed, 1.001), ("longformer", 0.4, 1.2)):
            for length in (64, 128):
                rows.append(row("loss", arm, arm, seed, loss, task="text", seq_len=length))
                for how in (arm, "dense", "stem"):
                    rows.append(row("correct", arm, how, seed, right, seq_len=length))
    table = report.verdict_table(pd.DataFrame(rows))
    assert list(table) == ["text loss at 64", "right answers at 64", "right answers at 128"]
    assert table.loc["stem / dense", "text loss at 64"].startswith("level: 1.001 (1.001 to 1.001) / 1.000")
    assert table.loc["stem / dense", "right answers at 64"].startswith("lower: 0.705 (0.700 to 0.710) / 0.900")
    assert table.loc["longformer / dense"].str.split(":").str[0].tolist() == ["higher", "lower", "lower"]
    assert table.loc["trained dense: read stem / read dense", "right answers at 128"] == ""
    assert "stem / uniform_topk" not in table.index
    assert "removes 60 (50 to 70) % of the gap" in "\n".join(report.adaptation_findings(adaptation))


def test_adaptation_is_told_over_all_positions_and_at_late_ones(adaptation):
    """At early positions Stem costs 0.1 too, and the tuning removes nothing."""
    early = (adaptation.start == 0) & (adaptation.trained == "adapt_stem") & (adaptation.inferred == "stem")
    told = report.adaptation_findings(adaptation.assign(value=adaptation.value.mask(early, 5.9)))
    removed = (
        "removes 30 (25 to 35) % of the gap over all 8192 positions and 60 (50 to 70) % of the gap from position 2048"
    )
    assert f"Fine-tuning with Stem on {removed} on." in told
    assert "Before any tuning, Stem costs +0.1000 nats over all 8192 positions and" in told[0]
    assert told[-1].startswith("Losses after tuning, from position 2048 on: dense dense 0.800 (0.800 to 0.800), ")

"""Speed at matched accuracy: the lowest density within both bounds, and times at that density beside dense kernels."""

import pandas as pd
import pytest

from stem.experiments import headline
from stem.experiments.long_context import matched_report, report
from stem.experiments.markdown import MISSING

MODEL, LENGTH = "Qwen2.5-Coder-0.5B", 2**15


def quality(method, asked, nats, loss, density=None):
    """Two rows of a method: needles and one kind of document."""
    about = dict(
        method=method, asked=asked, block_size=128.0 if method != "dense" else None, length=LENGTH, model=MODEL
    )
    about |= dict(density=density or asked or 1.0, count=2, difference=0.0, low=0.0, high=0.0, start=None, stop=None)
    needles = dict(measure="answer", task="niah_multikey_1", values=f"{nats} {nats}")
    documents = dict(measure="loss", task="prose", values=f"{loss} {loss}", start=0, stop=LENGTH - 1)
    return [about | needles, about | documents]


@pytest.fixture
def rows(monkeypatch):
    found = [
        *quality("dense", None, 0.0, 0.0),
        *quality("adaptive", 0.25, -0.1, 0.001),
        *quality("adaptive", 0.15, -0.26, 0.004, density=0.14),  # outside here, whatever was chosen is reported
        *quality("adaptive", 0.08, -0.1, 0.001),  # within the bounds here, but not where densities are chosen
        *quality("xattention", 0.15, -0.1, 0.006),
        *quality("xattention", 0.25, -0.3, 0.001),
    ]
    chosen = [
        *quality("dense", None, 0.0, 0.0),
        *quality("adaptive", 0.25, -0.1, 0.001),
        *quality("adaptive", 0.15, -0.2, 0.001),
        *quality("adaptive", 0.08, -0.26, 0.004),
        *quality("adaptive", 0.1, -0.2, 0.001),  # not among the reported rows
        *quality("xattention", 0.25, -0.3, 0.001),
    ]
    monkeypatch.setattr(report, "rows", lambda parts: pd.DataFrame(chosen if parts == ("choice",) else found))
    times = [
        dict(method=method, asked=asked, density=asked, source=source, tokens=n, operator_ms=ms, attention_ms=ms / 2)
        for source, n in ((f"captured from {MODEL}", LENGTH), ("random normal", 2**17))
        for method, asked, ms in (
            ("sdpa_cudnn", None, 12.0), ("fa3", None, 9.0), ("adaptive", 0.25, 4.0), ("adaptive", 0.15, 3.0),
            ("adaptive", 0.08, 1.0), ("xattention", 0.25, 6.0),
        )
    ]  # fmt: skip
    about = dict(device="NVIDIA H200", layers=24, q_heads=14, kv_heads=2, head_dim=64)
    monkeypatch.setattr(matched_report, "full_rows", lambda name: pd.DataFrame(times).assign(**about))


def test_points_pair_needles_and_documents_by_density(rows):
    found = matched_report.points(report.rows(("answers", "loss")), MODEL, LENGTH)
    assert [(point.asked, point.is_within) for point in found["adaptive"]] == [
        (0.08, True),
        (0.15, False),
        (0.25, True),
    ]
    assert not any(point.is_within for point in found["xattention"])
    assert found["adaptive"][1].needles.mean == pytest.approx(-0.26) and found["adaptive"][1].density == 0.14


def test_a_method_is_shown_at_the_lowest_density_that_other_samples_chose(rows):
    lines = [line for line in matched_report.matched().splitlines() if line.startswith("|")]
    assert lines[0].count("over FlashAttention-3, 9 ms") == 2
    ours, theirs = (line.strip("| ").split(" | ") for line in lines[2:])
    assert ours == [
        "adaptive",
        "14.0%",
        "-0.260 [-0.260, -0.260]",
        "+0.00400 [+0.00400, +0.00400]",
        *["3 (1.5)", "3.00× = 6.67 × 0.45"] * 2,
    ]
    assert theirs[:2] == ["xattention", "none to 25.0%"] and theirs[4:6] == ["6 (3)", "1.50× = 4.00 × 0.38"]


def test_a_model_without_samples_that_choose_shows_its_highest_density_at_its_longest_samples(rows, monkeypatch):
    """Needles of the captured length have no documents beside them, so the samples of half the length count."""
    read = report.rows

    def others(parts):
        frame = read(parts)
        if parts == ("choice",):
            return frame[frame.model == "none"]
        needles = frame[frame.measure == "answer"].assign(values="-9 -9")
        return pd.concat([frame.assign(length=LENGTH // 2), needles])

    monkeypatch.setattr(report, "rows", others)
    told = matched_report.matched()
    lines = [line.strip("| ").split(" | ") for line in told.splitlines() if line.startswith("|")][2:]
    assert [line[:2] for line in lines] == [["adaptive", "25.0%, not chosen"], ["xattention", "25.0%, not chosen"]]
    assert [line[2].split()[0] for line in lines] == ["-0.100", "-0.300"]
    assert "the dense kernel's. Needles and documents have 16K tokens." in told
    assert matched_report.fastest() is None  # nothing was chosen on other samples


def test_a_density_that_is_not_of_the_grid_is_named_and_not_chosen(rows, monkeypatch):
    read = report.rows

    def others(parts):
        more = quality("adaptive", 0.12, *((-0.1, 0.001) if parts == ("choice",) else (-0.5, 0.009)))
        return pd.concat([read(parts), pd.DataFrame(more[: 1 + (parts == ("choice",))])], ignore_index=True)

    monkeypatch.setattr(report, "rows", others)
    told = matched_report.matched()
    assert "| adaptive | 14.0% |" in told
    assert "none of these densities: adaptive at 12%, with -0.500 [-0.500, -0.500] nats on the needles here" in told


def test_a_method_without_times_is_shown_where_densities_were_chosen(rows, monkeypatch):
    read = report.rows

    def others(parts):
        more = quality("stem", 0.7, -1.0, 0.001) + (
            quality("subblock", 0.25, -1.0, 0.1) if parts != ("choice",) else []
        )
        return pd.concat([read(parts), pd.DataFrame(more)], ignore_index=True)

    monkeypatch.setattr(report, "rows", others)
    told = matched_report.matched()
    assert f"| stem | none to 70.0% | -1.000 [-1.000, -1.000] | +0.00100 [+0.00100, +0.00100] | {MISSING} |" in told
    assert "subblock" not in told  # neither times nor a density that other samples could choose


def test_needles_without_documents_are_shown_and_no_headline(rows, monkeypatch):
    read = report.rows

    def others(parts):
        frame = read(parts)
        return frame if parts == ("choice",) else frame[(frame.measure == "answer") | (frame.asked != 0.15)]

    monkeypatch.setattr(report, "rows", others)
    lines = [line.strip("| ").split(" | ") for line in matched_report.matched().splitlines() if line.startswith("|")]
    assert lines[2][:4] == ["adaptive", "14.0%", "-0.260 [-0.260, -0.260]", MISSING]
    assert matched_report.fastest() is None


def test_the_search_shows_its_best_settings_then_the_oracle_and_reuse(monkeypatch):
    names = [f"score_cells={i}" for i in range(12)] + ["exact_last_blocks=1048576", "score_cells=0"]
    frame = pd.DataFrame(
        dict(changes=name, anchors=1 + (i == 13), score=12.0 - i, values=f"{-i} {-i}", documents=0.01)
        for i, name in enumerate(names)
    ).assign(device="NVIDIA H200", length=2**14, asked=0.08, count=12, density_needles=0.08, density_documents=0.079)
    frame = frame.assign(model="smollm2-0.1.2", samples="tuning", thresholds=None, divergence=None)
    frame["document_values"] = [None, *["0.01 0.01"] * 12, " ".join(["0.01"] * 8)]
    monkeypatch.setattr(matched_report, "full_rows", lambda name: frame)
    lines = [line.split(" | ")[0].strip("| ") for line in matched_report.search().splitlines() if line.startswith("|")]
    best = [f"score_cells={i}" for i in range(11, 11 - matched_report.SEARCHED, -1)]
    assert lines[2:] == [*best, "exact_last_blocks=1048576", "the first line, reused by 2 layers each"]
    assert "| score_cells=11 | 8.0%, 7.9% | -11.00 [-11.00, -11.00] | +0.0100 |" in matched_report.search()
    told = matched_report.search()
    assert "then true mass in the place of scores, then selections that several layers reuse." in told
    assert f"| {MISSING} |" in told
    frame = frame.query("anchors == 1").assign(divergence=1.5, count=[12] * 12 + [24])
    told = matched_report.search()
    assert "on 12 to 24 needles" in told and "| 1.50 |" in told and "several layers" not in told


def test_reported_samples_show_thresholds_and_the_distance_to_the_same_with_exact_shares(monkeypatch):
    oracle, layers = "exact_last_blocks=1048576 score_cells=32", "last=0.25 layers=1,0.5"
    lines = [("score_cells=32", None), ("score_cells=32", layers), (oracle, layers)]
    frame = pd.DataFrame(dict(changes=changes, thresholds=of) for changes, of in lines)
    numbers = dict(divergence=0.3, score=1.0, anchors=1, count=2)
    about = dict(
        device="H200", model="smollm2-0.1.2", length=2**14, asked=0.08, samples="reported", density_needles=0.08
    )
    frame = frame.assign(**numbers, **about, density_documents=0.079)
    frame["values"], frame["document_values"] = ["-1 -1"] * 2 + ["-0.75 -0.75"], ["0.01 0.02"] * 2 + ["0.02 0.03"]
    frame["needles"], frame["documents"] = [-0.2, -0.3, -0.2], [0.004, 0.004, 0.006]
    monkeypatch.setattr(matched_report, "full_rows", lambda name: frame)
    assert "Within both bounds: 1 of 2 settings, and 0 of 1 with the true mass." in matched_report.reported()
    first, own, exact = [line.strip("| ").split(" | ") for line in matched_report.reported().splitlines()[-3:]]
    rows = {row[0]: row[1:] for row in (first, own, exact)}
    assert rows["score_cells=32"][-2:] == [MISSING, MISSING]
    told = "score_cells=32; threshold of the last block × 0.25; thresholds by layer"
    assert rows[told][:4] == ["8.0%, 7.9%", "-1.00 [-1.00, -1.00]", "+0.0040", "0.30"]
    assert rows[told][-2:] == ["-0.25 [-0.25, -0.25]", "-0.0100 [-0.0100, -0.0100]"]
    assert rows[f"exact_last_blocks=1048576 {told}"][-2:] == [MISSING, MISSING]
    assert matched_report.search() == "" and "of 16K tokens" in matched_report.reported()


def test_the_headline_is_the_fastest_method_with_a_chosen_density(rows, monkeypatch):
    method, (found,) = matched_report.fastest()
    assert (method, found.point.asked) == ("adaptive", 0.15)  # 0.08 is faster and was not chosen
    assert (found.wide.row.operator_ms, found.wide.row.tokens, found.wide.dense) == (3.0, 2**17, "FlashAttention-3")
    first, second, third = headline._matched()
    told = "**Operator at matched accuracy, 128K tokens: 3.0× over FlashAttention-3 (9 → 3 ms)**"
    assert first.startswith(f"{told}, `adaptive` at density 15.0%")
    assert "and one NVIDIA H200: 6.7 (blocks not computed) × 0.45 (the kernel) ([rows]" in first
    assert second.startswith("**On q, k and v of real models, 32K tokens**, mean of all layers: 3.0× over FlashAtten")
    assert f"on {MODEL} at density 15.0%: 6.7 (blocks not computed) × 0.45 (the kernel)" in second
    assert "(needles lose at most 0.25 nats, documents 0.005 nats per token; 32K tokens; Qwen2.5-Coder-0.5B)" in third
    assert "**`adaptive` 15%**. Other samples chose these densities." in third
    assert (
        "loses 0.260 [0.260, 0.260] nats on needles and 0.0040 [0.0040, 0.0040] nats per token on documents, out"
        in third
    )
    monkeypatch.setattr(matched_report, "NATS", -0.27)
    assert "(needles lose at most 0.27 nats" in headline._matched()[2] and "outside" not in headline._matched()[2]
    monkeypatch.setattr(matched_report, "NATS", -0.1)
    monkeypatch.setattr(matched_report, "LOSS", 0.0005)
    assert matched_report.fastest() is None and headline._matched() == []


def test_speed_ups_of_turns_have_intervals(rows, monkeypatch):
    """Rows whose calls took turns with the dense kernel hold its time and the median ratio with its interval."""
    times = matched_report.full_rows("long_context/matched")
    apart = "One without an interval is of an earlier run, without turns. "
    assert apart in matched_report.matched()
    turns = dict(dense="fa4", dense_ms=8.0, speedup=2.5, speedup_low=2.4, speedup_high=2.75)
    is_sparse = times.asked.notna()
    times = times.assign(**{name: pd.Series(value, times.index).where(is_sparse) for name, value in turns.items()})
    monkeypatch.setattr(matched_report, "full_rows", lambda name: times)
    told = matched_report.matched()
    assert "| 3 (1.5) | 2.50× [2.40, 2.75] = 6.67 × 0.38 |" in told and apart not in told
    first, second, _ = headline._matched()
    assert "128K tokens: 2.5× [2.40, 2.75] over FlashAttention-4 (8 → 3 ms)**" in first
    assert "2.5× [2.40, 2.75] over FlashAttention-4 (8 → 3 ms) on Qwen2.5-Coder-0.5B" in second


def test_the_headline_takes_the_highest_density_that_models_chose(rows, monkeypatch):
    read, times, other = report.rows, matched_report.full_rows("long_context/matched"), "Qwen2.5-Coder-1.5B"
    more = times[times.tokens == LENGTH].assign(source=f"captured from {other}")
    monkeypatch.setattr(matched_report, "full_rows", lambda name: pd.concat([times, more], ignore_index=True))

    def both(parts):
        wide = [*quality("dense", None, 0.0, 0.0), *quality("adaptive", 0.25, -0.2, 0.001)]
        wide = pd.DataFrame(wide).assign(model=other)
        return pd.concat([read(parts), wide], ignore_index=True)

    monkeypatch.setattr(report, "rows", both)
    _, (most, least) = matched_report.fastest()
    assert (most.model, most.point.asked, most.wide.row.operator_ms) == (other, 0.25, 4.0)
    assert (least.model, least.point.asked) == (MODEL, 0.15)
    first, second, third = headline._matched()
    assert "128K tokens: 2.2× over FlashAttention-3 (9 → 4 ms)**" in first
    assert f"on {other} at density 25.0%" in second and f"on {MODEL} at density 15.0%" in second
    assert f"32K tokens; {other}, {MODEL}): **`adaptive` 25%, 15%**." in third
    monkeypatch.setattr(report, "rows", lambda parts: both(parts).query(f"model != '{other}' or asked != 0.25"))
    assert len(matched_report.fastest()[1]) == 1  # a model without the method chooses nothing

    def missed(parts):
        return both(parts).assign(values=lambda of: of["values"].mask((of.model == other) & of.asked.notna(), "-1 -1"))

    monkeypatch.setattr(report, "rows", missed)
    assert matched_report.fastest() is None  # no density is within the bounds on the other model


def test_the_headline_names_the_densities_of_stem_and_of_the_best_other_method(rows, monkeypatch):
    read = report.rows

    def others(parts):
        more = [quality("stem", 0.7, -9.0, 0.001), quality("stem, last block dense", 0.7, -0.1, 0.001)]
        more += [quality("flashprefill", 0.4, -0.1, 0.001), quality("adaptive, mean pooling", 0.3, -0.1, 0.001)]
        return pd.concat([read(parts), pd.DataFrame(sum(more, []))], ignore_index=True)

    monkeypatch.setattr(report, "rows", others)
    held = "(and within them on the reported samples)"
    told = f"**`adaptive` 15%**; `flashprefill` 40% {held}; `stem, last block dense` 70% {held}; `stem` none to 70%. O"
    assert told in headline._matched()[2]

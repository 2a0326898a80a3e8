"""stem.experiments.long_context.report: generated tables from made-up rows."""

from stem.experiments import records
from stem.experiments.long_context import report


def evaluation_rows() -> list[dict]:
    about = dict(model="smollm2", seed=0, length=4096, count=100, block_size=64.0)
    rows = []
    for method, asked, density, nats in [
        ("dense", None, 1.0, 0.0),
        ("window", None, 0.1, -18.0),
        ("stem", 0.25, 0.25, -2),
    ]:
        who = about | dict(method=method, asked=asked, density=density, block_size=None if method == "dense" else 64.0)
        for measure, task, scale in [
            ("answer", "ruler_vt", 1),
            ("loss", "prose", -0.01),
            ("generated", "ruler_vt", 0.0),
        ]:
            ends = dict(difference=nats * scale, low=(nats - 1) * scale, high=(nats + 1) * scale)
            rows.append(dict(who, measure=measure, task=task, value=0.5 + nats * scale, dense=0.5, **ends))
        rows.append(dict(who, measure="loss", task="all", value=9.0, dense=9.0, difference=0.0, low=0.0, high=0.0))
    elsewhere = dict(rows[-4], asked=0.5, difference=-0.125, low=-1, high=1)
    preset = dict(rows[-4], method="stem, paper", asked=None, block_size=128.0, density=0.5, difference=-4.0)
    return [*rows, elsewhere, preset]


def test_evaluation(made_up_machine):
    records.write_rows("long_context/answers", evaluation_rows(), profile="full")
    text = report.evaluation()
    assert "**smollm2** on Made-up GPU, blocks of 64 tokens, asked for 25% of the block pairs" in text
    assert "| method | density | samples | ruler_vt, 4K |" in text and "| dense itself | 100.0% | 100 | 0.5 |" in text
    stem, window = "| stem | 25.0% | 100 | -2.0 [-3.0, -1.0] |", "| window | 10.0% | 100 | -18.0 [-19.0, -17.0] |"
    assert text.index(stem) < text.index("| stem, paper | 50.0% | 100 | -4.0") < text.index(window)  # best first
    assert "| window | 10.0% | 100 | +0% [+0%, +0%] |" in text.replace("-0%", "+0%")
    stem, window = (
        "| stem | 25.0% | 100 | +0.020 [+0.030, +0.010] |",
        "| window | 10.0% | 100 | +0.180 [+0.190, +0.170] |",
    )
    assert text.index(stem) < text.index(window)
    assert "9.0" not in text.replace("19.0", "") and "0.125" not in text
    assert "ruler_vt at 4K by block size and density asked for" in text
    assert "| method | 64, 25% | 64, 50% |" in text and "| stem | -2.0 | -0.1 |" in text


def test_evaluation_says_how_long_a_prefill_takes(made_up_machine):
    about = dict(model="smollm2", seed=0, count=3, measure="time", task="ruler_vt", difference=0, low=0, high=0)
    found = [
        ("dense", None, 4096, 20.0),
        ("dense", None, 8192, 60.0),
        ("stem", 0.25, 8192, 24.0),
        ("a", 0.25, 8192, 10),
    ]
    found = [
        dict(about, method=m, asked=of, block_size=of and 64, length=n, value=ms, dense=20.0 if n == 4096 else 60.0)
        for m, of, n, ms in found
    ]
    records.write_rows(
        "long_context/answers", [*evaluation_rows(), *[dict(row, density=1.0) for row in found]], profile="full"
    )
    text = report.evaluation()
    assert "| method | 4K | 8K |" in text and "| dense [ms] | 20 | 60 |" in text
    assert text.index("| a | – | 6.00× |") < text.index("| stem | – | 2.50× |")  # fastest first


def test_a_model_with_dense_rows_only_has_no_table_and_missing_cells_are_dashes(made_up_machine):
    rows = [dict(row, model="other") for row in evaluation_rows()[:1]]
    longer = [dict(row, length=8192, count=24) for row in evaluation_rows() if row["method"] != "stem"]
    records.write_rows("long_context/answers", evaluation_rows(), profile="full")
    records.write_rows("long_context/extension", rows + longer, profile="full")
    text = report.evaluation()
    assert "other" not in text and "| stem | 25.0% | 100 | -2.0 [-3.0, -1.0] | – |" in text
    assert "| window | 10.0% | 24 to 100 | -18.0" in text


def test_quality_shows_block_sizes_that_hold_both_the_published_and_our_selection(made_up_machine):
    about = dict(model="smollm2", text="prose", tokens=8192, windows=1, seed=0)
    rows = [
        dict(about, method=method, block_size=size, asked=asked, density=asked, gap=gap)
        for size, method, asked, gap in [
            (128, "stem", 0.31, 0.08),
            (128, "stem", 0.16, 0.2),
            (128, "adaptive", 0.31, 0.02),
            (128, "adaptive", 0.16, 0.05),
            (128, "adaptive", 0.155, 0.06),
            (64, "adaptive", 0.31, 0.01),
            (32, "stem", 0.31, 0.01),
        ]
    ]
    records.write_rows("long_context/loss", rows, profile="full")
    text = report.quality()
    assert "blocks of 128" in text and "blocks of 64" not in text and "blocks of 32" not in text
    assert "leaves 25% of the gap of `stem` at a density of 31 % and 25% at 16 %" in text
    assert "With half the blocks it leaves 75% of the gap that `stem` has at 31 %" in text
    assert "| adaptive | +0.0500 | +0.0200 |" in text

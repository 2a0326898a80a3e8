"""stem.experiments.tables: generated sections from made-up rows, whichever of them exist."""

import pytest

from stem.experiments import markdown, records, scoreboard, tables

FILE = "results/README.md"
README = "".join(f"# {name}\n<!-- begin:{name} -->\nold\n<!-- end:{name} -->\nprose\n" for name in tables.FILES[FILE])


@pytest.fixture(autouse=True)
def results(made_up_machine):
    """An empty results folder."""


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


def test_without_rows_each_section_says_how_to_get_them():
    text = tables.render(README, FILE)
    assert "old" not in text and text.count("prose") == len(tables.FILES[FILE])
    for number in ("03", "04", "05", "06"):
        assert f"make reproduce PROFILE=full ONLY={number}" in text
    assert tables.render(text, FILE) == text


def test_smoke_rows_change_nothing():
    before = tables.render(README, FILE)
    row = dict(operation="operator", provider="stem_triton", config="default", density=0.25, latency_ms=2.0)
    records.write_rows("speed", [dict(row, tokens=1024)], profile="smoke")
    assert tables.render(README, FILE) == before


def test_evaluation():
    records.write_rows("long_context/answers", evaluation_rows(), profile="full")
    text = tables.evaluation()
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


def test_evaluation_says_how_long_a_prefill_takes():
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
    text = tables.evaluation()
    assert "| method | 4K | 8K |" in text and "| dense [ms] | 20 | 60 |" in text
    assert text.index("| a | – | 6.00× |") < text.index("| stem | – | 2.50× |")  # fastest first


def test_a_model_with_dense_rows_only_has_no_table_and_missing_cells_are_dashes():
    rows = [dict(row, model="other") for row in evaluation_rows()[:1]]
    longer = [dict(row, length=8192, count=24) for row in evaluation_rows() if row["method"] != "stem"]
    records.write_rows("long_context/answers", evaluation_rows(), profile="full")
    records.write_rows("long_context/extension", rows + longer, profile="full")
    text = tables.evaluation()
    assert "other" not in text and "| stem | 25.0% | 100 | -2.0 [-3.0, -1.0] | – |" in text
    assert "| window | 10.0% | 24 to 100 | -18.0" in text


def test_quality_shows_block_sizes_that_hold_both_the_published_and_our_selection():
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
    text = tables.quality()
    assert "blocks of 128" in text and "blocks of 64" not in text and "blocks of 32" not in text
    assert "leaves 25% of the gap" in text and "25% at 16 %, and 75% of its gap at 31 %" in text
    assert "| adaptive | +0.0500 | +0.0200 |" in text


def test_training():
    common = dict(seed=0, task="text", trained="dense", place="position")
    rows = [
        dict(common, measure="loss", seq_len=length, inferred=inferred, value=value, count=count)
        for length in (512, 1024)
        for inferred, value, count in [("dense", 1.0, 3), ("dense", 2.0, 1), ("sliding_window", 4.0, 4)]
    ]
    recall = common | dict(measure="correct", place="distance", seq_len=512, inferred="dense", value=0.875, count=8)
    curve = common | dict(measure="loss", place="step", seq_len=512, inferred="dense", value=9.0, count=1)
    records.write_rows("training", [*rows, recall, curve], profile="full")
    text = tables.training()
    assert "| trained with | read with | text loss [nats], 512 | text loss [nats], 1K | recall, 512 |" in text
    assert "| dense | dense | 1.250 | 1.250 | 87.5% |" in text
    assert "| dense | sliding_window | 4.000 | 4.000 | – |" in text
    adapted = common | dict(measure="loss", task="held_out_tarfile", seq_len=4096, start=2048, count=1)
    losses = [("pretrained", "dense", 1.0), ("pretrained", "stem", 1.2), ("adapt_dense", "dense", 0.8)]
    losses += [("adapt_dense", "stem", 1.0), ("adapt_stem", "dense", 0.8), ("adapt_stem", "stem", 0.85)]
    held_out = [adapted | dict(trained=name, inferred=read, value=loss) for name, read, loss in losses]
    records.write_rows("training", [*rows, recall, *held_out], profile="full")
    with_adaptation = tables.training()
    assert with_adaptation.startswith(text) and "removes 75 % of the gap" in with_adaptation


@pytest.mark.parametrize(
    "text", ["", README + "<!-- begin:weather -->\n<!-- end:weather -->\n"], ids=["none", "unknown"]
)
def test_markers_and_sections_must_agree(text):
    with pytest.raises(ValueError, match=f"{FILE} has markers for"):
        tables.render(text, FILE)


def test_every_section_has_a_place_in_a_file():
    assert {name for names in tables.FILES.values() for name in names} == set(tables.SECTIONS)


def test_links_start_at_the_folder_of_their_file():
    section = "[a](notebooks/a.ipynb) [b](results/README.md#b) [c](https://example.org) [d](#d)"
    assert tables._links_from("README.md", section) == section
    found = "[a](../notebooks/a.ipynb) [b](README.md#b) [c](https://example.org) [d](#d)"
    assert tables._links_from("results/README.md", section) == found


def test_scoreboard_without_rows_says_what_writes_them():
    lines = scoreboard.scoreboard().splitlines()[2:]
    assert len(lines) == 8 and "-0.2% and +4.6% off the exact count" in lines[0] and "| partly |" in lines[0]
    assert all("not testable here yet: `make " in line or "writes the verdict" in line for line in lines[1:])
    assert all("PROFILE=full" in line for line in scoreboard.headline().splitlines())


def test_scoreboard_and_headline_read_the_rows():
    ratios = dict(speedup_vs_sdpa_cudnn=5.0, speedup_vs_sdpa_flash=9.0)
    common = dict(tokens=131072, density=0.25, latency_ms=30.0)
    timed = [
        common | ratios | dict(operation="operator", provider="stem_triton", config="default"),
        common | ratios | dict(operation="operator", provider="stem_hopper", config="default", latency_ms=60.0),
        common | ratios | dict(operation="operator", provider="stem_triton", config="released", density=0.2),
        common | dict(ratios, speedup_vs_sdpa_cudnn=2.5) | dict(operation="ttft", provider="stem", config="released"),
    ]
    records.write_rows("speed", timed, profile="full")
    answer = dict(model="smollm2", task="niah_single_2", measure="generated", length=8192, count=100, block_size=64.0)
    answer |= dict(asked=0.25, dense=0.5, low=-0.4, high=-0.2)
    answers = [
        answer | dict(method="stem", value=0.2, difference=-0.3, density=0.25),
        answer | dict(method="stem adaptive", value=0.53, difference=0.03, low=-0.02, high=0.1, density=0.24),
    ]
    records.write_rows("long_context/answers", answers, profile="full")
    losses = [
        dict(text=text, method=method, gap=gap + noise, asked=0.25, block_size=128)
        for text, noise in (("a", 0.0), ("b", 0.01))
        for method, gap in (("uniform_topk", 0.2), ("stem", 0.1 - noise / 10))
    ]
    records.write_rows("long_context/loss", losses, profile="full")
    claim = dict(claim="Table 1: output-aware over score-aware", paper="", on="tiny", seed=0)
    records.write_rows("theory/claims", [claim | dict(ours="+1 %", verdict="not reproduced: small")], profile="full")
    gaps = {"uniform": 0.2, "+ position decay": 0.15, "+ output-aware metric": 0.16}
    records.write_rows("theory/ablation", [dict(method=name, gap=gap) for name, gap in gaps.items()], profile="full")

    lines = scoreboard.scoreboard().splitlines()[2:]
    assert "| -7.2% | +1 % (tiny) | not reproduced |" in lines[1]
    assert "loss above dense 0.200 → 0.150 nats" in lines[3] and "not testable here yet" in lines[3]
    assert "loss above dense 0.150 → 0.160 nats" in lines[4]
    assert "difference -0.101 ± 0.001 over 2 texts" in lines[5] and "| reproduced |" in lines[5]
    assert "50% → 20% right, difference -30 points, 95 % interval -40 to -20, n = 100, density 25%" in lines[6]
    assert "| 3.7× (H20) | 9.0×, density 20.0% (Made-up GPU) | reproduced |" in lines[7]
    operator, first, needles = scoreboard.headline().splitlines()
    assert "5.0× over cuDNN (150 → 30 ms)** at 128K tokens and density 25.0%" in operator
    assert "2.5× over cuDNN (75 → 30 ms)" in first
    assert "53% of niah_single_2 right" in needles and "difference +3 points, 95 % interval -2 to +10" in needles


def test_lengths_are_whole_k_or_plain():
    assert [markdown.tokens_label(n) for n in (300, 1024, 1500, 131072, 2**20)] == ["300", "1K", "1500", "128K", "1M"]

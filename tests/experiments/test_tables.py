"""stem.experiments.tables: generated sections from made-up rows, whichever of them exist."""

import pytest

from stem.experiments import markdown, records, scoreboard, tables

FILE = "results/README.md"
README = "".join(f"# {name}\n<!-- begin:{name} -->\nold\n<!-- end:{name} -->\nprose\n" for name in tables.FILES[FILE])


@pytest.fixture(autouse=True)
def results(made_up_machine):
    """An empty results folder."""


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
        answer | dict(method="stem adaptive", value=0.4, difference=-0.1, density=0.24, length=4096),
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
    assert needles.endswith("With `dense_up_to=0`, `adaptive` answers 40% at 4K tokens, dense attention 50%.")


def test_lengths_are_whole_k_or_plain():
    assert [markdown.tokens_label(n) for n in (300, 1024, 1500, 131072, 2**20)] == ["300", "1K", "1500", "128K", "1M"]

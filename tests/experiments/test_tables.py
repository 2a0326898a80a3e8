"""stem.experiments.tables: generated sections from made-up rows, whichever of them exist."""

import pytest

from stem.experiments import headline, markdown, records, scoreboard, tables

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
    assert all("not testable here yet: `make " in line for line in lines[1:])
    assert all("PROFILE=full" in line for line in headline.headline().splitlines())


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
    claim = dict(claim="Eq. 5 and 9: bound of the error", paper="", on="tiny", seed=0)
    records.write_rows("theory/claims", [claim | dict(ours="100 %", verdict="reproduced, and loose")], profile="full")
    causal = dict(claim="no output before a block depends on it", impl="torch", error=0.0, passed=True)
    records.write_rows("correctness", [causal], profile="full")
    lines = {line[0].split(":")[0]: line[2:] for line in scoreboard.claims()}
    assert lines["Eq. 5 and 9"] == ("100 % (tiny)", "reproduced")
    assert lines["Fig. 1"] == (
        "9.0× = 5.0 (blocks not computed) × 1.80 (the kernel), density 20.0% (Made-up GPU)",
        "reproduced",
    )
    assert lines["Algorithm 1"][1] == "reproduced" and "largest change 0 in torch" in lines["Algorithm 1"][0]
    operator, first, _ = headline.headline().splitlines()
    assert "5.0× over cuDNN (150 → 30 ms)** at 128K tokens and density 25.0%" in operator
    assert "2.5× over cuDNN (75 → 30 ms)" in first and "Attention takes" not in first
    split = timed[-1] | dict(outside_ms=15.0)
    records.write_rows("speed", [*timed[:-1], split], profile="full")
    told = "Attention takes 80% of the dense time; its own speed-up is 4.0 (blocks not computed) × 1.00 (the kernel)"
    assert told in headline.headline().splitlines()[1]


def test_lengths_are_whole_k_or_plain():
    assert [markdown.tokens_label(n) for n in (300, 1024, 1500, 131072, 2**20)] == ["300", "1K", "1500", "128K", "1M"]

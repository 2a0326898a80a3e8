"""The paper's tables as they were typed in."""

from stem.experiments.theory import paper


def test_the_papers_tables_average_as_printed():
    table = paper.ruler()
    averages = table[["4K", "8K", "16K", "32K", "64K", "128K"]].mean(axis=1)
    assert ((averages - table["average"]).abs() < 0.02).all()
    assert paper.longbench().loc[("Qwen3-8B", "Stem"), "budget"] == 25

"""The command: one part with its options, or all parts with their defaults."""

import pytest

from stem.experiments.long_context import __main__


@pytest.fixture
def ran(monkeypatch):
    found = []
    for name, part in __main__.PARTS.items():
        monkeypatch.setattr(part, "main", lambda options, name=name: found.append((name, options)))
    return found


def test_without_a_part_all_run_with_their_defaults(ran):
    __main__.main(["--profile", "full"])
    assert (
        [name for name, _ in ran]
        == list(__main__.PARTS)
        == ["answers", "loss", "logits", "selection_cost", "choice", "matched", "tuning", "extension"]
    )
    assert {options.profile for _, options in ran} == {"full"}
    assert ran[0][1].methods is None and ran[7][1].evaluate_only is False
    assert [options.seed for name, options in ran if name in ("answers", "choice")] == [0, 2000]


@pytest.mark.parametrize("words", [["--profile", "full", "loss"], ["loss", "--profile", "full"]])
def test_the_profile_stands_before_or_behind_the_part(ran, words):
    __main__.main([*words, "--block-sizes", "64"])
    ((name, options),) = ran
    assert (name, options.profile, options.block_sizes) == ("loss", "full", [64])


def test_help_names_every_part(capsys):
    with pytest.raises(SystemExit):
        __main__.main(["--help"])
    told = capsys.readouterr().out
    assert all(f"\n    {name} " in told for name in __main__.PARTS)

"""stem.experiments.correctness.report: the table from made-up rows."""

from stem.experiments import records
from stem.experiments.correctness import report


def test_correctness(made_up_machine):
    rows = [
        dict(
            claim="equals dense",
            case=str(case),
            impl=impl,
            error=case / 4,
            tolerance=1.0,
            roundings=3,
            most_roundings=4,
            passed=True,
            seed=0,
        )
        for case in (1, 2)
        for impl in ("torch", "triton")
    ]
    records.write_rows("correctness", rows, profile="full")
    assert "| equals dense | torch, triton | 4 | 100% | 0.50 | 0.75 |" in report.correctness()

"""The paper's claims beside this repository's values, computed from committed rows."""

from stem import StemConfig, block_budget
from stem.experiments.headline import WRITES, fastest_row, product_told
from stem.experiments.long_context import verdicts
from stem.experiments.markdown import full_rows, markdown_table
from stem.experiments.theory import paper

UNTESTED = "not testable here yet"
HEADER = ("the paper's claim", "paper", "ours", "verdict")
IMPORTANT = (1, 6, 7, 8, 9, 10, 11, 13)  # places in `claims` of the README's eight lines
_TRAINED = ("not tested", "not testable here: its models have 8B parameters and more")


def scoreboard() -> str:
    """The eight most important claims of the paper: its value, ours from committed rows, and a verdict."""
    return markdown_table(HEADER, [line for number, line in enumerate(claims()) if number in IMPORTANT])


def all_claims() -> str:
    """Every claim of the paper that this repository tests, in the order of the paper."""
    return markdown_table(HEADER, claims())


def claims() -> list[tuple[str, str, str, str]]:
    """Lines (claim, the paper's value, ours, verdict) in the order of the paper.

    A verdict is "reproduced", "partly", "not reproduced" or "not testable here", followed by "yet" without rows.
    """
    logits = paper.TABLE_1["output-aware"]["logits"] / paper.TABLE_1["score-aware"]["logits"] - 1
    scores = {"LongBench": paper.longbench().average, "RULER": paper.ruler().average}
    stem, dense = ("Qwen3-8B", "Stem"), ("Qwen3-8B", "Dense")
    accuracy = "; ".join(f"{name} {average[dense]} → {average[stem]}" for name, average in scores.items())
    uniform, decay, both = "uniform", "+ position decay", "+ output-aware metric"
    lines = [
        ("Eq. 1: early values enter every later output", "no number", _claim("Eq. 1")),
        ("Eq. 2 and 4: block pairs of a constant and a decaying budget (256 blocks)", "formulas", _cost()),
        ("Eq. 5 and 9: bound of the error of a dropped block", "a proof", _claim("Eq. 5")),
        (
            "Eq. 6 and 7: values matter beside routing",
            "best weight 0.2",
            tuple(verdicts.value_size() or _claim("Eq. 6")),
        ),
        ("Eq. 8: operations, dense over Stem", "a formula", _claim("Eq. 8")),
        ("Algorithm 1: no output depends on a later block", "by construction", _causal()),
        ("Table 1: the value term lowers the error of the logits at equal cost", f"{logits:+.1%}", _value(logits)),
        ("Fig. 3: pruning early query rows hurts the logits most", "a plot", _found(verdicts.pruning(), "loss")),
        ("Table 5: position decay helps at equal cost", _points(uniform, decay), _step("decay")),
        ("Table 5: the value term helps at equal cost", _points(decay, both), _step("value")),
        (
            "Table 5: decay and value term together beat uniform top-k at equal cost",
            _points(uniform, both),
            _step("both"),
        ),
        (
            f"Tables 2 and 4: accuracy stays near dense at a budget of {paper.ruler().budget[stem]} %",
            accuracy,
            _found(verdicts.near_dense(), "answers"),
        ),
        ("Table 3: Stem saves budget in models trained with sparse attention", "42.84 → 43.16", _TRAINED),
        (
            "Fig. 1: operator latency at 128K tokens against FlashAttention-2",
            f"{_paper_ratio():.1f}× (H20)",
            _latency(),
        ),
    ]
    return [(claim, said, *found) for claim, said, found in lines]


def _points(before: str, after: str) -> str:
    """The paper's gain of one step of Table 5, for both of its models."""
    return f"{', '.join(f'{of[after] - of[before]:+.2f}' for of in paper.TABLE_5.values())} points of LongBench"


def _paper_ratio() -> float:
    return paper.FIGURE_1["dense_ms"] / paper.FIGURE_1["stem_ms"]


def _untested(experiment: str, ours: str = "no rows yet", reason: str = "") -> tuple[str, str]:
    return ours, f"{UNTESTED}: {reason}{WRITES[experiment]}"


def _cost() -> tuple[str, str]:
    blocks, k_start, decay = 256, 64, 0.7
    config = StemConfig(k_start=k_start, decay=decay, sink_blocks=1, local_blocks=1)
    exact = [config.replace(decay=1.0), config, config.replace(decay_from="k_start")]
    by_decay = paper.decay_cost(blocks, k_start, decay)
    formulas = paper.uniform_cost(blocks, k_start), by_decay, by_decay
    off = [formula / int(block_budget(blocks, of).sum()) - 1 for formula, of in zip(formulas, exact, strict=True)]
    fits = [abs(error) < 0.01 for error in off]
    ours = f"{off[0]:+.1%} and {off[1]:+.1%} off the exact count; {off[2]:+.1%} if decay starts in row k_start"
    return ours, "reproduced" if all(fits[:2]) else "partly" if any(fits) else "not reproduced"


def _claim(name: str) -> tuple[str, str]:
    """Value and verdict of the last row of notebook 01's claims that begins with `name`."""
    rows = full_rows("theory/claims")
    rows = rows[rows.claim.str.startswith(name)] if len(rows) else rows
    if rows.empty:
        return _untested("theory")
    row = rows.iloc[-1]
    verdict = next(word for word in ("not reproduced", "partly", "reproduced") if row.verdict.startswith(word))
    return f"{row.ours} ({row.on})", verdict


def _found(found: verdicts.Verdict, experiment: str) -> tuple[str, str]:
    return tuple(found) if found else _untested(experiment)


def _value(change: float) -> tuple[str, str]:
    return _found(verdicts.value_term(change), "loss")


def _step(step: str) -> tuple[str, str]:
    return _found(verdicts.ablation(step), "loss")


def _causal() -> tuple[str, str]:
    """Largest change of an output by a later block, in every implementation that notebook 03 measured."""
    rows = full_rows("correctness", claim="no output before a block depends on it")
    if rows.empty:
        return _untested("correctness")
    impls = ", ".join(dict.fromkeys(rows.impl))
    ours = f"largest change {rows.error.max():g} in {impls}; the z-score of the public implementations breaks it"
    return ours, "reproduced" if rows.passed.all() else "not reproduced"


def _latency() -> tuple[str, str]:
    row = fastest_row("operator", "released")
    if row is None:
        return _untested("speed")
    ratio = row.speedup_vs_sdpa_flash
    verdict = "reproduced" if ratio >= _paper_ratio() else "partly" if ratio > 1 else "not reproduced"
    return f"{ratio:.1f}× = {product_told(ratio, row.density)}, density {row.density:.1%} ({row.device})", verdict

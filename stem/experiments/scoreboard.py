"""The paper's claims beside this repository's values, and the three headline numbers, computed from committed rows."""

import pandas as pd

from stem import StemConfig, block_budget
from stem.experiments.long_context import matched_report, verdicts
from stem.experiments.long_context.report import Difference
from stem.experiments.markdown import full_rows, markdown_table, number, tokens_label
from stem.experiments.speed.report import DENSE_LABELS, best_ratio
from stem.experiments.theory import paper

LONGEST = 2**17  # tokens of the headline numbers and of the paper's Figure 1
DENSE = ("sdpa_cudnn", "sdpa_flash")
UNTESTED = "not testable here yet"
HEADER = ("the paper's claim", "paper", "ours", "verdict")
IMPORTANT = (1, 6, 7, 8, 9, 10, 11, 13)  # places in `claims` of the README's eight lines
_TRAINED = ("not tested", "not testable here: its models have 8B parameters and more")
WRITES = {
    "theory": "`make theory PROFILE=full` writes the verdict",
    "correctness": "`make correctness PROFILE=full` writes its rows",
    "loss": "`make quality PROFILE=full MODEL=qwen2.5-coder-0.5b LENGTHS=16384` writes its rows",
    "answers": "`make evaluation PROFILE=full` writes its rows",
    "speed": "`make speed PROFILE=full` on a CUDA machine writes its rows",
}


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


def headline() -> str:
    """Three numbers, each with its baseline and density: operator, time to first token, quality at equal density.

    The operator's is at matched accuracy where a timed method is within its bounds, else at a density of 25 %.
    """
    operator, first = "block selection included", "whole model in the shape of Llama-3.1-8B with random weights"
    lines = [
        _matched() or _time("Operator", "operator", "default", operator, "speed"),
        _time("Time to first token", "ttft", "released", first, "training-whole-models-real-tensors"),
        _needles(),
    ]
    return "\n".join(f"- {line}" for line in lines)


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
    row = _fastest("operator", "released")
    if row is None:
        return _untested("speed")
    ratio = row.speedup_vs_sdpa_flash
    verdict = "reproduced" if ratio >= _paper_ratio() else "partly" if ratio > 1 else "not reproduced"
    return f"{ratio:.1f}× = {_factors(ratio, row.density)}, density {row.density:.1%} ({row.device})", verdict


def _matched() -> str:
    """Speed-up of the fastest method at a density chosen within the bounds over the fastest dense kernel."""
    found = matched_report.fastest()
    if found is None:
        return ""
    dense, row, point = found.dense, found.row, found.point
    name = DENSE_LABELS.get(dense.method, dense.method)
    times, ratio = f"{number(dense.operator_ms)} → {number(row.operator_ms)} ms", dense.operator_ms / row.operator_ms
    bounds = f"bounds {-matched_report.NATS} and {matched_report.LOSS}"
    met = "" if point.is_within else ", met where it was chosen and missed here"
    return (
        f"**Operator at matched accuracy: {ratio:.1f}× over {name} ({times})** at "
        f"{tokens_label(row.tokens)} tokens ({row.source} inputs) and density {row.density:.1%}, block selection "
        f"included, on one {row.device}: {_factors(ratio, row.density)}. Its accuracy, on {found.model} at "
        f"{tokens_label(found.length)} tokens and density {point.density:.1%}, which other samples chose"
        f"{_elsewhere(found)}: `{found.method}` loses {_lost(point.needles)} nats on needles and "
        f"{point.documents.mean:.4f} nats per token on documents ({bounds}{met}){_others(found)} "
        "([rows](results/README.md#speed-at-matched-accuracy))."
    )


def _elsewhere(found: matched_report.Fastest) -> str:
    """Lower densities that other models chose for the method, with its loss on needles there."""
    told = [
        f"{of.point.asked:.0%} on {of.model}, where it loses {_lost(of.point.needles)} nats on needles"
        for of in found.elsewhere
    ]
    return f" ({'; '.join(told)})" if told else ""


def _others(found: matched_report.Fastest) -> str:
    """Densities at which Stem, and the best of the other methods, are within the bounds where they are chosen."""
    chosen = matched_report.picked(found.model, found.length)
    chosen = {name: of for name, of in chosen.items() if not name.startswith("adaptive") and of.is_chosen is not None}
    best = min(
        (name for name, of in chosen.items() if of.is_chosen), key=lambda name: chosen[name].point.asked, default=""
    )
    names = dict.fromkeys(name for name in (best, "stem, last block dense", "stem") if name in chosen)
    told = [f"`{name}` {'' if chosen[name].is_chosen else 'none to '}{chosen[name].point.asked:.0%}" for name in names]
    return f"; densities chosen so for others: {'; '.join(told)}" if told else ""


def _factors(ratio: float, density: float) -> str:
    """A speed-up as the product of the block pairs that are not computed and the rest, the kernel and selection."""
    return f"{1 / density:.1f} (blocks not computed) × {ratio * density:.1f} (the kernel)"


def _time(name: str, operation: str, config: str, told: str, section: str) -> str:
    """A speed-up over the fastest dense back end, with both times, density and machine."""
    row = _fastest(operation, config)
    if row is None:
        return f"**{name}**: {WRITES['speed']}."
    ratio, dense = best_ratio(row)
    times = f"{number(ratio * row.latency_ms)} → {number(row.latency_ms)} ms"
    return (
        f"**{name}: {ratio:.1f}× over {DENSE_LABELS[dense]} ({times})** at {tokens_label(row.tokens)} tokens and "
        f"density {row.density:.1%}, {told}, on one {row.device} ([rows](results/README.md#{section}))."
    )


def _needles() -> str:
    """Losses of `adaptive` and published Stem against dense attention, on needles and documents, at one density."""
    names = {"adaptive": "`adaptive` loses", "stem": "published Stem"}
    names["stem, last block dense"] = "Stem with a dense last query block"
    found = {told: verdicts.against(method) for method, told in names.items()}
    found = {told: pair for told, pair in found.items() if len(pair) == 2}  # needles, documents
    if len(found) < 2:
        return f"**Quality at equal density**: {WRITES['answers']}."
    needles, documents = zip(*found.values(), strict=True)
    lost = ", ".join(f"{told} {_lost(of.difference)}" for told, of in zip(found, needles, strict=True))
    where = "; ".join(dict.fromkeys(f"{of.model} at {tokens_label(of.length)} tokens" for of in needles + documents))
    densities = ", ".join(f"{of.density:.1%}" for of in needles)
    on_documents = ", ".join(f"{of.difference.mean:.3f}" for of in documents)
    lead = verdicts.against("adaptive", "stem, last block dense") if len(found) == len(names) else []
    lead = lead[0].difference if lead else None
    told = "" if lead is None or lead.excludes_zero else ", an interval that holds zero"
    paired = "" if lead is None else f" `adaptive` minus the last, paired: {lead}{told}."
    return (
        f"**Quality: on needles {lost}** nats of log p(answer) against dense attention, means of "
        f"{needles[0].difference.count} samples, {where}, densities {densities}.{paired} On documents the losses are "
        f"{on_documents} nats per token ([rows](results/README.md#long-context-evaluation))."
    )


def _lost(difference: Difference) -> str:
    """Loss of a method against dense attention and its 95 % interval, from a difference that is negative for a loss."""
    return f"{-difference.mean:.2f} [{-difference.high:.2f}, {-difference.low:.2f}]"


def _fastest(operation: str, config: str) -> pd.Series | None:
    """The fastest implementation's row of one operation at `LONGEST` tokens on CUDA; None without one."""
    rows = full_rows("speed", operation=operation, config=config, tokens=LONGEST)
    if len(rows):
        rows = rows.dropna(subset="latency_ms").dropna(subset=[f"speedup_vs_{name}" for name in DENSE], how="all")
    return rows.sort_values("latency_ms").iloc[0] if len(rows) else None

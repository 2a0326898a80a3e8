"""The paper's claims beside this repository's values, and the three headline numbers, computed from committed rows."""

from __future__ import annotations

import pandas as pd

from stem import StemConfig, block_budget
from stem.experiments.markdown import full_rows, markdown_table, number, tokens_label
from stem.experiments.speed.report import DENSE_LABELS
from stem.experiments.theory import paper

LONGEST = 2**17  # tokens of the headline numbers and of the paper's Figure 1
DENSE = ("sdpa_cudnn", "sdpa_flash")
NEEDLE = "niah_single_2"  # RULER's task whose answers are generated
BLOCK_SIZE, ASKED = 64.0, 0.25  # of the rows that compare selections on a real model
UNTESTED = "not testable here yet"
WRITES_VERDICTS = "`make theory PROFILE=full` writes the verdict"
EFFECTS = {"Table 5: position decay": "+ position decay", "Table 5: output-aware metric": "+ output-aware metric"}


def _points(before: str, after: str) -> str:
    """The paper's gain of one step of Table 5, for both of its models."""
    return f"{', '.join(f'{of[after] - of[before]:+.2f}' for of in paper.TABLE_5.values())} points of LongBench"


_TABLE_1 = paper.TABLE_1["output-aware"]["logits"] / paper.TABLE_1["score-aware"]["logits"] - 1
CLAIMS = {  # claims of notebook 01, by the first words of their row in results/theory/claims/
    "Table 1": ("Table 1: the value term lowers the error of the logits at equal cost", f"{_TABLE_1:+.1%}"),
    "Fig. 3": ("Fig. 3: pruning early query rows hurts the logits most", "a plot"),
    "Table 5: position decay": (
        "Table 5: position decay helps at equal cost",
        _points("uniform", "+ position decay"),
    ),
    "Table 5: output-aware metric": (
        "Table 5: the value term helps at equal cost",
        _points("+ position decay", "+ output-aware metric"),
    ),
}


def scoreboard() -> str:
    """At most eight claims of the paper: its value, ours from committed rows, and a verdict.

    Verdicts: "reproduced", "partly", "not reproduced", "not testable here", and "not testable here yet" where the rows
    hold no verdict.
    """
    lines = [_cost(), *(_claim(name) for name in CLAIMS), _both_rules(), _accuracy(), _latency()]
    return markdown_table(["the paper's claim", "paper", "ours", "verdict"], lines)


def headline() -> str:
    """Three numbers, each with its baseline and density: operator, time to first token, quality at equal density."""
    return "\n".join(f"- {line}" for line in (_operator(), _first_token(), _needles()))


def _cost() -> list[str]:
    blocks, k_start, decay = 256, 64, 0.7
    config = StemConfig(k_start=k_start, decay=decay, sink_blocks=1, local_blocks=1)
    exact = [config.replace(decay=1.0), config, config.replace(decay_from="k_start")]
    by_decay = paper.decay_cost(blocks, k_start, decay)
    formulas = paper.uniform_cost(blocks, k_start), by_decay, by_decay
    off = [formula / int(block_budget(blocks, of).sum()) - 1 for formula, of in zip(formulas, exact, strict=True)]
    fits = [abs(error) < 0.01 for error in off]
    ours = f"{off[0]:+.1%} and {off[1]:+.1%} off the exact count; {off[2]:+.1%} if decay starts in row k_start"
    verdict = "reproduced" if all(fits[:2]) else "partly" if any(fits) else "not reproduced"
    return ["Eq. 2 and 4: block pairs of a constant and a decaying budget (256 blocks)", "formulas", ours, verdict]


def _claim(name: str) -> list[str]:
    """A claim of notebook 01: its verdict where the rows hold one, else the values that they hold."""
    claim, said = CLAIMS[name]
    rows = full_rows("theory/claims")
    rows = rows[rows.claim.str.startswith(name)] if len(rows) else rows
    if len(rows):
        row = rows.iloc[-1]
        word = next(word for word in ("not reproduced", "partly", "reproduced") if row.verdict.startswith(word))
        return [claim, said, f"{row.ours} ({row.on})", word]
    ours, reason = "no rows yet", WRITES_VERDICTS
    gaps = full_rows("theory/ablation")
    if name in EFFECTS and len(gaps):
        steps = ["uniform", *EFFECTS.values()]
        gap = gaps.drop_duplicates("method", keep="last").set_index("method").gap[steps]
        step = steps.index(EFFECTS[name])
        ours = f"loss above dense {gap.iloc[step - 1]:.3f} → {gap.iloc[step]:.3f} nats (SmolLM2-135M)"
        reason = f"these rows hold no interval; {WRITES_VERDICTS}"
    return [claim, said, ours, f"{UNTESTED}: {reason}"]


def _both_rules() -> list[str]:
    claim = "Table 5: decay and value term together beat uniform top-k at equal cost"
    said = _points("uniform", "+ output-aware metric")
    rows = full_rows("long_context/loss")
    rows = rows[(rows.asked == ASKED) & (rows.block_size == 128)] if len(rows) else rows
    gaps = rows.pivot_table(index="text", columns="method", values="gap") if len(rows) else rows
    if not {"stem", "uniform_topk"} <= set(gaps):
        return [claim, said, "no rows yet", f"{UNTESTED}: `make quality PROFILE=full` writes its rows"]
    change = gaps["stem"] - gaps["uniform_topk"]
    mean, noise = change.mean(), 2 * change.sem()
    verdict = "reproduced" if mean < -noise else "not reproduced"
    ours = f"loss above dense {gaps.uniform_topk.mean():.3f} → {gaps['stem'].mean():.3f} nats, difference "
    ours += f"{mean:+.3f} ± {noise:.3f} over {len(change)} texts (SmolLM2-135M, density {ASKED:.0%})"
    return [claim, said, ours, verdict]


def _accuracy() -> list[str]:
    stem = ("Qwen3-8B", "Stem")
    budget, scores = paper.ruler().budget[stem], (paper.longbench().average[stem], paper.ruler().average[stem])
    dense = (frame.average["Qwen3-8B", "Dense"] for frame in (paper.longbench(), paper.ruler()))
    claim = f"Tables 2 and 4: accuracy stays near dense at a budget of {budget} %"
    said = "; ".join(
        f"{name} {before} → {after}" for name, before, after in zip(("LongBench", "RULER"), dense, scores, strict=True)
    )
    found = _answers("stem")
    if found.empty:
        return [claim, said, "no rows yet", f"{UNTESTED}: `make evaluation PROFILE=full` writes its rows"]
    row = found.iloc[-1]
    ours = f"SmolLM2-135M, {NEEDLE} at {tokens_label(row.length)}: {row.dense:.0%} → {row.value:.0%} right, "
    ours += f"difference {_interval(row)}, density {row.density:.0%}"
    return [claim, said, ours, "not testable here: the paper's model has 8B parameters"]


def _latency() -> list[str]:
    paper_ratio = paper.FIGURE_1["dense_ms"] / paper.FIGURE_1["stem_ms"]
    claim = "Fig. 1: operator latency at 128K tokens against FlashAttention-2"
    said = f"{paper_ratio:.1f}× (H20)"
    row = _fastest("operator", "released")
    if row is None:
        return [claim, said, "no rows yet", f"{UNTESTED}: `make speed PROFILE=full` on a CUDA machine writes its rows"]
    ratio = row.speedup_vs_sdpa_flash
    verdict = "reproduced" if ratio >= paper_ratio else "partly" if ratio > 1 else "not reproduced"
    return [claim, said, f"{ratio:.1f}×, density {row.density:.1%} ({row.device})", verdict]


def _operator() -> str:
    row = _fastest("operator", "default")
    if row is None:
        return "**Operator**: `make speed PROFILE=full` on a CUDA machine writes this number."
    return (
        f"**Operator: {_ratio(row)}** at {tokens_label(row.tokens)} tokens and density {row.density:.1%}, block "
        f"selection included, on one {row.device} ([rows](results/README.md#speed))."
    )


def _first_token() -> str:
    row = _fastest("ttft", "released")
    if row is None:
        return "**Time to first token**: `make speed PROFILE=full` on a CUDA machine writes this number."
    return (
        f"**Time to first token: {_ratio(row)}** at {tokens_label(row.tokens)} tokens and density {row.density:.1%}, "
        f"whole model in the shape of Llama-3.1-8B with random weights, on one {row.device} "
        "([rows](results/README.md#training-whole-models-real-tensors))."
    )


def _needles() -> str:
    adaptive, published = _answers("stem adaptive"), _answers("stem")
    if adaptive.empty or published.empty:
        return "**Quality at equal density**: `make evaluation PROFILE=full` writes this number."
    row, other = adaptive.iloc[-1], published.iloc[-1]
    shorter = "".join(
        f" With `dense_up_to=0`, `adaptive` answers {each.value:.0%} at {tokens_label(each.length)} tokens, "
        f"dense attention {each.dense:.0%}."
        for each in adaptive.iloc[:-1].itertuples()
    )
    return (
        f"**Quality: `adaptive` answers {row.value:.0%} of {NEEDLE} right** at {tokens_label(row.length)} tokens and "
        f"density {row.density:.0%}, dense attention {row.dense:.0%} (difference {_interval(row)}), published Stem "
        f"{other.value:.0%} at density {other.density:.0%}; SmolLM2-135M "
        f"([rows](results/README.md#long-context-evaluation)).{shorter}"
    )


def _fastest(operation: str, config: str) -> pd.Series | None:
    """The fastest implementation's row of one operation at `LONGEST` tokens on CUDA; None without one."""
    rows = full_rows("speed")
    if rows.empty:
        return None
    rows = rows[(rows.operation == operation) & (rows.config == config) & (rows.tokens == LONGEST)]
    rows = rows.dropna(subset=["latency_ms", *(f"speedup_vs_{name}" for name in DENSE)])
    return rows.sort_values("latency_ms").iloc[0] if len(rows) else None


def _ratio(row: pd.Series) -> str:
    """The speed-up over the faster dense back end, with both times: "5.0× over cuDNN (253 → 50.3 ms)"."""
    ratio, name = min((row[f"speedup_vs_{name}"], name) for name in DENSE)
    return f"{ratio:.1f}× over {DENSE_LABELS[name]} ({number(ratio * row.latency_ms)} → {number(row.latency_ms)} ms)"


def _answers(method: str) -> pd.DataFrame:
    """Rows of SmolLM2's generated answers to `NEEDLE` with one method, the longest prompts last."""
    rows = full_rows("long_context/answers")
    if rows.empty:
        return rows
    rows = rows[(rows.measure == "generated") & (rows.method == method) & (rows.task == NEEDLE)]
    rows = rows[(rows.asked == ASKED) & (rows.block_size == BLOCK_SIZE) & rows.model.str.startswith("smollm2")]
    return rows.sort_values("length")


def _interval(row: pd.Series) -> str:
    low, mean, high = (f"{100 * value:+.0f}" for value in (row.low, row.difference, row.high))
    return f"{mean} points, 95 % interval {low} to {high}, n = {row['count']:.0f}"

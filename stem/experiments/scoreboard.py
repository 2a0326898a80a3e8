"""The paper's claims beside this repository's values, and the three headline numbers, computed from committed rows."""

import pandas as pd

from stem import StemConfig, block_budget
from stem.experiments.markdown import full_rows, markdown_table, number, tokens_label
from stem.experiments.speed.report import DENSE_LABELS, best_ratio
from stem.experiments.theory import paper

LONGEST = 2**17  # tokens of the headline numbers and of the paper's Figure 1
DENSE = ("sdpa_cudnn", "sdpa_flash")
NEEDLE = "niah_single_2"  # RULER's task whose answers are generated
ASKED = 0.25  # density of the rows that compare selections on a real model
UNTESTED = "not testable here yet"
WRITES = {
    "theory": "`make theory PROFILE=full` writes the verdict",
    "loss": "`make quality PROFILE=full` writes its rows",
    "answers": "`make evaluation PROFILE=full` writes its rows",
    "speed": "`make speed PROFILE=full` on a CUDA machine writes its rows",
}


def scoreboard() -> str:
    """At most eight claims of the paper: its value, ours from committed rows, and a verdict.

    A verdict is "reproduced", "partly", "not reproduced" or "not testable here", followed by "yet" without rows.
    """
    logits = paper.TABLE_1["output-aware"]["logits"] / paper.TABLE_1["score-aware"]["logits"] - 1
    scores = {"LongBench": paper.longbench().average, "RULER": paper.ruler().average}
    stem, dense = ("Qwen3-8B", "Stem"), ("Qwen3-8B", "Dense")
    accuracy = "; ".join(f"{name} {average[dense]} → {average[stem]}" for name, average in scores.items())
    uniform, decay, both = "uniform", "+ position decay", "+ output-aware metric"
    lines = [
        ("Eq. 2 and 4: block pairs of a constant and a decaying budget (256 blocks)", "formulas", _cost()),
        ("Table 1: the value term lowers the error of the logits at equal cost", f"{logits:+.1%}", _claim("Table 1")),
        ("Fig. 3: pruning early query rows hurts the logits most", "a plot", _claim("Fig. 3")),
        ("Table 5: position decay helps at equal cost", _points(uniform, decay), _step(uniform, decay)),
        ("Table 5: the value term helps at equal cost", _points(decay, both), _step(decay, both)),
        ("Table 5: decay and value term together beat uniform top-k at equal cost", _points(uniform, both), _both()),
        (f"Tables 2 and 4: accuracy stays near dense at a budget of {paper.ruler().budget[stem]} %", accuracy, _near()),
        (
            "Fig. 1: operator latency at 128K tokens against FlashAttention-2",
            f"{_paper_ratio():.1f}× (H20)",
            _latency(),
        ),
    ]
    header = ["the paper's claim", "paper", "ours", "verdict"]
    return markdown_table(header, [(claim, said, *found) for claim, said, found in lines])


def headline() -> str:
    """Three numbers, each with its baseline and density: operator, time to first token, quality at equal density."""
    operator, first = "block selection included", "whole model in the shape of Llama-3.1-8B with random weights"
    lines = [
        _time("Operator", "operator", "default", operator, "speed"),
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


def _step(before: str, after: str) -> tuple[str, str]:
    """A step of Table 5: notebook 01's claim where the rows hold one, else the losses that they hold."""
    found, gaps = _claim(f"Table 5: {after.removeprefix('+ ')}"), full_rows("theory/ablation")
    if found != _untested("theory") or gaps.empty:
        return found
    gap = gaps.drop_duplicates("method", keep="last").set_index("method").gap
    ours = f"loss above dense {gap[before]:.3f} → {gap[after]:.3f} nats (SmolLM2-135M)"
    return _untested("theory", ours, "these rows hold no interval; ")


def _both() -> tuple[str, str]:
    rows = full_rows("long_context/loss", asked=ASKED, block_size=128)
    gaps = rows.pivot_table(index="text", columns="method", values="gap") if len(rows) else rows
    if not {"stem", "uniform_topk"} <= set(gaps):
        return _untested("loss")
    change = gaps["stem"] - gaps["uniform_topk"]
    mean, noise = change.mean(), 2 * change.sem()
    ours = f"loss above dense {gaps.uniform_topk.mean():.3f} → {gaps['stem'].mean():.3f} nats, difference "
    ours += f"{mean:+.3f} ± {noise:.3f} over {len(change)} texts (SmolLM2-135M, density {ASKED:.0%})"
    return ours, "reproduced" if mean < -noise else "not reproduced"


def _near() -> tuple[str, str]:
    found = _answers("stem")
    if found.empty:
        return _untested("answers")
    row = found.iloc[-1]
    ours = f"SmolLM2-135M, {NEEDLE} at {tokens_label(row.length)}: {row.dense:.0%} → {row.value:.0%} right, "
    ours += f"difference {_interval(row)}, density {row.density:.0%}"
    return ours, "not testable here: the paper's model has 8B parameters"


def _latency() -> tuple[str, str]:
    row = _fastest("operator", "released")
    if row is None:
        return _untested("speed")
    ratio = row.speedup_vs_sdpa_flash
    verdict = "reproduced" if ratio >= _paper_ratio() else "partly" if ratio > 1 else "not reproduced"
    return f"{ratio:.1f}×, density {row.density:.1%} ({row.device})", verdict


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
    adaptive, published = _answers("stem adaptive"), _answers("stem")
    if adaptive.empty or published.empty:
        return f"**Quality at equal density**: {WRITES['answers']}."
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
    rows = full_rows("speed", operation=operation, config=config, tokens=LONGEST)
    if len(rows):
        rows = rows.dropna(subset=["latency_ms", *(f"speedup_vs_{name}" for name in DENSE)])
    return rows.sort_values("latency_ms").iloc[0] if len(rows) else None


def _answers(method: str) -> pd.DataFrame:
    """Rows of SmolLM2's generated answers to `NEEDLE` with one method and blocks of 64, the longest prompts last."""
    same = dict(measure="generated", method=method, task=NEEDLE, asked=ASKED, block_size=64)
    rows = full_rows("long_context/answers", **same)
    return rows[rows.model.str.startswith("smollm2")].sort_values("length") if len(rows) else rows


def _interval(row: pd.Series) -> str:
    low, mean, high = (f"{100 * value:+.0f}" for value in (row.low, row.difference, row.high))
    return f"{mean} points, 95 % interval {low} to {high}, n = {row['count']:.0f}"

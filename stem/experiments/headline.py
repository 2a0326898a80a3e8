"""The three headline numbers, and two sentences beside them, computed from committed rows."""

import pandas as pd

from stem.experiments.long_context import matched_report, verdicts
from stem.experiments.long_context.matched_report import Chosen, Speed
from stem.experiments.long_context.report import Difference
from stem.experiments.markdown import full_rows, number, tokens_label
from stem.experiments.speed.report import DENSE_LABELS, best_ratio, factors

LONGEST = 2**17  # tokens of the operator's number and of the paper's Figure 1
MATCHED = "([rows](results/README.md#speed-at-matched-accuracy))"
WRITES = {
    "theory": "`make theory PROFILE=full` writes the verdict",
    "correctness": "`make correctness PROFILE=full` writes its rows",
    "loss": "`make quality PROFILE=full MODEL=qwen2.5-coder-0.5b LENGTHS=16384` writes its rows",
    "answers": "`make evaluation PROFILE=full` writes its rows",
    "speed": "`make speed PROFILE=full` on a CUDA machine writes its rows",
}


def headline() -> str:
    """Three numbers of the table of speed at matched accuracy, then time to first token and quality at equal density.

    Without a method that is within the bounds, the first number is the operator's at a density of 25 %.
    """
    first = "whole model in the shape of Llama-3.1-8B with random weights"
    lines = [
        *(_matched() or [_time("Operator", "operator", "default", "block selection included", "speed")]),
        _time("Time to first token", "ttft", "released", first, "training-whole-models-real-tensors"),
        _needles(),
    ]
    return "\n".join(f"- {line}" for line in lines)


def _matched() -> list[str]:
    """Speed-up on random inputs, speed-ups on q, k and v of real models, and the densities at which they hold."""
    found = matched_report.fastest()
    if found is None:
        return []
    method, chosen = found
    wide, device = chosen[0].wide, chosen[0].wide.row.device
    first = (
        f"**Operator at matched accuracy, {tokens_label(wide.row.tokens)} tokens: {_over(wide)}**, `{method}` at "
        f"density {wide.row.density:.1%} with its block selection, on {wide.row.source} inputs in the shape of "
        f"Llama-3.1-8B and one {device}: {_factors(wide)} {MATCHED}."
    )
    own = [(of, of.captured) for of in chosen if of.captured]
    told = "; ".join(f"{_over(at)} on {of.model} at density {at.row.density:.1%}: {_factors(at)}" for of, at in own)
    second = f"**On q, k and v of real models, {_lengths(own)} tokens**, mean of all layers: {told} {MATCHED}."
    return [first, *([second] if own else []), _densities(method, chosen)]


def _densities(method: str, chosen: list[Chosen]) -> str:
    """Lowest densities within the bounds on each model, of the method, of the best other one, and of Stem."""
    models, lengths = ", ".join(of.model for of in chosen), _lengths([(of, None) for of in chosen])
    own = ", ".join(f"{of.point.asked:.0%}" for of in chosen)
    told = [
        f"`{name}` {', '.join(densities)}{' (and within them on the reported samples)' if holds else ''}"
        for name, (densities, holds) in _others(chosen).items()
    ]
    lost = [
        f"{_lost(of.point.needles, 3)} nats on needles and {_lost(of.point.documents, 4)} nats per token on documents"
        + ("" if of.point.is_within else ", outside them here")
        for of in chosen
    ]
    return (
        f"**Lowest density within the bounds** (needles lose at most {-matched_report.NATS} nats, documents "
        f"{matched_report.LOSS} nats per token; {lengths} tokens; {models}): **`{method}` {own}**"
        f"{''.join(f'; {each}' for each in told)}. Other samples chose these densities. On the reported samples "
        f"`{method}` loses {', and '.join(lost)} {MATCHED}."
    )


def _others(chosen: list[Chosen]) -> dict[str, tuple[list[str], bool]]:
    """The best other method where densities are chosen, Stem with a dense last block, and Stem.

    For each: its densities by model, and whether it is within the bounds on the reported samples of all models.
    """
    picked = [matched_report.picked(of.model, of.length) for of in chosen]
    names = [name for name in picked[0] if not name.startswith("adaptive") and all(name in of for of in picked)]
    names = [name for name in names if all(of[name].is_chosen is not None for of in picked)]
    best = min(
        (name for name in names if all(of[name].is_chosen for of in picked)),
        key=lambda name: sum(of[name].point.asked for of in picked),
        default="",
    )
    return {
        name: (
            [f"{'' if of[name].is_chosen else 'none to '}{of[name].point.asked:.0%}" for of in picked],
            all(of[name].is_chosen and of[name].point.is_within for of in picked),
        )
        for name in dict.fromkeys((best, "stem, last block dense", "stem"))
        if name in names
    }


def _lengths(pairs: list[tuple[Chosen, Speed | None]]) -> str:
    return " and ".join(dict.fromkeys(tokens_label(at.row.tokens if at else of.length) for of, at in pairs))


def _over(speed: Speed) -> str:
    ends = "" if speed.low != speed.low else f" [{speed.low:.2f}, {speed.high:.2f}]"
    times = f"{number(speed.dense_ms)} → {number(speed.row.operator_ms)} ms"
    return f"{speed.ratio:.1f}×{ends} over {speed.dense} ({times})"


def _factors(speed: Speed) -> str:
    return product_told(speed.ratio, speed.row.density)


def product_told(ratio: float, density: float) -> str:
    """A speed-up as the product of the block pairs that are not computed and the rest, the kernel and selection."""
    return f"{1 / density:.1f} (blocks not computed) × {ratio * density:.2f} (the kernel)"


def _time(name: str, operation: str, config: str, told: str, section: str) -> str:
    """A speed-up over the fastest dense back end, with both times, density, factors and machine."""
    row = fastest_row(operation, config)
    if row is None:
        return f"**{name}**: {WRITES['speed']}."
    ratio, dense = best_ratio(row)
    times = f"{number(ratio * row.latency_ms)} → {number(row.latency_ms)} ms"
    return (
        f"**{name}: {ratio:.1f}× over {DENSE_LABELS[dense]} ({times})** at {tokens_label(row.tokens)} tokens and "
        f"density {row.density:.1%}, {told}, on one {row.device}{_split(row, ratio * row.latency_ms)} "
        f"([rows](results/README.md#{section}))."
    )


def _split(row: pd.Series, dense_ms: float) -> str:
    """Factors of a row's speed-up; of a whole model with the share of attention, and "" where it is not known."""
    found = factors(dense_ms, row)
    if found is None:
        return ""
    share, pairs, rate = found
    told = product_told(pairs * rate, row.density)
    return f": {told}" if share == 1 else f". Attention takes {share:.0%} of the dense time; its own speed-up is {told}"


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


def _lost(difference: Difference, digits: int = 2) -> str:
    """Loss of a method against dense attention and its 95 % interval: of answers, or of documents where digits is 4."""
    sign = 1 if digits == 4 else -1  # a loss of documents is a higher one, of answers a lower log-likelihood
    ends = sorted((sign * difference.low, sign * difference.high))
    return f"{sign * difference.mean:.{digits}f} [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]"


def fastest_row(operation: str, config: str) -> pd.Series | None:
    """The fastest implementation's row of one operation at `LONGEST` tokens on CUDA; None without one."""
    rows = full_rows("speed", operation=operation, config=config, tokens=LONGEST)
    if len(rows):
        rows = rows[[best_ratio(row)[0] > 0 for row in rows.to_dict("records")]]
    return rows.sort_values("latency_ms").iloc[0] if len(rows) else None

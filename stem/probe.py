"""What a trained model can do, as rows: its curve, its loss by position, its answers by distance.

A row is one number: `value` is the mean of `count` measurements whose `place` (step, position or distance) lies in
start..stop - 1, for one attention in training and one in inference. Evaluation reads the validation split.
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F

from stem.model import LanguageModel
from stem.tasks import IGNORED, make_batch
from stem.train import TrainConfig

CURVES = ("loss_text", "loss_recall", "grad_norm", "tokens_per_second")


@torch.no_grad()
def read(
    model: LanguageModel, task: str, seq_len: int, num_rows: int, *, seed: int = 0, bf16: bool = False
) -> pd.DataFrame:
    """Let a model read validation rows of a task, with the attention that it has now.

    Args:
        model: In eval mode.
        task: Name from stem.tasks.TASKS.
        seq_len: Tokens in a row; may exceed the training length.
        num_rows: Rows, read one at a time.
        seed: Of the rows.
        bf16: Autocast matrix products to bfloat16, as in training.
    Returns:
        One line for each target: position and distance [tokens], loss [nats], correct (True or False).
    """
    device = next(model.parameters()).device
    lines = []
    for index in range(num_rows):
        batch = make_batch([task], [index], seq_len, seed=seed, split="validation")
        asked = batch.targets[0] != IGNORED
        targets = batch.targets[0, asked]
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = model(batch.inputs.to(device))[0].float().cpu()[asked]  # [M, vocab]
        values = {"position": asked.nonzero()[:, 0], "distance": batch.distance[0, asked]}
        values |= {"loss": F.cross_entropy(logits, targets, reduction="none"), "correct": logits.argmax(-1) == targets}
        lines.append(pd.DataFrame({name: value.numpy() for name, value in values.items()}))
    return pd.concat(lines, ignore_index=True)


def binned(frame: pd.DataFrame, value: str, place: str, edges: Sequence[int]) -> list[dict]:
    """Mean of a column over half-open bins of another.

    Args:
        frame: The measurements.
        value, place: Columns of it: what to average, and the whole numbers that are binned.
        edges: Ascending bin edges, at least two; a bin without measurements is left out.
    Returns:
        Dicts with measure (= value), place, start, stop, value, count.
    """
    rows = []
    for start, stop in zip(edges, edges[1:], strict=False):
        inside = frame.loc[frame[place].between(start, stop - 1), value].astype(float)
        if len(inside):
            mean = inside.mean()
            rows.append(dict(measure=value, place=place, start=start, stop=stop, value=mean, count=len(inside)))
    return rows


def curve_rows(config: TrainConfig, num_bins: int = 30) -> list[dict]:
    """A finished run's log as rows: means over `num_bins` bins of steps of those `CURVES` that it holds."""
    log = pd.read_csv(Path(config.out) / "log.csv")
    edges = sorted({1 + round(config.steps * i / num_bins) for i in range(num_bins + 1)})
    rows = [row for name in CURVES if name in log for row in binned(log, name, "step", edges)]
    about = dict(trained=config.attention, inferred=config.attention, seed=config.seed, seq_len=config.seq_len)
    return [about | dict(task=config.tasks) | row for row in rows]


def evaluation_rows(
    model: LanguageModel, config: TrainConfig, inferred: str, seq_lens: Sequence[int], num_rows: int
) -> list[dict]:
    """Loss by position on text, and correct answers by distance on recall, with another attention if asked.

    Args:
        model: Trained by `config`; left with the attention it came with.
        config: Its training settings, for the columns and the seed.
        inferred: "dense" or one of stem.patterns.names().
        seq_lens: Lengths to read, inside and beyond the training length.
        num_rows: Rows of each task at the longest length; shorter ones get as many tokens.
    Returns:
        Rows; measure is "loss" (place "position", 8 equal bins) or "correct" (place "distance", doubling bins).
    """
    own, model.attention = model.attention, inferred
    rows = []
    for seq_len in seq_lens:
        about = dict(trained=config.attention, inferred=inferred, seed=config.seed, seq_len=seq_len)
        count = num_rows * max(seq_lens) // seq_len
        text, recall = (
            read(model, task, seq_len, count, seed=config.seed, bf16=config.bf16) for task in ("text", "recall")
        )
        eighths = [seq_len * i // 8 for i in range(9)]
        doublings = [1] + [2**i for i in range(4, seq_len.bit_length())] + [seq_len]
        rows += [about | dict(task="text") | row for row in binned(text, "loss", "position", eighths)]
        rows += [about | dict(task="recall") | row for row in binned(recall, "correct", "distance", doublings)]
    model.attention = own
    return rows


def mean_value(rows: pd.DataFrame) -> float:
    """Mean over all measurements behind the rows: their values weighted by their counts."""
    return float((rows["value"] * rows["count"]).sum() / rows["count"].sum())

"""Measure a trained model: rows of its training curve, its loss by position and its right answers by distance.

A row holds one number. Its `value` is the mean of `count` measurements whose `place` (step, position or distance) lies
in start..stop - 1. Evaluation reads the validation split.
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F

from stem.experiments.training.checkpoints import LOG
from stem.experiments.training.config import TrainConfig
from stem.experiments.training.model import LanguageModel
from stem.experiments.training.tasks import IGNORED, make_batch

SPIKE = 4.0  # a gradient norm this many times the median of the 25 steps before it counts as a spike


@torch.no_grad()
def read(
    model: LanguageModel, task: str, seq_len: int, num_rows: int, *, seed: int = 0, bf16: bool = False
) -> pd.DataFrame:
    """Measure a model on validation rows of a task, with the attention that it has now.

    Args:
        model: In eval mode.
        task, seq_len, seed: See make_batch; `seq_len` may exceed the training length.
    Returns:
        DataFrame with a line for each target: position and distance [tokens], loss [nats], correct (bool).
    """
    device = next(model.parameters()).device
    lines = []
    for index in range(num_rows):
        batch = make_batch([task], [index], seq_len, seed=seed, split="validation").to(device)
        asked = batch.targets[0] != IGNORED
        targets = batch.targets[0, asked]
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = model(batch.inputs)[0, asked].float()  # [M, vocab]
        values = {"position": asked.nonzero()[:, 0], "distance": batch.distance[0, asked]}
        values |= {"loss": F.cross_entropy(logits, targets, reduction="none"), "correct": logits.argmax(-1) == targets}
        lines.append(pd.DataFrame({name: value.cpu().numpy() for name, value in values.items()}))
    return pd.concat(lines, ignore_index=True)


def binned(frame: pd.DataFrame, value: str, place: str, edges: Sequence[int]) -> list[dict]:
    """Means of column `value` over half-open bins of the integers in column `place`; empty bins are left out.

    Returns:
        Dicts with measure (= value), place, start, stop, value, count.
    """
    bins = pd.cut(frame[place], edges, right=False)
    return [
        dict(measure=value, place=place, start=bin.left, stop=bin.right, value=inside.mean(), count=len(inside))
        for bin, inside in frame[value].astype(float).groupby(bins, observed=True)
    ]


def curve_rows(config: TrainConfig, num_bins: int = 30) -> list[dict]:
    """Rows of a finished run's log: means over `num_bins` bins of steps of the losses by task and of the gradient norm.

    Row "spikes" counts the steps whose gradient norm is more than `SPIKE` times the median of the 25 steps before it.
    Row "largest_spike" is the largest such ratio.
    """
    log = pd.read_csv(Path(config.out) / LOG)
    edges = sorted({1 + round(config.steps * i / num_bins) for i in range(num_bins + 1)})
    rows = []
    for name in log.columns[log.columns.str.startswith(("loss_", "grad_norm"))]:
        rows += binned(log.dropna(subset=name), name, "step", edges)
    ratio = log.grad_norm / log.grad_norm.shift().rolling(25, min_periods=5).median()
    whole = dict(place="step", start=1, stop=config.steps + 1, count=config.steps)
    rows.append(dict(measure="spikes", value=int((ratio > SPIKE).sum())) | whole)
    rows.append(dict(measure="largest_spike", value=ratio.max()) | whole)
    return [dict(seq_len=config.seq_len, task=config.tasks) | row for row in rows]


def evaluation_rows(model: LanguageModel, config: TrainConfig, seq_lens: Sequence[int], num_rows: int) -> list[dict]:
    """Loss by position on text and right answers by distance on other tasks, with the attention that a model has now.

    Args:
        model, config: In eval mode, and its training run, for the tasks, the seed of the rows and `bf16`.
        num_rows: Rows of each task at the longest length; shorter lengths get more rows, of as many tokens in all.
    Returns:
        Rows; measure is "loss" (place "position", 8 equal bins) or "correct" (place "distance", doubling bins).
    """
    rows = []
    for seq_len in seq_lens:
        eighths = [seq_len * i // 8 for i in range(9)]
        doublings = [1] + [2**i for i in range(4, seq_len.bit_length()) if 2**i < seq_len] + [seq_len]
        for task in config.tasks.split(","):
            count = num_rows * max(seq_lens) // seq_len
            lines = read(model, task, seq_len, count, seed=config.seed, bf16=config.bf16)
            what = ("loss", "position", eighths) if task == "text" else ("correct", "distance", doublings)
            rows += [dict(seq_len=seq_len, task=task) | row for row in binned(lines, *what)]
    return rows

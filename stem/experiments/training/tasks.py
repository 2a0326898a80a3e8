"""Endless training data with known answers: real text and associative recall, in one vocabulary of 256 ids.

Row r of a stream depends on (seed, split, r) alone. Any process can therefore make any row, a run resumes from a step
number, and processes that share a batch see exactly the rows of one process. Ids below 128 are ASCII text. Recall uses
the ids from 128 on, which such text never contains.

- text: windows of the standard library's source; every next byte is a target.
- recall: multi-query associative recall. A record is one token that names a key and its value. A question is one token
  that names a key. The answer is a target and never an input, so that it can be read from the record only.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stem.experiments.documents import LONG_MODULES, stdlib_documents
from stem.validation import check_choice, check_integer

VOCAB_SIZE = 256
IGNORED = -100  # target of a position that asks nothing; the default of torch's cross entropy
NUM_KEYS = NUM_VALUES = 4  # few, so that a small model learns them in a minute
RECORD, QUESTION, ANSWER = 128, 192, 208  # first ids of the 16 records, the questions and the answers
SPLITS = ("train", "validation")

Row = tuple[np.ndarray, np.ndarray, np.ndarray]  # inputs, targets, distance: int64 [N] each


class Batch(NamedTuple):
    """Inputs of a model and the targets that it is asked for."""

    inputs: Tensor  # int64 [B, N], ids in 0..255
    targets: Tensor  # int64 [B, N], the id to predict at each position, or IGNORED
    distance: Tensor  # int64 [B, N], tokens back to the input that holds the answer; 0 where there is no single one
    task: Tensor  # int64 [B], index into the names that the batch was made from

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(*(tensor.to(device) for tensor in self))


def make_batch(
    names: Sequence[str], rows: Sequence[int], seq_len: int, *, seed: int = 0, split: str = "train"
) -> Batch:
    """Make rows of a stream, on the CPU; row r belongs to task `names[r % len(names)]`.

    Args:
        rows: Row numbers >= 0; step s of B rows takes range(s * B, (s + 1) * B).
        seq_len: Tokens in a row, >= 32.
        seed: Seed of the whole stream, >= 0.
        split: "train" or "validation", which has other random rows and text of other modules.
    Raises:
        ValueError: For an unknown name or split, or a seq_len below 32.
    """
    if unknown := [name for name in names if name not in TASKS] or not names:
        raise ValueError(f"names={list(names)}: unknown {unknown}; accepted: {', '.join(TASKS)}")
    check_choice("split", split, SPLITS)
    check_integer("seq_len", seq_len, 32)
    made = []
    for row in rows:
        rng = np.random.default_rng((seed, SPLITS.index(split), row))
        made.append(TASKS[names[row % len(names)]](rng, seq_len, split))
    inputs, targets, distance = (torch.from_numpy(np.stack(column)) for column in zip(*made, strict=True))
    return Batch(inputs, targets, distance, torch.tensor([row % len(names) for row in rows]))


@functools.cache
def corpus(split: str) -> np.ndarray:
    """Text of a split, int64 ASCII codes [M]: four long modules for validation, all others for training."""
    everything = stdlib_documents(None)
    chosen = [text for name, text in everything.items() if (name in LONG_MODULES) == (split == "validation")]
    return np.frombuffer("\n".join(chosen).encode("ascii", "replace"), np.uint8).astype(np.int64)


def text_row(rng: np.random.Generator, seq_len: int, split: str) -> Row:
    """Make a random window of the corpus; the next byte is the target everywhere."""
    source = corpus(split)
    start = rng.integers(len(source) - seq_len)
    window = source[start : start + seq_len + 1]
    return window[:-1], window[1:], np.zeros(seq_len, np.int64)


def recall_row(rng: np.random.Generator, seq_len: int, split: str) -> Row:
    """Make a row in which every token is a record or a question.

    Each key has one record. Records stand in random order, at position 0 and at random positions of the first half.
    Every other position asks for one of the keys with a record so far.
    """
    order = rng.permutation(NUM_KEYS)
    values = rng.integers(NUM_VALUES, size=NUM_KEYS)
    records = np.sort(rng.choice(seq_len // 2, NUM_KEYS, replace=False))  # positions
    records[0] = 0
    positions = np.arange(seq_len)
    chosen = (rng.random(seq_len) * np.searchsorted(records, positions, side="right")).astype(np.int64)
    chosen[records] = np.arange(NUM_KEYS)
    key, value, stated = order[chosen], values[chosen], np.isin(positions, records)
    inputs = np.where(stated, RECORD + NUM_VALUES * key + value, QUESTION + key)
    targets = np.where(stated, IGNORED, ANSWER + value)
    return inputs, targets, positions - records[chosen]


TASKS = {"text": text_row, "recall": recall_row}

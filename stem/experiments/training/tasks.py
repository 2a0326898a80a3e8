"""Endless training data with known answers: real text and four synthetic long-range tasks, one vocabulary of 256 ids.

Row r of a stream depends on (seed, split, r) alone. Any process can therefore make any row, a run resumes from a step
number, and processes that share a batch see exactly the rows of one process. Ids below 128 are ASCII text. The tasks
use the ids from 128 on, which such text never contains.

- text: windows of the standard library's source; every next byte is a target.
- recall: multi-query associative recall. A record is one token that names a key and its value. A question is one token
  that names a key. The answer is a target and never an input, so that it can be read from the record only.
- pairs: recall with many keys and records of two tokens, the key and then the value; needs an induction circuit.
- needle: recall with text as filler, and a record or a question every 16 tokens.
- induction: random tokens, repeated with a random period.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stem.experiments.documents import LONG_MODULES, stdlib_documents

VOCAB_SIZE = 256
IGNORED = -100  # target of a position that asks nothing; the default of torch's cross entropy
NUM_KEYS = NUM_VALUES = 4  # of recall and needle: few, so that a small model learns them in a minute
MANY = 16  # keys and values of pairs
RECORD, QUESTION, ANSWER, BLANK = 128, 192, 208, 224  # ids: 16 records, 16 questions, 16 answers, 1 blank
QUESTION_EVERY = 16  # tokens between the questions of the needle task
SPLITS = ("train", "validation")

Row = tuple[np.ndarray, np.ndarray, np.ndarray]  # inputs, targets, distance: int64 [N] each


@dataclass(frozen=True)
class Batch:
    """Inputs of a model and the targets that it is asked for.

    Attributes:
        inputs: int64 [B, N], ids in 0..255.
        targets: int64 [B, N], the id to predict at each position, or IGNORED.
        distance: int64 [B, N], tokens back to the input that holds the answer; 0 where there is no single one.
        task: int64 [B], index into the names that the batch was made from.
    """

    inputs: Tensor
    targets: Tensor
    distance: Tensor
    task: Tensor

    def to(self, device: torch.device | str) -> "Batch":
        """Move all tensors to a device."""
        return Batch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def make_batch(
    names: Sequence[str], rows: Sequence[int], seq_len: int, *, seed: int = 0, split: str = "train"
) -> Batch:
    """Make rows of a stream; row r belongs to task `names[r % len(names)]`.

    Args:
        names: Tasks to take in turn, each one of `TASKS`.
        rows: Row numbers >= 0; step s of B rows takes range(s * B, (s + 1) * B).
        seq_len: Tokens in a row, >= 32.
        seed: Seed of the whole stream, >= 0.
        split: "train" or "validation", which has other random rows and text of other modules.
    Returns:
        Batch of len(rows) rows on the CPU.
    Raises:
        ValueError: For an unknown name or split, or a seq_len below 32.
    """
    if unknown := [name for name in names if name not in TASKS] or not names:
        raise ValueError(f"names={list(names)}: unknown {unknown}; accepted: {', '.join(TASKS)}")
    if split not in SPLITS:
        raise ValueError(f"split={split!r}; accepted: {', '.join(SPLITS)}")
    if seq_len < 32:
        raise ValueError(f"seq_len={seq_len}; accepted: 32 or more")
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
    """Make a row in which every token is a record or a question."""
    return _records_and_questions(rng, np.full(seq_len, BLANK), np.arange(seq_len))


def needle_row(rng: np.random.Generator, seq_len: int, split: str) -> Row:
    """Make a row of text with a record or a question in place of every 16th byte."""
    text, _, _ = text_row(rng, seq_len, split)
    return _records_and_questions(rng, text.copy(), np.arange(QUESTION_EVERY - 1, seq_len, QUESTION_EVERY))


def pairs_row(rng: np.random.Generator, seq_len: int, split: str) -> Row:
    """Make a row of two-token slots: (key, value) is a record, (key, blank) a question."""
    key, value, slot_distance, stated = _schedule(rng, seq_len // 2, MANY, MANY)
    inputs, targets = np.full(seq_len, BLANK), np.full(seq_len, IGNORED)
    distance = np.zeros(seq_len, np.int64)
    keys, values = (slice(start, seq_len // 2 * 2, 2) for start in (0, 1))
    inputs[keys] = QUESTION + key
    inputs[values] = np.where(stated, ANSWER + value, BLANK)
    targets[keys] = np.where(stated, IGNORED, ANSWER + value)
    distance[keys] = np.where(stated, 0, 2 * slot_distance - 1)
    return inputs, targets, distance


def induction_row(rng: np.random.Generator, seq_len: int, split: str) -> Row:
    """Make a row of random tokens (64 ids) with a period of N/8..N/2; from the second period on, all are targets."""
    period = int(rng.integers(seq_len // 8, seq_len // 2 + 1))
    tokens = np.resize(rng.integers(RECORD, QUESTION, period), seq_len + 1)
    known = np.arange(seq_len) >= period
    return tokens[:-1], np.where(known, tokens[1:], IGNORED), np.where(known, period - 1, 0)


def _schedule(rng: np.random.Generator, num_slots: int, num_keys: int, num_values: int) -> tuple[np.ndarray, ...]:
    """Draw which slots of a row are records and which are questions.

    Each key has one record. Records stand in random order, in slot 0 and in random slots of the first half. Every other
    slot asks for one of the keys with a record so far. Short rows have fewer keys.

    Returns:
        Arrays [num_slots]: key, value, slots back to the record of the key, and True where the slot is a record.
    """
    order = rng.permutation(num_keys)[: max(1, num_slots // 2)]
    values = rng.integers(num_values, size=len(order))
    statements = np.sort(rng.choice(max(1, num_slots // 2), len(order), replace=False))
    statements[0] = 0
    slots = np.arange(num_slots)
    chosen = (rng.random(num_slots) * np.searchsorted(statements, slots, side="right")).astype(np.int64)
    chosen[statements] = np.arange(len(order))
    return order[chosen], values[chosen], slots - statements[chosen], np.isin(slots, statements)


def _records_and_questions(rng: np.random.Generator, inputs: np.ndarray, places: np.ndarray) -> Row:
    """Put one-token records and questions at `places` of the filler `inputs`, which is changed in place."""
    key, value, _, stated = _schedule(rng, len(places), NUM_KEYS, NUM_VALUES)
    inputs[places] = np.where(stated, RECORD + NUM_VALUES * key + value, QUESTION + key)
    targets, distance = np.full(len(inputs), IGNORED), np.zeros(len(inputs), np.int64)
    targets[places] = np.where(stated, IGNORED, ANSWER + value)
    record_place = np.zeros(NUM_KEYS, np.int64)
    record_place[key[stated]] = places[stated]
    distance[places] = np.where(stated, 0, places - record_place[key])
    return inputs, targets, distance


TASKS = {
    "text": text_row,
    "recall": recall_row,
    "pairs": pairs_row,
    "needle": needle_row,
    "induction": induction_row,
}

"""Samples that a comparison reads: RULER prompts and document windows of one exact length, and calibration texts."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from stem.experiments import documents
from stem.experiments.long_context import ruler, signatures
from stem.validation import check_choice

# tasks that order their answers
FIXED_ORDER = (*ruler.ONE_ANSWER, "niah_multivalue", "niah_multiquery", "ruler_vt", signatures.TASK)

_TOKENS: dict[tuple, list[int]] = {}  # (function of a text, fingerprint of the tokenizer) -> tokens of the text


class Prompts(NamedTuple):
    """Samples of one task, all of one length."""

    task: str
    ids: Tensor  # int64 [samples, length]: filler, prompt, right answer
    answer_tokens: Tensor  # int64 [samples], length of the answer at the end [tokens]
    answers: list[list[str]]  # texts that a generated answer has to contain

    def first(self, count: int) -> Prompts:
        """The first samples."""
        return Prompts(self.task, *(of[:count] for of in self[1:]))


def exact_prompts(task: str, tokenizer, length: int, samples: int, seed: int = 0) -> Prompts:
    """Samples of RULER or of `signatures` of exactly `length` tokens, so that a batch needs no padding (our choice).

    Their prompts are a little shorter. The end of CPython's language reference fills the gap in front of the prompt.
    A BOS token stands at the very start and nowhere else.

    Args:
        task: One of `FIXED_ORDER`. Several answers are scored in the order of the question or of the text.
        length: Filler, prompt and answer together [tokens].
    Raises:
        ValueError: If the task does not order its answers, or a sample does not fit.
    """
    check_choice("task", task, FIXED_ORDER)
    of_task, start = signatures.samples if task == signatures.TASK else ruler.stored_samples, _start(tokenizer)
    rows = of_task(task, tokenizer, length, samples, seed)
    plain = partial(tokenizer, add_special_tokens=False, verbose=False)
    prompts = plain([f"{row['input']} {row['gen_prefix']}" for row in rows]).input_ids
    answers = [row["outputs"] for row in rows]  # in the order of the question
    if task == "niah_multivalue":
        answers = [sorted(row["outputs"], key=row["input"].index) for row in rows]  # in the order of the text
    answers = plain([f" {', '.join(of)}" for of in answers]).input_ids
    filler = plain(documents.prose()[-8 * length :]).input_ids[-length:]
    ids = []
    for prompt, answer in zip(prompts, answers, strict=True):
        missing = length - len(start) - len(prompt) - len(answer)
        if not 0 <= missing <= len(filler):
            raise ValueError(f"length={length}: a sample of {task} has {length - missing} tokens")
        ids.append(start + filler[len(filler) - missing :] + prompt + answer)
    counts = torch.tensor([len(answer) for answer in answers])
    return Prompts(task, torch.tensor(ids), counts, [row["outputs"] for row in rows])


def document_windows(tokenizer, length: int, count: int, kinds: Sequence[str] = tuple(documents.KINDS)) -> dict:
    """Kind of document -> int64 [count, length]: windows spread evenly over its texts, behind a BOS token if any.

    Texts of a kind follow one another until they hold that many tokens, so longer windows may read further texts.
    """
    found, start = {}, _start(tokenizer)
    for kind in kinds:
        tokens = _kind_tokens(kind, tokenizer, count * (length - len(start)))
        windows = documents.windows(tokens, length - len(start), count)
        found[kind] = torch.tensor([start + window for window in windows])
    return found


def _kind_tokens(kind: str, tokenizer, enough: int) -> list[int]:
    """Tokens of the first texts of a kind that hold `enough` of them together, or of all its texts."""
    found = []
    for text in documents.KINDS[kind]:
        if len(found) < enough:
            key = text, documents.fingerprint(str(tokenizer(ruler.TOKENIZER_SAMPLE).input_ids))
            if key not in _TOKENS:
                _TOKENS[key] = tokenizer(text(), add_special_tokens=False, verbose=False).input_ids
            found = found + _TOKENS[key]
    return found


def calibration_windows(tokenizer, length: int, count: int) -> list[Tensor]:
    """Windows int64 [count, length] of each of `calibration_texts`, spread evenly over the text."""
    texts = [tokenizer(text, verbose=False).input_ids for text in calibration_texts()]
    return [torch.tensor(documents.windows(tokens, length, count)) for tokens in texts]


def calibration_texts() -> tuple[str, str]:
    """Python source and English text that no comparison reads, each of more than 32 thousand tokens."""
    source = "\n".join(documents.stdlib_documents(documents.CALIBRATION_MODULES).values())
    folder = Path(importlib.import_module("transformers").__path__[0])
    described = [folder / "training_args.py", folder / "generation" / "configuration_utils.py"]
    return source, "\n".join(path.read_text(encoding="utf-8") for path in described)


def needle_block(prompts: Prompts, sample: int, block_size: int) -> int:
    """Index of the key block in which the only answer of a sample first appears."""
    ids, count = prompts.ids[sample], int(prompts.answer_tokens[sample])
    starts = (ids.unfold(0, count, 1) == ids[-count:]).all(-1).nonzero()
    return int(starts[0]) // block_size


def _start(tokenizer) -> list[int]:
    """Tokens that the tokenizer puts before every text: a BOS token, or none."""
    return tokenizer("").input_ids

"""Training sequences for a longer context: real text with hidden facts, and questions about them at its end."""

from __future__ import annotations

import importlib
import random
import re
import string
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from stem.experiments import documents

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
SUBJECTS = ("special magic number", "special magic number", "access code", "serial number", "lucky number", "account")
LETTERS = (string.ascii_lowercase.translate(str.maketrans("", "", "aeiou")), "aeiou")


class Sequences(NamedTuple):
    """A batch: int64 [n, N + 1] tokens, and bool [n, N + 1], True where a token belongs to an answer."""

    ids: Tensor
    answers: Tensor


class Mixture:
    """Training sequences that depend on (seed, index, length) only."""

    def __init__(self, tokenizer, text: str, seed: int = 0) -> None:
        self.tokenizer, self.seed = tokenizer, seed
        self.text = _encode_long(tokenizer, text)
        self.words = sorted(set(re.findall(r"\b[a-z]{4,9}\b", text)[:400_000]))

    def batch(self, index: int, length: int, count: int) -> Sequences:
        """Sequences index * count to (index + 1) * count - 1 of this length."""
        rows = [self.sequence(index * count + i, length) for i in range(count)]
        return Sequences(*(torch.stack(parts) for parts in zip(*rows, strict=True)))

    def sequence(self, index: int, length: int) -> tuple[Tensor, Tensor]:
        """One sequence: int64 [length + 1] tokens, and bool [length + 1], True where a token belongs to an answer."""
        draw = random.Random(f"{self.seed}|{length}|{index}")
        task = draw.choices(("facts", "only facts", "facts in noise", "chains"), (60, 12, 8, 20))[0]
        questions = min(draw.choice((1, 4, 16, 40)), max(1, length // 256))
        if task == "chains":
            intro = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
            hidden, asked = self._chains(draw, max(1, questions // 4))
        else:
            intro = "Some facts are hidden within the following text. Memorize them. I will quiz you about them.\n"
            facts = length // 24 if task == "only facts" else max(questions, draw.randint(1, max(1, length // 400)))
            hidden, asked = self._facts(draw, facts, questions)
        (front, *hidden), (tail, marks) = self.tokenizer([intro, *hidden]).input_ids, self._asked(asked)
        room = length + 1 - len(front) - len(tail)
        while sum(map(len, hidden)) > room and len(hidden) > 1:
            hidden.pop()  # the asked ones come first
        if task != "chains":
            draw.shuffle(hidden)
        filler = self._noise(room) if task == "facts in noise" or draw.random() < 0.1 else self._stretch(draw, room)
        body = _insert(draw, filler[: max(0, room - sum(map(len, hidden)))], hidden)
        ids = (front + body + tail)[-length - 1 :]
        return torch.tensor(ids), torch.tensor([False] * (len(ids) - len(marks)) + marks)

    def _facts(self, draw: random.Random, facts: int, questions: int) -> tuple[list[str], list[tuple[str, str]]]:
        """Sentences that hide values under keys, the asked ones first, and (question, answer) pairs."""
        subject = draw.choice(SUBJECTS)
        value = (lambda: _hexadecimal(draw)) if draw.random() < 0.1 else (lambda: str(draw.randint(10**6, 10**7 - 1)))
        keys = list(dict.fromkeys(self._key(draw) for _ in range(facts)))
        values = {
            key: [value() for _ in range(draw.choice((1, 1, 1, 4)) if i < 4 else 1)] for i, key in enumerate(keys)
        }
        asked, left = [], keys[:questions]
        while left:
            several = left[: draw.choice((1, 1, 1, 1, 2, 4))]
            left = left[len(several) :]
            found = [value for key in several for value in values[key]]
            listed = several[0] if len(several) == 1 else f"{', '.join(several[:-1])}, and {several[-1]}"
            what, verb = (f"{subject}s", "are") if len(found) > 1 else (subject, "is")
            asks = (
                f"What {verb} {'all ' if len(found) > 1 else ''}the {what} for {listed} mentioned in the provided text?"
            )
            asked.append((f"{asks} The {what} for {listed} mentioned in the provided text {verb}", ", ".join(found)))
        draw.shuffle(asked)
        sentences = [f" One of the {subject}s for {key} is: {value}.\n" for key in keys for value in values[key]]
        return sentences, asked

    def _chains(self, draw: random.Random, chains: int) -> tuple[list[str], list[tuple[str, str]]]:
        """Assignments of several chains, interleaved but in order within a chain, and (question, answer) pairs."""
        hidden, asked = [], []
        for _ in range(chains):
            value, hops = str(draw.randint(10000, 99999)), draw.choice((2, 3, 5))
            names = ["".join(draw.choices(string.ascii_uppercase, k=draw.choice((4, 5, 6)))) for _ in range(hops)]
            sources = [value, *(f"VAR {name}" for name in names[:-1])]
            hidden.append([f" VAR {name} = {source} \n" for name, source in zip(names, sources, strict=True)])
            text = f"Question: Find all variables that are assigned the value {value} in the text above. Answer: "
            text += "According to the chain(s) of variable assignment in the text above, "
            text += f"{hops} variables are assgined the value {value}, they are: "
            asked.append((text.rstrip(), ", ".join(names)))
        draw.shuffle(asked)
        turns = [number for number, lines in enumerate(hidden) for _ in lines]
        draw.shuffle(turns)
        remaining = [iter(lines) for lines in hidden]
        return [next(remaining[number]) for number in turns], asked

    def _asked(self, asked: Sequence[tuple[str, str]]) -> tuple[list[int], list[bool]]:
        """Tokens of the questions and their answers, and for each token True if it belongs to an answer."""
        ids, marks = [], []
        for question, answer in asked:
            for text, mark in ((f"\n{question}", False), (f" {answer}", True)):
                tokens = self.tokenizer(text).input_ids
                ids += tokens
                marks += [mark] * len(tokens)
        return ids, marks

    def _key(self, draw: random.Random) -> str:
        """Two words of the training text, or two invented ones, joined by a hyphen."""
        if draw.random() < 0.5:
            return "-".join(draw.choices(self.words, k=2))
        return "-".join("".join(draw.choice(LETTERS[i % 2]) for i in range(draw.choice((4, 6)))) for _ in range(2))

    def _stretch(self, draw: random.Random, tokens: int) -> list[int]:
        start = draw.randrange(max(1, len(self.text) - tokens))
        return self.text[start : start + tokens].tolist()

    def _noise(self, tokens: int) -> list[int]:
        """RULER's noise sentences, repeated."""
        sentence = self.tokenizer(NOISE).input_ids
        return (sentence * (tokens // len(sentence) + 1))[:tokens]


def training_text(most_chars: int = 20_000_000) -> str:
    """Python source that no comparison reads: other modules of the standard library, then transformers and torch."""
    root = Path(sysconfig.get_paths()["stdlib"])
    held_out = {root / f"{name}.py" for name in documents.EVALUATED_MODULES} | {root / "pydoc_data" / "topics.py"}
    folders = [Path(importlib.import_module(name).__path__[0]) for name in ("transformers", "torch")]
    held_out |= {folders[1] / "_torch_docs.py", folders[1] / "_tensor_docs.py"}
    left_out = {"site-packages", "test", "tests", "idlelib", "lib2to3"}
    paths = [path for path in sorted(root.rglob("*.py")) if not left_out & set(path.parts)]
    paths += [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    texts, chars = [], 0
    for path in paths:
        if path not in held_out and chars < most_chars:
            texts.append(path.read_text(encoding="utf-8", errors="replace"))
            chars += len(texts[-1])
    return "\n".join(texts)


def _encode_long(tokenizer, text: str) -> Tensor:
    """Tokens of a long text, int32 [n]; the tokenizer encodes pieces of whole lines in parallel."""
    lines, pieces, size = text.splitlines(keepends=True), [[]], 0
    for line in lines:
        pieces[-1].append(line)
        size += len(line)
        if size > 100_000:
            pieces.append([])
            size = 0
    encoded = tokenizer(["".join(piece) for piece in pieces if piece], verbose=False).input_ids
    return torch.cat([torch.tensor(ids, dtype=torch.int32) for ids in encoded])


def _insert(draw: random.Random, filler: list[int], pieces: list[list[int]]) -> list[int]:
    """Filler with the pieces inserted, in their order, at random places."""
    places = sorted(draw.randint(0, len(filler)) for _ in pieces)
    body, last = [], 0
    for place, piece in zip(places, pieces, strict=True):
        body += filler[last:place] + piece
        last = place
    return body + filler[last:]


def _hexadecimal(draw: random.Random) -> str:
    return "-".join("".join(draw.choices("0123456789abcdef", k=k)) for k in (8, 4, 4, 4, 12))

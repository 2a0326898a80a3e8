"""Longer contexts for a small pretrained model: a larger RoPE base and a few hundred steps on retrieval in long text.

`python -m stem.experiments.long_context.extend --profile full` brings SmolLM2 (8K) to 32K on one GPU, saves it in
`$STEM_CACHE`, and compares attention methods at lengths that the original cannot read. Attention is dense in training.

A training sequence is real text (source code that no evaluation reads) with facts hidden in it and questions about them
at its end. The loss is the mean over the answers plus the mean over a sample of the text's tokens, so that the model
learns to look things up far away and does not forget to read.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import random
import re
import string
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from stem import pretrained
from stem.experiments import documents, records
from stem.experiments.long_context import comparison
from stem.experiments.long_context.plan import TASKS, Plan

SMOKE = dict(stages=((512, 2, 1), (1024, 2, 1)), warmup=1, text_tokens=256)
PLANS = {
    "smoke": Plan((1024,), (1,), TASKS[:1], 1, 1, ("stem",), (0.5,), (32,), (0.5, 32), generates=None),
    "full": Plan(
        (16384, 32768),
        (50, 50),
        tasks=("niah_multikey_1", "niah_multiquery"),
        windows=2,
        names=(
            "stem", "stem adaptive", "stem softmax", "xattention", "flashprefill", "vertical_slash", "flexprefill",
            "a_shape",
        ),
        densities=(0.25, 0.1),
        block_sizes=(64, 128),
        curves=("stem", "stem adaptive", "stem softmax", "xattention"),
        presets=True,
        generates=None,
    ),
}  # fmt: skip
FAST_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH,
]  # fmt: skip
LOSSES = ("answer_loss", "text_loss")
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
SUBJECTS = ("special magic number", "special magic number", "access code", "serial number", "lucky number", "account")
LETTERS = (string.ascii_lowercase.translate(str.maketrans("", "", "aeiou")), "aeiou")


@dataclass(frozen=True)
class ExtendConfig:
    """The recipe. All of it is our choice; long trainings in the field take bases of millions for 32K."""

    model: str = "smollm2"
    """A name for stem.pretrained.load."""

    rope_theta: float = 6e5
    """New base of the rotary embedding; SmolLM2 has 1e5 for 8K. The smaller it is, the less there is to relearn."""

    stages: tuple[tuple[int, int, int], ...] = ((8192, 12, 4), (16384, 20, 2), (32768, 30, 1))
    """(sequence length [tokens], steps, sequences in a step), in order; the last length is the new context."""

    lr: float = 4e-4
    """Peak learning rate of AdamW."""

    warmup: int = 10
    """Steps of linear warm-up; cosine to a tenth of the peak afterwards."""

    text_tokens: int = 4096
    """Positions of each sequence whose loss on the text counts, drawn at random [tokens]."""

    seed: int = 0

    def __post_init__(self) -> None:
        if not self.stages or any(length < 256 or min(rest) < 1 for length, *rest in self.stages):
            raise ValueError(f"stages must hold (length >= 256, steps >= 1, sequences >= 1), got {self.stages!r}")
        for name in ("rope_theta", "lr", "text_tokens"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")

    @property
    def steps(self) -> int:
        return sum(steps for _, steps, _ in self.stages)

    @property
    def length(self) -> int:
        return self.stages[-1][0]


class Sequences(NamedTuple):
    """A batch: int64 [n, N + 1] tokens, and bool [n, N + 1], True where a token belongs to an answer."""

    ids: Tensor
    answers: Tensor


class Mixture:
    """Training sequences, each a function of (seed, index, length) alone."""

    def __init__(self, tokenizer, text: str, seed: int = 0) -> None:
        self.tokenizer, self.seed = tokenizer, seed
        self.text = _encode_long(tokenizer, text)
        words = re.findall(r"\b[a-z]{4,9}\b", text)
        self.words = sorted(set(words[:400_000]))

    def batch(self, index: int, length: int, count: int) -> Sequences:
        """Sequences number index * count ... of this length."""
        rows = [self.sequence(index * count + i, length) for i in range(count)]
        return Sequences(*(torch.stack(parts) for parts in zip(*rows, strict=True)))

    def sequence(self, index: int, length: int) -> tuple[Tensor, Tensor]:
        """One sequence: int64 [length + 1] and bool [length + 1]."""
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
            hidden.pop()  # those asked for come first
        if task != "chains":
            draw.shuffle(hidden)
        filler = self._noise(room) if task == "facts in noise" or draw.random() < 0.1 else self._stretch(draw, room)
        body = _insert(draw, filler[: max(0, room - sum(map(len, hidden)))], hidden)
        ids = (front + body + tail)[-length - 1 :]
        return torch.tensor(ids), torch.tensor([False] * (len(ids) - len(marks)) + marks)

    def _facts(self, draw: random.Random, facts: int, questions: int) -> tuple[list[str], list[tuple[str, str]]]:
        """Sentences that hide values under keys, those asked for first, and (question, answer) pairs."""
        subject = draw.choice(SUBJECTS)
        long = draw.random() < 0.1
        value = (lambda: _hexadecimal(draw)) if long else (lambda: str(draw.randint(10**6, 10**7 - 1)))
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
        """Variable assignments, chains interleaved and each in order, and questions for all variables of a chain."""
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
        """Questions with their answers as tokens, and which of these belong to an answer."""
        ids, marks = [], []
        for question, answer in asked:
            for text, mark in ((f"\n{question}", False), (f" {answer}", True)):
                tokens = self._ids(text)
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
        sentence = self._ids(NOISE)
        return (sentence * (tokens // len(sentence) + 1))[:tokens]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text).input_ids


def training_text(most_chars: int = 20_000_000) -> str:
    """Python source that no evaluation reads: the standard library's other modules, then transformers' and torch's."""
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


def load_with_base(config: ExtendConfig, device=None):
    """The model to extend with the new RoPE base and length, fp32 weights, and its tokenizer."""
    model, tokenizer = pretrained.load(config.model, "cpu")
    settings = model.config
    settings.rope_parameters = {**settings.rope_parameters, "rope_theta": float(config.rope_theta)}
    settings.max_position_embeddings = max(config.length, settings.max_position_embeddings)
    rebuilt = type(model)._from_config(settings, attn_implementation="sdpa", dtype=torch.float32)
    rebuilt.load_state_dict(model.state_dict())
    return rebuilt.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), tokenizer


def learning_rate(config: ExtendConfig, step: int) -> float:
    """Rate of step 0 .. steps - 1: linear warm-up, then half a cosine down to a tenth."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def losses(model, batch: Sequences, text_tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Mean loss over the answers, and over `text_tokens` other positions of each sequence drawn at random [nats]."""
    device = next(model.parameters()).device
    ids = batch.ids.to(device)
    hidden = model.get_decoder()(ids[:, :-1], use_cache=False).last_hidden_state.flatten(0, 1)
    answers, targets = batch.answers[:, 1:].flatten(), ids[:, 1:].flatten()
    generator = torch.Generator().manual_seed(seed)
    others = (~answers).nonzero()[:, 0]
    others = others[torch.randperm(len(others), generator=generator)[: text_tokens * len(ids)]]
    head, found = model.get_output_embeddings(), []
    for places in (answers.nonzero()[:, 0].to(device), others.to(device)):
        found.append(F.cross_entropy(head(hidden[places]).float(), targets[places]))
    return found[0], found[1]


def extend(
    config: ExtendConfig, text: str | None = None, *, device=None, limit_s: float = math.inf, show=print
) -> tuple[torch.nn.Module, object, list[dict]]:
    """Train.

    Args:
        config: The recipe.
        text: What the sequences are made of; None means `training_text()`.
        device: None means CUDA where there is one.
        limit_s: Stop after so many seconds of training, whatever is left of the stages.
        show: Called with a progress line every ten steps.
    Returns:
        (model in eval mode with fp32 weights, tokenizer, log: dicts of step, length [tokens], and `LOSSES` [nats]).
    """
    torch.manual_seed(config.seed)
    model, tokenizer = load_with_base(config, device)
    mixture = Mixture(tokenizer, training_text() if text is None else text, config.seed)
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, (0.9, 0.95), weight_decay=0.0, fused=True)
    log, started = [], time.monotonic()
    plan = [(length, count) for length, steps, count in config.stages for _ in range(steps)]
    model.train()
    for step, (length, count) in enumerate(plan):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        batch = mixture.batch(step, length, count)
        with torch.autocast(device.type, torch.bfloat16), sdpa_kernel(FAST_BACKENDS, set_priority=True):
            answer_loss, text_loss = losses(model, batch, config.text_tokens, step)
        (answer_loss + text_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        log.append(dict(step=step, length=length, answer_loss=answer_loss.detach(), text_loss=text_loss.detach()))
        if step % 10 == 9 or step + 1 == len(plan):
            answer, other = (sum(float(row[name]) for row in log[-10:]) / len(log[-10:]) for name in LOSSES)
            seconds = time.monotonic() - started
            told = f"step {step + 1}/{len(plan)}, {length} tokens, {seconds:.0f} s"
            show(f"{told}: answers {answer:.3f}, text {other:.3f} nats")
            if seconds > limit_s:
                break
    log = [{name: float(value) if isinstance(value, Tensor) else value for name, value in row.items()} for row in log]
    return model.eval(), tokenizer, log


def save(model, tokenizer, folder: str | Path) -> Path:
    """Write a model that `stem.pretrained.load(folder)` reads; an older one of that name is replaced at the end."""
    folder = Path(folder).expanduser().resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=folder.parent, prefix=f"{folder.name}.", ignore_cleanup_errors=True
    ) as scratch:
        model.save_pretrained(Path(scratch) / "new")
        tokenizer.save_pretrained(Path(scratch) / "new")
        if folder.exists():
            os.replace(folder, Path(scratch) / "old")
        os.replace(Path(scratch) / "new", folder)
    return folder


def _encode_long(tokenizer, text: str) -> Tensor:
    """Tokens of a long text, int32 [n]: cut at line ends into pieces that the tokenizer encodes in parallel."""
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
    """Pieces, in their order, at random places of the filler."""
    places = sorted(draw.randint(0, len(filler)) for _ in pieces)
    body, last = [], 0
    for place, piece in zip(places, pieces, strict=True):
        body += filler[last:place] + piece
        last = place
    return body + filler[last:]


def _hexadecimal(draw: random.Random) -> str:
    return "-".join("".join(draw.choices("0123456789abcdef", k=k)) for k in (8, 4, 4, 4, 12))


def curve_rows(config: ExtendConfig, log: Sequence[dict], num_bins: int = 40) -> list[dict]:
    """A training log as rows: means of both losses over bins of steps, start..stop - 1."""
    edges = sorted({round(len(log) * i / num_bins) for i in range(num_bins + 1)})
    rows = []
    for start, stop in zip(edges, edges[1:], strict=False):
        for name in LOSSES:
            value = sum(row[name] for row in log[start:stop]) / (stop - start)
            about = dict(method="dense", measure=name, task="training", length=log[start]["length"], seed=config.seed)
            rows.append(dict(**about, start=start, stop=stop, value=float(f"{value:.5g}"), count=stop - start))
    return rows


def main() -> None:
    """Train, save, compare attention methods, and write results/long_context/extension/."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--profile", choices=records.PROFILES, default="smoke")
    parser.add_argument("--out", help="folder of the model; default $STEM_CACHE/smollm2-32k, or -smoke")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--training-limit", type=float, default=math.inf, help="seconds after which training stops")
    parser.add_argument("--evaluate-only", action="store_true", help="compare with the model that is there already")
    comparison.add_options(parser)
    arguments = parser.parse_args()
    full = arguments.profile == "full"
    config = ExtendConfig(seed=arguments.seed) if full else ExtendConfig(**SMOKE, seed=arguments.seed)
    out = Path(
        arguments.out or pretrained.cache_folder() / f"smollm2-{config.length // 1024}k{'' if full else '-smoke'}"
    )
    show, rows, started = partial(print, flush=True), [], time.monotonic()
    if not arguments.evaluate_only:
        text = None if full else "\n".join(documents.stdlib_documents(None, 20_000).values())[:2_000_000]
        model, tokenizer, log = extend(config, text, limit_s=arguments.training_limit, show=show)
        show("saved", save(model, tokenizer, out))
        rows = curve_rows(config, log)
        del model
        torch.cuda.empty_cache()
    plan = PLANS[arguments.profile]
    few = tuple(min(4, samples) for samples in plan.samples)
    only_dense = replace(plan, samples=few, names=("dense",), block_sizes=(), presets=False)
    for name, of, processes in ((config.model, only_dense, 1), (str(out), plan, arguments.processes)):
        before = list(rows)

        def write(found: list[dict], before: list[dict] = before) -> None:
            show("wrote", records.write_rows("long_context/extension", before + found, arguments.profile))

        eager = arguments.eager or of is only_dense  # a few samples are not worth the compilation
        left = arguments.limit - (time.monotonic() - started)
        options = dict(processes=processes, limit_s=left, eager=eager, show=show, save=write)
        rows += processes.measure(of, name, arguments.seed, **options)


if __name__ == "__main__":
    main()

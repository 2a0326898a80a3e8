"""RULER's synthetic tasks built offline: lm-eval's prompts, our own seeding and haystack.

lm-eval draws all samples from one global generator, so that another task list gives other samples. It also downloads
essays for five of the tasks. Here each (task, length, seed) has a random stream of its own, and CPython's language
reference takes the place of the essays.
"""

import contextlib
import io
import json
import logging
import lzma
import random
import zlib
from collections.abc import Iterator

import numpy as np

from stem import pretrained
from stem.experiments import documents
from stem.validation import check_choice, check_integer

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
ONE_ANSWER = tuple(task for task in NEEDLES if task.startswith(("niah_single", "niah_multikey")))
TOKENIZER_SAMPLE = "One of the special magic numbers for goofy-hat is: 7057337. The sky is blue.\n\nVAR AZWOQ = 46987\n"
SHORTEST = 512  # below this the templates and the answer do not fit [tokens]


def build_samples(task: str, tokenizer, length: int, samples: int, seed: int = 0) -> list[dict]:
    """Samples of one RULER task at one length, equal on every call.

    Args:
        length: Longest prompt plus answer [tokens], >= `SHORTEST`. The real length can be shorter, see lm-eval.
        samples: Number of samples, >= 1. Sample i does not depend on it.
    Returns:
        lm-eval's documents: "input", "gen_prefix", "outputs" (list of answers), "max_length" = length.
    Raises:
        ValueError: If the task is unknown, or length or samples is too small.
    """
    check_choice("task", task, TASKS)
    check_integer("length", length, SHORTEST)
    check_integer("samples", samples, 1)
    stream = zlib.crc32(f"{task}|{length}|{seed}".encode())
    with _apart(stream):  # the imports draw from the global generator
        from stem.evaluate.offline import provide_sentence_splitter

        provide_sentence_splitter()
        from lm_eval.tasks.ruler import cwe_utils, fwe_utils, niah_utils, prepare_niah, vt_utils
    with _apart(stream):
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
    """`build_samples` with a cache in `$STEM_CACHE/ruler` (default ~/.cache/stem/ruler), with the same arguments.

    The name of a file holds task, length, seed and a fingerprint of the tokenizer. A file with enough samples is read,
    even where lm-eval is not installed. A file with fewer samples is replaced, unless the cache is read-only.
    """
    tokens = documents.fingerprint(str(tokenizer(TOKENIZER_SAMPLE).input_ids))
    name = f"{task}-{length}-{seed}-{tokens}.json.xz"
    path = pretrained.cache_folder() / "ruler" / name
    if path.is_file():
        rows = json.loads(lzma.decompress(path.read_bytes()))
        if len(rows) >= samples:
            return rows[:samples]
    rows = build_samples(task, tokenizer, length, samples, seed)
    pretrained.keep(path, lzma.compress(json.dumps(rows).encode(), preset=3))
    return rows


@contextlib.contextmanager
def _apart(seed: int) -> Iterator[None]:
    """Keep lm-eval's bars, prints and warnings out of a notebook, and its draws from the global generators apart."""
    logger, python_state, numpy_state = logging.getLogger("lm_eval"), random.getstate(), np.random.get_state()
    level = logger.level
    logger.setLevel(logging.ERROR)
    random.seed(seed)
    np.random.seed(seed)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        random.setstate(python_state)
        np.random.set_state(numpy_state)

"""Log-probabilities of a text's tokens in one engine, in FP8, in bf16 and dense: the cost of FP8 in serving."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from stem.experiments.documents import stdlib_documents
from stem.experiments.serving.engines import engine
from stem.pretrained import resolve

MODULES = ("argparse", "typing")
TOKENS, CHUNK = 16384, 4096
DENSITIES = (0.25, 0.1)


def accuracy_rows(name: str) -> Iterator[dict]:
    """Rows on a GPU for a model that stem.pretrained knows: one text, whole and in chunks, in bf16 and in FP8.

    Each has model, attention, density (requested), compute, chunk [tokens] (0 is the whole text), tokens, and over the
    tokens after the first: loss (mean negative log-probability, nats), difference and largest_difference (absolute, of
    a log-probability from that of the whole text in bf16 at this density), and from_dense (mean absolute difference
    from vLLM's own attention).
    """
    folder = str(resolve(name))
    text = "\n".join(stdlib_documents(MODULES).values())
    ids = AutoTokenizer.from_pretrained(folder)(text, verbose=False).input_ids[:TOKENS]
    ways = [None, *(dict(density=density, compute=compute) for density in DENSITIES for compute in ("input", "fp8"))]
    dense = bf16 = None
    for way in ways:
        for chunk in (None, CHUNK):
            found = log_probabilities(folder, way, ids, chunk)
            dense = found if dense is None else dense
            bf16 = found if way is None or (way["compute"], chunk) == ("input", None) else bf16
            about = dict(model=Path(folder).name, attention="vLLM", density=1.0, compute="input")
            about |= dict(attention="Stem") | way if way else {}
            apart = np.abs(found - (bf16 if way else dense))
            about |= dict(chunk=chunk or 0, tokens=len(ids), loss=-found.mean())
            about |= dict(difference=apart.mean(), largest_difference=apart.max())
            yield about | dict(from_dense=np.abs(found - dense).mean())


def log_probabilities(
    folder: str, settings: Mapping | None, ids: Sequence[int], chunk: int | None = None, dtype: str = "bfloat16"
) -> np.ndarray:
    """Log-probability of each token of a prompt after the first, fp64 [tokens - 1], in an engine of its own.

    Arguments as in engines.engine.
    """
    from vllm import SamplingParams

    room = dict(dtype=dtype, kv_cache_memory_bytes=2 << 30, gpu_memory_utilization=0.1)
    with engine(folder, settings, len(ids), chunk, **room) as llm:
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
        (output,) = llm.generate([dict(prompt_token_ids=list(ids))], params, use_tqdm=False)
    told = zip(ids[1:], output.prompt_logprobs[1:], strict=True)
    return np.array([row[token].logprob for token, row in told])

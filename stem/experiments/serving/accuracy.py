"""What FP8 costs in serving: log-probabilities of a text's tokens in one engine, in FP8, in bf16 and dense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from transformers import AutoTokenizer

from stem.experiments.documents import stdlib_documents
from stem.experiments.serving.engines import engine
from stem.pretrained import resolve

TOKENS, CHUNK = 16384, 4096
DENSITIES = (0.25, 0.1)


def accuracy_rows(model: str) -> list[dict]:
    """Rows for a model's name or file, on a GPU: one text, whole and in chunks, in bf16 and FP8.

    Each has attention, density (requested), compute, chunk [tokens] (0 is the whole prompt), tokens, and of the text's
    tokens after the first: loss (mean negative log-probability, nats), and the mean and largest absolute difference of
    a log-probability from the whole prompt in bf16 at this density (difference, largest_difference) and from dense
    attention (from_dense).
    """
    folder = str(resolve(model))
    text = "\n".join(stdlib_documents(["argparse", "typing"]).values())
    ids = AutoTokenizer.from_pretrained(folder)(text, verbose=False).input_ids[:TOKENS]
    rows, dense = [], None
    for density in (1.0, *DENSITIES):
        bf16 = None
        for compute in ("input", "fp8") if density < 1 else ("input",):
            for chunk in (None, CHUNK):
                settings = dict(density=density, compute=compute) if density < 1 else None
                found = log_probabilities(folder, settings, ids, chunk)
                bf16, dense = (found if x is None else x for x in (bf16, dense))
                about = dict(attention="Stem" if settings else "vLLM", density=density, compute=compute)
                apart = np.abs(found - bf16)
                rows.append(
                    about
                    | dict(chunk=chunk or 0, tokens=len(ids), loss=-found.mean(), difference=apart.mean())
                    | dict(largest_difference=apart.max(), from_dense=np.abs(found - dense).mean())
                )
                print(rows[-1], flush=True)
    return rows


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

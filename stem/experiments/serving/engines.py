"""Engines of vLLM in this process, and how long their prompts take."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

import torch

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine is in this process
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
if not torch.cuda.is_available():
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

SCHEDULER = "stem.vllm.AlignedScheduler"
BLOCK_SIZE = 128  # of vLLM's pages [tokens]
MEASURED = 3.0  # see timed [s]
MOST_ROUNDS = 60


def is_installed() -> bool:
    """Whether vLLM can be imported here."""
    return find_spec("vllm") is not None


@contextmanager
def engine(model: str, settings: Mapping | None, longest: int, chunk: int | None = None, **options) -> Iterator:
    """A vllm.LLM for prompts of up to `longest` tokens, without cached prefixes; it ends with the with block.

    Args:
        model: Folder of a model.
        settings: Settings of stem.vllm; None is vLLM's own attention.
        chunk: Tokens of a step at most; None takes whole prompts.
        options: Other arguments of vllm.LLM.
    """
    from vllm import LLM

    ours = {} if settings is None else dict(additional_config={"stem": dict(settings)}, scheduler_cls=SCHEDULER)
    if settings is not None and torch.cuda.is_available():
        ours["attention_backend"] = "CUSTOM"
    room = -(-(longest + 64) // BLOCK_SIZE) * BLOCK_SIZE
    steps = dict(max_model_len=room, max_num_batched_tokens=chunk or room, block_size=BLOCK_SIZE)
    shared = dict(skip_tokenizer_init=True, enforce_eager=True, enable_prefix_caching=False, max_num_seqs=8)
    llm = LLM(model, **{**shared, **steps, **ours, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def answer(llm, prompts: Sequence[Sequence[int]], tokens: int = 1) -> tuple[list[list[int]], float]:
    """Greedy tokens for each prompt of token ids, and the time until all are there [s]."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    outputs = llm.generate([dict(prompt_token_ids=list(ids)) for ids in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs], time.perf_counter() - start


def timed(
    llms: Sequence, prompts: Sequence[Sequence[int]], tokens: int = 1
) -> list[tuple[list[list[int]], list[float]]]:
    """Of each engine: answers of some tokens to all these prompts together, and the time of each round [ms].

    The engines take turns, another one first in each round, so that a change of the clock meets all of them. Each warms
    up first, then answers three times, and up to MOST_ROUNDS times while the rounds take less than MEASURED seconds
    together.
    """
    found = [answer(llm, prompts, tokens)[0] for llm in llms]
    times: list[list[float]] = []  # a row for each round
    while len(times) < 3 or (len(times) < MOST_ROUNDS and sum(map(sum, times)) < 1e3 * MEASURED):
        times.append([0.0] * len(llms))
        for place in range(len(times), len(times) + len(llms)):
            times[-1][place % len(llms)] = 1e3 * answer(llms[place % len(llms)], prompts, tokens)[1]
    return [(answers, list(column)) for answers, column in zip(found, zip(*times, strict=True), strict=True)]

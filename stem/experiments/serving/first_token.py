"""Rows of results/serving: time to the first token, whole prompts and chunks, vLLM's own attention and Stem."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context

import torch
from transformers import AutoTokenizer

from stem.experiments.documents import stdlib_documents
from stem.experiments.serving.engines import engine, fastest
from stem.pretrained import resolve

LAYERS, VOCABULARY = 8, 128256
LENGTHS = (1024, 2048, 4096, 8192, 32768, 131072)  # of whole prompts
CHUNKED_LENGTHS = (32768, 131072)
CHUNK = 8192
DENSITIES = (None, 0.25, 0.1)  # None is vLLM's own attention
TOGETHER, TOGETHER_TOKENS = 8, 32768  # prompts at once, and tokens of each
DECODE_TOKENS, DECODED = 4096, 128  # a prompt, and tokens of its answer after the first
SHOWN = 8  # tokens of an answer in a row
SMALL_BLOCKS = dict(block_size=32, sink_blocks=1, local_blocks=2)  # short prompts have many of them


def large_model_rows() -> list[dict]:
    """Rows on a GPU: eight layers of Llama-3.1-8B's shape with random weights, bf16, 128 tokens a block.

    Returns:
        A row for each attention, chunk and length: attention, density (requested), realised (the density that was
        computed), chunk [tokens] (0 is the whole prompt), tokens of a prompt, requests at a time, first_token_ms (see
        engines.fastest; of the last of several requests), token_ms of each further token (NaN where not measured), and
        answer, the ids of the first request's first tokens.
    """
    cases = [(whole_rows, density, LENGTHS) for density in DENSITIES]
    cases += [(chunked_rows, density, CHUNKED_LENGTHS) for density in DENSITIES]
    # a process for each engine: CUDA graphs of a second one would go to memory that the first has freed
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        return [row for rows in pool.map(_large_model_rows, *zip(*cases, strict=True)) for row in rows]


def _large_model_rows(measure: Callable, density: float | None, lengths: Sequence[int]) -> list[dict]:
    with large_model() as start:
        return measure(start, density, lengths)


@contextmanager
def large_model() -> Iterator:
    """Function engine(settings, longest, chunk) for the model of large_model_rows; decode runs from CUDA graphs."""
    from transformers import LlamaConfig

    sizes = dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8)
    config = LlamaConfig(**sizes, num_hidden_layers=LAYERS, vocab_size=VOCABULARY, max_position_embeddings=2**18)
    config.architectures = ["LlamaForCausalLM"]
    graphs = dict(mode=0, cudagraph_mode="FULL_DECODE_ONLY", cudagraph_capture_sizes=[1, 2, 4, 8])
    options = dict(load_format="dummy", dtype="bfloat16", kv_cache_memory_bytes=12 << 30, gpu_memory_utilization=0.3)
    options |= dict(enforce_eager=False, compilation_config=graphs)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        yield lambda settings, longest, chunk=None: engine(folder, settings, longest, chunk, **options)


def whole_rows(start, density: float | None, lengths: Sequence[int]) -> list[dict]:
    """Rows of whole prompts of these lengths [tokens] by an engine of large_model, one of them with a long answer."""
    settings = None if density is None else dict(density=density)
    with start(settings, max(lengths)) as llm:
        rows = [_row(llm, settings, None, [_ids(tokens, VOCABULARY)]) for tokens in lengths]
        return [*rows, _row(llm, settings, None, [_ids(DECODE_TOKENS, VOCABULARY, 1)], DECODED)]


def chunked_rows(start, density: float | None, lengths: Sequence[int]) -> list[dict]:
    """Rows of prompts in chunks by an engine of large_model: one at a time, and several at once."""
    settings = None if density is None else dict(density=density)
    prompts = [_ids(TOGETHER_TOKENS, VOCABULARY, seed) for seed in range(TOGETHER)]
    with start(settings, max(lengths), CHUNK) as llm:
        rows = [_row(llm, settings, CHUNK, [_ids(tokens, VOCABULARY)]) for tokens in lengths]
        return [*rows, _row(llm, settings, CHUNK, prompts)]


def small_model_rows(tokens: int = 3000, chunk: int = 500, density: float = 0.25) -> list[dict]:
    """Rows on a CPU: the embedded model in fp32, blocks of 32 tokens of a text; columns of large_model_rows.

    Times of further tokens are left out: on a CPU they are smaller than the noise of the prefill.
    """
    folder, found = str(resolve("smollm2")), []
    text = stdlib_documents(["argparse"])["argparse"]
    prompts = [AutoTokenizer.from_pretrained(folder)(text, verbose=False).input_ids[:tokens]]
    for settings in (None, dict(density=density, **SMALL_BLOCKS)):
        for size in (None, chunk):
            with engine(folder, settings, tokens, size, dtype="float32") as llm:
                found.append(_row(llm, settings, size, prompts, SHOWN - 1) | dict(token_ms=float("nan")))
    return found


def _row(
    llm, settings: Mapping | None, chunk: int | None, prompts: Sequence[Sequence[int]], further_tokens: int = 0
) -> dict:
    import stem.vllm

    about = dict(
        attention="vLLM" if settings is None else "Stem", density=1.0 if settings is None else settings["density"]
    )
    (answers, first_token_ms), token_ms = fastest(llm, prompts), float("nan")
    if further_tokens:
        answers, all_ms = fastest(llm, prompts, 1 + further_tokens)
        token_ms = (all_ms - first_token_ms) / further_tokens
    realised = 1.0 if settings is None else stem.vllm.density(llm).density()
    size = dict(chunk=chunk or 0, tokens=len(prompts[0]), requests=len(prompts))
    times = dict(first_token_ms=first_token_ms, token_ms=token_ms)
    row = {**about, "realised": realised, **size, **times, "answer": " ".join(map(str, answers[0][:SHOWN]))}
    print(row, flush=True)
    return row


def _ids(tokens: int, vocabulary: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, vocabulary, (tokens,), generator=generator).tolist()

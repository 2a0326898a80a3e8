"""Rows of results/serving: time to the first token, whole prompts and chunks, vLLM's own attention and Stem."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from transformers import AutoTokenizer

from stem.experiments.documents import stdlib_documents
from stem.experiments.serving.engines import engine, timed
from stem.experiments.speed.drop_in import paired
from stem.pretrained import resolve

LAYERS, VOCABULARY = 8, 128256
LENGTHS = (1024, 2048, 4096, 8192, 32768, 131072)  # of whole prompts
CHUNKED_LENGTHS = (131072, 32768)
CHUNK = 8192
MIN_TOKENS = 4096  # of a sparse prompt, as README starts a server
DENSITIES = (0.25, 0.1)
WAYS = (None, *(dict(density=density, min_tokens=MIN_TOKENS) for density in DENSITIES))  # None: vLLM's own attention
GROUPS = tuple(dict(way, lists="group") for way in WAYS[1:])  # lists that serve all query heads of a key-value head
FP8 = tuple(dict(way, compute="fp8") for way in WAYS[1:])
TOGETHER, TOGETHER_TOKENS = 8, 32768  # prompts at once, and tokens of each
DECODE_TOKENS, DECODED = 4096, 128  # a prompt, and tokens of its answer after the first
SHOWN = 8  # tokens of an answer in a row
SMALL_BLOCKS = dict(block_size=32, sink_blocks=1, local_blocks=2)  # short prompts have many of them


def large_model_rows() -> Iterator[list[dict]]:
    """Rows on a GPU: eight layers of Llama-3.1-8B's shape with random weights, bf16, 128 tokens a block.

    Prompts below MIN_TOKENS stay dense. The engines take turns, seven for whole prompts, which needs 100 GiB, and five
    for chunks. Those of whole prompts decode from CUDA graphs.

    Yields, one case after another:
        A row for each attention, chunk and length: attention, density (requested), lists and compute (see StemConfig),
        realised (the density that was computed), chunk [tokens] (0 is the whole prompt), tokens of a prompt, requests
        at a time, first_token_ms (the shortest of engines.timed; of the last of several requests), speedup over vLLM's
        own attention (the median over rounds of a round's ratio, from speedup_low to speedup_high, 95 %), clock_mhz,
        power_w and capped (see engines.Timing), token_ms of each further token (NaN where not measured), and answer,
        the ids of the first request's first tokens.
    """
    whole = [([_ids(tokens, VOCABULARY)], 0) for tokens in LENGTHS]
    whole += [([_ids(DECODE_TOKENS, VOCABULARY, 1)], DECODED)]
    chunked = [([_ids(tokens, VOCABULARY)], 0) for tokens in CHUNKED_LENGTHS]
    chunked += [([_ids(TOGETHER_TOKENS, VOCABULARY, seed) for seed in range(TOGETHER)], 0)]
    with large_model() as start:
        yield from compared(start, WAYS + GROUPS + FP8, None, whole, kv_cache_memory_bytes=5 << 30)
        yield from compared(start, WAYS + FP8, CHUNK, chunked, enforce_eager=True)


@contextmanager
def large_model() -> Iterator:
    """Function engine(settings, longest, chunk) for the model of large_model_rows."""
    from transformers import LlamaConfig

    sizes = dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8)
    config = LlamaConfig(**sizes, num_hidden_layers=LAYERS, vocab_size=VOCABULARY, max_position_embeddings=2**18)
    config.architectures = ["LlamaForCausalLM"]
    graphs = dict(mode=0, cudagraph_mode="FULL_DECODE_ONLY", cudagraph_capture_sizes=[1, 2, 4, 8])
    shared = dict(load_format="dummy", dtype="bfloat16", kv_cache_memory_bytes=9 << 30, gpu_memory_utilization=0.2)
    shared |= dict(enforce_eager=False, compilation_config=graphs)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        yield lambda settings, longest, chunk, **options: engine(folder, settings, longest, chunk, **shared | options)


def compared(
    start: Callable,
    settings: Sequence[Mapping | None],
    chunk: int | None,
    cases: Sequence[tuple[Sequence, int]],
    **options,
) -> Iterator[list[dict]]:
    """Rows of each case from engines with these settings, all alive; a case is prompts, and answers' further tokens.

    Arguments start, chunk and options: see large_model and engines.engine.
    """
    longest = max(len(ids) for prompts, _ in cases for ids in prompts)
    with ExitStack() as stack:
        llms = [stack.enter_context(start(x, longest, chunk, **options)) for x in settings]
        for prompts, further in cases:
            yield _rows(llms, settings, chunk, prompts, further)


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
                found += _rows([llm], [settings], size, prompts, SHOWN - 1)
    return [row | dict(token_ms=float("nan")) for row in found]


def _rows(
    llms: Sequence,
    settings: Sequence[Mapping | None],
    chunk: int | None,
    prompts: Sequence[Sequence[int]],
    further_tokens: int = 0,
) -> list[dict]:
    """A row for each engine and its settings, the first of several without; answers go on with further_tokens."""
    before = [_block_pairs(*engine) for engine in zip(llms, settings, strict=True)]
    first = measured = timed(llms, prompts)
    if further_tokens:
        measured = timed(llms, prompts, 1 + further_tokens)
    size, rows = dict(chunk=chunk or 0, tokens=len(prompts[0]), requests=len(prompts)), []
    for i, (answers, all_ms, *_) in enumerate(measured):
        kept, causal = _block_pairs(llms[i], settings[i]) - before[i]
        about = dict(attention="vLLM", density=1.0, lists="head", compute="input", realised=1.0)
        if settings[i] is not None:
            own = {name: settings[i].get(name, about[name]) for name in ("density", "lists", "compute")}
            about |= dict(attention="Stem", realised=float(kept / causal)) | own
        about |= size | dict(first_token_ms=min(first[i].all_ms))
        if len(llms) > 1:
            about |= paired(dense / own for dense, own in zip(first[0].all_ms, first[i].all_ms, strict=True))
        token_ms = (min(all_ms) - min(first[i].all_ms)) / further_tokens if further_tokens else float("nan")
        about |= {name: getattr(first[i], name) for name in ("clock_mhz", "power_w", "capped")}
        rows.append(about | dict(token_ms=token_ms, answer=" ".join(map(str, answers[0][:SHOWN]))))
        print(rows[-1], flush=True)
    return rows


def _block_pairs(llm, settings: Mapping | None) -> np.ndarray:
    """(kept, causal) block pairs of an engine so far."""
    import stem.vllm

    report = [] if settings is None else stem.vllm.density(llm)
    return np.array([[row["kept"], row["causal"]] for row in report], float).reshape(-1, 2).sum(0)


def _ids(tokens: int, vocabulary: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, vocabulary, (tokens,), generator=generator).tolist()

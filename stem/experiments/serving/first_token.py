"""Rows of results/serving: time to the first token, whole prompts and chunks, vLLM's own attention and Stem."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence

import torch

from stem.experiments.serving.engines import engine, fastest
from stem.pretrained import resolve

LAYERS, VOCABULARY = 8, 128256
LENGTHS = (1024, 4096, 8192, 32768, 65536, 131072)
DENSITIES = (None, 0.25, 0.1)  # None is vLLM's own attention
CHUNK = 8192
TOGETHER, TOGETHER_TOKENS = 8, 32768  # prompts at once, and tokens of each
SMALL_BLOCKS = dict(block_size=32, sink_blocks=1, local_blocks=2)  # short prompts have many of them


def large_model_rows() -> list[dict]:
    """Rows on a GPU: eight layers of Llama-3.1-8B's shape with random weights, bf16, 128 tokens a block.

    Returns:
        A row for each attention, chunk and length: attention, density (requested), realised (the density that was
        computed), chunk [tokens] (0 is the whole prompt), tokens of a prompt, requests at a time, first_token_ms (best
        of 3; of the last of several requests).
    """
    from transformers import LlamaConfig

    sizes = dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8)
    config = LlamaConfig(**sizes, num_hidden_layers=LAYERS, vocab_size=VOCABULARY, max_position_embeddings=2**18)
    config.architectures = ["LlamaForCausalLM"]
    options = dict(load_format="dummy", dtype="bfloat16", kv_cache_memory_bytes=12 << 30, gpu_memory_utilization=0.3)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        for chunk, lengths in ((None, LENGTHS), (CHUNK, LENGTHS[-3:])):
            for density in DENSITIES:
                settings = None if density is None else dict(density=density)
                with engine(folder, settings, max(lengths), chunk, **options) as llm:
                    for tokens in lengths:
                        found.append(_row(llm, settings, chunk, [_ids(tokens, VOCABULARY)]))
                    if chunk:
                        prompts = [_ids(TOGETHER_TOKENS, VOCABULARY, seed) for seed in range(TOGETHER)]
                        found.append(_row(llm, settings, chunk, prompts))
    return found


def small_model_rows(tokens: int = 3000, chunk: int = 500, density: float = 0.25) -> list[dict]:
    """Rows on a CPU: the embedded model in fp32, blocks of 32 tokens; columns of large_model_rows."""
    found = []
    for settings in (None, dict(density=density, **SMALL_BLOCKS)):
        for size in (None, chunk):
            with engine(str(resolve("smollm2")), settings, tokens, size, dtype="float32") as llm:
                found.append(_row(llm, settings, size, [_ids(tokens, 49152)]))
    return found


def _row(llm, settings: Mapping | None, chunk: int | None, prompts: Sequence[Sequence[int]]) -> dict:
    import stem.vllm

    about = dict(
        attention="vLLM" if settings is None else "Stem", density=1.0 if settings is None else settings["density"]
    )
    first_token_ms = fastest(llm, prompts)
    realised = 1.0 if settings is None else stem.vllm.density(llm).density()
    size = dict(chunk=chunk or 0, tokens=len(prompts[0]), requests=len(prompts))
    row = {**about, "realised": realised, **size, "first_token_ms": first_token_ms}
    print(row, flush=True)
    return row


def _ids(tokens: int, vocabulary: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, vocabulary, (tokens,), generator=generator).tolist()

"""Time to first token: the prefill of a whole model with random weights, dense and with Stem, and its peak memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from stem import hf
from stem.config import StemConfig
from stem.experiments.speed.bench import first_line, latencies, with_speedups
from stem.experiments.speed.candidates import CONFIGS, DENSE, Shape

LLAMA_8B = dict(  # meta-llama/Llama-3.1-8B, without its weights and its rescaled rotary frequencies
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=128256,
    max_position_embeddings=2**17,
)
TINY = dict(  # a small model of this kind, for a CPU
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=64,
    vocab_size=1024,
    max_position_embeddings=2**17,
)
LENGTHS = {  # tokens of each profile
    ("cuda", "full"): [2**17, 2**15, 2**14, 2**16],  # the headline number first
    ("cuda", "smoke"): [2**14],
    ("cpu", "full"): [2**11, 2**12, 2**13],
    ("cpu", "smoke"): [2**12],
}
CALLS, SECONDS = 3, 3.0  # calls of one length stop at either limit, after a warm-up call
TIMING = "perf_counter around a prefill of the whole model, one to three calls, clocks not locked"


def random_llama(settings: dict[str, int], device: str, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """A Llama of transformers with random normal weights on the device; nothing is downloaded."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(seed)
    config = LlamaConfig(**settings, tie_word_embeddings=False)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


def first_token(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits of the last position after a prefill that fills a key-value cache, as in generation: [1, V]."""
    return model(ids, use_cache=True, logits_to_keep=1).logits[:, 0]


def compare(
    model: nn.Module, tokens: int, backends: dict[str, SDPBackend], config: StemConfig, seed: int = 0
) -> list[dict[str, Any]]:
    """Time to first token of each dense back end, then of Stem (provider "stem"): one row each.

    Args:
        model: From `random_llama`; Stem is disabled afterwards.
        tokens: Length of the prompt, random token ids.
        backends: Dense back ends of SDPA by name.
        config: Used in every layer.
        seed: Of the token ids.
    Returns:
        provider, density, latency_ms with p20 and p80, peak_memory_mib (weights and cache included; CUDA only), error.
    """
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(seed))
    ids = ids.to(model.device)
    rows = [_timed(name, model, ids, partial(sdpa_kernel, backend)) for name, backend in backends.items()]
    return [*rows, _timed("stem", model, ids, partial(hf.stem_prefill, model, config))]


@torch.inference_mode()
def _timed(
    provider: str, model: nn.Module, ids: Tensor, attention: Callable[[], AbstractContextManager]
) -> dict[str, Any]:
    """Row of one kind of attention; `attention()` switches it on, and yields a Report for Stem."""
    row, on_cuda = dict(provider=provider, density=1.0, error=""), ids.is_cuda
    try:
        with attention() as report:
            if not first_token(model, ids).isfinite().all():
                raise FloatingPointError("the logits of the last position are not finite")
            if on_cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            times = []
            while len(times) < CALLS and sum(times) < SECONDS:
                start = time.perf_counter()
                first_token(model, ids).max().item()  # waits for the result
                times.append(time.perf_counter() - start)
            row |= latencies([1e3 * seconds for seconds in times])
            if on_cuda:
                row["peak_memory_mib"] = torch.cuda.max_memory_allocated() / 2**20
            if provider == "stem":
                row["density"] = report.density()
    except Exception as error:  # one provider's failure costs one row
        row["error"] = first_line(error)
    return row


def case(
    model: torch.nn.Module, tokens: int, device: str, *, configs: Iterable[str], seed: int = 0
) -> list[dict[str, Any]]:
    """Rows of operation "ttft" (time to first token) of one length: the dense back ends, then Stem with each config.

    Args:
        model: From `random_llama`; tokens: Length of the prompt.
        configs: Names in CONFIGS.
        seed: Of the token ids.
    """
    settings, dtype = model.config, str(model.dtype).removeprefix("torch.")
    heads = settings.num_attention_heads, settings.num_key_value_heads, settings.head_dim
    common = dict(operation="ttft") | asdict(Shape(tokens, 1, *heads, dtype)) | dict(timing=TIMING)
    rows = []
    for name in configs:
        config, backends = CONFIGS[name], {} if rows else DENSE[device]
        for row in compare(model, tokens, backends, config, seed):
            own = dict(config=name, block_size=config.block_size) if row["provider"] == "stem" else dict(config="dense")
            rows.append(common | own | row)
    return with_speedups(rows, seed)

"""Time to first token: the prefill of a whole model with random weights, dense and with Stem, and its peak memory."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from stem import StemConfig, hf
from stem.experiments.speed import peers
from stem.experiments.speed.bench import first_line, latencies, with_speedups
from stem.experiments.speed.candidates import DENSE, Shape

# meta-llama/Llama-3.1-8B without weights and rescaled rotary frequencies; the other sizes are LlamaConfig's defaults
LLAMA_8B = dict(intermediate_size=14336, num_key_value_heads=8, vocab_size=128256)
TINY = dict(  # a small model of this kind, for a CPU
    hidden_size=192, intermediate_size=512, num_hidden_layers=4,
    num_attention_heads=3, num_key_value_heads=1, vocab_size=1024,
)  # fmt: skip
LENGTHS = {  # tokens of each profile
    ("cuda", "full"): [2**17, 2**15, 2**14, 2**16],  # the headline number first
    ("cuda", "smoke"): [2**14],
    ("cpu", "full"): [2**11, 2**12, 2**13],
    ("cpu", "smoke"): [2**12],
}
FASTEST_ALONE = 2**17  # tokens from which on FlashAttention-3, where installed, is the only dense attention timed
CALLS, SECONDS = 3, 3.0  # calls of one length stop at either limit, after a warm-up call
TIMING = "perf_counter around a prefill of the whole model, one to three calls, clocks not locked"


def random_llama(settings: dict[str, int], device: str, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """A Llama of transformers with random normal weights on the device; nothing is downloaded."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(seed)
    config = LlamaConfig(**settings, max_position_embeddings=2**17, tie_word_embeddings=False)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


def first_token(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits of the last position after a prefill that fills a key-value cache, as in generation: [1, V]."""
    return model(ids, use_cache=True, logits_to_keep=1).logits[:, 0]


def dense_contexts(model: nn.Module, device: str) -> dict[str, Callable[[], AbstractContextManager]]:
    """Contexts by provider in which a model attends densely: SDPA's back ends, and on CUDA the installed peers."""
    contexts = {name: partial(_sdpa_of, model, backend) for name, backend in DENSE[device].items()}
    found = peers.installed(peers.DENSE) if device == "cuda" else []
    return contexts | {name: partial(peers.attention_of, model, name) for name in found}


@contextmanager
def _sdpa_of(model: nn.Module, backend: SDPBackend) -> Iterator[None]:
    with peers.implementation_of(model, "sdpa"), sdpa_kernel(backend):
        yield


def case(
    model: nn.Module, tokens: int, device: str, *, configs: Mapping[str, StemConfig], seed: int = 0
) -> list[dict[str, Any]]:
    """Rows of operation "ttft" (time to first token) of one length: dense back ends, then Stem with each config.

    The prompt holds random token ids. Peak memory includes weights and cache. Stem is disabled afterwards. `outside_ms`
    is the time of the model without attention.
    """
    settings, dtype = model.config, str(model.dtype).removeprefix("torch.")
    heads = settings.num_attention_heads, settings.num_key_value_heads, settings.head_dim
    common = dict(operation="ttft") | asdict(Shape(tokens, 1, *heads, dtype)) | dict(timing=TIMING)
    ids = torch.randint(settings.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(seed))
    timed = partial(_timed, model, ids.to(model.device))
    rows, common = [], common | dict(outside_ms=timed(peers.no_attention(model)).get("latency_ms"))
    contexts = dense_contexts(model, device)
    if "fa3" in contexts:
        names = [name for name in ("fa3", "sdpa_cudnn") if name == "fa3" or tokens < FASTEST_ALONE]
        contexts = {name: contexts[name] for name in names}  # FlashAttention-4 must compile, and 2 is slower
    for name, context in contexts.items():
        rows.append(common | dict(provider=name, config="dense") | timed(context()))
    for name, config in configs.items():
        about = dict(provider="stem", config=name, block_size=config.block_size)
        rows.append(common | about | timed(hf.stem_prefill(model, config)))
    return with_speedups(rows, seed)


@torch.inference_mode()
def _timed(model: nn.Module, ids: Tensor, attention: AbstractContextManager) -> dict[str, Any]:
    """Density, times, peak memory and error of one kind of attention; Stem's context yields its report."""
    row, on_cuda = dict(density=1.0, error=""), ids.is_cuda
    try:
        with attention as report:
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
            if isinstance(report, hf.Report):
                row["density"] = report.density()
    except Exception as error:  # one provider's failure costs one row
        row["error"] = first_line(error)
    return row

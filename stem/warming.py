"""Compilation ahead of the first prompt."""

import sys
import time
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from stem.attention import block_sparse_attention, stem_attention
from stem.config import StemConfig, check_config
from stem.impl.coverage import impl_for, resolve_impl
from stem.validation import check_integer


class WarmUp(NamedTuple):
    kernels: int  # compiled now; kernels loaded from Triton's cache on disk do not count
    seconds: float


def warm_up(
    model: nn.Module | tuple[int, int, int],
    config: StemConfig | None = None,
    lengths: Iterable[int] = (),
    *,
    impl: str | None = None,
    batch_size: int = 1,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> WarmUp:
    """Compile the kernels that prompts of these lengths need, by attention on random tensors (no paper source).

    They stay in Triton's cache on disk (TRITON_CACHE_DIR). One length at which scores choose blocks serves all lengths
    up to 1,024 blocks; beyond, each power of two of blocks has kernels of its own. The progress bar needs tqdm.
    impl="torch", a CPU's default, compiles nothing; a line on stderr says so.

    Args:
        model: A model of transformers, or the shape (Hq, Hkv, D): query heads, key-value heads and head_dim.
        config, impl: As in stem_attention. Default: those of each layer if Stem is enabled on the model.
        lengths: Tokens of the prompts, >= 1 each.
        batch_size: Prompts at once.
        dtype, device: Default: the model's; for a shape bf16, and CUDA where there is one.
    Raises:
        TypeError, ValueError: For a bad model, shape, config or length, or an impl that does not cover them.
    """
    start, compiled = time.perf_counter(), []
    lengths = sorted({lengths} if isinstance(lengths, int) else set(lengths))
    if not lengths:
        raise ValueError("lengths must hold at least one number of tokens, got none")
    for name, value in (("batch_size", batch_size), *(("lengths", tokens) for tokens in lengths)):
        check_integer(name, value, 1)
    layers = _layers(model, config, impl, dtype, device)
    if all(_runs_torch(*layer) for layer in layers):
        print("stem.warm_up: impl='torch' compiles nothing", file=sys.stderr)
        return WarmUp(0, 0.0)
    from triton import knobs

    note = lambda cache_hit, **others: compiled.extend([] if cache_hit else [others])  # noqa: E731
    before, knobs.compilation.listener = knobs.compilation.listener, note
    try:
        for layer, tokens in _with_progress([(layer, tokens) for layer in layers for tokens in lengths]):
            _run(*layer, tokens, batch_size)
    finally:
        knobs.compilation.listener = before
    return WarmUp(len(compiled), time.perf_counter() - start)


def _run(shape, config, impl, dtype, device, tokens: int, batch_size: int) -> None:
    sizes = [(batch_size, tokens, heads, shape[2]) for heads in (*shape[:2], shape[1])]  # as projections give
    q, k, v = (torch.randn(size, dtype=dtype, device=device).transpose(1, 2) for size in sizes)
    if isinstance(config, StemConfig):
        out = stem_attention(q, k, v, config, impl=impl)
    else:
        out = block_sparse_attention(q, k, v, config(q, k, v), impl=impl)
    torch.cuda.synchronize(out.device) if out.is_cuda else None


def _layers(model, config, impl, dtype, device) -> list[tuple]:
    """Shape, config (or Selector), impl, dtype and device of the layers that may be sparse; equal ones count once."""
    check_config(StemConfig() if config is None else config)
    if not isinstance(model, nn.Module):
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return [(_shape(model), config or StemConfig(), impl, dtype or torch.bfloat16, device)]
    from stem.hf.models import sparse_layers

    return sparse_layers(model, config, impl, dtype, device)


def _shape(shape) -> tuple[int, int, int]:
    if not isinstance(shape, tuple | list) or len(shape) != 3:
        raise TypeError(f"model must be a transformers model or (Hq, Hkv, D), got {shape!r}")
    for name, value in zip(("Hq", "Hkv", "D"), shape, strict=True):
        check_integer(name, value, 1)
    if shape[0] % shape[1]:
        raise ValueError(f"Hq must be a multiple of Hkv, got {shape!r}")
    return tuple(shape)


def _runs_torch(shape, config, impl, dtype, device) -> bool:
    impl = impl_for(getattr(config, "compute", "input"), impl)  # one that covers nothing fails when it is called
    return (impl or resolve_impl(None, device, dtype, shape[2], 128)) in ("torch", "reference")


def _with_progress(calls: list) -> Iterable:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return calls
    return tqdm(calls, desc="stem.warm_up", unit="length")

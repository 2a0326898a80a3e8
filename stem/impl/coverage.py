"""Names of the implementations, which problems each covers, and the forward kernel behind a name."""

from collections.abc import Callable
from importlib import import_module

import torch

from stem.validation import check_impl

IMPLS = ("reference", "torch", "triton", "hopper", "flex", "hopper_fp8")


def resolve_impl(impl: str | None, device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int) -> str:
    """The explicit implementation (ValueError or TypeError unless it covers the problem), else the fastest one."""
    chosen = check_impl(impl, IMPLS, device, dtype)
    if impl in ("hopper", "hopper_fp8") or (impl is None and chosen == "triton"):
        from stem.kernels.hopper_forward import unsupported

        reason = unsupported(device, dtype, head_dim, block_size)
        if impl is None:
            return "triton" if reason else "hopper"
        if reason:
            raise ValueError(f"impl={impl!r} does not cover {reason}")
    return chosen


def impl_for(compute: str, impl: str | None) -> str | None:
    """The implementation that a config's `compute` asks for; ValueError if impl names another one."""
    if compute == "fp8" and impl not in (None, "hopper_fp8"):
        raise ValueError(f"impl={impl!r} does not compute in FP8; compute='fp8' takes impl None or 'hopper_fp8'")
    return "hopper_fp8" if compute == "fp8" else impl


def sparse_kernel(impl: str, block_size: int = 128) -> Callable:
    """Forward kernel of an implementation: (q, k, v, kv_indices, kv_num_blocks, block_size, scale) -> out, lse."""
    name = {"triton": "sparse", "hopper_fp8": "fp8"}.get(impl, "pairs" if block_size == 64 else "hopper")
    return import_module(f"stem.kernels.{name}_forward").sparse_forward

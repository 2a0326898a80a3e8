"""Checks of arguments: each error names the argument, its value and what is accepted."""

from functools import lru_cache
from math import inf, isfinite
from numbers import Integral, Real

import torch
from torch import Tensor

from stem.kernels.mode import check_triton_on_cpu
from stem.transforms import is_transformed

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_choice(name: str, value: object, accepted: tuple) -> None:
    """Raise ValueError unless value is one of the accepted values."""
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}, got {value!r}")


def check_integer(name: str, value: object, low: int) -> None:
    """Raise unless value is an int >= low; a bool is no int."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int >= {low}, got {value!r}")
    if value < low:
        raise ValueError(f"{name} must be >= {low}, got {value!r}")


def check_number(name: str, value: object, low: float, high: float = inf, *, open_below: bool = False) -> None:
    """Raise unless value is a finite number in [low, high], or in (low, high] with `open_below`; bools are refused."""
    accepted = f"{'(' if open_below else '['}{low:g}, {high:g}{')' if high == inf else ']'}"
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number in {accepted}, got {value!r}")
    if not isfinite(value) or not (low < value <= high if open_below else low <= value <= high):
        raise ValueError(f"{name} must be in {accepted}, got {value!r}")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and statistics: fp64 for fp64 inputs, fp32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise unless q [B, Hq, Nq, D] and k, v [B, Hkv, Nkv, D] form a causal attention input (see stem_attention)."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    # torch.compile reads through the cache, and would warn
    check = check_layouts.__wrapped__ if torch.compiler.is_compiling() else check_layouts
    check((q.shape, q.dtype, q.device), (k.shape, k.dtype, k.device), (v.shape, v.dtype, v.device))


@lru_cache(maxsize=4096)
def check_layouts(*layouts: tuple[torch.Size, torch.dtype, torch.device]) -> None:
    """check_qkv from shape, dtype and device of q, k and v."""
    (q_shape, q_dtype, q_device), (k_shape, _, _), (v_shape, _, _) = layouts
    for name, (shape, dtype, _) in zip("qkv", layouts, strict=True):
        if len(shape) != 4:
            raise ValueError(f"{name} must be [batch, heads, tokens, head_dim], got shape {tuple(shape)}")
        if dtype not in DTYPES:
            raise TypeError(f"{name} must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
        if 0 in (shape[1], shape[3]):
            raise ValueError(f"{name} may be empty in batch and tokens only, got shape {tuple(shape)}")
    (batch, q_heads, q_len, head_dim), (_, kv_heads, kv_len, _) = q_shape, k_shape
    for name, (shape, dtype, device) in zip("kv", layouts[1:], strict=True):
        if dtype != q_dtype:
            raise TypeError(f"{name} must have q's dtype {q_dtype}, got {dtype}")
        if device != q_device:
            raise ValueError(f"{name} must be on q's device {q_device}, got {device}")
        if shape[0] != batch:
            raise ValueError(f"{name} must have q's batch size {batch}, got {shape[0]}")
        if shape[3] != head_dim:
            raise ValueError(f"{name} must have q's head_dim {head_dim}, got {shape[3]}")
    if k_shape != v_shape:
        raise ValueError(f"v must have k's shape {tuple(k_shape)}, got {tuple(v_shape)}")
    if q_heads % kv_heads:
        raise ValueError(f"q's heads must be a multiple of k's heads {kv_heads}, got {q_heads}")
    if q_len > kv_len:
        raise ValueError(f"q must have at most k's {kv_len} tokens, got {q_len}")
    if head_dim > 256:
        raise ValueError(f"head_dim must be in 1..256, got {head_dim}")


def check_finite(**tensors: Tensor) -> None:
    """Raise ValueError if a CPU tensor holds NaN or infinity; on CUDA the check would synchronise.

    A NaN score never selects a block, and NaN reaches only the rows that attend to it.
    """
    if torch.compiler.is_compiling():
        return
    for name, x in tensors.items():
        if not (x.is_cpu and x.numel()):
            continue
        extremes = (x.amin(), x.amax()) if is_transformed(x) else x.aminmax()  # neither copies x; the latter has no jvp
        if not torch.stack(extremes).isfinite().all():
            raise ValueError(f"{name} must be finite, got {int((~x.isfinite()).sum())} NaN or infinite values")


def check_scale(scale: float | None, head_dim: int) -> float:
    """The softmax scale, head_dim**-0.5 when None."""
    if scale is None:
        return head_dim**-0.5
    check_number("scale", scale, 0.0, open_below=True)
    return float(scale)


def check_sinks(sinks: Tensor, q: Tensor) -> None:
    """Raise unless sinks are one finite number for each head of q [B, Hq, Nq, D], on its device."""
    if not isinstance(sinks, Tensor):
        raise TypeError(f"sinks must be a torch.Tensor or None, got {type(sinks).__name__}")
    if sinks.dtype not in DTYPES:
        raise TypeError(f"sinks must be one of {', '.join(map(str, DTYPES))}, got {sinks.dtype}")
    if sinks.shape != q.shape[1:2]:
        raise ValueError(f"sinks must be [{q.shape[1]}], one for each head of q, got shape {tuple(sinks.shape)}")
    if sinks.device != q.device:
        raise ValueError(f"sinks must be on q's device {q.device}, got {sinks.device}")
    check_finite(sinks=sinks)


def check_prompt_length(prompt_length: int | None, kv_len: int) -> None:
    """Raise unless prompt_length is None or an int that the keys so far do not exceed."""
    if prompt_length is None:
        return
    if not isinstance(prompt_length, Integral) or isinstance(prompt_length, bool):
        raise TypeError(f"prompt_length must be an int or None, got {prompt_length!r}")
    if prompt_length < kv_len:
        raise ValueError(f"prompt_length must be at least k's {kv_len} tokens, got {prompt_length}")


def check_impl(impl: str | None, accepted: tuple[str, ...], device: torch.device, dtype: torch.dtype) -> str:
    """Name of the implementation to run: the explicit choice, or "triton" on CUDA and "torch" elsewhere."""
    if impl is None:
        return "triton" if device.type == "cuda" and dtype != torch.float64 else "torch"
    if impl not in accepted:
        raise ValueError(f"impl must be None or one of {', '.join(map(repr, accepted))}, got {impl!r}")
    if impl == "triton" and dtype == torch.float64:
        raise TypeError("impl='triton' takes float16, bfloat16 or float32, got torch.float64")
    if impl == "triton" and device.type == "cpu":
        check_triton_on_cpu()
    return impl

"""Attention kernels of other projects, compared with where they are installed: `pip install ".[peers]"`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

FA3, FA4 = "fa3_fwd_interface", "flash_attn.cute.interface"
DENSE = {"fa3": FA3, "fa4": FA4}  # provider -> its module; dense causal attention in 16 bits
FP8 = {"fa3_fp8": FA3}  # dense, with inputs that were rounded to e4m3 before the clock starts
SPARSE = {"fa4_sparse": FA4, "flex_flash": FA4}  # over Stem's blocks
NONE = "none"  # provider and config of a model without attention, see `no_attention`
LARGEST_E4M3 = torch.finfo(torch.float8_e4m3fn).max


def installed(providers: dict[str, str]) -> list[str]:
    """Providers whose module is installed; a module that cannot be imported counts, and its row holds the error."""
    return [provider for provider, module in providers.items() if _exists(module)]


def _exists(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of a package above it
        return False


@cache
def attention_function(provider: str) -> Callable:
    """flash_attn_func of a provider's module: tensors [B, N, H, D]."""
    return import_module((DENSE | FP8 | SPARSE)[provider]).flash_attn_func


def attend(provider: str, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Dense causal attention by "fa3" or "fa4", tensors [B, H, N, D]."""
    tokens_first = (x.transpose(1, 2) for x in (q, k, v))
    return _output(attention_function(provider)(*tokens_first, softmax_scale=scale, causal=True))


@contextmanager
def attention_of(model: nn.Module, provider: str) -> Iterator[None]:
    """Dense attention by "fa3" or "fa4" in a model of transformers, for unpadded prompts, while the context lasts."""
    from transformers import AttentionInterface, AttentionMaskInterface

    def forward(module, query, key, value, attention_mask, scaling=None, **options):
        return attend(provider, query, key, value, scaling).transpose(1, 2), None

    AttentionInterface.register(provider, forward)
    AttentionMaskInterface.register(provider, lambda *sizes, **options: None)
    with implementation_of(model, provider):
        yield


@contextmanager
def no_attention(model: nn.Module) -> Iterator[None]:
    """Queries in place of attention's output, in a model of transformers: its time is the model's outside attention."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NONE, lambda module, query, *others, **options: (query.transpose(1, 2), None))
    AttentionMaskInterface.register(NONE, lambda *sizes, **options: None)
    with implementation_of(model, NONE):
        yield


@contextmanager
def implementation_of(model: nn.Module, name: str) -> Iterator[None]:
    """An attention implementation of transformers in a model, also in one on which Stem is enabled, for a while.

    `model.set_attn_implementation` would read source code of the model, and a call timed next would find cold caches.
    """
    before = model.config._attn_implementation
    model.config._attn_implementation = {"": name}
    try:
        yield
    finally:
        model.config._attn_implementation = {"": before}


def attend_in_fp8(inputs: tuple[Tensor, ...]) -> Tensor:
    """Dense causal attention by FlashAttention-3 on the result of `rounded_to_fp8`, bf16 [B, H, N, D]."""
    *tokens_first, q_descale, k_descale, v_descale = inputs
    descales = dict(q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    return _output(attention_function("fa3_fp8")(*tokens_first, causal=True, **descales))


def rounded_to_fp8(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """q, k and v as e4m3 [B, N, H, D] with one scale for each KV head and its queries, then these scales [B, Hkv]."""
    kv_heads, rounded, scales = k.shape[1], [], []
    for x in (q, k, v):
        groups = x.unflatten(1, (kv_heads, -1))
        scale = groups.abs().amax((2, 3, 4)).float().clamp_min(1e-12) / LARGEST_E4M3  # [B, Hkv]
        scaled = (groups.float() / scale[:, :, None, None, None]).clamp(-LARGEST_E4M3, LARGEST_E4M3)
        rounded.append(scaled.to(torch.float8_e4m3fn).flatten(1, 2).transpose(1, 2).contiguous())
        scales.append(scale)
    return *rounded, *scales


def attend_to_blocks(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """FlashAttention-4 over the blocks of BlockSelection.to_block_mask, tensors [B, H, N, D]."""
    lists = mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices  # masked, then full
    blocks = import_module("flash_attn.cute.block_sparsity").BlockSparseTensorsTorch(*lists, block_size=mask.BLOCK_SIZE)
    tokens_first = (x.transpose(1, 2) for x in (q, k, v))
    options = dict(mask_mod=_causal_mask(), block_sparse_tensors=blocks, pack_gqa=False)
    return _output(attention_function("fa4_sparse")(*tokens_first, **options))


@cache
def _causal_mask() -> Callable:
    jit = import_module("cutlass.cute").jit

    @jit
    def causal(batch, head, query, key, lengths, tensors):
        return key <= query

    return causal


def _output(found) -> Tensor:
    """The output [B, H, N, D] of a function that returns [B, N, H, D], alone or before the log-sum-exp."""
    return (found[0] if isinstance(found, tuple) else found).transpose(1, 2)

"""vLLM's CPU back end with Stem, and its pages, whose order inside a page depends on dtype and instruction set."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from stem.transforms import lasting_tensors
from stem.vllm.backend import StemBuilder, StemImpl


class StemCPUBuilder(StemBuilder, CPUAttentionMetadataBuilder):
    """Metadata builder of the CPU back end."""


class StemCPUImpl(StemImpl, CPUAttentionBackendImpl):
    """Attention implementation of the CPU back end."""

    def gathered(self, layer, kv_cache: Tensor, pages: Tensor, stop: int) -> tuple[Tensor, Tensor]:
        return gather_packed(kv_cache, pages, stop, layer.isa)


class StemCPUBackend(CPUAttentionBackend):
    """vLLM's CPU back end, sparse where additional_config has settings for Stem."""

    @staticmethod
    def get_impl_cls() -> type:
        return StemCPUImpl

    @staticmethod
    def get_builder_cls() -> type:
        return StemCPUBuilder


def gather_packed(kv_cache: Tensor, pages: Tensor, stop: int, isa: str) -> tuple[Tensor, Tensor]:
    """Keys and values of a request's first `stop` positions, [1, Hkv, stop, D] each.

    Args:
        kv_cache: [pages, Hkv, page, 2 * D]; in memory, a head's keys of a page come before its values.
        pages: int [..], the request's pages in order.
        isa: vLLM's name of the instruction set that decides the order of the numbers.
    """
    _, num_heads, page, width = kv_cache.shape
    here = kv_cache[pages[: -(-stop // page)].long()].flatten(2).unflatten(2, (2, -1))  # [n, Hkv, 2, page * D]
    orders = packed_orders(num_heads, page, width // 2, kv_cache.dtype, isa)
    return tuple(
        here[:, :, part, order].unflatten(2, (page, -1)).transpose(0, 1).flatten(1, 2)[None, :, :stop]
        for part, order in enumerate(orders)
    )


@lru_cache
def packed_orders(num_heads: int, page: int, head_dim: int, dtype: torch.dtype, isa: str) -> tuple[Tensor, Tensor]:
    """Where the numbers of a page stand in memory, int64 [page * D] for keys and for values, row by row.

    vLLM's own function writes rows into a page here: first the number of the row, then that of the dimension, which
    every dtype holds exactly.
    """
    with lasting_tensors():
        rows = torch.arange(page)[:, None, None].expand(page, num_heads, head_dim)
        dims = torch.arange(head_dim).expand(page, num_heads, head_dim)
        places = []
        for numbers in (rows, dims):
            cache = torch.zeros(2, 1, num_heads, page, head_dim, dtype=dtype)  # keys and values
            x = numbers.to(dtype).contiguous()
            ops.cpu_attn_reshape_and_cache(x, x, cache[0], cache[1], torch.arange(page), isa)
            places.append(cache[:, 0, 0].flatten(1).long())  # [2, page * D]
        row, dim = places
        return tuple((row * head_dim + dim).argsort(dim=-1))

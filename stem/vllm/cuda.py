"""vLLM's FlashAttention back end with Stem, under the name CUSTOM."""

from __future__ import annotations

from torch import Tensor
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from stem.vllm.backend import StemBuilder, StemImpl
from stem.vllm.pages import gather


class StemCUDABuilder(StemBuilder, FlashAttentionMetadataBuilder):
    """Metadata builder of the FlashAttention back end."""


class StemCUDAImpl(StemImpl, FlashAttentionImpl):
    """Attention implementation of the FlashAttention back end."""

    def gathered(self, layer, kv_cache: Tensor, pages: Tensor, stop: int) -> tuple[Tensor, Tensor]:
        return gather(kv_cache, pages, stop)


class StemCUDABackend(FlashAttentionBackend):
    """vLLM's FlashAttention back end, sparse in prefill."""

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type:
        return StemCUDAImpl

    @staticmethod
    def get_builder_cls() -> type:
        return StemCUDABuilder

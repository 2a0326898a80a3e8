"""vLLM's FlashAttention back end with Stem, under the name CUSTOM."""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from stem.budget import kept_blocks
from stem.vllm.backend import Chunk, StemBuilder, StemImpl, causal_pairs
from stem.vllm.fp8 import attend_in_fp8
from stem.vllm.pages import attend_to_pages, gather, readable_rows


class StemCUDABuilder(StemBuilder, FlashAttentionMetadataBuilder):
    """Metadata builder of the FlashAttention back end."""


class StemCUDAImpl(StemImpl, FlashAttentionImpl):
    """Attention implementation of the FlashAttention back end."""

    def attend(self, layer, q: Tensor, kv_cache: Tensor, chunk: Chunk, out: Tensor) -> None:
        """See StemImpl; kernels read the pages where they can."""
        config = self.stem_config
        rows = chunk.block_rows(config)
        views = readable_rows(q, kv_cache, config, rows)
        if views is None:
            return super().attend(layer, q, kv_cache, chunk, out)
        past = chunk.sums.pop(layer.layer_name, None)
        if config.compute == "fp8":
            about = q, kv_cache, views, chunk.pages, chunk.stop, config, rows, self.scale, out, chunk.prompt_length
            counts, past = attend_in_fp8(*about, past)
        else:
            counts, past = attend_to_pages(q, *views, chunk.pages, chunk.stop, config, rows, self.scale, out, past)
        if past and not chunk.is_last:
            chunk.sums[layer.layer_name] = past
        if kept_blocks(rows, config) is None:
            self.count_kept(counts.sum(dtype=torch.int64), self.num_heads * causal_pairs(rows))

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

"""Attention of a batch in vLLM: prompts through Stem, all other rows through vLLM's own attention.

Two mixins extend the classes of a platform's back end, see cpu.py and cuda.py. The builder, which vLLM asks once a
step, decides which rows are sparse. The implementation, which vLLM asks in every layer, runs them.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor
from vllm.config import get_current_vllm_config, get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionCGSupport

from stem.attention import stem_attention
from stem.budget import BlockRows, keeps_every_block, kept_blocks
from stem.config import StemConfig
from stem.vllm import settings
from stem.vllm.prompts import Prompts, follow_prompts, prompts_of
from stem.vllm.report import Counts

logger = init_logger("vllm.plugins.stem")
ENGINES: WeakValueDictionary[str, Engine] = WeakValueDictionary()


class Chunk(NamedTuple):
    """Prompt tokens of a request in this step: all of its prompt or a part."""

    request: int  # row of the batch
    pages: Tensor  # int32, of the request, in order
    tokens: slice  # of the batch
    stop: int  # position after the last of them
    prompt_length: int  # tokens of the whole prompt
    sums: dict[str, tuple[Tensor, Tensor]]  # layer -> block sums of earlier chunks, see pages.attend_to_pages

    @property
    def is_last(self) -> bool:
        return self.stop == self.prompt_length

    def block_rows(self, config: StemConfig) -> BlockRows:
        return BlockRows.of(self.tokens.stop - self.tokens.start, self.stop, config.block_size, self.prompt_length)


class Batch(NamedTuple):
    """How a step runs in layers of one config."""

    chunks: list[Chunk]  # sparse
    dense_tokens: Tensor | None  # int64 [tokens], in order; None if there are none
    dense_metadata: object  # vLLM's, for these tokens alone


class Engine:
    """Sparse layers of one engine in this process, and the block pairs that they computed."""

    def __init__(self, vllm_config) -> None:
        attention = get_layers_from_vllm_config(vllm_config, Attention)
        self.layers = settings.sparse_layers(vllm_config, attention)
        self.min_tokens = settings.stem_settings(vllm_config).get("min_tokens", 0)
        follow_prompts(vllm_config)
        about = [(x.index, "stem" if x.config else f"vllm: {x.reason}") for x in self.layers.values()]
        self.counts = Counts(vllm_config.instance_id, about)
        for position, (name, layer) in enumerate(self.layers.items()):
            if layer.config:
                impl = attention[name].impl
                impl.stem_config, impl.count_kept = layer.config, partial(self.counts.add_kept, position)
        self._log(vllm_config)

    @classmethod
    def of(cls, vllm_config) -> Engine | None:
        """The engine of a config of vLLM, made at the first call; None without settings for Stem."""
        if settings.stem_settings(vllm_config) is None:
            return None
        engine = ENGINES.get(vllm_config.instance_id)
        if engine is None:
            engine = ENGINES[vllm_config.instance_id] = cls(vllm_config)
        return engine

    def count(self, names: list[str], chunks: list[Chunk], heads: dict[str, int]) -> None:
        """Add the block pairs of these chunks in some layers; where scores decide how many, the layer adds them."""
        self.counts.flush()
        pairs = {}  # config -> (kept, causal) block pairs of a head
        for position, (name, layer) in enumerate(self.layers.items()):
            if name in names and layer.config:
                if layer.config not in pairs:
                    pairs[layer.config] = np.sum([self._pairs(chunk, layer.config) for chunk in chunks], 0)
                self.counts.pairs[position] += heads[name] * pairs[layer.config]

    def _pairs(self, chunk: Chunk, config: StemConfig) -> tuple[int, int]:
        rows = chunk.block_rows(config)
        causal = (rows.stop - rows.first) * (rows.first + rows.stop + 1) // 2
        return causal if self.is_dense(chunk, config) else kept_blocks(rows, config) or 0, causal

    def is_dense(self, chunk: Chunk, config: StemConfig) -> bool:
        """Whether vLLM's own attention gives the result, or is asked for by min_tokens."""
        return chunk.prompt_length < self.min_tokens or keeps_every_block(chunk.block_rows(config), config)

    def _log(self, vllm_config) -> None:
        sparse = [x for x in self.layers.values() if x.config]
        reasons = {
            x.reason: [y.index for y in self.layers.values() if y.reason == x.reason] for x in self.layers.values()
        }
        others = "; ".join(f"layers {indices}: {reason}" for reason, indices in reasons.items() if reason)
        logger.info(
            "Stem: sparse prefill in %d of %d attention layers, settings %s%s",
            len(sparse), len(self.layers), dict(settings.stem_settings(vllm_config)),
            f"; vLLM's own attention in {others}" if others else "",
        )  # fmt: skip
        scheduler = vllm_config.scheduler_config
        if scheduler.enable_chunked_prefill and "AlignedScheduler" not in str(scheduler.scheduler_cls):
            logger.warning(
                "Stem: chunks of a prompt may end inside a block, which changes results a little; "
                "add --scheduler-cls stem.vllm.AlignedScheduler"
            )


class StemBuilder:
    """Mixin of a metadata builder: adds `stem`, a Batch for each config, to the metadata of steps with sparse rows."""

    supports_update_block_table = False  # the metadata of dense rows holds a block table of its own
    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH  # graphs of decode only

    @classmethod
    def get_cudagraph_support(cls, vllm_config, kv_cache_spec) -> AttentionCGSupport:
        return cls._cudagraph_support

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device, *args, **kwargs) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device, *args, **kwargs)
        self.engine = Engine.of(vllm_config)
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        self.heads = {name: layer.num_heads for name, layer in layers.items()}
        known = self.engine.layers if self.engine else {}
        self.configs = {known[name].config for name in layer_names if name in known} - {None}
        self.unfinished: dict[str, Chunk] = {}  # prompts of the step before that go on, by request

    def use_cascade_attention(self, *args, **kwargs) -> bool:
        return False  # it would take the first rows of prompts apart from the others

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        prompts = prompts_of(common_attn_metadata) if self.configs else None
        unfinished, self.unfinished = self.unfinished, {}
        if prompts is None or common_attn_metadata.causal is not True:
            return metadata
        chunks, rows = prompt_chunks(common_attn_metadata, prompts, unfinished)
        self.unfinished = {prompts.names[chunk.request]: chunk for chunk in chunks if not chunk.is_last}
        if chunks:
            self.engine.count(self.layer_names, chunks, self.heads)
            batches = {config: self._batch(config, chunks, rows, common_attn_metadata) for config in self.configs}
            metadata.stem = {config: batch for config, batch in batches.items() if batch.chunks}
        return metadata

    def build_for_cudagraph_capture(self, common_attn_metadata):
        return super().build(0, common_attn_metadata)

    def _batch(self, config: StemConfig, chunks: list[Chunk], rows: list[tuple[int, int, int]], common) -> Batch:
        sparse = [chunk for chunk in chunks if not self.engine.is_dense(chunk, config)]
        ends = {chunk.request: chunk.tokens.stop for chunk in sparse}
        dense = [(request, ends.get(request, start), stop) for request, start, stop in rows]
        dense = [row for row in dense if row[1] < row[2]]
        if not sparse or not dense:
            return Batch(sparse, None, None)
        tokens = torch.cat([torch.arange(start, stop) for _, start, stop in dense]).to(self.device)
        part = rows_of(common, dense, tokens)
        return Batch(sparse, tokens, super().build(0, part, fast_build=True))  # fast: leaves shared buffers alone


class StemImpl:
    """Mixin of an attention implementation: sparse rows through Stem."""

    stem_config: StemConfig | None = None  # set by Engine on sparse layers
    count_kept = None

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        settings.check(get_current_vllm_config())  # raises before weights are loaded

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs):
        batches = getattr(attn_metadata, "stem", None)
        batch = batches.get(self.stem_config) if batches else None
        if batch is None:
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
        out = output.view(-1, self.num_heads, self.head_size)
        for chunk in batch.chunks:
            q, chunk_out = (x[chunk.tokens].transpose(0, 1)[None] for x in (query, out))  # [1, Hq, tokens, D]
            self.attend(layer, q, kv_cache, chunk, chunk_out)
        if batch.dense_metadata is not None:
            tokens = batch.dense_tokens
            part = torch.empty_like(out[: len(tokens)])
            rows = (x if x is None else x[tokens] for x in (query, key, value))
            super().forward(layer, *rows, kv_cache, batch.dense_metadata, part, *args, **kwargs)
            out[tokens] = part
        return output

    def attend(self, layer, q: Tensor, kv_cache: Tensor, chunk: Chunk, out: Tensor) -> None:
        """Attention of a chunk's queries [1, Hq, tokens, D] to its prompt so far, stored in out."""
        config = self.stem_config
        k, v = self.gathered(layer, kv_cache, chunk.pages, chunk.stop)
        options = dict(scale=self.scale, prompt_length=chunk.prompt_length)
        if kept_blocks(chunk.block_rows(config), config) is not None:
            out.copy_(stem_attention(q, k, v, config, **options))
        else:
            attended, selection = stem_attention(q, k, v, config, **options, return_selection=True)
            out.copy_(attended)
            self.count_kept(selection.kv_num_blocks.sum(dtype=torch.int64))

    def gathered(self, layer, kv_cache: Tensor, pages: Tensor, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `stop` positions of a request, [1, Hkv, stop, D] each."""
        raise NotImplementedError


def prompt_chunks(common, prompts: Prompts, before: dict[str, Chunk]) -> tuple[list[Chunk], list[tuple[int, int, int]]]:
    """Prompt tokens of each request in a step, and all its tokens as (request, first, stop).

    `before` holds chunks of the step before by request. A chunk that goes on where one of them stops takes its sums
    over. A request that vLLM preempted in between has lost its pages, and skips a step.
    """
    starts, ends = common.query_start_loc_cpu.tolist(), common.seq_lens_cpu_upper_bound.tolist()
    chunks, rows = [], []
    for request, (start, stop) in enumerate(zip(starts, starts[1:], strict=False)):
        if start == stop:  # padding of a CUDA graph
            continue
        rows.append((request, start, stop))
        prompt_length, first = int(prompts.lengths[request]), ends[request] - (stop - start)
        if first < prompt_length:
            last = min(ends[request], prompt_length)  # a resumed request computes answered tokens again, after these
            pages = common.block_table_tensor[request].clone()  # kernels read aligned memory
            earlier = before.get(prompts.names[request])
            sums = earlier.sums if earlier and earlier.stop == first else {}
            chunks.append(Chunk(request, pages, slice(start, start + last - first), last, prompt_length, sums))
    return chunks, rows


def rows_of(common, rows: list[tuple[int, int, int]], tokens: Tensor):
    """Metadata of some tokens of a step, the last ones of their requests, as a step of its own."""
    requests = torch.tensor([request for request, _, _ in rows])
    lengths = torch.tensor([stop - start for _, start, stop in rows], dtype=torch.int32)
    starts = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    on_device = requests.to(tokens.device)
    return type(common)(
        query_start_loc=starts.to(tokens.device),
        query_start_loc_cpu=starts,
        seq_lens=common.seq_lens[on_device],
        num_reqs=len(rows),
        num_actual_tokens=len(tokens),
        max_query_len=int(lengths.max()),
        max_seq_len=common.max_seq_len,
        block_table_tensor=common.block_table_tensor[on_device],
        slot_mapping=common.slot_mapping[tokens],
        seq_lens_cpu_upper_bound=common.seq_lens_cpu_upper_bound[requests],
    )

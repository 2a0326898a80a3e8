"""Attention of a batch in vLLM: prompts through Stem, all other rows through vLLM's own attention.

Two mixins extend the classes of a platform's back end, see cpu.py and cuda.py. The builder, which vLLM asks once a
step, decides which rows are sparse. The implementation, which vLLM asks in every layer, runs them.
"""

from __future__ import annotations

from functools import lru_cache, partial
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
    tokens: slice  # of the batch
    stop: int  # position after the last of them
    prompt_length: int  # tokens of the whole prompt
    pages: Tensor | None = None  # int32, of the request, in order; None where no layer is sparse
    sums: dict[str, tuple] | None = None  # layer -> of earlier chunks, see pages.attend_to_pages and fp8.Past

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

    def positions(self, heads: dict[str, int]) -> dict[StemConfig, tuple[np.ndarray, np.ndarray]]:
        """Sparse layers among these by config: rows of the counts, int64 [layers], and heads, int64 [layers, 1]."""
        found = {}
        for config in {layer.config for layer in self.layers.values()} - {None}:
            known = [(i, name) for i, (name, layer) in enumerate(self.layers.items()) if layer.config == config]
            here = np.array([(i, heads[name]) for i, name in known if name in heads], dtype=np.int64)
            if len(here):
                found[config] = here[:, 0], here[:, 1:]
        return found

    def count(self, chunks: list[Chunk], config: StemConfig, positions: np.ndarray, heads: np.ndarray) -> list[int]:
        """Add the block pairs of these chunks in some layers, and return the requests that are sparse there.

        Where scores decide how many blocks are kept, the layer adds them later.
        """
        sparse, kept, causal = [], 0, 0
        for chunk in chunks:
            kept_pairs, all_pairs, is_dense = block_pairs(
                chunk.tokens.stop - chunk.tokens.start, chunk.stop, chunk.prompt_length, config, self.min_tokens
            )
            if kept_pairs:
                kept, causal = kept + kept_pairs, causal + all_pairs
            if not is_dense:
                sparse.append(chunk.request)
        self.counts.pairs[positions] += heads * (kept, causal)
        return sparse

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
        heads = {name: layer.num_heads for name, layer in layers.items()}
        self.positions = self.engine.positions(heads) if self.engine else {}  # by config
        self.unfinished: dict[str, Chunk] = {}  # sparse prompts of the step before that go on, by request

    def use_cascade_attention(self, *args, **kwargs) -> bool:
        return False  # it would take the first rows of prompts apart from the others

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        if self.engine:
            self.engine.counts.flush()
        prompts = prompts_of(common_attn_metadata) if self.positions else None
        before, self.unfinished = self.unfinished, {}
        if prompts is None or common_attn_metadata.causal is not True:
            return metadata
        if chunks := prompt_chunks(common_attn_metadata, prompts):
            sparse = {config: self.engine.count(chunks, config, *where) for config, where in self.positions.items()}
            if any(sparse.values()):
                metadata.stem = self._batches(sparse, chunks, common_attn_metadata, prompts, before)
        return metadata

    def build_for_cudagraph_capture(self, common_attn_metadata):
        return super().build(0, common_attn_metadata)

    def _batches(
        self,
        sparse: dict[StemConfig, list[int]],
        chunks: list[Chunk],
        common,
        prompts: Prompts,
        before: dict[str, Chunk],
    ) -> dict[StemConfig, Batch]:
        """A Batch for each config whose layers are sparse for some requests; see with_pages for `before`."""
        requests = set().union(*sparse.values())
        found = {
            x.request: with_pages(x, common, before.get(prompts.names[x.request]))
            for x in chunks
            if x.request in requests
        }
        self.unfinished = {prompts.names[request]: chunk for request, chunk in found.items() if not chunk.is_last}
        return {config: self._batch([found[x] for x in wanted], common) for config, wanted in sparse.items() if wanted}

    def _batch(self, sparse: list[Chunk], common) -> Batch:
        ends = {chunk.request: chunk.tokens.stop for chunk in sparse}
        starts = common.query_start_loc_cpu.tolist()
        rows = ((i, ends.get(i, start), stop) for i, (start, stop) in enumerate(zip(starts, starts[1:], strict=False)))
        dense = [(request, start, stop) for request, start, stop in rows if start < stop]
        if not dense:
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
        options, rows = dict(scale=self.scale, prompt_length=chunk.prompt_length), chunk.block_rows(config)
        if kept_blocks(rows, config) is not None:
            out.copy_(stem_attention(q, k, v, config, **options))
        else:
            attended, selection = stem_attention(q, k, v, config, **options, return_selection=True)
            out.copy_(attended)
            self.count_kept(selection.kv_num_blocks.sum(dtype=torch.int64), self.num_heads * causal_pairs(rows))

    def gathered(self, layer, kv_cache: Tensor, pages: Tensor, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `stop` positions of a request, [1, Hkv, stop, D] each."""
        raise NotImplementedError


@lru_cache(maxsize=4096)
def block_pairs(
    tokens: int, stop: int, prompt_length: int, config: StemConfig, min_tokens: int
) -> tuple[int, int, bool]:
    """Kept and causal block pairs of a chunk in one head, and whether vLLM's own attention computes it.

    It does for prompts below min_tokens, and where every block is kept. Kept pairs are 0 where scores decide them.
    """
    rows = BlockRows.of(tokens, stop, config.block_size, prompt_length)
    causal = causal_pairs(rows)
    is_dense = prompt_length < min_tokens or keeps_every_block(rows, config)
    return causal if is_dense else kept_blocks(rows, config) or 0, causal, is_dense


def causal_pairs(rows: BlockRows) -> int:
    """Block pairs of dense attention in some rows of one head."""
    return (rows.stop - rows.first) * (rows.first + rows.stop + 1) // 2


def prompt_chunks(common, prompts: Prompts) -> list[Chunk]:
    """Prompt tokens of each request in a step, without their pages."""
    starts, ends = common.query_start_loc_cpu.numpy(), common.seq_lens_cpu_upper_bound.numpy()
    known = min(len(prompts.lengths), len(ends), len(starts) - 1)  # after them, padding of a CUDA graph
    firsts, chunks = ends[:known] - starts[1 : known + 1] + starts[:known], []
    for request in (firsts < prompts.lengths[:known]).nonzero()[0].tolist():
        start, end, first = int(starts[request]), int(ends[request]), int(firsts[request])
        prompt_length = int(prompts.lengths[request])
        stop = min(end, prompt_length)  # a resumed request computes answered tokens again, after these
        if first < stop:
            chunks.append(Chunk(request, slice(start, start + stop - first), stop, prompt_length))
    return chunks


def with_pages(chunk: Chunk, common, earlier: Chunk | None) -> Chunk:
    """The chunk with its request's pages, and the sums of the request's chunk in the step before.

    They are taken over if the chunk goes on where that one stops. A request that vLLM preempted in between has lost its
    pages, and skips a step.
    """
    first = chunk.stop - (chunk.tokens.stop - chunk.tokens.start)
    sums = earlier.sums if earlier and earlier.stop == first else {}
    pages = common.block_table_tensor[chunk.request].clone()  # at an aligned address, as kernels want it
    return chunk._replace(pages=pages, sums=sums)


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

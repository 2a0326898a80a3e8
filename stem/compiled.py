"""stem_attention under torch.compile and on meta tensors: two operators, which decide when the graph runs."""

import json
from functools import lru_cache

import torch
from torch import Tensor
from torch.library import custom_op

from stem.config import StemConfig, check_config
from stem.impl import operators
from stem.impl.coverage import IMPLS, impl_for
from stem.impl.stand_ins import kernel_stand_ins, with_stand_ins
from stem.planning import CHOOSE_IMPL, select
from stem.selection import BlockSelection
from stem.validation import check_impl, check_prompt_length, check_qkv, check_scale


def traced_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: StemConfig,
    scale: float | None,
    impl: str | None,
    prompt_length: int | None,
) -> tuple[Tensor, Tensor, BlockSelection]:
    """Output, log-sum-exp and selection of stem.stem_attention; lists have room for every key block."""
    check_qkv(q, k, v)
    check_config(config)
    check_prompt_length(prompt_length, k.shape[2])
    scale = check_scale(scale, q.shape[-1])
    impl = impl_for(config.compute, impl)
    choose_impl = CHOOSE_IMPL[check_impl(impl, IMPLS, q.device, q.dtype)]
    lists = select_op(q, k, v, config.as_json, scale, choose_impl or "", prompt_length)
    selection = BlockSelection(*lists, config.block_size, lists[0].shape[3], q.shape[2], k.shape[2], config.dropped)
    return *traced_block_attention(q, k, v, selection, scale, impl), selection


def traced_block_attention(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, scale: float, impl: str | None
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of stem.block_sparse_attention; one operator but for "reference", and "flex" on CUDA."""
    if not q.is_meta and (impl == "reference" or (impl == "flex" and q.is_cuda)):
        from stem.impl.attend import attend

        return attend(q, k, v, selection, scale, impl, needs_grad=True)
    out, lse = operators.attend(q, k, v, selection, scale, impl)
    if check_impl(impl, IMPLS, q.device, q.dtype) in ("torch", "flex"):
        return with_stand_ins(out, lse, q, k, v, selection, scale)
    return kernel_stand_ins(out, lse, q, k, v, selection, scale, needs_grad=True)


@custom_op("stem::select_blocks", mutates_args=())
def select_op(
    q: Tensor, k: Tensor, v: Tensor, config: str, scale: float, impl: str, prompt_length: int | None
) -> tuple[Tensor, Tensor]:
    selection = select(q, k, v, _from_json(config), scale, impl or None, prompt_length)
    return tuple(x.clone() for x in selection.padded_lists()[::-1])  # a compiled graph may write into what it gets


@select_op.register_fake
def _(q, k, v, config, scale, impl, prompt_length):
    size = _from_json(config).block_size
    num_kv_blocks = (k.shape[2] + size - 1) // size
    num_q_blocks = num_kv_blocks - (k.shape[2] - q.shape[2]) // size
    rows = q.shape[0], q.shape[1], num_q_blocks
    return q.new_empty((*rows, num_kv_blocks), dtype=torch.int32), q.new_empty(rows, dtype=torch.int32)


@lru_cache(maxsize=256)
def _from_json(text: str) -> StemConfig:
    return StemConfig(**json.loads(text))

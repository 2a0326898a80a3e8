"""Stem as operators of torch.library: what torch.compile sees, and where gradients enter the kernels.

    stem::select_blocks                      q, k, v -> lists; no gradient flows through a selection
    stem::block_sparse_attention             q, k, v, lists -> out, lse
    stem::block_sparse_attention_backward    its gradient; has none itself

`impl` is that of stem.block_sparse_attention, "" where it is None; configs travel as JSON, which operators accept.
"""

from __future__ import annotations

import json
from functools import lru_cache

import torch
from torch import Tensor
from torch.library import custom_op

from stem.config import StemConfig
from stem.impl.gather import gather_attention, gather_gradients
from stem.selection import BlockSelection


def select(
    q: Tensor, k: Tensor, v: Tensor, config: StemConfig, scale: float, impl: str | None, prompt_length: int | None
) -> BlockSelection:
    """Scores, budget and selection as one operator; the lists have room for every key block, their length is data."""
    lists = select_op(q, k, v, config.as_json, scale, impl or "", prompt_length)
    return BlockSelection(*lists, config.block_size, lists[0].shape[3], q.shape[2], k.shape[2])


def attend(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, scale: float, impl: str | None
) -> tuple[Tensor, Tensor]:
    """Attention over the kept blocks as one operator, differentiable once; see stem.block_sparse_attention."""
    lists = selection.kv_indices, selection.kv_num_blocks
    return attention_op(q, k, v, *lists, selection.block_size, scale, impl or "")


@custom_op("stem::select_blocks", mutates_args=())
def select_op(
    q: Tensor, k: Tensor, v: Tensor, config: str, scale: float, impl: str, prompt_length: int | None
) -> tuple[Tensor, Tensor]:
    from stem.attention import select

    selection = select(q, k, v, _from_json(config), scale, impl or None, prompt_length)
    kv_num_blocks, kv_indices = selection._padded_lists()
    return kv_indices.clone(), kv_num_blocks.clone()  # a compiled graph may write into what an operator returns


@select_op.register_fake
def _(q, k, v, config, scale, impl, prompt_length):
    size = _from_json(config).block_size
    num_kv_blocks = (k.shape[2] + size - 1) // size
    num_q_blocks = num_kv_blocks - (k.shape[2] - q.shape[2]) // size
    rows = q.shape[0], q.shape[1], num_q_blocks
    return q.new_empty((*rows, num_kv_blocks), dtype=torch.int32), q.new_empty(rows, dtype=torch.int32)


@custom_op("stem::block_sparse_attention", mutates_args=())
def attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_indices: Tensor,
    kv_num_blocks: Tensor,
    block_size: int,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    impl = _resolve(impl, q, block_size)
    if impl == "torch":
        out, lse = gather_attention(q, k, v, _selection(q, k, kv_indices, kv_num_blocks, block_size), scale)
    elif impl == "triton":
        from stem.kernels.sparse_forward import sparse_forward

        out, lse = sparse_forward(q, k, v, kv_indices, kv_num_blocks, block_size, scale)
    else:
        from stem.kernels.hopper_forward import sparse_forward

        out, lse = sparse_forward(q, k, v, kv_indices, kv_num_blocks, block_size, scale)
    return _laid_out_like(out, q), lse.contiguous()


@attention_op.register_fake
def _(q, k, v, kv_indices, kv_num_blocks, block_size, scale, impl):
    return _empty_like(q), q.new_empty(q.shape[:3], dtype=_statistics_dtype(q))


@custom_op("stem::block_sparse_attention_backward", mutates_args=())
def attention_backward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor,
    kv_indices: Tensor,
    kv_num_blocks: Tensor,
    block_size: int,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if _resolve(impl, q, block_size) == "torch":
        selection = _selection(q, k, kv_indices, kv_num_blocks, block_size)
        gradients = gather_gradients(q, k, v, selection, scale, dout, dlse)
    else:
        from stem.kernels.sparse_backward import sparse_backward

        lists = kv_indices, kv_num_blocks
        gradients = sparse_backward(q, k, v, out, lse, dout, dlse, *lists, block_size, scale)
    return tuple(_laid_out_like(gradient, x) for gradient, x in zip(gradients, (q, k, k), strict=True))


@attention_backward_op.register_fake
def _(q, k, v, out, lse, dout, dlse, kv_indices, kv_num_blocks, block_size, scale, impl):
    return _empty_like(q), _empty_like(k), _empty_like(k)


def _save(ctx, inputs, output) -> None:
    q, k, v, kv_indices, kv_num_blocks, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, kv_indices, kv_num_blocks)


def _differentiate(ctx, dout: Tensor, dlse: Tensor):
    q, k, v, out, lse, kv_indices, kv_num_blocks = ctx.saved_tensors
    gradients = attention_backward_op(q, k, v, out, lse, dout, dlse, kv_indices, kv_num_blocks, *ctx.options)
    return *gradients, None, None, None, None, None


def _refuse(ctx, *gradients):
    raise NotImplementedError(
        "stem attention by kernels has no second derivative: use impl='torch' or 'reference' outside torch.compile"
    )


attention_op.register_autograd(_differentiate, setup_context=_save)
attention_backward_op.register_autograd(_refuse)


def _resolve(impl: str, q: Tensor, block_size: int) -> str:
    from stem.attention import _choose

    return _choose(impl or None, q, block_size)


def _selection(q: Tensor, k: Tensor, kv_indices: Tensor, kv_num_blocks: Tensor, block_size: int) -> BlockSelection:
    num_kv_blocks = -(-k.shape[2] // block_size)
    return BlockSelection(kv_indices, kv_num_blocks, block_size, num_kv_blocks, q.shape[2], k.shape[2])


def _empty_like(x: Tensor, **options) -> Tensor:
    """Uninitialised, in the shape, dtype and order of strides of x, but contiguous if the last dimension is not."""
    layout = torch.preserve_format if x.stride(-1) == 1 else torch.contiguous_format
    return torch.empty_like(x, memory_format=layout, **options)


def _laid_out_like(result: Tensor, x: Tensor) -> Tensor:
    """The result with the strides that the fake implementation promises; kernels copy inputs that they cannot read."""
    promised = _empty_like(x, device="meta").stride()
    return result if result.stride() == promised else _empty_like(x).copy_(result)


def _statistics_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


@lru_cache(maxsize=256)
def _from_json(text: str) -> StemConfig:
    return StemConfig(**json.loads(text))

"""Attention over the kept blocks as operators of torch.library: for torch.compile, and for gradients of the kernels.

`impl` is that of stem.block_sparse_attention, "" where it is None: the operator then chooses when it runs.
"""

import torch
from torch import Tensor
from torch.library import custom_op

from stem.impl.coverage import resolve_impl, sparse_kernel
from stem.impl.flex import flex_attention
from stem.impl.gather import gather_attention, gather_gradients
from stem.selection import BlockSelection
from stem.transforms import vmap_inside_operators
from stem.validation import compute_dtype


def attend(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, scale: float, impl: str | None
) -> tuple[Tensor, Tensor]:
    """Attention over the kept blocks as one operator, differentiable once; see stem.block_sparse_attention."""
    lists = (selection.kv_indices, selection.kv_num_blocks)
    if not torch.compiler.is_compiling():  # lists made in inference mode cannot be saved for the backward pass
        lists = (x.clone() if x.is_inference() else x for x in lists)
    return attention_op(q, k, v, *lists, selection.block_size, scale, impl or "")


@custom_op("stem::block_sparse_attention", mutates_args=())
def attention_op(
    q: Tensor, k: Tensor, v: Tensor, kv_indices: Tensor, kv_num_blocks: Tensor, block_size: int, scale: float, impl: str
) -> tuple[Tensor, Tensor]:
    impl = resolve_impl(impl or None, q.device, q.dtype, q.shape[3], block_size)
    if impl == "torch":
        out, lse = gather_attention(q, k, v, _selection(q, k, kv_indices, kv_num_blocks, block_size), scale)
    elif impl == "flex":
        selection = _selection(q, k, kv_indices, kv_num_blocks, block_size)
        with vmap_inside_operators():
            out, lse = flex_attention(q, k, v, selection, scale)
    else:
        out, lse = sparse_kernel(impl, block_size)(q, k, v, kv_indices, kv_num_blocks, block_size, scale)
    return _laid_out_like(out, q), lse.contiguous()


@attention_op.register_fake
def _(q, k, v, kv_indices, kv_num_blocks, block_size, scale, impl):
    return _empty_like(q), q.new_empty(q.shape[:3], dtype=compute_dtype(q.dtype))


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
    if not q.shape[0]:
        return tuple(_empty_like(x) for x in (q, k, k))
    if resolve_impl(impl or None, q.device, q.dtype, q.shape[3], block_size) in ("torch", "flex"):
        selection = _selection(q, k, kv_indices, kv_num_blocks, block_size)
        with torch.autocast(q.device.type, enabled=False):
            gradients = gather_gradients(q, k, v, selection, scale, dout, dlse)
    else:
        from stem.kernels.sparse_backward import sparse_backward

        gradients = sparse_backward(q, k, v, out, lse, dout, dlse, kv_indices, kv_num_blocks, block_size, scale)
    return tuple(_laid_out_like(gradient, x) for gradient, x in zip(gradients, (q, k, k), strict=True))


@attention_backward_op.register_fake
def _(q, k, v, out, lse, dout, dlse, kv_indices, kv_num_blocks, block_size, scale, impl):
    return _empty_like(q), _empty_like(k), _empty_like(k)


def _save(ctx, inputs, output) -> None:
    q, k, v, kv_indices, kv_num_blocks, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, kv_indices, kv_num_blocks)


def _differentiate(ctx, dout: Tensor, dlse: Tensor):
    if ctx.options[-1] == "hopper_fp8":
        raise NotImplementedError("impl='hopper_fp8' has no backward pass; train with compute='input'")
    q, k, v, out, lse, kv_indices, kv_num_blocks = ctx.saved_tensors
    gradients = attention_backward_op(q, k, v, out, lse, dout, dlse, kv_indices, kv_num_blocks, *ctx.options)
    return *gradients, None, None, None, None, None


def _refuse(ctx, *gradients):
    raise NotImplementedError(
        "stem attention by kernels has no second derivative: use impl='torch' or 'reference' outside torch.compile"
    )


attention_op.register_autograd(_differentiate, setup_context=_save)
attention_backward_op.register_autograd(_refuse)


def _selection(q: Tensor, k: Tensor, kv_indices: Tensor, kv_num_blocks: Tensor, block_size: int) -> BlockSelection:
    return BlockSelection(kv_indices, kv_num_blocks, block_size, -(-k.shape[2] // block_size), q.shape[2], k.shape[2])


def _empty_like(x: Tensor, **options) -> Tensor:
    layout = torch.preserve_format if x.stride(-1) == 1 else torch.contiguous_format
    return torch.empty_like(x, memory_format=layout, **options)


def _laid_out_like(result: Tensor, x: Tensor) -> Tensor:
    """The result with the strides that the fake implementation promises; kernels copy inputs that they cannot read."""
    promised = _empty_like(x, device="meta").stride()
    return result if result.stride() == promised else _empty_like(x).copy_(result)

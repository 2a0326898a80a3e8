"""impl="flex": torch's FlexAttention with the same lists; compiled on CUDA, unfused on the CPU."""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from stem.selection import BlockSelection


def flex_attention(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, scale: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over the kept blocks, on the CPU without gradients; see stem.block_sparse_attention."""
    from torch.nn.attention.flex_attention import AuxRequest

    front = (k.shape[2] - q.shape[2]) % selection.block_size
    q, k, v = (q, k, v) if q.is_cuda else (q.detach(), k.detach(), v.detach())
    q = pad(q, (0, 0, front, 0))
    options = dict(block_mask=selection.to_block_mask(), scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    if q.is_cuda and (tile := selection.block_size) < 128:  # FlexAttention's own tiles are larger than the blocks
        options["kernel_options"] = dict(fwd_BLOCK_M=tile, fwd_BLOCK_N=tile, FORCE_USE_FLEX_ATTENTION=True)
    out, aux = _function(q.is_cuda)(q, k, v, **options, return_aux=AuxRequest(lse=True))
    return out[:, :, front:], aux.lse[:, :, front:]


@lru_cache(maxsize=2)
def _function(compiled: bool):
    from torch.nn.attention import flex_attention

    if compiled:
        return torch.compile(flex_attention.flex_attention)
    flex_attention._WARNINGS_SHOWN.add("flex_attention_performance")  # "called without torch.compile"
    return flex_attention.flex_attention

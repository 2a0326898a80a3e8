"""impl="flex": torch's FlexAttention with the same lists; compiled on CUDA, unfused on the CPU."""

import warnings
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from stem.selection import BlockSelection


def flex_attention(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, scale: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over the kept blocks, on the CPU without gradients; see stem.block_sparse_attention."""
    if q.is_cuda:
        return _run(q, k, v, selection, scale)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        return _run(q.detach(), k.detach(), v.detach(), selection, scale)


def _run(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, scale: float) -> tuple[Tensor, Tensor]:
    from torch.nn.attention.flex_attention import AuxRequest

    front = (k.shape[2] - q.shape[2]) % selection.block_size
    q = pad(q, (0, 0, front, 0))
    options = dict(block_mask=selection.to_block_mask(), scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    out, aux = _function(q.is_cuda)(q, k, v, **options, return_aux=AuxRequest(lse=True))
    return out[:, :, front:], aux.lse[:, :, front:]


@lru_cache(maxsize=2)
def _function(compiled: bool):
    from torch.nn.attention import flex_attention

    return torch.compile(flex_attention.flex_attention) if compiled else flex_attention.flex_attention

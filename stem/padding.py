"""Padding and caches in transformers models: which keys belong to each row, without an N x N mask."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.masking_utils import sdpa_mask


def stem_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs,
) -> Tensor | None:
    """Mask function of transformers: None for a causal prompt from key 0, spans for padding and later chunks.

    Spans are int64 [B, 1, 1, 3] on the CPU, in the place of a bool [B, 1, Nq, Nk]: the first key of the row's tokens,
    the last one + 1, and the key of the first query. Decode, and what is not causal-with-padding, gets SDPA's mask.
    """
    within_window = local_size is None or kv_offset + kv_length <= local_size
    if q_length > 1 and allow_is_causal_skip and within_window:
        spans = _padding_spans(attention_mask, batch_size, int(q_offset), q_length)
        if spans is not None:
            return None if (spans == spans.new_tensor([0, q_length, 0])).all() else spans
    sizes = dict(batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset)
    options = dict(local_size=local_size, allow_is_causal_skip=allow_is_causal_skip, attention_mask=attention_mask)
    return sdpa_mask(**sizes, **options, **kwargs)


def token_mask(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """What SDPA takes: spans become bool [B, 1, Nq, Nk], other masks stay."""
    if mask is None or not _is_spans(mask):
        return mask
    start, stop, offset = mask.to(query.device).unbind(-1)  # [B, 1, 1]
    position = torch.arange(key.shape[2], device=query.device)
    last = torch.arange(query.shape[2], device=query.device)[:, None] + offset[..., None]  # [B, 1, Nq, 1]
    return (position >= start[..., None]) & (position < stop[..., None]) & (position <= last)


def rows_by_span(mask: Tensor | None, query: Tensor) -> dict[tuple[int, int, int], list[int]]:
    """Batch rows that share a span (start, stop, offset), so that they can be computed together.

    Raises:
        ValueError: If the mask is more than padding.
    """
    if mask is None:
        return {(0, query.shape[2], 0): list(range(query.shape[0]))}
    if not _is_spans(mask):
        raise ValueError(
            f"attention_mask: stem attention takes causal attention with padding at the ends of each row, got a custom "
            f"mask {mask.dtype} {tuple(mask.shape)} (a 4-dimensional mask, packed sequences, or padding between tokens)"
        )
    rows: dict[tuple[int, int, int], list[int]] = {}
    for row, span in enumerate(mask.flatten(1).expand(query.shape[0], -1).tolist()):
        rows.setdefault(tuple(span), []).append(row)
    return rows


def _padding_spans(mask: Tensor | None, batch_size: int, q_offset: int, q_length: int) -> Tensor | None:
    """Spans (see stem_mask) of a padding mask bool [B, >= Nk or what is known of it]; None if a row has a gap."""
    written = q_offset + q_length
    if mask is None:
        return torch.tensor([0, written, q_offset]).expand(batch_size, 1, 1, 3)
    mask = mask[:, :written].int()
    start, stop = mask.argmax(-1), mask.shape[1] - mask.flip(-1).argmax(-1)
    start, stop, tokens = torch.stack([start, stop, mask.sum(-1)]).cpu()
    stop = torch.where(tokens > 0, stop, start)
    if (stop - start != tokens).any():
        return None
    return torch.stack([start, stop, torch.full_like(start, q_offset)], -1)[:, None, None]


def _is_spans(mask: Tensor) -> bool:
    return mask.dtype == torch.int64 and mask.shape[2:] == (1, 3)

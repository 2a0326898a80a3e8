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
    the last one + 1, and the key of the first query. Decode, and what is not causal-with-padding, gets SDPA's mask, as
    does a compiled graph, which cannot look at the padding.
    """
    within_window = local_size is None or kv_offset + kv_length <= local_size
    if q_length > 1 and allow_is_causal_skip and within_window and not torch.compiler.is_compiling():
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

    A row has several spans if its mask says that several sequences are packed into it.

    Raises:
        ValueError: If the mask is more than causality, padding and packed sequences.
    """
    if mask is None:
        return {(0, query.shape[2], 0): list(range(query.shape[0]))}
    if _is_spans(mask):
        spans = [[tuple(span)] for span in mask.flatten(1).expand(query.shape[0], -1).tolist()]
    else:
        spans = _token_mask_spans(mask, query.shape[0])
    rows: dict[tuple[int, int, int], list[int]] = {}
    for row, of_row in enumerate(spans):
        for span in of_row:
            rows.setdefault(span, []).append(row)
    return rows


def _token_mask_spans(mask: Tensor, batch_size: int) -> list[list[tuple[int, int, int]]]:
    """Spans of each row of a token mask [B or 1, 1, Nq, Nk], bool (True = attend) or additive (0 = attend)."""
    causal = mask.shape[1] == 1 and (mask.dtype == torch.bool or mask.is_floating_point())
    if causal and mask.is_floating_point():
        causal = not ((mask != 0) & (mask > torch.finfo(mask.dtype).min / 2)).any()
        mask = mask == 0
    spans = [_packed_spans(row) for row in mask[:, 0]] if causal else [None]
    if None in spans:
        raise ValueError(
            f"attention_mask: stem attention takes causal attention with padding at the ends of each row, or with "
            f"sequences packed one after the other, got another 4-dimensional mask or padding between tokens: "
            f"{mask.dtype} {tuple(mask.shape)}"
        )
    return spans * (batch_size // len(spans))


def _packed_spans(mask: Tensor) -> list[tuple[int, int, int]] | None:
    """Spans of packed sequences in a bool mask [Nq, Nk], True = attend; None if it says anything else."""
    query, key = (torch.arange(size, device=mask.device) for size in mask.shape)
    bits = mask.to(torch.uint8)
    attends, first, last = mask.any(-1), bits.argmax(-1), mask.shape[1] - 1 - bits.flip(-1).argmax(-1)
    offset = int((last - query)[attends][0]) if attends.any() else 0
    position = query + offset
    token = attends & (last == position)
    padding = attends & ~token  # its own key exists for nobody
    expected = (key >= first[:, None]) & (key <= position[:, None])
    if (mask != expected)[token].any() or mask[:, position[padding].clamp(0, mask.shape[1] - 1)].any():
        return None
    starts, lengths = first[token].unique_consecutive(return_counts=True)
    stops = position[token][lengths.cumsum(0) - 1] + 1
    if (lengths[1:] != (stops - starts)[1:]).any():  # only the first sequence may have begun in a cache
        return None
    return [(start, stop, offset) for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)]


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

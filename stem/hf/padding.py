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

    Spans are int64 [B, 1, S, 3] on the CPU, in the place of a bool [B, 1, Nq, Nk]. Each of a row's S sequences (here 1)
    has its first key, its last key + 1, and the key at the position of query 0. SDPA's mask is returned for decode, for
    padding with gaps, for other masks than causality and padding, and in a compiled graph, which cannot look at the
    padding.
    """
    within_window = local_size is None or kv_offset + kv_length <= local_size
    if q_length > 1 and allow_is_causal_skip and within_window and not torch.compiler.is_compiling():
        spans = _padding_spans(attention_mask, batch_size, int(q_offset), q_length)
        if spans is not None:
            return None if (spans == spans.new_tensor([0, q_length, 0])).all() else spans
    sizes = dict(batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset)
    options = dict(local_size=local_size, allow_is_causal_skip=allow_is_causal_skip, attention_mask=attention_mask)
    return sdpa_mask(**sizes, **options, **kwargs)


def packed_mask(mask: Tensor | None, ends_q: Tensor, ends_k: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """The mask of one row of packed sequences, given where they end (cu_seq_lens_q and cu_seq_lens_k).

    Args:
        mask: As stem_attention_forward takes it. Spans already separate the sequences, and are returned.
        ends_q, ends_k: int [S + 1], tokens before each of the S sequences and in all of them.
        query, key: [1, heads, N, D].
    Raises:
        ValueError: If mask is None and the sequences are not those of one row without a cache.
    """
    same = ends_k is None or ends_k is ends_q or torch.compiler.is_compiling() or torch.equal(ends_q, ends_k)
    if not same or query.shape[0] != 1 or key.shape[2] != query.shape[2]:
        if mask is None:
            raise ValueError(
                f"cu_seq_lens_q: Stem attention takes sequences packed into one row without a cache, with the same "
                f"cu_seq_lens_k, got {query.shape[0]} rows of {query.shape[2]} queries and {key.shape[2]} keys"
            )
        return mask
    if mask is not None and _is_spans(mask):
        return mask
    ends = ends_q.long()
    spans = torch.stack([ends[:-1], ends[1:], torch.zeros_like(ends[1:])], -1)[None, None]
    return spans if mask is None else as_bool(mask) & token_mask(spans, query, key)


def token_mask(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """SDPA's form of a mask: spans become bool [B, 1, Nq, Nk], True = attend; other masks stay."""
    if mask is None or not _is_spans(mask):
        return mask
    start, stop, offset = mask.to(query.device)[..., None].unbind(-2)  # [B, 1, S, 1]
    position = torch.arange(key.shape[2], device=query.device)
    last = torch.arange(query.shape[2], device=query.device) + offset[:, :, 0]  # [B, 1, Nq]
    real = ((position >= start) & (position < stop)).any(-2)  # [B, 1, Nk]
    q_sequence, k_sequence = ((x >= start).sum(-2) for x in (last[:, :, None], position))  # 1..S, 0 before the first
    return (q_sequence[..., None] == k_sequence[..., None, :]) & real[..., None, :] & (position <= last[..., None])


def as_bool(mask: Tensor) -> Tensor:
    """A token mask as bool, True = attend; additive masks have 0 where it attends."""
    return mask == 0 if mask.is_floating_point() else mask


def rows_by_span(mask: Tensor | None, query: Tensor) -> dict[tuple, list[int]]:
    """Batch rows by span (start, stop, offset), so that rows with the same span can be computed together.

    A row with packed sequences has several spans. A row with padding between its tokens has the span
    (start, stop, offset, True), from its first token to its last.

    Raises:
        ValueError: If the mask is more than causality, padding and packed sequences.
    """
    if mask is None:
        return {(0, query.shape[2], 0): list(range(query.shape[0]))}
    if _is_spans(mask):
        spans = [[tuple(span) for span in row] for row in mask[:, 0].expand(query.shape[0], -1, -1).tolist()]
    else:
        spans = _token_mask_spans(mask, query.shape[0])
    rows: dict[tuple, list[int]] = {}
    for row, of_row in enumerate(spans):
        for span in of_row:
            rows.setdefault(span, []).append(row)
    return rows


def _token_mask_spans(mask: Tensor, batch_size: int) -> list[list[tuple]]:
    """Spans of each row of a token mask [B or 1, 1, Nq, Nk], bool (True = attend) or additive (0 = attend)."""
    causal = mask.shape[1] == 1 and (mask.dtype == torch.bool or mask.is_floating_point())
    if causal and mask.is_floating_point():
        causal = not ((mask != 0) & (mask > torch.finfo(mask.dtype).min / 2)).any()
    spans = [None]
    if causal:
        mask = as_bool(mask)[:, 0]
        offset = _offset(mask)
        spans = [spans if (spans := _packed_spans(row, offset)) is not None else _gaps(row, offset) for row in mask]
    if None in spans:
        raise ValueError(
            f"attention_mask: Stem attention takes causal attention with padding, or with sequences packed one after "
            f"the other, got another 4-dimensional mask: {mask.dtype} {tuple(mask.shape)}"
        )
    return spans * (batch_size // len(spans))


def _offset(mask: Tensor) -> int:
    """Key at the position of query 0 in a causal mask, bool [B, Nq, Nk], in which some query attends to itself."""
    bits, query = mask.to(torch.uint8), torch.arange(mask.shape[1], device=mask.device)
    last = mask.shape[2] - 1 - bits.flip(-1).argmax(-1)  # [B, Nq]
    return int(torch.where(mask.any(-1), last - query, 0).max()) if mask.numel() else 0


def _packed_spans(mask: Tensor, offset: int) -> list[tuple[int, int, int]] | None:
    """Spans of packed sequences in a bool mask [Nq, Nk], True = attend; None if it says anything else."""
    query, key = (torch.arange(size, device=mask.device) for size in mask.shape)
    bits = mask.to(torch.uint8)
    attends, first, last = mask.any(-1), bits.argmax(-1), mask.shape[1] - 1 - bits.flip(-1).argmax(-1)
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


def _gaps(mask: Tensor, offset: int) -> list[tuple[int, int, int, bool]] | None:
    """The span of a bool mask [Nq, Nk] of causality and padding with gaps; None if it says anything else."""
    queries, keys = mask.shape
    position = torch.arange(queries, device=mask.device) + offset
    real = mask.any(0)
    expected = real & (torch.arange(keys, device=mask.device) <= position[:, None])
    if offset + queries > keys or (mask != expected).any():
        return None
    tokens = real.nonzero()
    return [(int(tokens[0]), int(tokens[-1]) + 1, offset, True)] if len(tokens) else []


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
    return mask.dtype == torch.int64 and mask.shape[-1] == 3

"""Padding and caches in transformers models: which keys belong to each row, without an N x N mask."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.masking_utils import sdpa_mask

LOOKED_AT = WeakTensorKeyDictionary()  # mask -> (what about it, result, layers that have asked), see `once`
MASKED = -1e4  # additive masks hold this or less where a key is masked


def stem_mask(batch_size: int, q_length: int, kv_length: int, q_offset: int | Tensor = 0, **options) -> Tensor | None:
    """Mask function of transformers: None for a causal prompt from key 0, spans for padding and later chunks.

    Spans are int64 [B, 1, S, 3] on the CPU: first key, last key + 1 and the key at the position of query 0 of each of a
    row's S sequences (here 1). SDPA's mask is returned for decode, padding with gaps, masks other than causality and
    padding, and in a compiled graph, which cannot look at the padding. `options` are other arguments of `sdpa_mask`.
    """
    window = options.get("local_size") or float("inf")
    is_causal = options.get("allow_is_causal_skip", True) and options.get("kv_offset", 0) + kv_length <= window
    if is_causal and q_length > 1 and not torch.compiler.is_compiling():
        padding, offset = options.get("attention_mask"), int(q_offset)
        if padding is not None and padding.ndim != 2:
            raise ValueError(
                f"attention_mask must be [batch, tokens], or a token mask of four dimensions, got shape "
                f"{tuple(padding.shape)}"
            )
        written = offset + q_length
        if padding is None or (padding.shape[1] >= written and padding[:, :written].all()):
            return torch.tensor([0, written, offset]).expand(batch_size, 1, 1, 3) if offset else None
        spans = _padding_spans(padding[:, :written].int(), offset)
        if spans is not None:
            return spans
    return sdpa_mask(batch_size, q_length, kv_length, q_offset, **options)


def packed_mask(
    mask: Tensor | None, ends_q: Tensor, ends_k: Tensor | None, query: Tensor, key: Tensor
) -> Tensor | None:
    """Mask of a row of packed sequences, query and key [1, heads, N, D]; spans separate them already and are returned.

    `ends_q` and `ends_k` are cu_seq_lens_q and cu_seq_lens_k, int [S + 1]: tokens before each of S sequences, and in
    total. Raises ValueError if mask is None and they are neither in one row without a cache nor the rows themselves.
    """
    same = ends_k is None or ends_k is ends_q or torch.compiler.is_compiling() or torch.equal(ends_q, ends_k)
    same = same and key.shape[2] == query.shape[2]
    fits = same and query.shape[0] == 1
    if mask is not None and (_is_spans(mask) or not fits):
        return mask
    if same and not fits:
        rows = torch.arange(query.shape[0] + 1, dtype=ends_q.dtype, device=ends_q.device) * query.shape[2]
        if torch.equal(ends_q, rows):  # every row is one sequence, as without these lengths
            return mask
    if not fits:
        raise ValueError(
            f"cu_seq_lens_q: Stem attention takes sequences packed into one row without a cache, with the same "
            f"cu_seq_lens_k, got {query.shape[0]} rows of {query.shape[2]} queries and {key.shape[2]} keys"
        )
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


def once(handle: int, x: Tensor | None, about: Hashable, look: Callable[[], Any]) -> Any:
    """look(), remembered for a mask x and a hashable `about` from the first layer of a forward pass to the last.

    A layer, named by its handle, that asks again begins another pass, for which x may have been rewritten. Another
    version of x does the same for the layers of another model. Tensors of inference mode count no versions, so every
    layer looks at them.
    """
    if x is None or torch.compiler.is_compiling() or x.is_inference():
        return look()
    about = about, x._version
    known, found, asked = LOOKED_AT.get(x, (None, None, ()))
    if known != about or handle in asked:
        found, asked = look(), set()
        LOOKED_AT[x] = about, found, asked
    asked.add(handle)
    return found


def as_bool(mask: Tensor) -> Tensor:
    """A token mask as bool, True = attend; additive masks have 0 where it attends."""
    return mask == 0 if mask.is_floating_point() else mask


def rows_by_span(mask: Tensor | None, query: Tensor) -> dict[tuple, list[int]]:
    """Batch rows by span (start, stop, offset), so that rows with the same span can be computed together.

    A row with packed sequences has several spans. One with padding between its tokens has (start, stop, offset, True).
    Raises ValueError if the mask is more than causality, padding and packed sequences.
    """
    if mask is None:
        return {(0, query.shape[2], 0): list(range(query.shape[0]))}
    if _is_spans(mask):
        spans = [[tuple(span) for span in row] for row in mask[:, 0].expand(query.shape[0], -1, -1).tolist()]
    else:
        spans = _token_mask_spans(mask) * (query.shape[0] // mask.shape[0])
    rows = defaultdict(list)
    for row, of_row in enumerate(spans):
        for span in of_row:
            rows[span].append(row)
    return rows


def _token_mask_spans(mask: Tensor) -> list[list[tuple]]:
    """Spans of each row of a token mask [B or 1, 1, Nq, Nk], bool (True = attend) or additive (0 = attend)."""
    if mask.shape[1] > 1 and mask.stride(1) == 0:
        mask = mask[:, :1]  # one mask for all heads
    known = mask.shape[1] == 1 and mask.dtype == torch.bool
    if mask.shape[1] == 1 and mask.is_floating_point():
        known = not ((mask != 0) & (mask > MASKED)).any()
    spans = [None]
    if known:
        rows = as_bool(mask)[:, 0]
        bits, query = rows.to(torch.uint8), torch.arange(mask.shape[2], device=mask.device)
        first, last = bits.argmax(-1), mask.shape[3] - 1 - bits.flip(-1).argmax(-1)  # [B, Nq]
        offset = int(torch.where(rows.any(-1), last - query, 0).max())  # some query attends to itself
        spans = [_row_spans(*of_row, query + offset) for of_row in zip(rows, first, last, strict=True)]
    if None in spans:
        raise ValueError(
            f"attention_mask: Stem attention takes causal attention with padding, or with sequences packed one after "
            f"the other, got another 4-dimensional mask: {mask.dtype} {tuple(mask.shape)}"
        )
    return spans


def _row_spans(mask: Tensor, first: Tensor, last: Tensor, position: Tensor) -> list[tuple] | None:
    """Spans of a bool mask [Nq, Nk], or None; first and last keys and key positions of its queries, int64 [Nq]."""
    key, real, offset = torch.arange(mask.shape[1], device=mask.device), mask.any(0), int(position[0])
    causal, attends = key <= position[:, None], mask.any(1)
    token = attends & (last == position)
    padding = position[attends & ~token].clamp(0, len(key) - 1)  # keys that exist for nobody
    packed = causal & (key >= first[:, None])
    if torch.equal(mask[token], packed[token]) and not real[padding].any():
        starts, lengths = first[token].unique_consecutive(return_counts=True)
        stops = position[token][lengths.cumsum(0) - 1] + 1
        if torch.equal(lengths[1:], (stops - starts)[1:]):  # only the first sequence may have begun in a cache
            return [(start, stop, offset) for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)]
    if position[-1] >= len(key) or not torch.equal(mask, real & causal):
        return None
    tokens = real.nonzero()
    return [(int(tokens[0]), int(tokens[-1]) + 1, offset, True)]


def _padding_spans(mask: Tensor, q_offset: int) -> Tensor | None:
    """Spans (see stem_mask) of a padding mask, 0 or 1 in int [B, keys so far]; None if a row has a gap."""
    start, stop = mask.argmax(-1), mask.shape[1] - mask.flip(-1).argmax(-1)
    start, stop, tokens = torch.stack([start, stop, mask.sum(-1)]).cpu()
    stop = torch.where(tokens > 0, stop, start)
    if (stop - start != tokens).any():
        return None
    return torch.stack([start, stop, torch.full_like(start, q_offset)], -1)[:, None, None]


def _is_spans(mask: Tensor) -> bool:
    return mask.dtype == torch.int64 and mask.shape[-1] == 3

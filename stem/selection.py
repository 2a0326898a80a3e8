"""From scores and a budget to the kept blocks: BlockSelection and how it is chosen."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stem.cells import mask_future
from stem.config import StemConfig, check_config
from stem.transforms import refused_by_name
from stem.validation import check_impl, check_integer

CELL = 16  # tokens that one stand-in stands for with dropped="cells"


@dataclass(frozen=True, eq=False)
class BlockSelection:
    """The key blocks that each query block attends to.

    Query blocks are aligned to the key grid: row r stands at key block num_kv_blocks - nq + r, and the first row is
    partial at its front where kv_len - q_len is no multiple of block_size. Read only, since calls may share the lists.

    Attributes:
        kv_indices: int32 [B, Hq, nq, max], ascending key blocks; entries past the count are 0.
        kv_num_blocks: int32 [B, Hq, nq], how many entries of kv_indices count.
        block_size, num_kv_blocks: Tokens per block; key blocks nk.
        q_len, kv_len: Query and key tokens; queries are the last q_len positions.
        dropped: Whether dropped blocks are ignored or stand in by means, see StemConfig. Counts are of kept blocks.
    """

    kv_indices: Tensor
    kv_num_blocks: Tensor
    block_size: int
    num_kv_blocks: int
    q_len: int
    kv_len: int
    dropped: str = "skip"

    @classmethod
    def from_mask(cls, block_mask: Tensor, block_size: int, *, q_len: int | None = None, kv_len: int | None = None):
        """The selection of a bool mask [B, Hq, nq, nk], True = attend; lengths default to whole blocks.

        Raises TypeError unless it is bool; ValueError unless it is 4-dimensional, causal and fits the lengths.
        """
        if not isinstance(block_mask, Tensor) or block_mask.dtype != torch.bool:
            raise TypeError(f"block_mask must be a bool tensor, got {getattr(block_mask, 'dtype', type(block_mask))}")
        if block_mask.ndim != 4:
            raise ValueError(f"block_mask must be [B, Hq, nq, nk], got shape {tuple(block_mask.shape)}")
        check_integer("block_size", block_size, 1)
        nq, nk = block_mask.shape[-2:]
        if block_mask.device.type == "cpu" and block_mask.triu(nk - nq + 1).any():
            raise ValueError("block_mask must not keep a future block (above the diagonal), got one that does")
        counts = block_mask.sum(-1, dtype=torch.int32)
        width = nk if block_mask.is_cuda or not counts.numel() else max(1, int(counts.max()))
        order = block_mask.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :width].to(torch.int32)
        unused = torch.arange(width, device=order.device) >= counts[..., None]
        return cls(order.masked_fill(unused, 0), counts, block_size, nk, *_lengths(q_len, kv_len, nq, nk, block_size))

    @classmethod
    def every_block(cls, batch: int, heads: int, q_len: int, kv_len: int, block_size: int, device: torch.device):
        """The selection of density 1: every causal block of every row, the lists of all heads in one memory."""
        nk = -(-kv_len // block_size)
        first = (kv_len - q_len) // block_size
        counts = torch.arange(first + 1, nk + 1, dtype=torch.int32, device=device)  # [nq]
        blocks = torch.arange(nk, dtype=torch.int32, device=device)
        indices = torch.where(blocks < counts[:, None], blocks, 0)  # [nq, nk]
        lists = indices.expand(batch, heads, -1, -1), counts.expand(batch, heads, -1)
        return cls(*lists, block_size, nk, q_len, kv_len)

    @property
    def num_q_blocks(self) -> int:
        return self.kv_num_blocks.shape[-1]

    def to_mask(self) -> Tensor:
        """Block mask, bool [B, Hq, nq, nk], True = attend."""
        unused = torch.arange(self.kv_indices.shape[-1], device=self.kv_indices.device) >= self.kv_num_blocks[..., None]
        columns = self.kv_indices.long().masked_fill(unused, self.num_kv_blocks)
        mask = columns.new_zeros(*self.kv_num_blocks.shape, self.num_kv_blocks + 1, dtype=torch.bool)
        return mask.scatter_(-1, columns, True)[..., :-1]

    def to_token_mask(self) -> Tensor:
        """Token mask with causality, bool [B, Hq, q_len, kv_len], True = attend; memory O(N^2), for small inputs."""
        q_position = torch.arange(self.kv_len - self.q_len, self.kv_len, device=self.kv_indices.device)
        kv_position = torch.arange(self.kv_len, device=self.kv_indices.device)
        first = self.num_kv_blocks - self.num_q_blocks
        kept = self.to_mask()[:, :, q_position // self.block_size - first][..., kv_position // self.block_size]
        return kept & (q_position[:, None] >= kv_position)

    def density(self) -> float:
        """Kept over causal block pairs of all rows, heads and batch entries, in (0, 1]; NaN without any."""
        causal = self.kv_num_blocks.shape[0] * self.kv_num_blocks.shape[1] * self.causal_pairs
        return float(self.kv_num_blocks.sum(dtype=torch.int64)) / causal if causal else float("nan")

    @property
    def stand_in_tokens(self) -> int:
        """Tokens of a dropped block that one stand-in stands for; 0 without stand-ins."""
        return {"skip": 0, "mean": self.block_size, "cells": CELL}[self.dropped]

    @property
    def causal_pairs(self) -> int:
        return self.num_q_blocks * (2 * self.num_kv_blocks - self.num_q_blocks + 1) // 2

    def to_block_mask(self):
        """torch FlexAttention BlockMask of the same lists; the diagonal block is partial, all others are full.

        Its queries are (kv_len - q_len) % block_size padding rows, which align them to the key grid, and q_len rows.
        """
        from torch.nn.attention.flex_attention import BlockMask

        first = self.num_kv_blocks - self.num_q_blocks
        start = first * self.block_size
        mask = self.to_mask()
        diagonal = torch.ones_like(mask).tril(first).triu(first)
        partial, full = (
            BlockSelection.from_mask(kept, self.block_size).padded_lists()
            for kept in (mask & diagonal, mask & ~diagonal)
        )
        block_size = self.block_size

        def mask_mod(b, h, q_idx, kv_idx):
            # FlexAttention without torch.compile reads only this function, so it says everything that the lists say
            return mask[b, h, q_idx // block_size, kv_idx // block_size] & (q_idx + start >= kv_idx)

        lengths = (self.kv_len - start, self.kv_len)
        return BlockMask.from_kv_blocks(*partial, *full, BLOCK_SIZE=block_size, mask_mod=mask_mod, seq_lengths=lengths)

    def padded_lists(self) -> tuple[Tensor, Tensor]:
        """kv_num_blocks and kv_indices widened to num_kv_blocks columns, as BlockMask expects."""
        missing = self.num_kv_blocks - self.kv_indices.shape[-1]
        return self.kv_num_blocks, torch.nn.functional.pad(self.kv_indices, (0, missing))


@refused_by_name("select_blocks")
def select_blocks(
    scores: Tensor,
    budget: Tensor,
    config: StemConfig,
    *,
    q_len: int | None = None,
    kv_len: int | None = None,
    impl: str | None = None,
) -> BlockSelection:
    """Keep the best-scoring blocks of each row within its budget (Algorithm 1), and the sink, local and diagonal ones.

    With `forced="inside"` the forced blocks are kept first: the diagonal, then sink and local blocks in turn, nearest
    to their end first, until the budget is spent. Ties go to the lower index; NaN counts as -inf.

    Args:
        scores: fp32 or fp64 [B, Hq, nq, nk] from `block_scores`.
        budget: int32 [nk] from `block_budget`; the last nq rows are used.
        q_len, kv_len: Default whole blocks [tokens].
        impl: "torch", "triton" or None (Triton on CUDA).
    Raises:
        ValueError, TypeError: If shapes do not fit, a budget is below 1, or a name is unknown.
    """
    _check_scores(scores, budget, config)
    impl = check_impl(impl, ("torch", "triton"), scores.device, scores.dtype)
    nq, nk = scores.shape[-2:]
    q_len, kv_len = _lengths(q_len, kv_len, nq, nk, config.block_size)
    rows = budget[nk - nq :]
    if impl == "triton":
        from stem.kernels import block_select, share_select

        if config.allocation == "adaptive":
            lists = share_select.select_above(scores, *config.share_rules(nk))
        else:
            width = min(nk, int(rows.max()) + config.always_kept.added)
            lists = block_select.select_topk(scores, rows.to(scores.device), *config.always_kept, width)
        return BlockSelection(*lists, config.block_size, nk, q_len, kv_len, config.dropped)
    priority = _forced_priority(nq, nk, config, scores.device)
    forced = priority < 0
    scores = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if config.allocation == "adaptive":
        kept = (mask_future(scores).softmax(-1) > config.threshold) | forced
        kept[..., : max(0, config.dense_blocks_of(nk) - (nk - nq)), :] = True
        kept[..., max(0, nq - config.dense_last_blocks) :, :] = True
    else:
        rank = _rank(-scores)
        if not config.always_kept.on_top:
            rank = _rank(torch.where(forced, priority, rank))
        kept = rank < rows[:, None].to(scores.device)
        if config.always_kept.on_top:
            kept = kept | forced
    selection = BlockSelection.from_mask(kept.tril(nk - nq), config.block_size, q_len=q_len, kv_len=kv_len)
    return replace(selection, dropped=config.dropped)


def _rank(x: Tensor) -> Tensor:
    """Position of each entry in its sorted row, 0 = smallest, ties to the lower index."""
    return x.argsort(dim=-1, stable=True).argsort(dim=-1)


def _forced_priority(nq: int, nk: int, config: StemConfig, device: torch.device) -> Tensor:
    """int64 [nq, nk]: negative for forced blocks, smaller = kept first; 0 elsewhere."""
    row = torch.arange(nk - nq, nk, device=device)[:, None]
    column = torch.arange(nk, device=device)
    distance = row - column
    last = 2 * nk + 2
    local = torch.where((distance >= 0) & (distance < max(config.local_blocks, 1)), 2 * distance, last)
    sink = torch.where((distance >= 0) & (column < config.sink_blocks), 2 * column + 1, last)
    return torch.minimum(local, sink) - last


def _lengths(q_len: int | None, kv_len: int | None, nq: int, nk: int, block_size: int) -> tuple[int, int]:
    """q_len and kv_len, by default whole blocks; raises unless they cover nq and nk blocks."""
    kv_len = nk * block_size if kv_len is None else kv_len
    q_len = kv_len - (nk - nq) * block_size if q_len is None else q_len
    if -(-kv_len // block_size) != nk:
        raise ValueError(f"kv_len must span {nk} blocks of {block_size} tokens, got {kv_len}")
    if not 1 <= q_len <= kv_len or nk - (kv_len - q_len) // block_size != nq:
        raise ValueError(f"q_len must span the last {nq} of {nk} blocks of {block_size} tokens, got {q_len}")
    return q_len, kv_len


def _check_scores(scores: Tensor, budget: Tensor, config: StemConfig) -> None:
    for name, x in (("scores", scores), ("budget", budget)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    check_config(config)
    if scores.ndim != 4 or scores.shape[-2] > scores.shape[-1]:
        raise ValueError(f"scores must be [B, Hq, nq, nk] with nq <= nk, got shape {tuple(scores.shape)}")
    if scores.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"scores must be torch.float32 or torch.float64, got {scores.dtype}")
    if budget.is_floating_point() or budget.dtype == torch.bool:
        raise TypeError(f"budget must be an integer tensor, got {budget.dtype}")
    if budget.shape != scores.shape[-1:]:
        raise ValueError(f"budget must have one entry per key block [{scores.shape[-1]}], got {tuple(budget.shape)}")
    if budget.device.type == "cpu" and budget.min() < 1:
        raise ValueError(f"budget must be >= 1 in every row, got {int(budget.min())}")


def fit_selection(selection: BlockSelection, q: Tensor, k: Tensor) -> BlockSelection:
    """The selection with q's and k's lengths; raises unless its heads, blocks and device are theirs."""
    if not isinstance(selection, BlockSelection):
        raise TypeError(f"selection must be a BlockSelection, got {type(selection).__name__}")
    if selection.kv_indices.device != q.device:
        raise ValueError(f"selection must be on q's device {q.device}, got {selection.kv_indices.device}")
    heads = tuple(selection.kv_num_blocks.shape[:2])
    if heads != tuple(q.shape[:2]):
        raise ValueError(f"selection must have q's batch size and heads {tuple(q.shape[:2])}, got {heads}")
    q_len, kv_len, size = q.shape[2], k.shape[2], selection.block_size
    blocks = (-(-kv_len // size) - (kv_len - q_len) // size, -(-kv_len // size))
    if blocks != (selection.num_q_blocks, selection.num_kv_blocks):
        raise ValueError(
            f"selection must have {blocks[0]} query and {blocks[1]} key blocks of {size} for {q_len} queries and "
            f"{kv_len} keys, got {selection.num_q_blocks} and {selection.num_kv_blocks}"
        )
    return replace(selection, q_len=q_len, kv_len=kv_len)

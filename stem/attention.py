"""The pipeline: scores + budget -> selection -> attention over the kept blocks."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import cache, lru_cache
from types import NoneType

import torch
from torch import Tensor
from torch.nn.functional import pad

from stem.budget import BlockRows, device_budget, full_rows, keeps_every_block, scores_matter
from stem.cells import kernel_cells
from stem.config import StemConfig, check_config
from stem.impl.dense import fused_attention
from stem.impl.gather import gather_attention
from stem.reference import masked_attention
from stem.scores import block_scores, cell_bonus, routing_scale
from stem.selection import BlockSelection, select_blocks
from stem.validation import check_finite, check_impl, check_prompt_length, check_qkv, check_scale

IMPLS = ("reference", "torch", "triton", "hopper", "flex")
DEFAULT = StemConfig()  # made once: torch.compile cannot make one
CHUNK_SCORES = 1 << 26  # block scores held at a time by the Triton path: 256 MiB
SHORT_BLOCKS = 64  # key blocks up to which lists that no score decides are kept: there launches are what costs
# With every block kept, impl="hopper" is faster than torch's dense kernels from here on (NVIDIA H200, 9 to 64 heads).
LISTS_TOKENS, LISTS_ROWS = 640, 20 * 1024  # tokens of the prompt; queries of all heads and batch entries
REPEATED_IMPLS = (None, "triton", "hopper")


def stem_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: StemConfig | None = None,
    *,
    scale: float | None = None,
    impl: str | None = None,
    return_selection: bool = False,
    return_lse: bool = False,
    prompt_length: int | None = None,
) -> Tensor | tuple:
    """Causal attention over the key blocks that Stem selects (Algorithm 1); the drop-in for SDPA's causal prefill.

    Args:
        q: [B, Hq, Nq, D], fp16, bf16, fp32 or fp64 (not with "triton"), D <= 256: the last Nq positions.
        k, v: [B, Hkv, Nkv, D], Hq % Hkv == 0, Nq <= Nkv, same dtype and device as q.
        config: Default StemConfig(), a quarter of the causal block pairs.
        scale: Softmax scale, default D**-0.5.
        impl: See block_sparse_attention. With None, a dense kernel of torch attends where the budget keeps every block
            of every row and it is the faster one; where a block may be dropped, it never does.
        return_selection, return_lse: Also return the BlockSelection / the log-sum-exp, in this order.
        prompt_length: Tokens of the whole prompt where these are a chunk of it, >= Nkv, default Nkv. The budget and
            the blocks at the end are those of the whole prompt; so chunks of whole blocks together give what it gives,
            but for a value term that is z-scored over the values so far.
    Returns:
        [B, Hq, Nq, D] like q, or a tuple. Gradients flow through the attention, not through the selection.
    Raises:
        ValueError, TypeError: For bad shapes, dtypes, devices or names, and for non-finite input on the CPU.
    """
    config = DEFAULT if config is None else config

    def call() -> tuple[Tensor, Tensor | None, BlockSelection | None]:
        return _stem_attention(q, k, v, config, scale, impl, prompt_length, return_selection, return_lse)

    if not return_selection and _is_repeatable(q, k, v, config, scale, impl, prompt_length):
        from stem.kernels.replay import replay

        outputs = replay((q, k, v), (config, scale, impl, prompt_length, bool(return_lse)), call)
    else:
        outputs = call()
    wanted = [x for x in outputs if x is not None]
    return tuple(wanted) if len(wanted) > 1 else wanted[0]


def _is_repeatable(q, k, v, config, scale, impl, prompt_length) -> bool:
    """Whether a call is made of kernels alone; these arguments have not been checked."""
    return (
        not torch.compiler.is_compiling()
        and type(q) is type(k) is type(v) is Tensor
        and q.is_cuda
        and impl in REPEATED_IMPLS
        and type(config) is StemConfig
        and type(scale) in (NoneType, float)
        and type(prompt_length) in (NoneType, int)
        and not _needs_operator(q, k, v)
    )


def _stem_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: StemConfig,
    scale: float | None,
    impl: str | None,
    prompt_length: int | None,
    return_selection: bool,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None, BlockSelection | None]:
    """stem_attention: the output, the selection and the log-sum-exp, None where not wanted."""
    check_qkv(q, k, v)
    check_config(config)
    scale = check_scale(scale, q.shape[-1])
    check_prompt_length(prompt_length, k.shape[2])

    def choose() -> BlockSelection:
        if torch.compiler.is_compiling():
            from stem.impl import operators  # imports torch's compiler

            return operators.select(q, k, v, config, scale, _STAGE_IMPL[check_impl(impl, IMPLS, q)], prompt_length)
        return select(q, k, v, config, scale, _STAGE_IMPL[_choose(impl, q, config.block_size)], prompt_length)

    dense = _attend_densely(q, k, v, config, scale, prompt_length, return_lse) if impl is None else None
    if dense is None and _overlaps(q, k, v, config, impl, prompt_length):
        out, lse, selection = _attend_while_choosing(q, k, v, config, _rows(q, k, config, prompt_length), scale)
    else:
        selection = choose() if return_selection or dense is None else None
        out, lse = dense or _attend(q, k, v, selection, scale, impl)
    return out, selection if return_selection else None, lse if return_lse else None


def _attend_densely(
    q: Tensor, k: Tensor, v: Tensor, config: StemConfig, scale: float, prompt_length: int | None, return_lse: bool
) -> tuple[Tensor, Tensor | None] | None:
    """(out, lse) by a dense kernel of torch, or None: where a block may be dropped, or lists of all are faster."""
    if torch.compiler.is_compiling() or not keeps_every_block(_rows(q, k, config, prompt_length), config):
        return None
    batch, heads, q_len, _ = q.shape
    long = k.shape[2] >= LISTS_TOKENS and batch * heads * q_len >= LISTS_ROWS
    if long and _choose(None, q, config.block_size) == "hopper" and not _needs_operator(q, k, v):
        return None
    check_finite(q=q, k=k, v=v)
    return fused_attention(q, k, v, scale, return_lse)


def _overlaps(q: Tensor, k: Tensor, v: Tensor, config: StemConfig, impl: str | None, prompt_length: int | None) -> bool:
    """Whether attention can begin before all blocks are chosen: on Hopper, for a short prompt with full rows."""
    if _needs_operator(q, k, v) or _choose(impl, q, config.block_size) != "hopper":
        return False
    from stem.kernels.score_select import MAX_KV_BLOCKS

    rows = _rows(q, k, config, prompt_length)
    full = full_rows(rows, config)
    return 0 < full < rows.stop - rows.first and rows.stop <= MAX_KV_BLOCKS and _by_budget(rows, config)


def _attend_while_choosing(
    q: Tensor, k: Tensor, v: Tensor, config: StemConfig, rows: BlockRows, scale: float
) -> tuple[Tensor, Tensor, BlockSelection]:
    """Output, log-sum-exp and selection by kernels each of which begins before the one before it has ended.

    Attention to the full rows waits for no list and comes first.
    """
    from stem.kernels.hopper_forward import prepare

    check_finite(q=q, k=k, v=v)
    attend = prepare(q, k, v, scale)  # may launch kernels of its own, so it comes first
    selection = _select_by_budget(q, k, v, config, rows, scale)
    return *attend(selection.kv_indices, selection.kv_num_blocks, full_rows(rows, config)), selection


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    scale: float | None = None,
    impl: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact causal softmax attention over the kept blocks only.

    Args:
        q, k, v, scale: As in stem_attention.
        selection: Lists for Hq heads and these lengths, on q's device.
        impl: None chooses "hopper" where it applies, else "triton" on CUDA and "torch" elsewhere (also for fp64); an
            explicit choice never falls back.
            "reference": token mask and softmax in fp32 or fp64, memory O(N^2). "torch": gathers the kept blocks, a few
            rows at a time. "triton": stem.kernels. "hopper": the same with a forward pass for sm_90, fp16 or bf16, D 64
            or 128, block_size 128. "flex": torch's FlexAttention with the same lists, unfused on the CPU.
        return_lse: Also return the natural log-sum-exp, fp32 (fp64 for fp64 inputs) [B, Hq, Nq].
    Returns:
        [B, Hq, Nq, D] like q; differentiable, twice with "torch" and "reference". A row without blocks gives 0.
    Raises:
        ValueError, TypeError: For bad shapes, dtypes, devices or names, or a selection that does not fit.
    """
    check_qkv(q, k, v)
    selection = _fitted(selection, q, k)
    scale = check_scale(scale, q.shape[-1])
    out, lse = _attend(q, k, v, selection, scale, impl)
    return (out, lse) if return_lse else out


def _attend(
    q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, scale: float, impl: str | None
) -> tuple[Tensor, Tensor]:
    if torch.compiler.is_compiling() and impl in (None, "torch", "triton", "hopper"):
        from stem.impl import operators

        return operators.attend(q, k, v, selection, scale, impl)  # it chooses when it runs
    return _RUN[_choose(impl, q, selection.block_size)](q, k, v, selection, scale)


def select(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: StemConfig,
    scale: float,
    impl: str | None,
    prompt_length: int | None = None,
) -> BlockSelection:
    """Scores, budget and selection of stem_attention, by Triton some rows at a time; no host synchronisation.

    Args:
        q, k, v, config, scale, prompt_length: As there, checked.
        impl: "torch", "triton" or None (Triton on CUDA).
    Returns:
        Lists that are read only: where no score matters, all calls for some lengths share them.
    """
    impl = check_impl(impl, ("torch", "triton"), q)
    rows = _rows(q, k, config, prompt_length)
    if _all_forced(rows, config):
        check_finite(q=q, k=k, v=v)
        return _forced_selection(*q.shape[:3], k.shape[2], config, rows, q.device)
    if keeps_every_block(rows, config):
        check_finite(q=q, k=k, v=v)
        return BlockSelection.every_block(*q.shape[:3], k.shape[2], config.block_size, q.device)
    if impl == "triton" and _by_budget(rows, config):
        return _select_by_budget(q, k, v, config, rows, scale)
    config_here = rows.at_the_end(config)
    if impl == "triton" and config.reduction == "softmax" and config.allocation == "adaptive":
        return _select_by_share(q, k, v, config_here, scale)
    scores = block_scores(q, k, v, config_here, scale=scale, impl=impl)
    lengths = dict(q_len=q.shape[2], kv_len=k.shape[2])
    return select_blocks(scores, rows.budget(config), config_here, impl=impl, **lengths)


def _all_forced(rows: BlockRows, config: StemConfig) -> bool:
    return rows.stop <= SHORT_BLOCKS and not scores_matter(rows, config)


def _by_budget(rows: BlockRows, config: StemConfig) -> bool:
    """Whether the best blocks by mean score are kept, as many as the budget says."""
    return config.reduction == "mean" and config.allocation != "adaptive" and not _all_forced(rows, config)


def _rows(q: Tensor, k: Tensor, config: StemConfig, prompt_length: int | None) -> BlockRows:
    return BlockRows.of(q.shape[2], k.shape[2], config.block_size, prompt_length)


@lru_cache(maxsize=4096)
def _forced_selection(
    batch: int, heads: int, q_len: int, kv_len: int, config: StemConfig, rows: BlockRows, device: torch.device
) -> BlockSelection:
    """The selection where no score matters: the forced blocks, or all of them."""
    lists = _forced_lists(batch, heads, config, rows, device)
    return BlockSelection(*lists, config.block_size, rows.stop, q_len, kv_len)


@cache  # for good: a CUDA graph may have the addresses
def _forced_lists(
    batch: int, heads: int, config: StemConfig, rows: BlockRows, device: torch.device
) -> tuple[Tensor, Tensor]:
    scores = torch.zeros(batch, heads, rows.stop - rows.first, rows.stop)
    selection = select_blocks(scores, rows.budget(config), rows.at_the_end(config), impl="torch")
    return selection.kv_indices.to(device), selection.kv_num_blocks.to(device)


def _select_by_share(q: Tensor, k: Tensor, v: Tensor, config: StemConfig, scale: float) -> BlockSelection:
    from stem.kernels.share_select import pool_select

    check_finite(q=q, k=k, v=v)
    q, k, v = q.detach(), k.detach(), v.detach()
    cells = kernel_cells(q.shape[2], k.shape[2], config)
    dense = config.dense_blocks_of(cells.num_kv_blocks), config.dense_last_blocks
    rules = config.threshold, config.sink_blocks, config.local_blocks, *dense, config.exact_last_blocks
    lists = pool_select(q, k, cell_bonus(v, config, "triton"), cells, scale, *rules)
    return BlockSelection(*lists, config.block_size, cells.num_kv_blocks, cells.q_len, cells.kv_len)


def _select_by_budget(
    q: Tensor, k: Tensor, v: Tensor, config: StemConfig, rows: BlockRows, scale: float
) -> BlockSelection:
    from stem.kernels.block_scores import block_sums, score_blocks, score_inputs
    from stem.kernels.block_select import empty_lists, select_topk
    from stem.kernels.score_select import MAX_KV_BLOCKS, score_select

    check_finite(q=q, k=k, v=v)
    (batch, heads, q_len), kv_len, size = q.shape[:3], k.shape[2], config.block_size
    offset = kv_len - q_len
    first_q_block, num_kv_blocks, num_q_blocks = rows.first, rows.stop, rows.stop - rows.first
    budget, width = device_budget(rows, config, q.device)
    lists = empty_lists(batch, heads, num_q_blocks, width, q.device)
    scale = routing_scale(q.shape[3], config, scale)
    forced = config.sink_blocks, config.local_blocks, config.forced == "on_top"

    step = min(num_q_blocks, max(1, CHUNK_SCORES // (batch * heads * num_kv_blocks)))
    args = q, k, v, size, config.score_stride, config.value_norm, config.value_weight
    if num_kv_blocks <= MAX_KV_BLOCKS and step == num_q_blocks:
        inputs = score_inputs(*args, first_q_block=full_rows(rows, config))
        score_select(*inputs, scale, budget, *forced, lists)
        return BlockSelection(*lists, size, num_kv_blocks, q_len, kv_len)
    q_sums, k_sums, value_bonus = score_inputs(*args, num_q_blocks=step)
    for row in range(0, num_q_blocks, step):
        if row:
            start, stop = ((first_q_block + x) * size - offset for x in (row, row + step))
            chunk = q[:, :, start:stop]
            q_sums = block_sums(chunk, size, config.score_stride, reverse=True, offset=offset + start)
        scores = score_blocks(q_sums, k_sums, value_bonus, scale, first_q_block + row)
        select_topk(scores, budget, *forced, width, lists, row)
    return BlockSelection(*lists, size, num_kv_blocks, q_len, kv_len)


def _reference(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, scale: float) -> tuple[Tensor, Tensor]:
    return masked_attention(q, k, v, selection.to_token_mask(), scale, return_lse=True)


def _triton(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, scale: float) -> tuple[Tensor, Tensor]:
    if _needs_operator(q, k, v):
        from stem.impl import operators

        return operators.attend(q, k, v, selection, scale, "triton")
    from stem.kernels.sparse_forward import sparse_forward

    return sparse_forward(q, k, v, selection.kv_indices, selection.kv_num_blocks, selection.block_size, scale)


def _hopper(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, scale: float) -> tuple[Tensor, Tensor]:
    if _needs_operator(q, k, v):
        from stem.impl import operators

        return operators.attend(q, k, v, selection, scale, "hopper")
    from stem.kernels.hopper_forward import sparse_forward

    return sparse_forward(q, k, v, selection.kv_indices, selection.kv_num_blocks, selection.block_size, scale)


def _needs_operator(*tensors: Tensor) -> bool:
    """Whether the kernels are called through stem.impl.operators, which costs the host some tens of us."""
    needs_gradients = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return needs_gradients or torch.compiler.is_compiling()


def _flex(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, scale: float) -> tuple[Tensor, Tensor]:
    if q.is_cuda:
        return _run_flex(q, k, v, selection, scale)
    return _FlexOnCPU.apply(q, k, v, selection, scale)


class _FlexOnCPU(torch.autograd.Function):
    """torch's FlexAttention has no backward on the CPU, so the gradient there is that of impl="torch"."""

    @staticmethod
    def forward(ctx, q, k, v, selection, scale):
        ctx.save_for_backward(q, k, v)
        ctx.selection, ctx.scale = selection, scale
        return _run_flex(q.detach(), k.detach(), v.detach(), selection, scale)

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            outputs = gather_attention(*inputs, ctx.selection, ctx.scale)
        return *torch.autograd.grad(outputs, inputs, (grad_out, grad_lse)), None, None


def _run_flex(q: Tensor, k: Tensor, v: Tensor, selection: BlockSelection, scale: float) -> tuple[Tensor, Tensor]:
    from torch.nn.attention.flex_attention import AuxRequest

    front = (k.shape[2] - q.shape[2]) % selection.block_size
    q = pad(q, (0, 0, front, 0))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        out, aux = _flex_attention(q.is_cuda)(
            q,
            k,
            v,
            block_mask=selection.to_block_mask(),
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
            return_aux=AuxRequest(lse=True),
        )
    return out[:, :, front:], aux.lse[:, :, front:]


@lru_cache(maxsize=2)
def _flex_attention(compiled: bool):
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if compiled else flex_attention


_RUN = {"reference": _reference, "torch": gather_attention, "triton": _triton, "hopper": _hopper, "flex": _flex}
# How scores and selection run for an implementation of the attention.
_STAGE_IMPL = {"reference": "torch", "torch": "torch", "triton": "triton", "hopper": "triton", "flex": None}


def _choose(impl: str | None, q: Tensor, block_size: int) -> str:
    """The implementation to run: for None the fastest that covers this problem; raises if an explicit one does not."""
    chosen = check_impl(impl, IMPLS, q)
    if impl == "hopper" or (impl is None and chosen == "triton"):
        from stem.kernels.hopper_forward import unsupported

        reason = unsupported(q, block_size)
        if impl is None:
            return "triton" if reason else "hopper"
        if reason:
            raise ValueError(f"impl='hopper' does not cover {reason}")
    return chosen


def _fitted(selection: BlockSelection, q: Tensor, k: Tensor) -> BlockSelection:
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

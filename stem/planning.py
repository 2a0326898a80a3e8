"""From a Problem to a Plan: everything about a call that does not depend on the numbers in q, k and v."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, partial
from threading import Lock

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

from stem import choose
from stem.budget import BlockRows, device_budget, full_rows, keeps_every_block, kept_blocks, scored_rows
from stem.config import StemConfig, check_config
from stem.impl.attend import attend, empty_attention
from stem.impl.coverage import impl_for, resolve_impl
from stem.impl.dense import dense_kernel, fused_attention
from stem.selection import BlockSelection
from stem.transforms import is_transformed
from stem.validation import check_finite, check_prompt_length, check_qkv, check_scale

SHORT_BLOCKS = 64  # key blocks up to which launches dominate: known lists are cached, others made beside attention
# With every block kept, impl="hopper" is faster than torch's dense kernels from here on (NVIDIA H200, 9 to 64 heads).
LISTS_TOKENS, LISTS_ROWS = 640, 20 * 1024  # tokens of the prompt; queries of all heads and batch entries
MOST_PLANS = 1024
KERNELS = ("triton", "hopper", "hopper_fp8")
# How scores and selection run for an implementation of the attention; None is Triton on CUDA and torch elsewhere.
CHOOSE_IMPL = {"reference": "torch", "torch": "torch", "flex": None} | dict.fromkeys(KERNELS, "triton")

WHY = {  # choice -> reason, for Plan.explain
    "all": "every row keeps every block, so the lists hold all of them",
    "forced": "forced blocks use up every row's budget, so cached lists serve every call",
    "topk": "Triton scores the blocks and keeps the best of each row's budget",
    "share": "Triton keeps the blocks whose share of their row exceeds the threshold, without storing scores",
    "scores": "{} scores every block pair in memory and selects",
}

PLANS: dict[tuple, Plan] = {}  # the oldest goes first
CAPTURED: list[Plan] = []  # a CUDA graph may read their tables
LOCK = Lock()  # of PLANS, while it changes
Results = tuple[Tensor, Tensor | None, Tensor | None, BlockSelection | None]  # of Plan.run


@dataclass(frozen=True)
class Problem:
    """A call without its numbers: enough to decide how it runs, on any machine and without tensors."""

    batch: int
    q_heads: int
    kv_heads: int
    q_len: int  # queries, the last of the keys' positions [tokens]
    kv_len: int  # [tokens]
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    config: StemConfig
    scale: float  # of the softmax
    impl: str | None = None  # as in stem.block_sparse_attention
    prompt_length: int | None = None  # as in stem.stem_attention [tokens]
    return_selection: bool = False
    return_lse: bool = False
    return_counts: bool = False  # of kept blocks, where the data decide them
    needs_grad: bool = False  # gradient mode is on and an input requires a gradient, or has a tangent
    is_plain: bool = True  # plain tensors, whose launches may be recorded and replayed
    dense_kernel: str | None = None  # torch's fused kernel for the problem, see stem.impl.dense.dense_kernel

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, config: StemConfig, *options) -> Problem:
        """The problem of `plan_for`'s arguments, by position; ValueError or TypeError if no plan covers them."""
        (scale, impl, prompt_length), returns = options[:3], [bool(x) for x in options[3:]]
        check_qkv(q, k, v)
        check_config(config)
        check_prompt_length(prompt_length, k.shape[2])
        is_plain = type(q) is type(k) is type(v) is Tensor
        needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        if is_transformed(q, k, v):
            impl, is_plain, needs_grad = impl or "torch", False, True
        dense = dense_kernel(q, k, v, needs_grad, returns[1]) if impl is None and q.numel() else None
        sizes = q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3]
        scale = check_scale(scale, q.shape[3])
        return cls(*sizes, q.dtype, q.device, config, scale, impl, prompt_length, *returns, needs_grad, is_plain, dense)


@dataclass(eq=False)
class Plan:
    """How a problem runs, decided once; `explain` says it in words."""

    problem: Problem
    recordings: dict = field(default_factory=dict)  # launches of earlier calls by stream, see stem.kernels.replay

    def __post_init__(self) -> None:
        p = self.problem
        self.rows = BlockRows.of(p.q_len, p.kv_len, p.config.block_size, p.prompt_length)
        impl = impl_for(p.config.compute, p.impl)
        size, heads = p.config.block_size, p.config.pooled_heads(p.q_heads, p.kv_heads)
        pairs = size == 64 and heads > 1 and heads % 2 == 0 and impl != "hopper_fp8" and not p.needs_grad
        self.impl = resolve_impl(impl, p.device, p.dtype, p.head_dim, 128 if pairs else size)  # kernels/pairs_forward
        self.choose_impl = CHOOSE_IMPL[self.impl] or ("triton" if p.device.type == "cuda" else "torch")
        if p.dtype == torch.float64 or not p.batch * p.q_len:
            self.choose_impl = "torch"
        self.choice = self._choice()
        self.path = self._path()
        kernels_alone = p.impl in (None, *KERNELS) and not p.needs_grad and self.path in ("lists", "overlap")
        self.is_repeatable = p.is_plain and p.device.type == "cuda" and kernels_alone and not p.return_selection
        if self.is_repeatable:
            from stem.kernels.replay import replay

            self.replay = partial(replay, compile_first=self.choice != "scores")
        if self.path == "overlap":
            from stem.kernels.hopper_forward import prepare

            self.prepare = prepare

    def run(self, q: Tensor, k: Tensor, v: Tensor) -> Results:
        """Output, log-sum-exp, counts and selection for tensors of this problem; None for what was not asked for.

        Counts are the kv_num_blocks of the selection, int32 [B, Hq, nq]; None too where `kept_blocks` is known.
        """
        if self.is_repeatable:
            return *self.replay(self.recordings, (q, k, v), lambda: self._run(q, k, v)[:3]), None
        return self._run(q, k, v)

    def choose(self, q: Tensor, k: Tensor, v: Tensor) -> BlockSelection:
        """The kept blocks, read only; see the functions of stem.choose."""
        p, rows = self.problem, self.rows
        if self.choice == "forced":
            return self._selection(self.forced)
        if self.choice == "all":
            return BlockSelection.every_block(p.batch, p.q_heads, p.q_len, p.kv_len, p.config.block_size, p.device)
        if self.choice == "topk":
            return self._selection(choose.choose_topk(q, k, v, p.config, rows, p.scale, self.budget))
        if self.choice == "share":
            return self._selection(choose.choose_share(q, k, v, p.config, rows, p.scale))
        return choose.choose_scores(q, k, v, p.config, rows, p.scale, self.choose_impl)

    def explain(self) -> str:
        """One sentence: how the problem runs, and why."""
        p = self.problem
        tokens = f"{p.q_len} queries on {p.kv_len} keys" if p.q_len < p.kv_len else f"{p.kv_len} tokens"
        call = f"{tokens} in blocks of {p.config.block_size}"
        if self.path == "empty":
            return f"{call}: there is no query, so nothing runs."
        if self.path == "dense":
            return f"{call}: torch's dense kernel ({p.dense_kernel}) attends, because every row keeps every block."
        how = f'{WHY[self.choice].format(self.choose_impl)}; impl="{self.impl}" attends'
        if self.path == "overlap" and not keeps_every_block(self.rows, p.config):
            first = f"the first {full_rows(self.rows, p.config)} rows, which keep every block"
            how += f", beginning with {first}, while the other rows' blocks are chosen"
        if p.config.dropped != "skip" and not keeps_every_block(self.rows, p.config):
            how += "; dropped blocks stand in by means"
        if p.needs_grad and self.impl in ("triton", "hopper"):
            how += " through an operator that holds the backward pass"
        return f"{call}: {how}{'; repeated calls replay the launches' if self.is_repeatable else ''}."

    @cached_property
    def kept_blocks(self) -> int | None:
        """Kept block pairs of one head, the same for finite q, k and v of any value; None where they decide it."""
        return kept_blocks(self.rows, self.problem.config)

    @cached_property
    def budget(self) -> tuple[Tensor, int]:
        """The budget of each row on the device, and the longest list; see stem.budget.device_budget."""
        return device_budget(self.rows, self.problem.config, self.problem.device)

    @cached_property
    def forced(self) -> tuple[Tensor, Tensor]:
        """Lists of forced blocks on the device; see stem.choose.forced_lists."""
        p = self.problem
        return choose.forced_lists(p.batch, p.q_heads, p.config, self.rows, p.device)

    def _choice(self) -> str:
        config, rows = self.problem.config, self.rows
        if self.problem.q_len and rows.stop <= SHORT_BLOCKS and not scored_rows(rows, config):
            return "forced"
        if not self.problem.q_len or keeps_every_block(rows, config):
            return "all"
        kinds = {("mean", False): "topk", ("softmax", True): "share"} if self.choose_impl == "triton" else {}
        return kinds.get((config.reduction, config.allocation == "adaptive"), "scores")

    def _path(self) -> str:
        p, rows = self.problem, self.rows
        if not p.batch * p.q_len:
            return "empty"
        if p.impl is None and p.config.compute == "input" and p.dense_kernel and keeps_every_block(rows, p.config):
            is_long = p.kv_len >= LISTS_TOKENS and p.batch * p.q_heads * p.q_len >= LISTS_ROWS
            if not (is_long and self.impl == "hopper" and not p.needs_grad):
                return "dense"
        if self.impl == "hopper" and p.config.block_size == 128 and not p.needs_grad and full_rows(rows, p.config):
            if keeps_every_block(rows, p.config) or (self.choice == "topk" and rows.stop <= SHORT_BLOCKS):
                return "overlap"  # full rows need no lists
        return "lists"

    def _run(self, q: Tensor, k: Tensor, v: Tensor) -> Results:
        p = self.problem
        if not q.is_cuda:
            check_finite(q=q, k=k, v=v)
        elif torch.cuda.is_current_stream_capturing() and self not in CAPTURED:
            CAPTURED.append(self)
        selection = None
        if self.path == "empty":
            out, lse = empty_attention(q, k, v)
        elif self.path == "dense":
            out, lse = fused_attention(q, k, v, p.scale, p.dense_kernel, p.return_lse)
        elif self.path == "overlap":  # of scoring, selection and attention (programmatic dependent launch)
            start = self.prepare(q, k, v, p.scale)  # may launch kernels of its own, so it comes first
            if self.choice == "topk" and not (p.return_selection or p.return_counts or p.config.dropped != "skip"):
                lists = choose.choose_topk(q, k, v, p.config, self.rows, p.scale, self.budget)
            else:
                selection = self.choose(q, k, v)
                lists = selection.kv_indices, selection.kv_num_blocks
            out, lse = start(*lists, full_rows(self.rows, p.config), selection.stand_in_tokens if selection else 0)
        else:
            selection = self.choose(q, k, v)
            out, lse = attend(q, k, v, selection, p.scale, self.impl, p.needs_grad)
        if p.return_selection and selection is None:
            selection = self.choose(q, k, v)
        counts = selection.kv_num_blocks if p.return_counts and self.kept_blocks is None else None
        return out, lse if p.return_lse else None, counts, selection if p.return_selection else None

    def _selection(self, lists: tuple[Tensor, Tensor]) -> BlockSelection:
        p = self.problem
        return BlockSelection(*lists, p.config.block_size, self.rows.stop, p.q_len, p.kv_len, p.config.dropped)


def plan_for(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: StemConfig,
    scale: float | None = None,
    impl: str | None = None,
    prompt_length: int | None = None,
    return_selection: bool = False,
    return_lse: bool = False,
    return_counts: bool = False,
) -> Plan:
    """Plan for these arguments of stem.stem_attention and Plan.run's counts, cached by everything that it depends on.

    Autocast and torch.compile never reach the cache. Plans of torch.func and of forward-mode AD, whose tensors look
    like plain ones, are not cached. A miss raises the errors of Problem.of and resolve_impl.
    """
    args = config, scale, impl, prompt_length, return_selection, return_lse, return_counts
    if not (
        type(q) is type(k) is type(v) is Tensor
        and type(config) is StemConfig
        and (scale is None or type(scale) is float)  # 1, 1.0 and True are one key
        and (prompt_length is None or type(prompt_length) is int)
        and (impl is None or type(impl) is str)
        and peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    ):
        return Plan(Problem.of(q, k, v, *args))
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    gradients = modes[0] and (q.requires_grad or k.requires_grad or v.requires_grad)
    layouts = q.shape, q.stride(), q.dtype, q.device, k.shape, k.stride(), k.dtype, k.device
    key = args, modes, gradients, layouts, v.shape, v.stride(), v.dtype, v.device
    plan = PLANS.get(key)
    if plan is None:
        plan = Plan(Problem.of(q, k, v, *args))
        with LOCK:
            while len(PLANS) >= MOST_PLANS:
                del PLANS[next(iter(PLANS))]
            PLANS[key] = plan
    return plan


def select(q: Tensor, k: Tensor, v: Tensor, config: StemConfig, *options) -> BlockSelection:
    """Kept blocks of stem.stem_attention without the attention, read only: calls of one length may share the lists.

    Options are scale, impl ("torch", "triton" or None, which is Triton on CUDA) and prompt_length.
    """
    check_finite(q=q, k=k, v=v)
    return plan_for(q, k, v, config, *options).choose(q, k, v)

"""Candidates of the speed comparison: shapes, inputs, configs, and each call with the check of its result."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

import stem
from stem.experiments.speed import gate, peers

# "released" is the schedule of the method's public code, the preset angelslim. "default" is StemConfig().
CONFIGS = {"released": stem.StemConfig.preset("angelslim"), "default": stem.StemConfig()}
SHORT = (
    640,
    1024,
    1500,
    2048,
    3000,
    4096,
    5500,
    8192,
    12000,
    16384,
)  # powers of two, and lengths that end inside a block
BRIEFLY = {  # config -> lengths at which CUDA times the whole operator only
    # the released schedule with its sink and local blocks inside the budget
    "three_regime": (stem.StemConfig.preset("angelslim", forced="inside"), (2**14, 2**15, 2**16, 2**17)),
    "paper": (stem.StemConfig.preset("paper"), SHORT),
    "hpc_ops": (stem.StemConfig.preset("hpc_ops"), SHORT),
    "adaptive": (stem.StemConfig.preset("adaptive"), SHORT),
}
GRAPH = "graph "  # prefix of an operation that was replayed from a CUDA graph, at all lengths of SHORT
PREFILL = "prefill "  # prefix of an operation, before the name of a model, see stem.experiments.speed.drop_in
NEVER_DENSE = "adaptive, never dense"  # config: the preset without its limit `dense_up_to`, for the limit's break-even
EIGHT_PERCENT = "adaptive, 8 %"  # config: the preset with a threshold for that density, by stem.calibrate
LOW_DENSITY = 0.08  # of EIGHT_PERCENT
PRESETS = ("paper", "released", "hpc_ops", "adaptive")  # configs of the rows that are presets of StemConfig
DENSE = {
    "cuda": {"sdpa_cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa_flash": SDPBackend.FLASH_ATTENTION},
    "cpu": {"sdpa_cpu": SDPBackend.FLASH_ATTENTION},
}
IMPLS = {"cuda": ["triton", "hopper"], "cpu": ["torch"]}  # "hopper" only on sm_90
BASELINES = ("fa3", "fa4", "sdpa_cudnn", "sdpa_flash", "sdpa_cpu", "fa3_fp8")  # dense; e4m3 has the config "dense fp8"


@dataclass(frozen=True)
class Shape:
    """Shape of the attention of one prompt [tokens, heads, channels]; the default is one layer of Llama-3.1-8B."""

    tokens: int
    batch: int = 1
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"

    def dense_flops(self) -> int:
        """Operations of dense causal attention, counted as in metrics.attention_flops: 2 N (N + 1) D Hq [FLOP]."""
        return 2 * self.batch * self.q_heads * self.head_dim * self.tokens * (self.tokens + 1)

    def least_bytes(self) -> int:
        """Bytes that attention must move at least: q, k and v read once, the output written once [B]."""
        elements = 2 * self.batch * (self.q_heads + self.kv_heads) * self.tokens * self.head_dim
        return elements * getattr(torch, self.dtype).itemsize


SMOLLM2 = Shape(0, q_heads=9, kv_heads=3, head_dim=64, dtype="float32")
SHAPES = {"cuda": Shape(0), "cpu": SMOLLM2}


class Problem:
    """Inputs of one case, and the intermediate results of the operator's parts, computed when first needed.

    Args:
        impl: Implementation of the attention, and of scores and selection ("triton" computes these for "hopper").
        seed: Of random normal inputs, and of the rows that the gate checks.
        qkv: Inputs in place of random ones: q [B, Hq, N, D], k and v [B, Hkv, N, D].
    """

    def __init__(
        self, shape: Shape, config: stem.StemConfig, device: str, impl: str, seed: int = 0, qkv: tuple | None = None
    ) -> None:
        self.shape, self.config, self.impl = shape, config, impl
        self.chooses = "triton" if impl == "hopper" else impl
        self._generator = torch.Generator(device).manual_seed(seed)
        self.q, self.k, self.v = qkv or (self._normal(n) for n in (shape.q_heads, shape.kv_heads, shape.kv_heads))
        self.rows = gate.sampled_rows(shape.tokens, config.block_size, seed)
        self.budget = stem.block_budget(-(-shape.tokens // config.block_size), config)

    def _normal(self, heads: int) -> Tensor:
        size = self.shape.batch, heads, self.shape.tokens, self.shape.head_dim
        return gate.guarded_normal(size, getattr(torch, self.shape.dtype), self._generator.device, self._generator)

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    @cached_property
    def dout(self) -> Tensor:
        return self._normal(self.shape.q_heads)

    def score(self) -> Tensor:
        return stem.block_scores(*self.qkv, self.config, impl=self.chooses)

    def select(self) -> stem.BlockSelection:
        lengths = dict(q_len=self.shape.tokens, kv_len=self.shape.tokens)
        return stem.select_blocks(self.scores, self.budget, self.config, impl=self.chooses, **lengths)

    scores, selection = cached_property(score), cached_property(select)

    def attend(self) -> Tensor:
        return stem.block_sparse_attention(*self.qkv, self.selection, impl=self.impl)

    @cached_property
    def block_mask(self) -> BlockMask:
        return self.selection.to_block_mask()

    @cached_property
    def in_fp8(self) -> tuple[Tensor, ...]:
        return peers.rounded_to_fp8(*self.qkv)


@dataclass(frozen=True)
class Candidate:
    """An operation of one provider: `prepare(problem)` returns the call to time and the check of its result."""

    operation: str
    provider: str
    prepare: Callable[[Problem], tuple[Callable[[], Any], Callable[[Any], float]]]


Attend = Callable[[Tensor, Tensor, Tensor, Problem], Tensor]  # q, k, v like the problem's -> output


def attend_densely(backend: SDPBackend) -> Attend:
    """Dense causal attention by one back end of SDPA; it fails where this back end does not run."""

    def attend(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return attend


def dense_attends(device: str) -> dict[str, Attend]:
    """Dense causal attention by provider: SDPA's back ends, and on CUDA the peers that are installed."""
    attends = {name: attend_densely(backend) for name, backend in DENSE[device].items()}
    if device == "cuda":
        for name in peers.installed(peers.DENSE):
            attends[name] = lambda q, k, v, problem, name=name: peers.attend(name, q, k, v)
        for name in peers.installed(peers.FP8):
            attends[name] = lambda q, k, v, problem: peers.attend_in_fp8(problem.in_fp8)
    return attends


def attend_sparsely(impl: str) -> Attend:
    """Attention to the selected blocks by one implementation."""
    return lambda q, k, v, problem: stem.block_sparse_attention(q, k, v, problem.selection, impl=impl)


def attend_by_flex(**kernel_options: str) -> Attend:
    """FlexAttention over the selected blocks, compiled for one length; BACKEND="FLASH" is FlashAttention-4."""
    torch.compiler.reset()  # one specialisation per length stays below the limit on recompilations
    compiled = torch.compile(flex_attention, dynamic=False)
    options = dict(enable_gqa=True, kernel_options=kernel_options or None)
    return lambda q, k, v, problem: compiled(q, k, v, block_mask=problem.block_mask, **options)


def sparse_peers(flex: bool) -> list[Candidate]:
    """Attention to the selected blocks by the peers that are installed, with `flex` by FlexAttention too."""
    makers = {"fa4_sparse": lambda: lambda q, k, v, problem: peers.attend_to_blocks(q, k, v, problem.block_mask)}
    makers |= {"flex_flash": partial(attend_by_flex, BACKEND="FLASH"), "flex": attend_by_flex} if flex else {}
    found = {"flex", *peers.installed(peers.SPARSE)}
    return [attention_candidate(name, make()) for name, make in makers.items() if name in found]


def attention_candidate(provider: str, attend: Attend) -> Candidate:
    """Forward pass of attention alone."""

    def prepare(problem: Problem):
        selection = None if provider in BASELINES else problem.selection
        call = partial(attend, *problem.qkv, problem)
        allowed = gate.FP8_TOLERANCE if provider in peers.FP8 else None
        return call, lambda out: gate.check_output(out, *problem.qkv, problem.rows, selection, allowed)

    return Candidate("attention", provider, prepare)


def training_candidate(provider: str, attend: Attend) -> Candidate:
    """Forward and backward pass of attention alone."""

    def prepare(problem: Problem):
        inputs = [x.detach().requires_grad_() for x in problem.qkv]
        selection = None if provider in BASELINES else problem.selection

        def call() -> tuple[Tensor, ...]:
            with torch.enable_grad():
                out = attend(*inputs, problem)
            return torch.autograd.grad(out, inputs, problem.dout)

        return call, lambda found: gate.check_gradients(found, *problem.qkv, problem.dout, problem.rows, selection)

    return Candidate("forward+backward", provider, prepare)


def stem_candidates(impl: str | None) -> list[Candidate]:
    """Scores, selection, attention and the whole operator of one implementation.

    "hopper" has the last two only. None has the operator only, with `impl=None` and as provider "stem".
    """

    def check_lists(selection: stem.BlockSelection, problem: Problem) -> float:
        return gate.check_selection(selection, problem.scores, problem.budget, problem.config, problem.rows)

    def check_operator(out: Tensor, problem: Problem) -> float:
        _, selection = stem.stem_attention(*problem.qkv, problem.config, impl=impl, return_selection=True)
        check_lists(selection, problem)
        return gate.check_output(out, *problem.qkv, problem.rows, selection)

    def score(problem: Problem):
        return problem.score, lambda scores: gate.check_scores(scores, *problem.qkv, problem.config)

    def select(problem: Problem):
        return problem.select, lambda selection: check_lists(selection, problem)

    def operate(problem: Problem):
        call = partial(stem.stem_attention, *problem.qkv, problem.config, impl=impl)
        return call, lambda out: check_operator(out, problem)

    if impl is None:
        return [Candidate("operator", "stem", operate)]
    name = f"stem_{impl}"
    parts = [] if impl == "hopper" else [Candidate("scores", name, score), Candidate("selection", name, select)]
    return [*parts, attention_candidate(name, attend_sparsely(impl)), Candidate("operator", name, operate)]


def graph_candidate(candidate: Candidate) -> Candidate:
    """A candidate replayed from a CUDA graph, which leaves out the host's launch time."""

    def prepare(problem: Problem):
        call, check = candidate.prepare(problem)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):  # a first call compiles and allocates, which a graph cannot capture
            call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call()

        def replay():
            graph.replay()
            return out

        return replay, check

    return replace(candidate, operation=GRAPH + candidate.operation, prepare=prepare)


def default_impls(device: str) -> list[str]:
    """The fast implementations that this device runs."""
    hopper = device == "cuda" and torch.cuda.get_device_capability() == (9, 0)
    return [impl for impl in IMPLS[device] if impl != "hopper" or hopper]

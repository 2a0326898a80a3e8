"""Speed: dense, FlexAttention and Stem on one machine, part by part, each row gated by stem.experiments.speed.gate before it is timed.

`python -m stem.experiments.speed.bench --profile full` measures, writes results/speed/<machine>.csv and prints a short table last.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import stem
from stem import metrics
from stem.experiments import records
from stem.experiments.speed import gate

# "released" is the schedule that the method's public code ships with; "default" is StemConfig().
CONFIGS = {"released": stem.StemConfig.preset("angelslim"), "default": stem.StemConfig()}
# Of these only attention and the whole operator are timed, on CUDA and at these lengths. "three_regime" is the released
# schedule with its sink and local blocks inside the budget instead of on top; the presets show where sparse wins.
SHORT = (1024, 1500, 2048, 3000, 4096, 5500, 8192, 12000, 16384)  # powers of two, and multiples of no block between
BRIEFLY = {
    "three_regime": (stem.StemConfig.preset("angelslim", forced="inside"), (2**14, 2**15, 2**16, 2**17)),
    "paper": (stem.StemConfig.preset("paper"), SHORT),
    "hpc_ops": (stem.StemConfig.preset("hpc_ops"), SHORT),
    "adaptive": (stem.StemConfig.preset("adaptive"), SHORT),
}
GRAPH = "graph "  # before the operation of a row that was replayed from a CUDA graph, as are all of SHORT
PRESETS = ("paper", "released", "hpc_ops", "adaptive")  # as they are named in the rows
DENSE = {
    "cuda": {"sdpa_cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa_flash": SDPBackend.FLASH_ATTENTION},
    "cpu": {"sdpa_cpu": SDPBackend.FLASH_ATTENTION},
}
IMPLS = {"cuda": ["triton", "hopper"], "cpu": ["torch"]}  # "hopper" only on sm_90
BASELINES = ("sdpa_cudnn", "sdpa_flash", "sdpa_cpu")
LENGTHS = {  # tokens of each profile
    ("cuda", "full"): [*SHORT, *(2**n for n in range(15, 18)), 2**20],
    ("cuda", "smoke"): [2**13, 2**15, 2**17],
    ("cpu", "full"): [1024 * 2**n for n in range(6)],
    ("cpu", "smoke"): [1024 * 2**n for n in range(4)],
}
FLEX_TOKENS = (2**17,)  # each length costs one more compilation
TRAINING_TOKENS = {"cuda": (2**15, 2**13), "cpu": (2**11,)}  # forward and backward, the first with FlexAttention
TRAINING_CONFIG = "default"
CAPTURED_TOKENS = {"cuda": 2**13, "cpu": 2**11}
CAPTURED_LAYERS = {"cuda": (0, 10, 20, 29), "cpu": (10,)}  # of SmolLM2-135M's thirty
# Arithmetic of an operation over that of attention's forward pass; a backward pass has five products to its two.
FLOP_FACTOR = {"attention": 1, "operator": 1, "forward+backward": 3.5, "captured attention": 1, "captured operator": 1}
FLOP_FACTOR |= {"graph attention": 1, "graph operator": 1}
ONE_CONFIG_TOKENS = 2**19  # from here on only the first config, which saves minutes
COLUMNS = (
    *("operation", "provider", "config", "tokens", "batch", "q_heads", "kv_heads", "head_dim", "dtype", "block_size"),
    *("density", "latency_ms", "latency_ms_p20", "latency_ms_p80", "tflops", "gb_per_s", "peak_memory_mib"),
    *(f"speedup_vs_{name}" for name in BASELINES),
    *("flop", "least_bytes", "error_vs_fp64", "error", "timing", "seed"),
)
SAME = ("operation", "provider", "config", "tokens")  # name what a row measured
LONGEST_CALL_MS = {"cuda": 2_000, "cpu": 30_000}  # dense calls predicted to take longer are skipped
TIMING = {
    "cuda": "triton.testing.do_bench, L2 flushed before each call, clocks not locked",
    "cpu": "perf_counter, caches warm, clocks not locked",
}
FIRST_TOKEN_TIMING = "perf_counter around a prefill of the whole model, one to three calls, clocks not locked"


@dataclass(frozen=True)
class Shape:
    """The attention of one prompt: by default one layer of Llama-3.1-8B."""

    tokens: int
    batch: int = 1
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"

    def dense_flops(self) -> int:
        """QK^T and PV over the causal triangle, as metrics.attention_flops counts them: 2 N (N + 1) D Hq [FLOP]."""
        return 2 * self.batch * self.q_heads * self.head_dim * self.tokens * (self.tokens + 1)

    def least_bytes(self) -> int:
        """q, k and v read once and the output written once [B]."""
        elements = 2 * self.batch * (self.q_heads + self.kv_heads) * self.tokens * self.head_dim
        return elements * getattr(torch, self.dtype).itemsize


SMOLLM2 = Shape(0, q_heads=9, kv_heads=3, head_dim=64, dtype="float32")
SHAPES = {"cuda": Shape(0), "cpu": SMOLLM2}


class Problem:
    """The inputs of one case, and what the parts of the operator hand to each other, made when first asked for.

    `impl` computes scores and selection ("triton" where it is "hopper", which only attends), and the attention where no
    other is asked for. `qkv`: inputs of this shape, random normal ones by default.
    """

    def __init__(
        self,
        shape: Shape,
        config: stem.StemConfig,
        device: str,
        impl: str,
        seed: int = 0,
        qkv: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> None:
        self.shape, self.config, self.impl = shape, config, impl
        self.chooses = "triton" if impl == "hopper" else impl
        self._generator = torch.Generator(device).manual_seed(seed)
        heads = shape.q_heads, shape.kv_heads, shape.kv_heads
        self.q, self.k, self.v = qkv or (self._normal(number) for number in heads)
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
        """What arrives at the output in a backward pass."""
        return self._normal(self.shape.q_heads)

    def score(self) -> Tensor:
        return stem.block_scores(*self.qkv, self.config, impl=self.chooses)

    def select(self) -> stem.BlockSelection:
        lengths = dict(q_len=self.shape.tokens, kv_len=self.shape.tokens)
        return stem.select_blocks(self.scores, self.budget, self.config, impl=self.chooses, **lengths)

    def attend(self, impl: str | None = None) -> Tensor:
        return stem.block_sparse_attention(*self.qkv, self.selection, impl=impl or self.impl)

    def operate(self, impl: str | None = None) -> Tensor:
        return stem.stem_attention(*self.qkv, self.config, impl=impl or self.impl)

    def operate_by_default(self) -> Tensor:
        return stem.stem_attention(*self.qkv, self.config)

    @cached_property
    def scores(self) -> Tensor:
        return self.score()

    @cached_property
    def selection(self) -> stem.BlockSelection:
        return self.select()


@dataclass(frozen=True)
class Candidate:
    """Something to check and to time: `prepare(problem)` returns the call, and the check of what it returns."""

    operation: str
    provider: str
    prepare: Callable[[Problem], tuple[Callable[[], Any], Callable[[Any], float]]]


def dense_candidate(provider: str, backend: SDPBackend) -> Candidate:
    """Dense causal attention by one named back end of SDPA, which fails rather than fall back."""

    def prepare(problem: Problem):
        def call() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*problem.qkv, is_causal=True, enable_gqa=True)

        return call, lambda out: gate.check_output(out, *problem.qkv, problem.rows)

    return Candidate("attention", provider, prepare)


def flex_candidate() -> Candidate:
    """FlexAttention, compiled for this length, over the blocks that Stem selected."""

    def prepare(problem: Problem):
        from torch.nn.attention.flex_attention import flex_attention

        torch.compiler.reset()  # one specialisation per length: never meets the limit on recompilations
        call = partial(
            torch.compile(flex_attention, dynamic=False),
            *problem.qkv,
            block_mask=problem.selection.to_block_mask(),
            enable_gqa=True,
        )
        return call, lambda out: gate.check_output(out, *problem.qkv, problem.rows, problem.selection)

    return Candidate("attention", "flex", prepare)


def training_candidate(provider: str, attend: Callable[..., Tensor], dense: bool = False) -> Candidate:
    """Forward and backward of attention; `attend(q, k, v, problem)` returns the output of given blocks, or of all."""

    def prepare(problem: Problem):
        inputs = [x.detach().requires_grad_() for x in problem.qkv]

        def call() -> tuple[Tensor, ...]:
            with torch.enable_grad():
                out = attend(*inputs, problem)
            return torch.autograd.grad(out, inputs, problem.dout)

        selection = None if dense else problem.selection
        return call, lambda found: gate.check_gradients(found, *problem.qkv, problem.dout, problem.rows, selection)

    return Candidate("forward+backward", provider, prepare)


def training_candidates(device: str, impls: Sequence[str], dense: Iterable[str], flex: bool) -> list[Candidate]:
    """Forward and backward of the dense baselines, of Stem's blocks in each implementation and in FlexAttention."""

    def attend_densely(q: Tensor, k: Tensor, v: Tensor, problem: Problem, backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def attend(q: Tensor, k: Tensor, v: Tensor, problem: Problem, impl: str) -> Tensor:
        return stem.block_sparse_attention(q, k, v, problem.selection, impl=impl)

    candidates = [
        training_candidate(name, partial(attend_densely, backend=DENSE[device][name]), dense=True) for name in dense
    ]
    candidates += [training_candidate(f"stem_{impl}", partial(attend, impl=impl)) for impl in impls]
    if flex:
        from torch.nn.attention.flex_attention import flex_attention

        torch.compiler.reset()
        compiled = torch.compile(flex_attention, dynamic=False)

        def attend_by_flex(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> Tensor:
            return compiled(q, k, v, block_mask=block_mask(problem), enable_gqa=True)

        block_mask = lru_cache(maxsize=1)(lambda problem: problem.selection.to_block_mask())
        candidates.append(training_candidate("flex", attend_by_flex))
    return candidates


def stem_candidates(impl: str | None) -> list[Candidate]:
    """The parts of Stem and the whole operator in one implementation; "hopper" shares Triton's scores and selection.

    None is the operator as `impl=None` computes it, provider "stem".
    """

    def check_lists(selection: stem.BlockSelection, problem: Problem) -> float:
        return gate.check_selection(selection, problem.scores, problem.budget, problem.config, problem.rows)

    def check_operator(out: Tensor, problem: Problem) -> float:
        _, selection = stem.stem_attention(*problem.qkv, problem.config, impl=impl, return_selection=True)
        check_lists(selection, problem)
        return gate.check_output(out, *problem.qkv, problem.rows, selection)

    parts = {
        "scores": lambda p: (p.score, lambda scores: gate.check_scores(scores, *p.qkv, p.config)),
        "selection": lambda p: (p.select, lambda selection: check_lists(selection, p)),
        "attention": lambda p: (
            partial(p.attend, impl),
            lambda out: gate.check_output(out, *p.qkv, p.rows, p.selection),
        ),
        "operator": lambda p: (partial(p.operate, impl), lambda out: check_operator(out, p)),
    }
    if impl is None:
        return [Candidate("operator", "stem", lambda p: (p.operate_by_default, lambda out: check_operator(out, p)))]
    if impl == "hopper":
        del parts["scores"], parts["selection"]
    return [Candidate(operation, f"stem_{impl}", prepare) for operation, prepare in parts.items()]


def graph_candidate(candidate: Candidate) -> Candidate:
    """The same, replayed from a CUDA graph: what the GPU needs for it, without the host's time for its launches."""

    def prepare(problem: Problem):
        call, check = candidate.prepare(problem)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):  # what a first call does once cannot be captured
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


def run(candidate: Candidate, problem: Problem, config_name: str) -> dict[str, Any]:
    """One row: check, then time. A candidate that fails leaves its error in the row instead of numbers.

    Returns:
        Liger-like columns; latencies [ms], tflops of the kept pairs (attention and operator), peak_memory_mib beyond
        the inputs, error_vs_fp64 (relative L2, worst sampled row), error ("" when all went well).
    """
    shape, dense = problem.shape, candidate.provider in BASELINES
    row = dict(operation=candidate.operation, provider=candidate.provider, config="dense" if dense else config_name)
    row |= asdict(shape) | dict(block_size=None if dense else problem.config.block_size, error="")
    row |= dict(timing=TIMING[problem.q.device.type])
    try:
        call, check = candidate.prepare(problem)
        own = candidate.provider.startswith("stem")  # SDPA's buffers are torch's, and FlexAttention would compile twice
        with gate.poisoned_buffers() if own else nullcontext():
            row["error_vs_fp64"] = check(call())
        row |= measure(call, problem.q.device.type)
        row["density"] = 1.0 if dense else problem.selection.density()
        if candidate.operation in FLOP_FACTOR:
            flop = shape.dense_flops() if dense else metrics.attention_flops(problem.selection, shape.head_dim)
            row["flop"] = flop * FLOP_FACTOR[candidate.operation]
            row["least_bytes"] = shape.least_bytes()
            row["tflops"] = row["flop"] / row["latency_ms"] / 1e9
    except Exception as error:  # recorded, so that one provider's failure costs one row
        row["error"] = f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
    return row


def measure(call: Callable[[], Any], device: str) -> dict[str, float]:
    """Median, p20 and p80 of a call that has run before [ms], and its peak memory, result included [MiB].

    CUDA: triton's do_bench, or two single calls when one takes over a second. CPU: three calls or half a second,
    whichever is more; memory is not measured there (NaN).
    """
    peak_mib = float("nan")
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        once = _one_call(call, device)
        peak_mib = (torch.cuda.max_memory_allocated() - before) / 2**20
    if device == "cuda" and once < 1_000:
        from triton.testing import do_bench

        # a short call is warmed up for longer: what came before it, compilation above all, let the clocks fall
        times = do_bench(call, warmup=10 if once > 10 else 50, rep=max(100, int(5 * once)), return_mode="all")
    elif device == "cuda":
        times = [once, _one_call(call, device)]
    else:
        times, enough = [], time.perf_counter() + 0.5
        while len(times) < 3 or time.perf_counter() < enough:
            times.append(_one_call(call, device))
    p20, median, p80 = torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return dict(latency_ms=median, latency_ms_p20=p20, latency_ms_p80=p80, peak_memory_mib=peak_mib)


def _one_call(call: Callable[[], Any], device: str) -> float:
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return (time.perf_counter() - start) * 1e3


def case(
    shape: Shape,
    device: str,
    *,
    configs: Sequence[str] | None = None,
    impls: Sequence[str] = ("torch",),
    dense: Iterable[str] | None = None,
    flex: bool = False,
    briefly: Iterable[str] = (),
    graphs: bool = False,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Rows of one shape: the dense baselines, then each config in each implementation, all with their speed-ups.

    Args:
        shape: Which problem.
        device: "cuda" or "cpu".
        configs: Names in CONFIGS, default all.
        impls: Implementations of stem_attention; the first one computes the lists for all, FlexAttention included.
        dense: Which back ends of DENSE to measure, default all of the device.
        flex: Whether to measure FlexAttention with the lists of the first config.
        briefly: Names in BRIEFLY: only attention by the last of `impls`, and the operator as impl=None computes it.
        graphs: Whether to measure the dense baselines and the operator as impl=None computes it in CUDA graphs too.
        seed: Of the random normal inputs.
    """
    configs = tuple(CONFIGS) if configs is None else configs
    with torch.no_grad():
        problem = Problem(shape, CONFIGS[configs[0]], device, impls[0], seed)
        names = DENSE[device] if dense is None else dense
        baselines = [dense_candidate(name, DENSE[device][name]) for name in names]
        baselines += [graph_candidate(candidate) for candidate in baselines if graphs]
        in_graphs = [graph_candidate(candidate) for candidate in stem_candidates(None) if graphs]
        rows = [run(candidate, problem, "dense") for candidate in baselines]
        for config_name in configs:
            problem = None  # free the last one's memory first
            problem = Problem(shape, CONFIGS[config_name], device, impls[0], seed)
            measured = [*impls, None] if device == "cuda" else impls
            candidates = [candidate for impl in measured for candidate in stem_candidates(impl)]
            if config_name != configs[0]:  # once is enough for an implementation that is not the fastest
                slower = [f"stem_{impl}" for impl in impls[:-1]]
                candidates = [
                    c for c in candidates if c.operation in ("scores", "selection") or c.provider not in slower
                ]
            if flex and config_name == configs[0]:
                candidates.append(flex_candidate())
            rows += [run(candidate, problem, config_name) for candidate in candidates + in_graphs]
        for config_name in briefly:
            problem = None
            problem = Problem(shape, BRIEFLY[config_name][0], device, impls[0], seed)
            attention = [c for c in stem_candidates(impls[-1]) if c.operation == "attention"]
            candidates = attention + stem_candidates(None) + in_graphs
            rows += [run(candidate, problem, config_name) for candidate in candidates]
    return with_speedups(rows, seed)


def with_speedups(rows: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """The rows with their ratios to the dense baselines that were run like them; parts of the operator have none."""
    for row in rows:
        in_graph = row["operation"].startswith(GRAPH)
        dense = [r for r in rows if r["config"] == "dense" and r["operation"].startswith(GRAPH) == in_graph]
        baseline = {r["provider"]: r.get("latency_ms") for r in dense}
        for name in BASELINES:
            both = row["operation"] not in ("scores", "selection") and "latency_ms" in row and baseline.get(name)
            row[f"speedup_vs_{name}"] = baseline[name] / row["latency_ms"] if both else None
    return [row | dict(seed=seed) for row in rows]


def training_case(
    shape: Shape, device: str, *, impls: Sequence[str], dense: Iterable[str] | None = None, flex: bool, seed: int = 0
) -> list[dict[str, Any]]:
    """Rows of operation "forward+backward" of one shape with TRAINING_CONFIG; arguments as in `case`."""
    with torch.no_grad():
        problem = Problem(shape, CONFIGS[TRAINING_CONFIG], device, impls[0], seed)
        names = DENSE[device] if dense is None else dense
        candidates = training_candidates(device, impls, names, flex)
        return with_speedups([run(candidate, problem, TRAINING_CONFIG) for candidate in candidates], seed)


def captured_case(
    model: torch.nn.Module, ids: Tensor, layers: Iterable[int], device: str, *, impls: Sequence[str], seed: int = 0
) -> list[dict[str, Any]]:
    """Rows of operations "captured attention" and "captured operator": on q, k and v of layers of a real model.

    Args:
        model: A causal language model of transformers on the device; ids: Token ids [1, N].
        layers: Which; a row's latency is the median over them, its density their mean, its error the worst.
        device, impls: As in `case`; the config is "default".
        seed: Of the sampled rows.
    """
    from stem.experiments.theory import flow

    found = []
    for layer in layers:
        with torch.no_grad():
            q, k, v = (x.contiguous() for x in flow.capture(model, ids, layer))
            shape = Shape(q.shape[2], 1, q.shape[1], k.shape[1], q.shape[3], str(q.dtype).removeprefix("torch."))
            problem = Problem(shape, CONFIGS["default"], device, impls[0], seed, (q, k, v))
            candidates = [dense_candidate(name, backend) for name, backend in DENSE[device].items()]
            for impl in impls:
                candidates += [c for c in stem_candidates(impl) if c.operation in ("attention", "operator")]
            for candidate in candidates:
                candidate = replace(candidate, operation=f"captured {candidate.operation}")
                found.append(run(candidate, problem, "default"))
    rows = pd.DataFrame(found)
    merged = []
    for _, group in rows.groupby(["operation", "provider"], sort=False):
        row = group.iloc[0].to_dict()
        numbers = group.select_dtypes("number")
        row |= numbers.median().to_dict() | dict(density=group.get("density", pd.Series(dtype=float)).mean())
        row |= dict(error_vs_fp64=group["error_vs_fp64"].max(), error="; ".join(e for e in group["error"] if e))
        merged.append({name: value for name, value in row.items() if not pd.isna(value)} | dict(error=row["error"]))
    return with_speedups(merged, seed)


def sweep(
    lengths: Iterable[int],
    device: str,
    *,
    impls: Sequence[str] | None = None,
    configs: Sequence[str] | None = None,
    seed: int = 0,
    shape: Shape | None = None,
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Rows over lengths, shortest first, after those of the machine's ceilings; yields (tokens, rows).

    `impls`, `shape` and `configs` default to default_impls and SHAPES of the device, and all of CONFIGS, on CUDA those
    of BRIEFLY too. A dense back end whose next call is predicted, from its last one, to exceed LONGEST_CALL_MS is
    skipped, and says so.
    """
    briefly = BRIEFLY if device == "cuda" and configs is None else {}
    shape = SHAPES[device] if shape is None else shape
    impls = default_impls(device) if impls is None else impls
    configs = tuple(CONFIGS) if configs is None else configs
    yield 0, ceilings(device, shape.dtype)
    last = {}  # provider -> (tokens, ms)
    for tokens in sorted(lengths):
        predicted = {name: ms * (tokens / before) ** 2 for name, (before, ms) in last.items()}
        affordable = [name for name in DENSE[device] if predicted.get(name, 0) <= LONGEST_CALL_MS[device]]
        rows = case(
            replace(shape, tokens=tokens),
            device,
            configs=configs[: 1 if tokens >= ONE_CONFIG_TOKENS else None],
            impls=impls,
            dense=affordable,
            flex=device == "cuda" and tokens in FLEX_TOKENS,
            briefly=[name for name, (_, measured) in briefly.items() if tokens in measured],
            graphs=device == "cuda" and tokens in SHORT,
            seed=seed,
        )
        last |= {r["provider"]: (tokens, r["latency_ms"]) for r in rows if r["config"] == "dense" and "latency_ms" in r}
        for name in set(DENSE[device]) - set(affordable):
            skipped = dict(operation="attention", provider=name, config="dense", density=1.0, seed=seed)
            skipped["error"] = f"skipped: about {predicted[name] / 1e3:.0f} s a call"
            rows.append(asdict(replace(shape, tokens=tokens)) | skipped)
        yield tokens, rows


def beyond_the_operator(
    device: str, profile: str, *, impls: Sequence[str] | None = None, seed: int = 0
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Rows of training, of time to first token, and of a real model's q, k and v; yields (what they are, rows).

    What matters most comes first, so that a run that is cut short has it.
    """
    from stem import pretrained
    from stem.experiments.speed import first_token

    impls = default_impls(device) if impls is None else impls

    def train(lengths: Iterable[int], flex: bool = False):
        for tokens in lengths:
            shape = replace(SHAPES[device], tokens=tokens)
            yield (
                f"forward+backward, {tokens:,} tokens",
                training_case(shape, device, impls=impls, flex=flex, seed=seed),
            )

    def read(lengths: Iterable[int]):
        for tokens in lengths:
            rows = first_token_case(model, tokens, device, configs=configs, seed=seed)
            yield f"time to first token, {tokens:,} tokens", rows

    dtype = getattr(torch, SHAPES[device].dtype)
    yield from train(TRAINING_TOKENS[device][:1], flex=device == "cuda")
    settings = first_token.LLAMA_8B if device == "cuda" else first_token.TINY
    model = first_token.random_llama(settings, device, dtype, seed)
    configs = ("released",) if device == "cuda" else ("default",)
    lengths = first_token.LENGTHS[device, profile]
    yield from read(lengths)
    small, tokenizer = pretrained.load("smollm2", device=device, dtype=dtype)
    ids = prompt(tokenizer, CAPTURED_TOKENS[device]).to(device)
    yield "captured from SmolLM2", captured_case(small, ids, CAPTURED_LAYERS[device], device, impls=impls, seed=seed)
    yield from train(TRAINING_TOKENS[device][1:] if profile == "full" else ())


def prompt(tokenizer, tokens: int) -> Tensor:
    """Token ids [1, tokens] of real text: the sources of the standard library."""
    from stem.experiments.documents import stdlib_documents

    text = "\n".join(stdlib_documents().values())[: 8 * tokens]  # more than enough characters
    return torch.tensor(tokenizer(text).input_ids[:tokens])[None]


def first_token_case(
    model: torch.nn.Module, tokens: int, device: str, *, configs: Iterable[str], seed: int = 0
) -> list[dict[str, Any]]:
    """Rows of operation "ttft", time to first token, of one length: the dense back ends, and Stem with each config."""
    from stem.experiments.speed import first_token

    settings, dtype = model.config, str(model.dtype).removeprefix("torch.")
    heads = settings.num_attention_heads, settings.num_key_value_heads, settings.head_dim
    common = dict(operation="ttft") | asdict(Shape(tokens, 1, *heads, dtype)) | dict(timing=FIRST_TOKEN_TIMING)
    rows = []
    for name in configs:
        config, backends = CONFIGS[name], {} if rows else DENSE[device]
        for row in first_token.compare(model, tokens, backends, config, seed):
            own = dict(config=name, block_size=config.block_size) if row["provider"] == "stem" else dict(config="dense")
            rows.append(common | own | row)
    return with_speedups(rows, seed)


def default_impls(device: str) -> list[str]:
    """The fast implementations that this device runs."""
    hopper = device == "cuda" and torch.cuda.get_device_capability() == (9, 0)
    return [impl for impl in IMPLS[device] if impl != "hopper" or hopper]


def ceilings(device: str, dtype: str) -> list[dict[str, Any]]:
    """What this machine can do at most, measured: a square matmul [TFLOP/s] and a copy [GB/s], as two rows."""
    kind = getattr(torch, dtype)
    n, elements = (8192, 2**29) if device == "cuda" else (2048, 2**25)
    a, b = (torch.randn(n, n, device=device).to(kind) for _ in range(2))
    source = torch.ones(elements, dtype=kind, device=device)
    target = torch.empty_like(source)
    common = dict(operation="ceiling", dtype=dtype, error="", timing=TIMING[device])
    matmul = common | dict(provider="matmul") | measure(lambda: torch.mm(a, b), device)
    copy = common | dict(provider="copy") | measure(lambda: target.copy_(source), device)
    matmul["tflops"] = 2 * n**3 / matmul["latency_ms"] / 1e9
    copy["gb_per_s"] = 2 * elements * kind.itemsize / copy["latency_ms"] / 1e6
    return [matmul, copy]


def wins_from(rows: Iterable[dict[str, Any]] | pd.DataFrame, config: str, margin: float = 1.0) -> int | None:
    """The shortest measured length from which on the operator beats every dense back end by `margin`; None if none.

    Lengths without a dense time do not count.
    """
    frame = pd.DataFrame(rows)
    operator = frame[(frame["operation"] == "operator") & (frame["config"] == config)].set_index("tokens")
    speedups = operator[[f"speedup_vs_{name}" for name in BASELINES]].dropna(how="all").min(axis=1)
    speedups = speedups.groupby(level=0).max()  # the fastest implementation at each length
    wins = (speedups > margin)[::-1].cummin()[::-1]  # True where it and all longer ones win
    return int(wins.idxmax()) if wins.any() else None


def over_dense(
    rows: Iterable[dict[str, Any]] | pd.DataFrame, configs: Sequence[str] = PRESETS, *, graph: bool = False
) -> pd.DataFrame:
    """Speed-up of the operator (impl=None) over the fastest dense back end: tokens down, configs across.

    Both called from Python, or with `graph` both replayed from a CUDA graph.
    """
    frame, prefix = pd.DataFrame(rows).dropna(subset="latency_ms"), GRAPH if graph else ""
    dense = frame[(frame["operation"] == prefix + "attention") & (frame["config"] == "dense")]
    dense = dense.groupby("tokens").latency_ms.min()
    operator = frame[(frame["operation"] == prefix + "operator") & (frame["provider"] == "stem")]
    times = operator.pivot_table(index="tokens", columns="config", values="latency_ms")
    return times.rdiv(dense, axis=0).reindex(columns=[name for name in configs if name in times]).dropna(how="all")


def table(rows: Iterable[dict[str, Any]] | pd.DataFrame) -> str:
    """The rows as a short text table: lengths down, the columns that people compare across."""
    frame = pd.DataFrame(rows)
    wanted = ["tokens", "config", "operation", "provider", "density", "latency_ms", "tflops", "gb_per_s"]
    wanted += ["peak_memory_mib", *(f"speedup_vs_{name}" for name in BASELINES), "error"]
    shown = frame[[column for column in wanted if column in frame and frame[column].notna().any()]]
    return shown.rename(columns=lambda name: name.replace("speedup_vs_", "vs_")).to_string(
        index=False, na_rep="", float_format=lambda x: f"{x:.4g}", max_colwidth=60
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m stem.experiments.speed.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--profile", choices=records.PROFILES, default="smoke", help="lengths and file of the rows")
    parser.add_argument("--quick", action="store_true", help="the smoke lengths; same as --profile smoke")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="TOKENS", help="only these; other rows stay")
    parser.add_argument(
        "--impls", nargs="+", metavar="IMPL", help="default: triton and hopper on CUDA, torch on the CPU"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: CUDA where there is one")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    profile = "smoke" if options.quick else options.profile
    rows, start = [], time.perf_counter()
    for what, found in _everything(options, device, profile):
        rows += found
        print(f"{time.perf_counter() - start:6.1f} s  {what}  {len(found)} rows", flush=True)
        # after each part, so that a run that is cut short leaves what it measured
        same = SAME if options.lengths else None
        path = records.write_rows("speed", pd.DataFrame(rows, columns=list(COLUMNS)), profile, same=same)
    print(table(rows))
    print(f"wrote {path}")


def _everything(options: argparse.Namespace, device: str, profile: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """What is measured and its rows: the operator by length, what is beyond it, the operator at extreme lengths."""
    lengths = options.lengths or LENGTHS[device, profile]
    common = dict(impls=options.impls, seed=options.seed)
    ordinary = [n for n in lengths if n < ONE_CONFIG_TOKENS or options.lengths]
    for tokens, found in sweep(ordinary, device, **common):
        yield f"{tokens:>8,} tokens", found
    if not options.lengths:
        yield from beyond_the_operator(device, profile, **common)
    for tokens in sorted(set(lengths) - set(ordinary)):
        impls = default_impls(device) if options.impls is None else options.impls
        shape = replace(SHAPES[device], tokens=tokens)
        yield (
            f"{tokens:>8,} tokens",
            case(shape, device, configs=tuple(CONFIGS)[:1], impls=impls, dense=(), seed=options.seed),
        )


if __name__ == "__main__":
    main()

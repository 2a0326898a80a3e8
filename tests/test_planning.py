"""stem.planning: how each problem runs, without a GPU; and a cache that changes no result."""

import functools
import gc
import sys
from dataclasses import replace
from types import CellType, FunctionType

import pytest
import torch
import torch.nn.functional as F

import stem
from stem import StemConfig
from stem.planning import Plan, Problem, plan_for

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
DENSE, PAPER, ADAPTIVE = StemConfig(density=1.0), StemConfig.preset("paper"), StemConfig.preset("adaptive")
GROUPS_OF_64 = PAPER.replace(block_size=64, lists="group")
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def hopper(monkeypatch):
    from stem.kernels import hopper_forward

    monkeypatch.setattr(hopper_forward, "is_sm90", lambda device: True)


@pytest.fixture
def older_gpu(monkeypatch):
    from stem.kernels import hopper_forward

    monkeypatch.setattr(hopper_forward, "is_sm90", lambda device: False)


def problem(tokens, config, device=CUDA, **changes):
    """A prompt of Llama-3.1-8B's attention shape in bf16, for which torch has its dense kernels."""
    dense = "cudnn" if device.type == "cuda" else "cpu"
    plain = Problem(1, 32, 8, tokens, tokens, 128, torch.bfloat16, device, config, 128**-0.5, dense_kernel=dense)
    return replace(plain, **changes)


TABLE = [  # tokens, config, changes -> path, choice, impl, repeatable
    (512, DENSE, {}, "dense", "forced", "hopper", False),
    (1024, DENSE, {}, "overlap", "forced", "hopper", True),
    (1024, StemConfig(), {}, "lists", "forced", "hopper", True),
    (1024, PAPER, {}, "lists", "forced", "hopper", True),
    (1024, DENSE, dict(q_heads=8), "dense", "forced", "hopper", False),
    (1536, PAPER, {}, "overlap", "topk", "hopper", True),
    (1536, PAPER, dict(return_selection=True), "overlap", "topk", "hopper", False),
    (1536, PAPER, dict(needs_grad=True), "lists", "topk", "hopper", False),
    (1536, PAPER, dict(impl="triton"), "lists", "topk", "triton", True),
    (1536, PAPER, dict(impl="torch"), "lists", "scores", "torch", False),
    (1536, PAPER, dict(impl="flex"), "lists", "topk", "flex", False),
    (1536, PAPER, dict(is_plain=False), "overlap", "topk", "hopper", False),
    (1536, PAPER, dict(dtype=torch.float32, dense_kernel=None), "lists", "topk", "triton", True),
    (1536, PAPER, dict(dtype=torch.float64, dense_kernel=None), "lists", "scores", "torch", True),
    (1536, PAPER, dict(head_dim=96), "lists", "topk", "triton", True),
    (1536, PAPER.replace(block_size=64), {}, "lists", "topk", "triton", True),
    (8192, PAPER, {}, "overlap", "topk", "hopper", True),
    (2**17, PAPER, {}, "lists", "topk", "hopper", True),
    (2**17, PAPER.replace(lists="group"), {}, "lists", "topk", "hopper", True),
    (2**17, ADAPTIVE.replace(lists="group"), {}, "lists", "share", "hopper", True),
    (2**17, GROUPS_OF_64, {}, "lists", "topk", "hopper", True),
    (2**17, GROUPS_OF_64, dict(q_heads=24), "lists", "topk", "triton", True),
    (2**17, GROUPS_OF_64, dict(needs_grad=True), "lists", "topk", "triton", False),
    (2**17, GROUPS_OF_64, dict(dtype=torch.float32, dense_kernel=None), "lists", "topk", "triton", True),
    (2**17, PAPER, dict(q_len=1000), "lists", "topk", "hopper", True),
    (2**17, PAPER.replace(reduction="softmax"), {}, "lists", "scores", "hopper", True),
    (4096, ADAPTIVE, {}, "overlap", "forced", "hopper", True),
    (4096, ADAPTIVE, dict(needs_grad=True), "dense", "forced", "hopper", False),
    (4096, ADAPTIVE, dict(prompt_length=2**15), "lists", "share", "hopper", True),
    (2**15, ADAPTIVE, {}, "lists", "share", "hopper", True),
    (2**15, ADAPTIVE, dict(impl="torch"), "lists", "scores", "torch", False),
    (2**15, StemConfig(density=1.0), dict(dense_kernel=None), "overlap", "all", "hopper", True),
    (2**15, PAPER, dict(batch=0), "empty", "scores", "hopper", False),
    (1024, StemConfig(density=1.0), dict(device=CPU), "dense", "forced", "torch", False),
    (1024, StemConfig(density=1.0), dict(device=CPU, impl="torch"), "lists", "forced", "torch", False),
    (2**15, PAPER, dict(device=CPU), "lists", "scores", "torch", False),
]


@pytest.mark.parametrize("tokens, config, changes, path, choice, impl, repeatable", TABLE)
def test_how_a_problem_runs_on_hopper(tokens, config, changes, path, choice, impl, repeatable, hopper):
    plan = Plan(problem(tokens, config, **changes))
    assert (plan.path, plan.choice, plan.impl, plan.is_repeatable) == (path, choice, impl, repeatable)


def test_other_gpus_never_overlap_and_attend_by_triton(older_gpu):
    for tokens, config, changes, _, _, impl, _ in TABLE:
        if impl == "hopper":
            plan = Plan(problem(tokens, config, **changes))
            assert plan.impl == "triton" and plan.path in ("dense", "lists", "empty")


@pytest.mark.parametrize(
    "tokens, config, changes, said",
    [
        (512, DENSE, {}, "512 tokens in blocks of 128: torch's dense kernel (cudnn) attends, because every row"),
        (1536, PAPER, {}, "beginning with the first 9 rows, which keep every block, while"),
        (2**15, ADAPTIVE, {}, "share of their row exceeds the threshold"),
        (2**15, PAPER, dict(q_len=100, needs_grad=True), "100 queries on 32768 keys in blocks of 128: Triton scores"),
        (
            2**15,
            PAPER,
            dict(needs_grad=True),
            "attends through an operator that holds the backward pass.",
        ),
        (2**15, PAPER, dict(device=CPU), 'torch scores every block pair in memory and selects; impl="torch" attends.'),
        (2**15, PAPER, dict(batch=0), "there is no query"),
    ],
)
def test_explain_says_what_runs_and_why(tokens, config, changes, said, hopper):
    assert said in Plan(problem(tokens, config, **changes)).explain()


@pytest.mark.parametrize("tokens", [1024, 2**15])
def test_a_call_that_keeps_every_block_scores_nothing(tokens, hopper, monkeypatch):
    monkeypatch.setattr(stem.planning.choose, "choose_topk", None)
    plan, given = Plan(problem(tokens, DENSE.replace(dense_up_to=2**16), dense_kernel=None)), []
    lists = torch.zeros(1), torch.zeros(1)
    selection = stem.BlockSelection(*lists, 128, tokens // 128, tokens, tokens)
    monkeypatch.setattr(plan, "choose", lambda *inputs: selection)
    monkeypatch.setattr(plan, "prepare", lambda *inputs: lambda *arguments: given.append(arguments) or (lists[0], None))
    plan._run(*torch.zeros(3, 1))
    assert plan.path == "overlap" and given[0][2:] == (tokens // 128, 0)
    assert given[0][0] is lists[0] and given[0][1] is lists[1]


def draw(q_len=120, kv_len=120, impl=None):
    """q, k, v on the CPU; on the GPU for impl="triton" where there is one, since its kernels are compiled there."""
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    sizes = (2, q_len), (1, kv_len), (1, kv_len)
    return [torch.randn(2, heads, tokens, 16, device=device) for heads, tokens in sizes]


SMALL = dict(block_size=16, score_stride=8, sink_blocks=1, local_blocks=1)
CONFIGS = {
    "density": StemConfig(**SMALL, density=0.4),
    "everything": StemConfig(**SMALL, density=1.0),
    "blocks": StemConfig(**SMALL, k_start=4, decay=0.5),
    "forced only": StemConfig(**SMALL, k_start=2, decay=1.0),
    "on top": StemConfig(**SMALL, k_start=3, forced="on_top"),
    "dense ends": StemConfig(**SMALL, k_start=4, dense_first_blocks=3, dense_last_blocks=2),
    "share": StemConfig.preset("adaptive", block_size=16, score_cells=4, threshold=0.1, dense_up_to=0),
}


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("lengths", [(120, 120), (33, 100)], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_known_counts_are_the_realised_ones(name, lengths, impl):
    q, k, v = draw(*lengths, impl)
    for prompt_length in (None, 400):
        plan = plan_for(q, k, v, CONFIGS[name], impl=impl, prompt_length=prompt_length)
        realised = plan.choose(q, k, v).kv_num_blocks.sum(-1)
        if plan.kept_blocks is not None:
            assert (realised == plan.kept_blocks).all()
        assert (plan.kept_blocks is None) == (name in ("on top", "share"))


@pytest.mark.parametrize("lengths", [(120, 120), (50, 120)], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_fast_paths_change_no_result(name, lengths, monkeypatch, fresh_plans):
    q, k, v = draw(*lengths)
    options = dict(return_selection=True, return_lse=True)
    fast = stem.stem_attention(q, k, v, CONFIGS[name], **options)
    stem.planning.PLANS.clear()
    monkeypatch.setattr(stem.planning, "SHORT_BLOCKS", 0)
    monkeypatch.setattr(stem.planning, "keeps_every_block", lambda *_: False)
    monkeypatch.setattr(Plan, "_path", lambda plan: "lists")
    slow = stem.stem_attention(q, k, v, CONFIGS[name], **options)
    torch.testing.assert_close(fast[0], slow[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fast[2], slow[2], rtol=1e-5, atol=1e-6)
    assert torch.equal(fast[1].to_mask(), slow[1].to_mask())


def test_equal_calls_share_a_plan_and_others_do_not(fresh_plans):
    q, k, v = draw()
    config = CONFIGS["density"]
    plan = plan_for(q, k, v, config)
    assert plan_for(*draw(), StemConfig(**SMALL, density=0.4)) is plan
    others = [
        plan_for(q, k, v, config, scale=0.5),
        plan_for(q, k, v, config, impl="torch"),
        plan_for(q, k, v, config, prompt_length=300),
        plan_for(q, k, v, config, return_lse=True),
        plan_for(q, k, v, config, return_selection=True),
        plan_for(q[:1], k[:1], v[:1], config),
        plan_for(q, k, v.mT.contiguous().mT, config),
        plan_for(q.double(), k.double(), v.double(), config),
        plan_for(q.clone().requires_grad_(), k, v, config),
        plan_for(q, k, v, config.replace(density=0.5)),
    ]
    with torch.inference_mode():
        others.append(plan_for(q, k, v, config))
    with torch.no_grad():
        others.append(plan_for(q, k, v, config))
    assert len({id(each) for each in (plan, *others)}) == len(others) + 1


def test_an_argument_of_another_type_is_checked_whatever_was_planned_before():
    q, k, v = draw()
    stem.stem_attention(q, k, v, CONFIGS["density"], scale=1.0, prompt_length=120)
    with pytest.raises(TypeError, match=r"scale must be a number in \(0, inf\), got True"):
        stem.stem_attention(q, k, v, CONFIGS["density"], scale=True, prompt_length=120)
    with pytest.raises(TypeError, match="config must be a StemConfig, got {}"):
        stem.stem_attention(q, k, v, {})
    with pytest.raises(ValueError, match="impl must be None or one of .*, got 'cuda'"):
        stem.stem_attention(q, k, v, CONFIGS["density"], impl="cuda")
    with pytest.raises(ValueError, match="prompt_length must be at least k's 120 tokens, got 100"):
        stem.stem_attention(q, k, v, CONFIGS["density"], prompt_length=100)


def test_few_plans_are_kept(fresh_plans, monkeypatch):
    monkeypatch.setattr(stem.planning, "MOST_PLANS", 3)
    for tokens in range(100, 110):
        stem.stem_attention(*draw(tokens, tokens), CONFIGS["density"])
        assert len(stem.planning.PLANS) <= 3


WALKED = (dict, list, tuple, set, FunctionType, CellType, classmethod, staticmethod, functools._lru_cache_wrapper)


def cached_tensors():
    """Every tensor that can be reached from a module of stem, those of its kernels included."""
    modules = [vars(module) for name, module in list(sys.modules.items()) if name.partition(".")[0] == "stem"]
    todo = [x for members in modules for name, x in members.items() if not name.startswith("__")]
    seen, found = {id(vars(module)): None for module in list(sys.modules.values())}, []  # other modules' globals
    while todo:
        x = todo.pop()
        if id(x) in seen:
            continue
        seen[id(x)] = x
        kind = type(x)
        if issubclass(kind, torch.Tensor):
            found.append(x)
        elif issubclass(kind, WALKED) or (x if kind is type else kind).__module__.partition(".")[0] == "stem":
            todo += gc.get_referents(x)
    return found


def test_the_walk_of_caches_finds_their_tensors(fresh_plans):
    q, k, v = draw(impl="triton")
    plan = plan_for(q, k, v, CONFIGS["density"], impl="triton")
    plan.recordings["stream"] = [q]
    held = plan.budget[0], *stem.choose.forced_lists(3, 4, CONFIGS["forced only"], plan.rows, CPU), q
    found = {id(x) for x in cached_tensors()}
    assert all(id(x) in found for x in held) and id(k) not in found


@pytest.mark.parametrize("impl", [None, "torch", "triton"])
@pytest.mark.parametrize("name", CONFIGS)
def test_training_works_after_inference_mode_on_the_same_shapes(name, impl, fresh_plans):
    stem.budget.device_budget.cache_clear()
    stem.choose.forced_lists.cache_clear()
    q, k, v = draw(impl=impl)
    with torch.inference_mode():
        before = stem.stem_attention(q, k, v, CONFIGS[name], impl=impl)
        assert stem.stem_attention(q, k, v, CONFIGS[name], impl=impl, return_selection=True)[0].equal(before)
    assert not [x for x in cached_tensors() if x.is_inference()]
    q.requires_grad_()
    out = stem.stem_attention(q, k, v, CONFIGS[name], impl=impl)
    out.sum().backward()
    torch.testing.assert_close(out.detach(), before.clone(), rtol=1e-5, atol=1e-5)
    assert q.grad.isfinite().all() and q.grad.abs().max() > 0


@pytest.mark.parametrize("impl", [None, "reference", "torch", "triton"])
def test_an_empty_batch_gives_empty_tensors(impl):
    q, k, v = (x[:0].requires_grad_() for x in draw(impl=impl))
    out, selection, lse = stem.stem_attention(
        q, k, v, CONFIGS["density"], impl=impl, return_selection=True, return_lse=True
    )
    assert out.shape == q.shape and lse.shape == q.shape[:3] and selection.kv_num_blocks.shape[0] == 0
    out.sum().backward()
    assert q.grad.shape == q.shape
    assert stem.block_sparse_attention(q, k, v, selection, impl=impl).shape == q.shape
    for config in CONFIGS.values():
        scores = stem.block_scores(q, k, v, config, impl="triton" if impl == "triton" else None)
        assert scores.shape == (0, q.shape[1], 8, 8)


@pytest.mark.parametrize("kv_len", [0, 5, 32, 2000])
@pytest.mark.parametrize("impl", [None, "reference", "torch", "triton", "flex"])
def test_no_queries_give_empty_tensors(impl, kv_len):
    device = "cuda" if impl == "triton" and stem.TRITON_MODE == "compile" else "cpu"
    shapes = (2, 4, 0, 16), (2, 2, kv_len, 16), (2, 2, kv_len, 16)
    q, k, v = (torch.randn(shape, device=device, requires_grad=True) for shape in shapes)
    for config in (*CONFIGS.values(), StemConfig.preset("adaptive", block_size=32)):
        options = dict(impl=impl, return_selection=True, return_lse=True, sinks=torch.zeros(4, device=device))
        out, selection, lse = stem.stem_attention(q, k, v, config, **options)
        assert out.shape == F.scaled_dot_product_attention(q, k, v, enable_gqa=True).shape == q.shape
        assert lse.shape == q.shape[:3] and (selection.q_len, selection.kv_len) == (0, kv_len)
        out.sum().backward()
        assert q.grad.shape == q.shape and not k.grad.any() and not v.grad.any()
        assert stem.block_sparse_attention(q, k, v, selection, impl=impl).shape == q.shape
        assert stem.block_scores(q, k, v, config, impl="torch").shape == (*q.shape[:2], *selection.to_mask().shape[2:])


def test_keys_are_not_missing():
    q, k = torch.randn(2, 4, 3, 16), torch.randn(2, 4, 0, 16)
    with pytest.raises(ValueError, match="q must have at most k's 0 tokens, got 3"):
        stem.stem_attention(q, k, k)
    with pytest.raises(ValueError, match=r"q may be empty in batch and tokens only, got shape \(2, 0, 3, 16\)"):
        stem.stem_attention(q[:, :0], k, k)


@NEEDS_CUDA
@pytest.mark.parametrize("name", ["paper", "forced only"])
def test_a_graph_outlives_the_plans_it_recorded(name, fresh_plans):
    config = {"paper": PAPER, "forced only": StemConfig(k_start=8, decay=1.0)}[name]
    q, k, v = (torch.randn(1, heads, 2048, 128, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2))
    expected = stem.stem_attention(q, k, v, config, return_selection=True)[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = stem.stem_attention(q, k, v, config)
    stem.planning.PLANS.clear()
    stem.budget.device_budget.cache_clear()
    stem.choose.forced_lists.cache_clear()
    gc.collect()
    garbage = [torch.full((1 << 16,), -1, dtype=torch.int32, device="cuda") for _ in range(64)]
    graph.replay()
    assert len(garbage) == 64 and torch.equal(out, expected)


@pytest.mark.parametrize("name", ["density", "everything", "share"])
def test_counts_are_returned_where_the_data_decide_them(name):
    q, k, v = draw()
    config = CONFIGS[name]
    plan = plan_for(q, k, v, config, return_counts=True)
    out, lse, counts, selection = plan.run(q, k, v)
    expected, kept = stem.stem_attention(q, k, v, config, return_selection=True)
    assert torch.equal(out, expected) and lse is None and selection is None
    assert (counts is None) == (name != "share") == (plan.kept_blocks is not None)
    if counts is None:
        assert set(kept.kv_num_blocks.sum(2).flatten().tolist()) == {plan.kept_blocks}
    else:
        assert torch.equal(counts, kept.kv_num_blocks)
    assert plan_for(q, k, v, config).run(q, k, v)[2] is None


@NEEDS_CUDA
def test_replayed_calls_return_their_counts():
    config = ADAPTIVE.replace(dense_up_to=0, threshold=0.02)
    for _ in range(5):
        q, k, v = (torch.randn(1, heads, 2000, 128, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2))
        plan = plan_for(q * 3, k, v, config, return_counts=True)
        out, _, counts, _ = plan.run(q * 3, k, v)
        expected, kept = stem.stem_attention(q * 3, k, v, config, return_selection=True)
        assert torch.equal(counts, kept.kv_num_blocks) and torch.equal(out, expected)
    assert type(next(iter(plan.recordings.values()))).__name__ == "Recording"

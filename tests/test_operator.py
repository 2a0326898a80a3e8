"""How stem_attention runs on a GPU: in chunks of rows, without waiting for the device, inside a CUDA graph."""

import pytest
import torch

import stem
from stem import StemConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_sm90 = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a GPU of compute capability 9.0",
)
needs_cuda = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
CONFIGS = {
    "default": StemConfig(),
    "uniform": StemConfig(density=0.4, allocation="uniform"),
    "paper": StemConfig.preset("paper"),
    "angelslim": StemConfig.preset("angelslim", k_start=0.5),
    "hpc_ops": StemConfig.preset("hpc_ops", k_start=0.4),
    "everything": StemConfig(density=1.0),
    "adaptive": StemConfig.preset("adaptive", dense_up_to=0),
    "groups": StemConfig(density=0.3, lists="group", block_size=64),
}


def draw(tokens, dtype=torch.bfloat16, head_dim=128, device="cuda"):
    return [torch.randn(1, heads, tokens, head_dim, device=device).to(dtype) for heads in (8, 2, 2)]


@pytest.mark.parametrize(("value_norm", "forced"), [("log", "on_top"), ("zscore", "inside")])
def test_rows_scored_in_chunks_select_what_all_rows_select(value_norm, forced, monkeypatch):
    q, k, v = (torch.randn(1, heads, 80, 16, device=DEVICE) for heads in (2, 1, 1))
    config = StemConfig(block_size=16, score_stride=8, k_start=3, value_norm=value_norm, forced=forced)
    config = config.replace(sink_blocks=1, local_blocks=1)
    for queries in (q, q[:, :, 20:]):
        expected = stem.planning.select(queries, k, v, config, 0.25, "torch").to_mask()
        for rows_at_a_time in (5, 2):
            monkeypatch.setattr(stem.choose, "CHUNK_SCORES", rows_at_a_time * 2 * 5)
            assert torch.equal(stem.planning.select(queries, k, v, config, 0.25, "triton").to_mask(), expected)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("lengths", [(90, 90), (50, 133)], ids=str)
def test_where_no_score_matters_the_forced_blocks_are_taken_unscored(lengths, impl, monkeypatch, fresh_plans):
    config = StemConfig(block_size=16, score_stride=8, k_start=3, decay=0.8, sink_blocks=1, local_blocks=2)
    q, k, v = (
        torch.randn(2, heads, tokens, 16, device=DEVICE)
        for heads, tokens in zip((4, 2, 2), lengths[:1] + 2 * lengths[1:], strict=True)
    )
    with monkeypatch.context() as patch:
        patch.setattr(stem.planning, "SHORT_BLOCKS", 0)
        expected = stem.stem_attention(q, k, v, config, impl=impl, return_selection=True)
    stem.planning.PLANS.clear()
    for name in ("choose_scores", "choose_topk"):
        monkeypatch.setattr(stem.choose, name, lambda *_, **__: pytest.fail("scores were computed"))
    found = stem.stem_attention(q, k, v, config, impl=impl, return_selection=True)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1].to_mask(), expected[1].to_mask())


def test_lists_that_no_score_decides_tell_blocks_from_shares():
    """k_start=1 is one block and k_start=1.0 is all of them."""
    q, k, v = (torch.randn(1, 1, 80, 16, device=DEVICE) for _ in range(3))
    for k_start, density in ((1, 5 / 15), (1.0, 1.0), (1, 5 / 15)):
        config = StemConfig(block_size=16, k_start=k_start, decay=1.0)
        _, selection = stem.stem_attention(q, k, v, config, impl="torch", return_selection=True)
        assert selection.density() == pytest.approx(density)


@needs_cuda
@pytest.mark.parametrize("impl", [None, "triton"])
@pytest.mark.parametrize("name", CONFIGS)
def test_it_never_waits_for_the_device(name, impl):
    q, k, v = draw(3000)

    def attend():
        stem.stem_attention(q, k, v, CONFIGS[name], impl=impl)
        stem.stem_attention(q[:, :, 200:], k, v, StemConfig(density=1.0), impl=impl)

    attend()  # compiles, and copies the budgets
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.parametrize("tokens", [777, 2111])
@pytest.mark.parametrize("heads", [(14, 2, 64), (12, 2, 128), (64, 8, 128)], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_heads_of_models_and_lengths_that_end_inside_a_block(name, heads, tokens):
    q_heads, kv_heads, head_dim = heads
    q, k, v = (
        torch.randn(1, number, tokens, head_dim, device="cuda").bfloat16() for number in (q_heads, kv_heads, kv_heads)
    )
    config = CONFIGS[name]
    if name == "adaptive":
        config = config.replace(threshold=0.1)  # at which random blocks are dropped
    out, selection = stem.stem_attention(q, k, v, config, return_selection=True)
    for rows in torch.arange(tokens, device="cuda").split(512):
        part = stem.reference.masked_attention(
            q[:, :, rows].double(), k.double(), v.double(), selection.to_token_mask()[:, :, rows]
        )
        assert (out[:, :, rows] - part).norm() < 4e-3 * part.norm()
    for _ in range(3):  # the third call is replayed
        assert torch.equal(stem.stem_attention(q, k, v, config), out)


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("impl", [None, "triton"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_cuda_graph_replays_what_eager_code_computes(name, impl, dtype):
    q, k, v = draw(3000, dtype)

    def attend():
        return stem.stem_attention(q, k, v, CONFIGS[name], impl=impl, return_lse=True)

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend()
    for _ in range(2):
        for x in (q, k, v):
            x.normal_()
        graph.replay()
        for found, expected in zip(captured, attend(), strict=True):
            assert torch.equal(found, expected)


@needs_sm90
@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize(
    ("batch", "heads", "lengths"),
    [(1, (32, 8), (1536, 1536)), (1, (32, 8), (4090, 4090)), (3, (9, 3), (1500, 1700)), (1, (2, 1), (1900, 1900))],
    ids=str,
)
@pytest.mark.parametrize("name", ["paper", "zscore", "strides that TMA cannot read"])
def test_attention_that_begins_before_all_blocks_are_chosen(
    name, batch, heads, lengths, in_graph, monkeypatch, fresh_plans
):
    """Scores of the inputs before, in the memory that all calls share, must never be what is attended by."""
    changes = dict(value_norm="zscore", forced="on_top") if name == "zscore" else {}
    config = StemConfig.preset("paper", **changes)
    sizes = zip((heads[0], heads[1], heads[1]), lengths[:1] + 2 * lengths[1:], strict=True)
    q, k, v = (torch.empty(batch, number, tokens, 128, dtype=torch.bfloat16, device="cuda") for number, tokens in sizes)
    if name.startswith("strides"):
        q, v = (x.mT.contiguous().mT for x in (q, v))

    def fill(seed):
        generator = torch.Generator("cuda").manual_seed(seed)
        for x in (q, k, v):
            x.normal_(generator=generator)

    with monkeypatch.context() as patch:
        patch.setattr(stem.planning.Plan, "_path", lambda plan: "lists")
        expected = []
        for seed in range(5):
            fill(seed)
            out, selection = stem.stem_attention(q, k, v, config, return_selection=True)
            expected.append((out, selection.to_mask()))
    assert selection.density() < 1
    stem.planning.PLANS.clear()
    monkeypatch.setattr(stem.planning, "attend", lambda *_: pytest.fail("one stage after the other"))
    fill(0)
    out, selection = stem.stem_attention(q, k, v, config, return_selection=True)
    if in_graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, selection = stem.stem_attention(q, k, v, config, return_selection=True)
    for turn in range(25):
        fill(turn % 5)
        if in_graph:
            graph.replay()
        else:
            out, selection = stem.stem_attention(q, k, v, config, return_selection=True)
        assert torch.equal(out, expected[turn % 5][0])
        assert torch.equal(selection.to_mask(), expected[turn % 5][1])


@needs_cuda
def test_memory_of_scores_and_selection():
    q, k, v = (torch.randn(1, heads, 2**17, 128, device="cuda", dtype=torch.bfloat16) for heads in (32, 8, 8))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    stem.planning.select(q, k, v, StemConfig(), 128**-0.5, "triton")
    assert torch.cuda.max_memory_allocated() - before <= 2**30


@needs_cuda
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_flex_takes_blocks_smaller_than_its_tiles(block_size):
    q, k, v = (torch.randn(1, heads, 500, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2))
    q.requires_grad_()
    config = StemConfig(block_size=block_size, density=0.4, sink_blocks=1, local_blocks=1)
    out, selection = stem.stem_attention(q, k, v, config, impl="flex", return_selection=True)
    exact = q.detach().double().requires_grad_()
    expected = stem.block_sparse_attention(exact, k.double(), v.double(), selection, impl="reference")
    assert selection.density() < 0.6
    assert (out - expected).norm() < 5e-3 * expected.norm()
    found, right = (torch.autograd.grad(x.sum(), of)[0] for x, of in ((out, q), (expected, exact)))
    assert (found - right).norm() < 1e-2 * right.norm()

"""The Gluon forward for sm_90: the claims of test_kernels_sparse_forward.py where it applies, and where it does not.

Its compilation needs a process of its own, as in test_kernels_compile.py: this file is both the tests and that process.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sparse_inputs import (
    DEVICE,
    eager,
    inputs_with_late_maxima,
    lists_of,
    oracle,
    random_inputs,
    random_mask,
)

import stem

BLOCK_SIZE = 128
DTYPES = [torch.float16, torch.bfloat16]
SHARED_MEMORY_BYTES = 227 * 1024  # what one program may use on sm_90
IS_SM90 = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
needs_sm90 = pytest.mark.skipif(not IS_SM90, reason="needs a GPU of compute capability 9.0")
pytestmark = pytest.mark.usefixtures("poisoned_empty")


def forward(q, k, v, mask, scale):
    from stem.kernels.hopper_forward import sparse_forward

    return sparse_forward(q, k, v, *lists_of(mask), BLOCK_SIZE, scale)


@needs_sm90
def test_graphs_run_side_by_side():
    from stem.kernels.hopper_forward import sparse_forward

    q, k, v = random_inputs(32, 8, 3000, 3000, 128, torch.bfloat16)
    problem = q, k, v, *lists_of(random_mask(1, 32, 3000, 3000, BLOCK_SIZE)), BLOCK_SIZE, 0.1
    expected, _ = sparse_forward(*problem)
    graphs, outs = [torch.cuda.CUDAGraph() for _ in range(2)], []
    for graph in graphs:
        with torch.cuda.graph(graph):
            outs += [sparse_forward(*problem)[0] for _ in range(3)]
    for _ in range(10):
        for graph in graphs:
            with torch.cuda.stream(torch.cuda.Stream()):
                graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for out in outs)


@pytest.fixture
def check(assert_close_to_oracle):
    """Run the kernel on q, k, v and a block mask, and compare out and lse with the oracle."""

    def run(q, k, v, mask, scale=None):
        scale = q.shape[3] ** -0.5 if scale is None else scale
        out, lse = forward(q, k, v, mask, scale)
        expected_out, expected_lse = oracle(q, k, v, mask, BLOCK_SIZE, scale)
        assert out.dtype == q.dtype and lse.dtype == torch.float32 and out.stride(-1) == 1
        assert_close_to_oracle(out, expected_out, eager(q, k, v, mask, BLOCK_SIZE, scale), reduction=k.shape[2])
        torch.testing.assert_close(lse.cpu().double(), expected_lse, rtol=1e-5, atol=1e-4)

    return run


@needs_sm90
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128], ids=lambda d: f"D{d}")
@pytest.mark.parametrize("num_tokens", [1, 63, 128, 129, 1000], ids=lambda n: f"N{n}")
def test_lengths(check, num_tokens, head_dim, dtype):
    q, k, v = random_inputs(2, 1, num_tokens, num_tokens, head_dim, dtype)
    check(q, k, v, random_mask(1, 2, num_tokens, num_tokens, BLOCK_SIZE))


@needs_sm90
@pytest.mark.parametrize("head_dim", [64, 128], ids=lambda d: f"D{d}")
@pytest.mark.parametrize(
    ("num_queries", "num_keys"), [(1, 300), (70, 333), (256, 512), (200, 201), (127, 1300), (777, 1500)]
)
def test_chunks_of_queries(check, num_queries, num_keys, head_dim):
    q, k, v = random_inputs(2, 1, num_queries, num_keys, head_dim, torch.bfloat16)
    check(q, k, v, random_mask(1, 2, num_queries, num_keys, BLOCK_SIZE))


@needs_sm90
@pytest.mark.parametrize(("num_q_heads", "num_kv_heads"), [(9, 3), (4, 2), (1, 1)])
def test_grouped_heads_and_batches(check, num_q_heads, num_kv_heads):
    q, k, v = random_inputs(num_q_heads, num_kv_heads, 400, 400, 64, torch.bfloat16, batch=2)
    check(q, k, v, random_mask(2, num_q_heads, 400, 400, BLOCK_SIZE))


@needs_sm90
def test_rows_without_the_diagonal_and_without_any_block(check):
    q, k, v = random_inputs(2, 2, 1000, 1000, 128, torch.bfloat16)
    mask = random_mask(1, 2, 1000, 1000, BLOCK_SIZE, diagonal=False, keep=0.4)
    mask[:, :, 3] = False
    assert not mask.diagonal(dim1=2, dim2=3).all() and mask.any()
    check(q, k, v, mask)


@needs_sm90
def test_long_lists_go_round_the_rings_often(check):
    q, k, v = random_inputs(1, 1, 5000, 5000, 128, torch.bfloat16)
    check(q, k, v, random_mask(1, 1, 5000, 5000, BLOCK_SIZE, keep=2))


@needs_sm90
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [300, 3000])
@pytest.mark.parametrize("boost", [8, 30, 100])
def test_rows_whose_maximum_comes_late(check, boost, num_tokens, dtype):
    q, k, v = inputs_with_late_maxima(boost, num_tokens, 64, dtype)
    check(q, k, v, random_mask(1, 2, num_tokens, num_tokens, BLOCK_SIZE))


@needs_sm90
def test_many_tasks_of_a_program_are_done_again(check):
    q, k, v = random_inputs(40, 20, 1500, 1500, 128, torch.bfloat16)
    k[:, ::2, :200] *= 40  # half of the heads, all of their rows but the first
    check(q, k, v, random_mask(1, 40, 1500, 1500, BLOCK_SIZE, keep=2))


@needs_sm90
@pytest.mark.parametrize("scale", [0.01, 1.0, -0.3, 0.0])
def test_scale(check, scale):
    q, k, v = random_inputs(1, 1, 300, 300, 128, torch.bfloat16)
    check(q, k, v, random_mask(1, 1, 300, 300, BLOCK_SIZE), scale)


@needs_sm90
def test_strides_that_tma_cannot_read(check):
    q, k, v = random_inputs(2, 2, 300, 300, 128, torch.bfloat16)
    mask = random_mask(1, 2, 300, 300, BLOCK_SIZE)
    check(*(x.contiguous().mT.contiguous().mT for x in (q, k, v)), mask)  # D not contiguous
    check(q[:, :1].expand(1, 2, -1, -1), k[:, :1].expand(1, 2, -1, -1), v, mask)  # a stride of zero
    odd = torch.full((3, 2 * 300 * 129 + 1), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    odd = [x[1:].view(1, 2, 300, 129)[..., :128] for x in odd]  # neither address nor rows aligned
    check(*(x.copy_(y) for x, y in zip(odd, (q, k, v), strict=True)), mask)


@needs_sm90
def test_blocks_off_the_list_change_nothing():
    q, k, v = random_inputs(1, 1, 512, 512, 128, torch.bfloat16)
    mask = random_mask(1, 1, 512, 512, BLOCK_SIZE)
    mask[..., 1] = False
    before = forward(q, k, v, mask, 0.1)
    k[:, :, 128:256], v[:, :, 128:256] = float("nan"), float("nan")
    after = forward(q, k, v, mask, 0.1)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


@needs_sm90
def test_offsets_beyond_32_bits(check):
    storage = torch.zeros(3, 300, 2**23, dtype=torch.bfloat16, device=DEVICE)  # the last row starts past 2**31
    q, k, v = (x[None, None, :, :64].copy_(torch.randn(300, 64)) for x in storage)
    check(q, k, v, random_mask(1, 1, 300, 300, BLOCK_SIZE))


@needs_sm90
def test_repeated_runs_are_bit_equal():
    q, k, v = random_inputs(8, 2, 3000, 3000, 128, torch.bfloat16)
    mask = random_mask(1, 8, 3000, 3000, BLOCK_SIZE)
    first, *others = (forward(q, k, v, mask, 0.1) for _ in range(20))
    assert all(torch.equal(first[0], other[0]) and torch.equal(first[1], other[1]) for other in others)


@needs_sm90
def test_launches_leave_their_counters_at_zero():
    from stem.kernels.tasks import stream_scratch

    q, k, v = random_inputs(8, 2, 3000, 3000, 128, torch.bfloat16)
    mask = random_mask(1, 8, 3000, 3000, BLOCK_SIZE)
    expected, _ = forward(q, k, v, mask, 0.1)
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            stream.wait_stream(torch.cuda.default_stream())
            outs = [forward(q, k, v, mask, 0.1)[0] for _ in range(3)]
        stream.synchronize()
        assert all(torch.equal(out, expected) for out in outs)
        assert not stream_scratch(q.device, stream.cuda_stream, 8 * mask.shape[2])[:2].any()


def full_then_some(batch, num_q_heads, num_queries, num_keys, full_rows):
    """A block mask whose first rows are causal and whose others are random."""
    mask = random_mask(batch, num_q_heads, num_queries, num_keys, BLOCK_SIZE)
    mask[:, :, :full_rows] = random_mask(batch, num_q_heads, num_queries, num_keys, BLOCK_SIZE, keep=2)[
        :, :, :full_rows
    ]
    return mask


@needs_sm90
@pytest.mark.parametrize("full_rows", [0, 1, 5, 13, 19])
@pytest.mark.parametrize(
    ("batch", "num_q_heads", "num_kv_heads", "num_queries", "num_keys"),
    [
        (1, 32, 8, 2400, 2400),
        (3, 9, 3, 2400, 2400),
        (1, 2, 1, 2400, 2400),
        (2, 32, 8, 2390, 2700),
        (1, 3, 1, 2401, 2420),
    ],
)
def test_lists_of_full_rows_are_not_read(batch, num_q_heads, num_kv_heads, num_queries, num_keys, full_rows):
    from stem.kernels.hopper_forward import prepare

    q, k, v = random_inputs(num_q_heads, num_kv_heads, num_queries, num_keys, 64, torch.bfloat16, batch=batch)
    mask = full_then_some(batch, num_q_heads, num_queries, num_keys, full_rows)
    expected = forward(q, k, v, mask, 0.1)
    kv_indices, kv_num_blocks = lists_of(mask)
    kv_indices[:, :, :full_rows] = 2**30
    kv_num_blocks[:, :, :full_rows] = 2**30
    found = prepare(q, k, v, 0.1)(kv_indices, kv_num_blocks, full_rows)
    assert all(map(torch.equal, found, expected))


def in_pages(x, pages):
    """The keys or values of x [1, H, N, D] in memory of twice as many blocks, block i of them at pages[i]."""
    pool = torch.randn(2 * len(pages), x.shape[1], BLOCK_SIZE, 2 * x.shape[3], dtype=x.dtype, device=x.device)
    pool = pool.transpose(1, 2).contiguous()[..., : x.shape[3]].transpose(1, 2)  # rows are part of longer ones
    for block, rows in enumerate(x[0].split(BLOCK_SIZE, 1)):
        pool[pages[block], :, : rows.shape[1]] = rows
    return pool.transpose(0, 1).flatten(1, 2)[None]


@needs_sm90
@pytest.mark.parametrize("full_rows", [0, 3])
@pytest.mark.parametrize("head_dim", [64, 128], ids=lambda d: f"D{d}")
@pytest.mark.parametrize(("num_queries", "num_keys"), [(1000, 1000), (70, 333), (2048, 4096), (777, 1500)])
def test_pages(num_queries, num_keys, head_dim, full_rows):
    from stem.kernels.hopper_forward import prepare

    q, k, v = random_inputs(4, 2, num_queries, num_keys, head_dim, torch.bfloat16)
    num_rows = -(-num_keys // BLOCK_SIZE) - (num_keys - num_queries) // BLOCK_SIZE
    mask = full_then_some(1, 4, num_queries, num_keys, min(full_rows, num_rows))
    expected = forward(q, k, v, mask, 0.1)
    pages = torch.randperm(2 * -(-num_keys // BLOCK_SIZE), device=DEVICE).int()[: -(-num_keys // BLOCK_SIZE)]
    out = torch.empty(num_queries, 4, head_dim, dtype=q.dtype, device=DEVICE).transpose(0, 1)[None]
    paged = dict(pages=pages, num_keys=num_keys, out=out)
    found = prepare(q, in_pages(k, pages), in_pages(v, pages), 0.1, **paged)(*lists_of(mask), min(full_rows, num_rows))
    assert found[0] is out and all(map(torch.equal, found, expected))


@needs_sm90
@pytest.mark.parametrize("num_queries", [1500, 1412], ids=["whole", "chunk"])
def test_rows_of_a_longer_prompt(num_queries):
    """Whole query blocks, here with the first and the last one, of which a chunk and a prompt hold a part."""
    from stem.kernels.hopper_forward import prepare

    q, k, v = random_inputs(4, 2, num_queries, 1500, 128, torch.bfloat16)
    mask, start = random_mask(1, 4, num_queries, 1500, BLOCK_SIZE), 1500 - num_queries  # 12 query blocks
    expected = forward(q, k, v, mask, 0.1)
    rows = torch.tensor([0, 1, 4, 5, 8, 11])
    mine = torch.isin(torch.arange(start, 1500) // BLOCK_SIZE, rows)
    pages = torch.arange(12, device=DEVICE, dtype=torch.int32)
    k, v = (torch.nn.functional.pad(x, (0, 0, 0, 36)) for x in (k, v))
    options = dict(pages=pages, num_keys=int(mine.sum()) + start % BLOCK_SIZE)
    found = prepare(q[:, :, mine], k, v, 0.1, **options)(*lists_of(mask[:, :, rows]))
    assert all(torch.equal(x, y[:, :, mine]) for x, y in zip(found, expected, strict=True))


@needs_sm90
def test_it_is_the_default_where_it_applies(monkeypatch):
    from stem.kernels import hopper_forward

    calls = []
    original = hopper_forward.sparse_forward
    noting = lambda q, *rest: calls.append((q.dtype, rest[4])) or original(q, *rest)  # noqa: E731
    monkeypatch.setattr(hopper_forward, "sparse_forward", noting)
    for dtype, head_dim, block_size in [
        (torch.bfloat16, 128, 128),
        (torch.float32, 128, 128),
        (torch.bfloat16, 128, 64),
    ]:
        q, k, v = random_inputs(4, 2, 1000, 1000, head_dim, dtype)
        config = stem.StemConfig(block_size=block_size)
        out = stem.stem_attention(q, k, v, config)
        torch.testing.assert_close(out, stem.stem_attention(q, k, v, config, impl="triton"), rtol=0, atol=2e-2)
    assert set(calls) == {(torch.bfloat16, 128)}  # twice: a first call compiles its kernels before it runs them


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_sm90)])
def test_an_explicit_choice_never_falls_back(device):
    def attend(dtype, head_dim, block_size):
        q = torch.randn(1, 1, 256, head_dim, device=device, dtype=dtype)
        return stem.stem_attention(q, q, q, stem.StemConfig(block_size=block_size), impl="hopper")

    if device == "cpu":
        with pytest.raises(ValueError, match="impl='hopper' does not cover device cpu"):
            attend(torch.bfloat16, 128, 128)
        return
    for arguments, what in [
        ((torch.float32, 128, 128), "dtype torch.float32"),
        ((torch.bfloat16, 96, 128), "head_dim 96"),
        ((torch.bfloat16, 128, 64), "block_size 64"),
    ]:
        with pytest.raises(ValueError, match=what):
            attend(*arguments)


def compile_for_sm90(head_dim, per_block, paged):
    """Compile ahead of time, as a launch with aligned pointers would; bytes of shared memory."""
    import triton
    from stem.kernels import hopper_forward
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    def tile(rows, columns=head_dim):
        return f"tensordesc<bf16[1, 1, {rows}, {columns}],{hopper_forward.TMA_LAYOUT!r}>"

    kernel = hopper_forward.hopper_forward_kernel
    types = dict(
        q_desc=tile(64), k_desc=tile(128), v_desc=tile(128), out_ptr="*bf16", lse_ptr="*fp32",
        kv_indices_ptr="*i32", kv_num_blocks_ptr="*i32", scratch_ptr="*i32", pages_ptr="*i32",
        scale="fp32", k_means_desc=tile(128), v_means_desc=tile(128), masks_desc=tile(16, 128),
    )  # fmt: skip
    constants = dict(PER_BLOCK=per_block) if paged else dict(PER_BLOCK=per_block, pages_ptr=None)
    if not per_block:
        constants |= dict(k_means_desc=None, v_means_desc=None, masks_desc=None)
    names, types = kernel.arg_names, types | dict.fromkeys(constants, "constexpr")
    constants = {(names.index(name),): value for name, value in constants.items()}
    divisible = [i for i, name in enumerate(names) if types.get(name, "").startswith("*")]
    aligned = {(i,): [["tt.divisibility", 16]] for i in divisible}
    source = GluonASTSource(kernel, {name: types.get(name, "i32") for name in names}, constants, aligned)
    options = {"num_warps": 4, "maxnreg": hopper_forward.LAUNCH_REGISTERS}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).metadata.shared


def compile_pairs_of_cells():
    """Compile cell_pairs_sm90.py ahead of time; bytes of shared memory."""
    import triton
    from stem.kernels import cell_pairs_sm90, hopper_forward
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    kernel, constants = cell_pairs_sm90.pair_cells_sm90_kernel, dict(Q_CELL=16, K_CELL=16, CELLS=8)
    types = dict(
        q_desc=f"tensordesc<bf16[1, 1, 64, 256],{hopper_forward.TMA_LAYOUT!r}>",
        k_desc=f"tensordesc<bf16[1, 16, 4, 2, 256],{cell_pairs_sm90.KEY_LAYOUT!r}>", sums_ptr="*bf16", flags_ptr="*i32",
    )  # fmt: skip
    names, types = kernel.arg_names, types | dict.fromkeys(constants, "constexpr")
    constants = {(names.index(name),): value for name, value in constants.items()}
    divisible = (names.index(name) for name in ("sums_ptr", "flags_ptr", "stride_sn"))
    aligned = {(i,): [["tt.divisibility", 16]] for i in divisible}
    source = GluonASTSource(kernel, {name: types.get(name, "i32") for name in names}, constants, aligned)
    options = {"num_warps": 4, "maxnreg": hopper_forward.LAUNCH_REGISTERS}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).metadata.shared


@pytest.mark.slow
def test_it_compiles_for_sm90(tmp_path):
    pytest.importorskip("triton.backends.nvidia")
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    process = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr[-3000:]
    assert max(json.loads(process.stdout)) <= SHARED_MEMORY_BYTES


if __name__ == "__main__":
    cases = (64, 0, True), (128, 0, False), (128, 1, False), (64, 8, False)
    print(json.dumps([*(compile_for_sm90(*case) for case in cases), compile_pairs_of_cells()]))

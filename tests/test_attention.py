"""Claims about stem_attention and block_sparse_attention, each for every implementation it holds for."""

import oracles
import pytest
import torch
from devices import on_its_device
from torch.utils._python_dispatch import TorchDispatchMode

import stem
from stem import BlockSelection, StemConfig
from stem.reference import dense_attention

stem_attention = on_its_device(stem.stem_attention)
block_sparse_attention = on_its_device(stem.block_sparse_attention)
block_scores = on_its_device(stem.block_scores)
select_blocks = on_its_device(stem.select_blocks)

IMPLS = ("reference", "torch", "triton", "flex")
IN_FLOAT64 = ("reference", "torch", "flex")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
every_impl = pytest.mark.parametrize("impl", IMPLS)


def draw(batch, q_heads, kv_heads, q_len, kv_len, head_dim, dtype=torch.float32):
    q = torch.randn(batch, q_heads, q_len, head_dim).to(dtype)
    k, v = (torch.randn(batch, kv_heads, kv_len, head_dim).to(dtype) for _ in range(2))
    return q, k, v


def random_selection(q, k, block, share=0.5, diagonal=True):
    """Random blocks for each head; without the diagonal some rows may be empty."""
    q_len, kv_len = q.shape[2], k.shape[2]
    nk = -(-kv_len // block)
    nq = nk - (kv_len - q_len) // block
    mask = (torch.rand(*q.shape[:2], nq, nk) < share).tril(nk - nq)
    if diagonal:
        mask |= torch.ones(nq, nk, dtype=torch.bool).tril(nk - nq).triu(nk - nq)
    return BlockSelection.from_mask(mask, block, q_len=q_len, kv_len=kv_len)


def eager_attention(q, k, v, allowed):
    """Masked attention in plain torch, in the dtype of the inputs; the tolerance is derived from its error."""
    k, v = (oracles.repeat_heads(x, q.shape[1]) for x in (k, v))
    logits = (q @ k.mT * q.shape[3] ** -0.5).masked_fill(~allowed, -torch.inf)
    return logits.softmax(-1) @ v


def check_against_oracle(q, k, v, block, impl, assert_close):
    selection = random_selection(q, k, block)
    allowed = oracles.token_mask(selection.to_mask(), block, q.shape[2], k.shape[2])
    expected, expected_lse = oracles.attention(q, k, v, allowed)
    out, lse = block_sparse_attention(q, k, v, selection, impl=impl, return_lse=True)
    assert out.dtype == q.dtype and out.shape == q.shape and lse.dtype == torch.float32
    assert_close(out, expected, eager_attention(q, k, v, allowed), k.shape[2])
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


LENGTHS = {  # Nq, Nkv, block
    "1": (1, 1, 128), "63": (63, 63, 32), "129": (129, 129, 128), "1000": (1000, 1000, 128),
    "chunk": (64, 192, 64), "decode": (1, 129, 64), "below-a-block": (7, 100, 32), "unaligned": (50, 133, 32),
    "across-a-block": (40, 100, 32),
}  # fmt: skip


@every_impl
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_lengths(lengths, dtype, impl, assert_close_to_oracle):
    q_len, kv_len, block = LENGTHS[lengths]
    check_against_oracle(*draw(1, 2, 1, q_len, kv_len, 32, DTYPES[dtype]), block, impl, assert_close_to_oracle)


@every_impl
@pytest.mark.parametrize("head_dim", [16, 32, 40, 64, 80, 96, 128, 256])
def test_head_dims(head_dim, impl, assert_close_to_oracle):
    for dtype in (torch.float32, torch.float16):
        check_against_oracle(*draw(1, 1, 1, 70, 70, head_dim, dtype), 32, impl, assert_close_to_oracle)


@every_impl
@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_block_sizes(block, impl, assert_close_to_oracle):
    check_against_oracle(*draw(1, 2, 1, 150, 170, 16), block, impl, assert_close_to_oracle)


@every_impl
@pytest.mark.parametrize("heads", ["9/3", "4/2", "32/8", "1/1"])
def test_grouped_heads_equal_repeated_heads(heads, impl, assert_close_to_oracle):
    q_heads, kv_heads = map(int, heads.split("/"))
    q, k, v = draw(1 if q_heads > 9 else 2, q_heads, kv_heads, 40, 40, 16)
    check_against_oracle(q, k, v, 32, impl, assert_close_to_oracle)
    selection = random_selection(q, k, 32)
    repeated = [oracles.repeat_heads(x, q_heads) for x in (k, v)]
    found, expected = (block_sparse_attention(q, *kv, selection, impl=impl) for kv in ((k, v), repeated))
    torch.testing.assert_close(found, expected)


PRESETS = {
    "default": (StemConfig(block_size=16, k_start=4), 200),
    "paper": (StemConfig.preset("paper", block_size=16, min_blocks=3), 300),
    "angelslim": (StemConfig.preset("angelslim", block_size=16), 60 * 16 - 3),
    "hpc_ops": (StemConfig.preset("hpc_ops", block_size=16), 57 * 16 - 9),
}


@pytest.mark.parametrize("impl", IN_FLOAT64)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_whole_pipeline_in_float64(preset, impl):
    config, length = PRESETS[preset]
    q, k, v = (x.double() for x in draw(1, 2, 1, length - 20, length, 16))
    n = -(-length // 16)
    if preset == "default":
        budget = [max(1, min(i, int(4 - 4 * (1 - 0.7) / n * i))) for i in range(1, n + 1)]
    elif preset == "paper":
        budget = oracles.paper_schedule(n, floor=3)
    else:
        budget = oracles.three_regime_schedule(n, decay=oracles.Fraction(10 if preset == "hpc_ops" else 7, 10))
    scores = oracles.preset_scores("paper" if preset == "default" else preset, q, k, v, 16)
    kept = oracles.selection_mask(scores, budget, 4, 4, on_top=config.forced == "on_top")
    expected, expected_lse = oracles.attention(q, k, v, oracles.token_mask(kept, 16, length - 20, length))
    found = stem_attention(q, k, v, config, impl=impl, return_selection=True, return_lse=True)
    assert torch.equal(found[1].to_mask(), kept) and found[1].density() < 1.0
    torch.testing.assert_close(found[0], expected)
    torch.testing.assert_close(found[2], expected_lse)


@every_impl
def test_the_pipeline_is_its_three_steps(impl):
    q, k, v = draw(1, 2, 1, 60, 100, 16)
    config = StemConfig(block_size=16, density=0.4)
    stage = impl if impl in ("torch", "triton") else "torch"
    scores = block_scores(q, k, v, config, impl=stage)
    budget = stem.block_budget(7, config)
    selection = select_blocks(scores, budget, config, q_len=60, kv_len=100, impl=stage)
    steps = block_sparse_attention(q, k, v, selection, impl=impl)
    assert torch.equal(stem_attention(q, k, v, config, impl=impl), steps)


@every_impl
def test_full_budget_equals_dense(impl):
    q, k, v = draw(2, 2, 1, 75, 107, 32)
    config = StemConfig(block_size=32, density=1.0)
    out, selection = stem_attention(q, k, v, config, impl=impl, return_selection=True)
    assert selection.density() == 1.0
    torch.testing.assert_close(out, dense_attention(q, k, v))
    mask = oracles.causal(75, 107)
    sdpa = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(out, sdpa)


@every_impl
@pytest.mark.parametrize("reduction", ["mean", "softmax"])
def test_no_output_before_a_block_depends_on_it(reduction, impl):
    """Bit for bit: perturb q, k and v from position 100 on, inside block 3 of 32 tokens."""
    q, k, v = draw(1, 1, 1, 200, 200, 16)
    config = StemConfig(block_size=32, score_stride=8, k_start=3, reduction=reduction)
    before = stem_attention(q, k, v, config, impl=impl)
    for x in (q, k, v):
        x[:, :, 100:] = 5 * torch.randn_like(x[:, :, 100:])
    after = stem_attention(q, k, v, config, impl=impl)
    assert torch.equal(before[:, :, :96], after[:, :, :96])
    assert not torch.equal(before[:, :, 100:], after[:, :, 100:])


@every_impl
def test_token_causality_inside_the_diagonal_block(impl):
    q, k, v = draw(1, 1, 1, 64, 64, 16)
    selection = random_selection(q, k, 32)
    before = block_sparse_attention(q, k, v, selection, impl=impl)
    k[:, :, 45:], v[:, :, 45:] = 9.0, 9.0
    after = block_sparse_attention(q, k, v, selection, impl=impl)
    assert torch.equal(before[:, :, :45], after[:, :, :45])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:All-NaN:RuntimeWarning")
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("change", ["nan", "permute"])
def test_unselected_keys_and_values_are_never_read(change, impl):
    """Row by row: what the blocks hold that a row did not select does not change the row, bit for bit."""
    q, k, v = draw(1, 1, 1, 150, 150, 16)
    selection = random_selection(q, k, 32, share=0.3)
    kept = selection.to_mask()[0, 0]
    assert not kept[:, 0].all()
    out = block_sparse_attention(q, k, v, selection, impl=impl)
    for row in range(5):
        unselected = (~kept[row]).repeat_interleave(32)[:150]
        changed_k, changed_v = k.clone(), v.clone()
        for x in (changed_k, changed_v):
            tokens = x[:, :, unselected]
            x[:, :, unselected] = torch.nan if change == "nan" else tokens[:, :, torch.randperm(tokens.shape[2])]
        changed = block_sparse_attention(q, changed_k, changed_v, selection, impl=impl)
        rows = slice(32 * row, 32 * row + 32)
        assert torch.equal(changed[:, :, rows], out[:, :, rows])


@every_impl
def test_rows_without_blocks_give_zero(impl):
    q, k, v = draw(1, 2, 1, 96, 96, 16)
    mask = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 0, 0]]).bool().expand(1, 2, 3, 3)
    selection = BlockSelection.from_mask(mask, 32)
    out, lse = block_sparse_attention(q, k, v, selection, impl=impl, return_lse=True)
    expected, _ = oracles.attention(q, k, v, oracles.token_mask(mask, 32, 96, 96))
    assert not out[:, :, 32:64].any() and lse[:, :, 32:64].isneginf().all()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@every_impl
@pytest.mark.parametrize("reduction", ["mean", "softmax"])
def test_chunks_of_whole_blocks_equal_the_whole_prompt(reduction, impl):
    q, k, v = draw(1, 1, 1, 170, 170, 16)
    config = StemConfig(block_size=16, score_stride=4, k_start=3, decay=1.0, sink_blocks=1, local_blocks=1)
    config = config.replace(reduction=reduction)
    whole, selection = stem_attention(q, k, v, config, impl=impl, return_selection=True)
    start, parts, masks = 0, [], []
    for end in (48, 64, 144, 170):
        chunk = (q[:, :, start:end], k[:, :, :end], v[:, :, :end])
        out, kept = stem_attention(*chunk, config, impl=impl, return_selection=True)
        masks.append(torch.nn.functional.pad(kept.to_mask(), (0, 11 - kept.num_kv_blocks)))
        parts.append(out)
        start = end
    assert torch.equal(torch.cat(masks, 2), selection.to_mask())
    torch.testing.assert_close(torch.cat(parts, 2), whole)


OF_THE_WHOLE = {  # configs whose budget or last blocks depend on the length of the prompt
    "density": StemConfig(block_size=16, density=0.4, sink_blocks=1, local_blocks=1),
    "paper": StemConfig.preset("paper", block_size=16, min_blocks=5),
    "on-top": StemConfig.preset(
        "angelslim", block_size=16, density=0.3, sink_blocks=1, local_blocks=1, value_norm="log"
    ),
    "uniform-softmax": StemConfig.preset("adaptive", block_size=16, density=0.3, sink_blocks=1, local_blocks=1),
    "adaptive": StemConfig.preset("adaptive", dense_up_to=0, block_size=16, threshold=0.1, exact_last_blocks=2),
    "dense-end": StemConfig.preset("adaptive", dense_up_to=0, block_size=16, threshold=0.2, dense_last_blocks=3),
}


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("total", [164, 170])
@pytest.mark.parametrize("name", OF_THE_WHOLE)
def test_chunks_that_know_the_length_of_the_prompt_equal_it(name, total, impl):
    q, k, v = draw(1, 2, 1, total, total, 16)
    q, config = 3 * q, OF_THE_WHOLE[name]
    whole, selection = stem_attention(q, k, v, config, impl=impl, return_selection=True)
    assert selection.density() < 0.9
    for known in (True, False):
        start, parts, masks = 0, [], []
        for end in (48, 64, 144, 160, total):
            chunk, length = (q[:, :, start:end], k[:, :, :end], v[:, :, :end]), total if known else None
            out, kept = stem_attention(*chunk, config, impl=impl, return_selection=True, prompt_length=length)
            masks.append(torch.nn.functional.pad(kept.to_mask(), (0, 11 - kept.num_kv_blocks)))
            parts.append(out)
            start = end
        assert torch.equal(torch.cat(masks, 2), selection.to_mask()) == known
        if known:
            torch.testing.assert_close(torch.cat(parts, 2), whole)


def test_a_short_chunk_of_a_long_prompt_is_not_dense():
    """The budget is that of a prompt of 12 blocks, which is not enough for its first 3."""
    q, k, v = draw(1, 1, 1, 48, 48, 16)
    config = StemConfig(block_size=16, density=0.2, sink_blocks=0, local_blocks=1)
    for impl in (None, "reference"):
        out, of_three = stem_attention(q, k, v, config.replace(density=1.0), impl=impl, return_selection=True)
        out, of_twelve = stem_attention(q, k, v, config, impl=impl, return_selection=True, prompt_length=192)
        assert of_twelve.kv_num_blocks[0, 0].tolist() == stem.block_budget(12, config)[:3].tolist()
        assert of_three.density() == 1 > of_twelve.density()


@pytest.mark.parametrize(
    "length, error, message",
    [(47, ValueError, "prompt_length.*at least k's 48.*47"), (64.0, TypeError, "prompt_length.*int or None.*64.0")],
)
def test_prompt_lengths_that_cannot_be(length, error, message):
    with pytest.raises(error, match=message):
        stem_attention(*draw(1, 1, 1, 48, 48, 16), StemConfig(block_size=16), prompt_length=length)


@every_impl
def test_batch_entries_are_independent(impl):
    q, k, v = draw(3, 2, 1, 80, 80, 16)
    config = StemConfig(block_size=32, density=0.6)
    whole = stem_attention(q, k, v, config, impl=impl)
    for b in range(3):
        one = stem_attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], config, impl=impl)
        torch.testing.assert_close(one, whole[b : b + 1])


@every_impl
def test_non_contiguous_inputs(impl):
    q, k, v = draw(1, 2, 2, 70, 70, 16)
    config = StemConfig(block_size=32, density=0.7)
    expected = stem_attention(q, k, v, config, impl=impl)
    token_major = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]  # as transformers makes them
    sliced = [x.repeat_interleave(2, -1)[..., ::2] for x in (q, k, v)]  # last stride 2
    expanded = [q, k[:, :1].expand(1, 2, 70, 16), v[:, :1].expand(1, 2, 70, 16)]  # stride 0
    for strided in (token_major, sliced):
        torch.testing.assert_close(stem_attention(*strided, config, impl=impl), expected)
    one_head = stem_attention(q, k[:, :1], v[:, :1], config, impl=impl)
    torch.testing.assert_close(stem_attention(*expanded, config, impl=impl), one_head)


@every_impl
def test_scale_and_large_logits(impl):
    q, k, v = draw(1, 1, 1, 64, 64, 16)
    selection = random_selection(q, k, 32)
    allowed = oracles.token_mask(selection.to_mask(), 32, 64, 64)
    for scale in (0.01, 1.0, 100.0):  # logits up to some thousands
        expected, _ = oracles.attention(q, k, v, allowed, scale)
        out = block_sparse_attention(q, k, v, selection, scale, impl=impl)
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-3)


@every_impl
def test_extras_come_in_the_documented_order(impl):
    q, k, v = draw(1, 2, 1, 33, 33, 16)
    config = StemConfig(block_size=16, density=0.9)
    out = stem_attention(q, k, v, config, impl=impl)
    _, selection, lse = stem_attention(q, k, v, config, impl=impl, return_selection=True, return_lse=True)
    assert isinstance(selection, BlockSelection) and (selection.q_len, selection.kv_len) == (33, 33)
    pair = stem_attention(q, k, v, config, impl=impl, return_lse=True)
    assert torch.equal(pair[0], out) and torch.equal(pair[1], lse) and lse.shape == (1, 2, 33)


def test_without_a_config_a_quarter_is_kept_and_torch_runs_on_the_cpu():
    q, k, v = draw(1, 1, 1, 80 * 128, 80 * 128, 16)
    out, selection = stem_attention(q, k, v, return_selection=True)
    assert selection.density() == pytest.approx(0.25, abs=0.01)
    assert torch.equal(out, block_sparse_attention(q, k, v, selection, impl="torch"))


def gradients(function, *tensors):
    inputs = [x.detach().clone().requires_grad_() for x in tensors]
    out, lse = function(*inputs)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return torch.autograd.grad((out * weights).sum() + (lse.to(out.dtype) * weights[..., 0]).sum(), inputs)


@every_impl
@pytest.mark.parametrize("lengths", ["whole", "ragged", "unaligned"])
def test_gradients_equal_those_of_float64_autograd(lengths, impl):
    q_len, kv_len = {"whole": (96, 96), "ragged": (90, 90), "unaligned": (45, 90)}[lengths]
    tensors = draw(2, 4, 2, q_len, kv_len, 16)
    selection = random_selection(*tensors[:2], 32)
    allowed = oracles.token_mask(selection.to_mask(), 32, q_len, kv_len)
    expected = gradients(lambda *x: oracles.attention(*x, allowed), *(x.double() for x in tensors))
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        if impl == "triton" and dtype == torch.float64:
            continue
        found = gradients(
            lambda *x: block_sparse_attention(*x, selection, impl=impl, return_lse=True),
            *(x.to(dtype) for x in tensors),
        )
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("impl", IN_FLOAT64)
def test_gradcheck(impl):
    q, k, v = (x.double().requires_grad_() for x in draw(1, 2, 1, 20, 36, 3))
    selection = random_selection(q, k, 16)
    assert torch.autograd.gradcheck(
        lambda *x: block_sparse_attention(*x, selection, impl=impl, return_lse=True), (q, k, v), fast_mode=True
    )


@every_impl
def test_no_gradient_flows_through_the_selection(impl):
    tensors = draw(1, 2, 1, 80, 80, 16)
    config = StemConfig(block_size=16, density=0.4)
    _, selection = stem_attention(*tensors, config, impl=impl, return_selection=True)
    whole = gradients(lambda *x: stem_attention(*x, config, impl=impl, return_lse=True), *tensors)
    fixed = gradients(lambda *x: block_sparse_attention(*x, selection, impl=impl, return_lse=True), *tensors)
    assert all(torch.equal(one, other) for one, other in zip(whole, fixed, strict=True))


def test_keys_that_nobody_selects_have_no_gradient():
    q, k, v = (x.requires_grad_() for x in draw(1, 1, 1, 64, 64, 16))
    mask = torch.tensor([[1, 0], [0, 1]]).bool()[None, None]
    mask[0, 0, 0, 0] = False
    block_sparse_attention(q, k, v, BlockSelection.from_mask(mask, 32), impl="torch").sum().backward()
    for x in (k, v):
        assert not x.grad[:, :, :32].any() and x.grad[:, :, 32:].any()


class LargestTensor(TorchDispatchMode):
    """Remembers the largest number of elements that an operator returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, torch.Tensor) and func is not torch.ops.aten.expand.default:
                self.elements = max(self.elements, x.numel())
        return result


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_impl_torch_builds_nothing_of_size_n_squared(backward, monkeypatch):
    monkeypatch.setattr(stem.impl.gather, "CHUNK_LOGITS", 1 << 14)
    monkeypatch.setattr(stem.impl.gather, "PIECE_NUMBERS", 1 << 14)
    config = StemConfig(block_size=16, k_start=4, decay=1.0)
    elements = []
    for length in (1024, 2048):
        tensors = draw(1, 1, 1, length, length, 16)
        with LargestTensor() as largest:
            out = stem_attention(*(x.requires_grad_(backward) for x in tensors), config, impl="torch")
            if backward:
                out.sum().backward()
        elements.append(largest.elements)
        assert largest.elements <= 2 * length * 16
    assert elements[1] <= 2.1 * elements[0]


def test_chunks_of_rows_do_not_change_the_result(monkeypatch):
    q, k, v = draw(1, 2, 1, 200, 200, 16)
    selection = random_selection(q, k, 16)
    whole = block_sparse_attention(q, k, v, selection, impl="torch")
    for elements in (1, 5000, 20000):
        monkeypatch.setattr(stem.impl.gather, "CHUNK_LOGITS", elements)
        monkeypatch.setattr(stem.impl.gather, "PIECE_NUMBERS", elements)
        monkeypatch.setattr(stem.impl.gather, "PIECE_KEYS", elements // 100)
        for needs_grad in (False, True):  # each has a path of its own
            chunked = block_sparse_attention(q.requires_grad_(needs_grad), k, v, selection, impl="torch")
            torch.testing.assert_close(chunked.detach(), whole)


@pytest.mark.parametrize("factor", [40.0, -40.0], ids=["large", "small"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_query_blocks_whose_sums_leave_the_range_get_a_softmax(factor, dtype, monkeypatch):
    """Every fourth query block points along all keys, or against them: with logits near +-160."""
    q, k, v = (x.to(dtype) for x in draw(2, 4, 2, 200, 200, 16))
    k = 1 + k / 4
    q[:, :, torch.arange(200) // 16 % 4 == 2] += factor
    selection, left = random_selection(q, k, 16), []
    softmax_attention = stem.impl.gather._softmax_attention
    monkeypatch.setattr(
        stem.impl.gather, "_softmax_attention", lambda *args: left.append(args[-1]) or softmax_attention(*args)
    )
    found = block_sparse_attention(q, k, v, selection, impl="torch", return_lse=True)
    wanted = block_sparse_attention(q.double(), k.double(), v.double(), selection, impl="reference", return_lse=True)
    (rows,) = left
    listed = selection.kv_num_blocks.flatten()[rows]
    assert (rows % 13 % 4 == 2).all() and (listed > 0).all() and len(rows) >= 2 * 4
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4 if dtype == torch.float32 else 1e-9, atol=1e-4)


QKV = dict(zip("qkv", (torch.zeros(1, 4, 32, 16), *torch.zeros(2, 1, 2, 48, 16)), strict=True))
BAD_TENSORS = [
    (dict(q=QKV["q"].numpy()), TypeError, "q .*torch.Tensor.*ndarray"),
    (dict(k=None), TypeError, "k .*torch.Tensor.*NoneType"),
    (dict(q=torch.zeros(4, 32, 16)), ValueError, r"q .*\[batch, heads, tokens, head_dim\].*\(4, 32, 16\)"),
    (dict(q=torch.zeros(1, 4, 5, 0)), ValueError, r"q .*empty.*\(1, 4, 5, 0\)"),
    (dict(q=torch.zeros(1, 4, 32, 16).int()), TypeError, "q .*float16.*float32.*int32"),
    (dict(v=QKV["v"].half()), TypeError, "v .*q's dtype torch.float32.*float16"),
    (dict(k=QKV["k"].to("meta")), ValueError, "k .*q's device cpu.*meta"),
    (dict(k=torch.zeros(2, 2, 48, 16)), ValueError, "k .*batch size 1.*2"),
    (dict(v=torch.zeros(1, 2, 48, 8)), ValueError, "v .*head_dim 16.*8"),
    (dict(v=torch.zeros(1, 2, 40, 16)), ValueError, r"v .*k's shape \(1, 2, 48, 16\).*\(1, 2, 40, 16\)"),
    (dict(q=torch.zeros(1, 3, 32, 16)), ValueError, "q's heads .*multiple of k's heads 2.*3"),
    (dict(q=torch.zeros(1, 4, 49, 16)), ValueError, "q .*at most k's 48 tokens.*49"),
    ({name: torch.zeros(1, 1, 32, 257) for name in "qkv"}, ValueError, r"head_dim .*1\.\.256.*257"),
    (dict(scale=0.0), ValueError, "scale must be in .0, inf., got 0.0"),
    (dict(scale=float("nan")), ValueError, "scale must be in .0, inf., got nan"),
    (dict(scale="auto"), TypeError, "scale .*number.*'auto'"),
    (dict(impl="cuda"), ValueError, "impl .*'reference', 'torch', 'triton', 'hopper', 'flex'.*'cuda'"),
]
BAD_IDS = [
    "numpy", "none", "3d", "empty", "int", "dtype", "device", "batch", "head_dim", "v-length", "heads", "Nq>Nkv",
    "head_dim-257", "scale-0", "scale-nan", "scale-str", "impl",
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "words"), BAD_TENSORS, ids=BAD_IDS)
def test_bad_input(arguments, error, words):
    with pytest.raises(error, match=words):
        stem_attention(**{**QKV, "config": StemConfig(block_size=16), **arguments})
    selection = random_selection(QKV["q"], QKV["k"], 16)
    with pytest.raises(error, match=words):
        block_sparse_attention(**{**QKV, "selection": selection, **arguments})


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_non_finite_input_is_refused_before_it_can_select(name, value):
    tensors = {key: x.clone() for key, x in QKV.items()}
    tensors[name][0, 0, 7] = value
    with pytest.raises(ValueError, match=f"{name} must be finite, got 16 NaN or infinite"):
        stem_attention(**tensors, config=StemConfig(block_size=16))


@pytest.mark.parametrize("config", [{"density": 0.5}, "paper", 0.25], ids=str)
def test_a_config_is_a_stem_config(config):
    with pytest.raises(TypeError, match="config must be a StemConfig"):
        stem_attention(**QKV, config=config)


def test_an_explicit_triton_never_falls_back():
    tensors = {name: x.double() for name, x in QKV.items()}
    with pytest.raises(TypeError, match="impl='triton'.*float32.*float64"):
        stem_attention(**tensors, config=StemConfig(block_size=16), impl="triton")


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda q, k: torch.ones(1, 4, 2, 3).bool(), TypeError, "selection must be a BlockSelection.*Tensor"),
        (lambda q, k: random_selection(q[:, :2], k, 16), ValueError, r"selection .*heads \(1, 4\).*\(1, 2\)"),
        (lambda q, k: random_selection(q, k, 32), None, None),
        (lambda q, k: random_selection(q, k[:, :, :32], 16), ValueError, "selection .*2 query and 3 key.*got 2 and 2"),
        (lambda q, k: random_selection(q[:, :, 16:], k, 16), ValueError, "selection .*2 query and 3 key.*got 1 and 3"),
    ],
    ids=["mask", "heads", "other-block-size-is-fine", "keys", "queries"],
)
def test_a_selection_must_fit(make, error, words):
    q, k, v = QKV.values()
    selection = make(q, k)
    if error is None:
        assert block_sparse_attention(q, k, v, selection).shape == q.shape
        return
    with pytest.raises(error, match=words):
        block_sparse_attention(q, k, v, selection)

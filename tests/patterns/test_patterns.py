"""Every pattern against a brute-force mask written from its specification, natively and at equal cost."""

import math
from functools import partial

import oracles
import pattern_oracles
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import stem
from stem import StemConfig, hf, patterns

BLOCK = 16
CONFIG = StemConfig(block_size=BLOCK, score_stride=4, density=0.45, sink_blocks=2, local_blocks=2)
LENGTHS = {"whole": (192, 192), "ragged": (187, 187), "chunk": (64, 192), "unaligned": (75, 187)}
NAMES = patterns.names()
LIKE_THE_PAPER = "dense", "stem"  # their budget is their own


def draw(q_len=192, kv_len=192, q_heads=4, kv_heads=2, dtype=torch.float64):
    """Random q, k, v; heads differ in sharpness, values in size, and the first key draws attention."""
    q = 3 * torch.randn(1, q_heads, q_len, 16, dtype=dtype) * torch.linspace(0.1, 1, q_heads)[:, None, None]
    k, v = (torch.randn(1, kv_heads, kv_len, 16, dtype=dtype) for _ in range(2))
    q[..., 0] += 1
    k[:, :, 0, 0] += 4
    return q, k, v * torch.rand(1, kv_heads, kv_len, 1, dtype=dtype).exp()


def heads(x, num_q_heads):
    """[1, H, N, D] -> a list of lists of vectors, one for each query head."""
    return oracles.repeat_heads(x, num_q_heads)[0].tolist()


def as_mask(rows_of_heads, nk):
    """Kept blocks of each head and row -> bool [1, Hq, nq, nk]."""
    mask = torch.zeros(1, len(rows_of_heads), len(rows_of_heads[0]), nk, dtype=torch.bool)
    for head, kept_rows in enumerate(rows_of_heads):
        for row, kept in enumerate(kept_rows):
            mask[0, head, row, sorted(kept)] = True
    return mask


RULES = {  # name, keywords, and what row i keeps of n blocks
    "dense": ("dense", {}, lambda i, j, n: True),
    "sliding_window": ("sliding_window", dict(window_blocks=3), lambda i, j, n: i - j < 3),
    "longformer": (
        "longformer",
        dict(window_blocks=2, global_blocks=3),
        lambda i, j, n: i - j < 2 or j < 3 or i < 3,
    ),
    "longformer-dilated": (
        "longformer",
        dict(window_blocks=3, global_blocks=0, dilation=2),
        lambda i, j, n: i - j < 6 and (i - j) % 2 == 0,
    ),
    "strided": (
        "sparse_transformer_strided",
        dict(window_blocks=2, stride_blocks=5),
        lambda i, j, n: i - j < 2 or (i - j) % 5 == 0,
    ),
    "strided-square-root": (
        "sparse_transformer_strided",
        dict(window_blocks=4),
        lambda i, j, n: i - j < 4 or (i - j) % math.ceil(math.sqrt(n)) == 0,
    ),
    "fixed": ("sparse_transformer_fixed", dict(stride_blocks=4), lambda i, j, n: j // 4 == i // 4 or j % 4 >= 3),
    "fixed-two-summaries": (
        "sparse_transformer_fixed",
        dict(summary_blocks=2),
        lambda i, j, n: j // 4 == i // 4 or j % 4 >= 2,
    ),
    "a_shape": ("a_shape", dict(sink_blocks=1, window_blocks=3), lambda i, j, n: j < 1 or i - j < 3),
    "a_shape-of-the-config": ("a_shape", dict(window_blocks=1), lambda i, j, n: j < 2 or i - j < 1),
    "tri_shape": (
        "tri_shape",
        dict(sink_blocks=1, window_blocks=2, last_tokens=17),
        lambda i, j, n: j < 1 or i - j < 2 or i >= n - 2,
    ),
    "tri_shape-never-dense": (
        "tri_shape",
        dict(sink_blocks=1, window_blocks=2, last_tokens=0),
        lambda i, j, n: j < 1 or i - j < 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("rule", RULES)
def test_fixed_patterns_natively(rule, lengths):
    name, native, keep = RULES[rule]
    q_len, kv_len = LENGTHS[lengths]
    n = -(-kv_len // BLOCK)
    expected = pattern_oracles.by_rule(q_len, kv_len, BLOCK, lambda i, j: keep(i, j, n))
    found = patterns.select(name, *draw(q_len, kv_len), CONFIG, **native).to_mask()
    assert torch.equal(found, as_mask([expected] * 4, n))


@pytest.mark.parametrize("tokens", [1, 16, 17, 100, 10**6])
def test_tri_shape_is_dense_where_the_last_tokens_are(tokens):
    kept = patterns.select("tri_shape", *draw(187, 187), CONFIG, window_blocks=1, last_tokens=tokens).kv_num_blocks
    first = max(0, 187 - tokens) // BLOCK
    assert kept[0, 0].tolist() == [i + 1 if i >= first or i < 3 else 3 for i in range(12)]


def native_oracle(name, q, k, v, native):
    """bool [1, Hq, nq, nk] of a pattern that looks at q, k, v."""
    nq_heads, nk = q.shape[1], -(-k.shape[2] // BLOCK)
    p = oracles.probabilities(q, k)[0]
    queries, keys = heads(q, nq_heads), heads(k, nq_heads)
    if name == "vertical_slash":
        verticals, slashes = native.get("verticals", 1000), native.get("slashes", 6096)
        return as_mask([pattern_oracles.vertical_slash(head, BLOCK, verticals, slashes) for head in p], nk)
    if name == "flexprefill":
        settings = {"tau": 0.1, "min_budget": 512} | native
        return as_mask(
            [pattern_oracles.flexprefill(*head, BLOCK, **settings)[0] for head in zip(queries, keys, p, strict=True)],
            nk,
        )
    if name == "flashprefill":
        settings = {"alpha": native["alpha"]} | {
            short: native[long]
            for short, long in (("sinks", "sink_blocks"), ("window", "window_blocks"), ("last", "dense_last_blocks"))
            if long in native
        }
        return as_mask(
            [pattern_oracles.flashprefill(*head, BLOCK, **settings) for head in zip(queries, keys, strict=True)], nk
        )
    if name == "uniform_topk":
        counts = [min(i + 1, native["row_blocks"]) for i in range(nk)]
        scores = oracles.hide_future(oracles.antidiagonal_sums(q, k, BLOCK, 4))
        return oracles.selection_mask(scores, counts, 2, 2)
    if name == "xattention":
        shares, forced = oracles.softmax_scores(q, k, v, BLOCK, 4, (BLOCK // 4,) * 2, 0.0).exp(), lambda i: {0, i}
    else:
        mass = oracles.probabilities(q, k)
        if name == "oracle_output":
            mass = mass * oracles.repeat_heads(v, nq_heads).norm(dim=-1)[:, :, None]
        shares, forced = oracles.block_means(mass, BLOCK), lambda i: {i}
    grid = pattern_oracles.rows(q.shape[2], k.shape[2], BLOCK)
    return as_mask(
        [
            [pattern_oracles.top_share(row, i, forced(i), native["tau"]) for i, row in zip(grid, head, strict=True)]
            for head in shares[0].tolist()
        ],
        nk,
    )


NATIVE = {
    "uniform_topk": ("uniform_topk", dict(row_blocks=5)),
    "vertical_slash": ("vertical_slash", dict(verticals=31, slashes=60)),
    "vertical_slash-columns": ("vertical_slash", dict(verticals=60, slashes=50)),
    "vertical_slash-minimum": ("vertical_slash", dict(verticals=1, slashes=1)),
    "vertical_slash-default": ("vertical_slash", dict(slashes=50)),
    "flexprefill-lines": ("flexprefill", dict(gamma=0.5, tau=0.0, min_budget=16)),
    "flexprefill-pairs": ("flexprefill", dict(gamma=0.6, tau=1.0, min_budget=32)),
    "flexprefill-mixed": ("flexprefill", dict(gamma=0.4, tau=0.1, min_budget=48)),
    "flexprefill-short": ("flexprefill", dict(gamma=0.4)),
    "xattention": ("xattention", dict(tau=0.6)),
    "xattention-forced-alone": ("xattention", dict(tau=0.0)),
    "flashprefill": ("flashprefill", dict(alpha=0.2)),
    "flashprefill-free": ("flashprefill", dict(alpha=0.4, sink_blocks=0, window_blocks=0, dense_last_blocks=0)),
    "flashprefill-dense-rows": ("flashprefill", dict(alpha=1.0, sink_blocks=1, window_blocks=2, dense_last_blocks=3)),
    "oracle_mass": ("oracle_mass", dict(tau=0.7)),
    "oracle_output": ("oracle_output", dict(tau=0.7)),
}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("case", NATIVE)
def test_patterns_that_look_natively(case, lengths):
    name, native = NATIVE[case]
    q, k, v = draw(*LENGTHS[lengths])
    found = patterns.select(name, q, k, v, CONFIG, **native).to_mask()
    assert torch.equal(found, native_oracle(name, q, k, v, native))


def test_flexprefill_has_both_kinds_of_heads_in_these_tests():
    q, k, _ = draw()
    p = oracles.probabilities(q, k)[0]
    per_head = zip(heads(q, 4), heads(k, 4), p, strict=True)
    kinds = {pattern_oracles.flexprefill(*head, BLOCK, 0.4, 0.1, 48)[1] for head in per_head}
    assert kinds == {True, False}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("native", [dict(random_blocks=2), dict(random_blocks=3, window_blocks=1, global_blocks=0)])
def test_bigbird_natively(native, lengths):
    window, first = native.get("window_blocks", 3), native.get("global_blocks", 2)
    q_len, kv_len = LENGTHS[lengths]
    mask = patterns.select("bigbird", *draw(q_len, kv_len), CONFIG, **native).to_mask()[0]
    for head in range(4):
        for row, i in enumerate(pattern_oracles.rows(q_len, kv_len, BLOCK)):
            kept = set(mask[head, row].nonzero()[:, 0].tolist())
            always = {j for j in range(i + 1) if i - j < window or j < first}
            candidates = set(range(i + 1)) - always
            assert always <= kept and len(kept - always) == min(native["random_blocks"], len(candidates))


def constant_rows(nk):
    return oracles.constant_rows(int(stem.block_budget(nk, CONFIG).sum()), nk)


def fill(first, i, count):
    """The blocks `first` in this order, then the most recent ones, until there are `count`: a set."""
    order = dict.fromkeys([j for j in first if 0 <= j <= i] + list(range(i, -1, -1)))
    return set(list(order)[:count])


WINDOWS = {"sliding_window": [], "a_shape": [0, 1], "longformer": [0]}  # kept first


def equal_cost_oracle(name, q, k, v):
    """bool [B, Hq, nq, nk], from the specification and the cost of the config's own schedule."""
    nk = -(-k.shape[2] // BLOCK)
    even = constant_rows(nk)
    if name in WINDOWS:
        grid = pattern_oracles.rows(q.shape[2], k.shape[2], BLOCK)
        return as_mask([[fill([i, *WINDOWS[name]], i, even[i]) for i in grid]] * q.shape[1], nk)
    routing = oracles.antidiagonal_sums(q, k, BLOCK, 4) / 4 / (BLOCK * BLOCK / 4)
    if name == "stem":
        value = oracles.repeat_heads(oracles.log_value_term(v, BLOCK), q.shape[1])[:, :, None]
        budget = stem.block_budget(nk, CONFIG).tolist()
        return oracles.selection_mask(oracles.hide_future(routing + 0.2 * value), budget, 2, 2)
    if name == "uniform_topk":
        return oracles.selection_mask(oracles.hide_future(routing), even, 2, 2)
    if name == "xattention":
        return oracles.selection_mask(oracles.softmax_scores(q, k, v, BLOCK, 4, (BLOCK // 4,) * 2, 0.0), even, 1, 1)
    mass = oracles.probabilities(q, k)
    if name == "oracle_output":
        mass = mass * oracles.repeat_heads(v, q.shape[1]).norm(dim=-1)[:, :, None]
    return oracles.selection_mask(oracles.block_means(mass, BLOCK), even, 0, 1)


EQUAL_COST = (*WINDOWS, "stem", "uniform_topk", "xattention", "oracle_mass", "oracle_output")


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", EQUAL_COST)
def test_at_equal_cost(name, lengths):
    q, k, v = draw(*LENGTHS[lengths])
    selection = patterns.select(name, q, k, v, CONFIG)
    assert (selection.q_len, selection.kv_len) == LENGTHS[lengths]
    assert torch.equal(selection.to_mask(), equal_cost_oracle(name, q, k, v))


LEAST = {  # blocks that a pattern keeps whatever the density, at n blocks of 64 tokens
    "longformer": lambda i, j, n: j < 1,
    "bigbird": lambda i, j, n: i - j < 3 or j < 2,
    "a_shape": lambda i, j, n: j < 2,
    "tri_shape": lambda i, j, n: j < 2 or i >= n - 2,
    "vertical_slash": lambda i, j, n: i - j < 2 or j < 1,
    "flashprefill": lambda i, j, n: i - j < 4 or j < 2 or i >= n - 2,
}


def least_density(name, n):
    keep = LEAST.get(name, lambda i, j, n: False)
    kept = sum(i == j or keep(i, j, n) for i in range(n) for j in range(i + 1))
    if name == "sparse_transformer_fixed":
        kept = min(sum(j // s == i // s or j % s == s - 1 for i in range(n) for j in range(i + 1)) for s in (8, 9, 11))
    return kept / (n * (n + 1) / 2)


@pytest.mark.parametrize("blocks", [64, 100])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "dense"])
def test_density_is_the_requested_one_or_the_least(name, blocks):
    size = BLOCK if name.startswith("oracle") else 64
    q, k, v = draw(size * blocks - 3, size * blocks - 3, 2, 1, torch.float32)
    least = least_density(name, blocks)
    for density in (0.1, 0.16, 0.25, 0.31, 0.5, 1.0):
        config = CONFIG.replace(block_size=size, density=density)
        selection = patterns.select(name, q, k, v, config)
        assert selection.density() == pytest.approx(max(density, least), abs=0.02)


SCHEDULES = {
    "paper": StemConfig.preset("paper", block_size=BLOCK),
    "angelslim": StemConfig.preset("angelslim", block_size=BLOCK),
    "dense-last": StemConfig(block_size=BLOCK, k_start=14, dense_last_blocks=4),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", [name for name in NAMES if name not in LIKE_THE_PAPER])
def test_methods_spend_what_the_schedule_of_the_config_costs(name, schedule):
    q, k, v = draw(64 * BLOCK, 64 * BLOCK, 1, 1, torch.float32)
    pairs = int(stem.block_budget(64, SCHEDULES[schedule]).sum())
    counts = patterns.select(name, q, k, v, SCHEDULES[schedule]).kv_num_blocks
    assert int(counts.sum()) == pytest.approx(pairs, abs=0.02 * 64 * 65 / 2)
    if name in (*EQUAL_COST, "random", "bigbird"):
        assert counts[0, 0].tolist() == oracles.constant_rows(pairs, 64)


@pytest.mark.parametrize("name", ["sparse_transformer_strided", "sparse_transformer_fixed", "vertical_slash"])
def test_solved_parameters_are_parameters(name):
    """A solved pattern has the native form: some native parameters give it, or one block more in a row."""
    q, k, v = draw(128, 128, 1, 1, torch.float32)
    solved = patterns.select(name, q, k, v, CONFIG).to_mask()
    tries = {
        "sparse_transformer_strided": [
            dict(window_blocks=w, stride_blocks=s) for w in range(1, 9) for s in range(1, 9)
        ],
        "sparse_transformer_fixed": [
            dict(stride_blocks=s, summary_blocks=c) for s in range(1, 9) for c in range(1, s + 1)
        ],
        "vertical_slash": [dict(verticals=x, slashes=y) for x in range(30, 129, 7) for y in range(50, 129, 7)],
    }[name]
    tries = [patterns.select(name, q, k, v, CONFIG, **native).to_mask() for native in tries]
    most = 1 if name == "sparse_transformer_strided" else 0
    assert any((solved >= mask).all() and ((solved & ~mask).sum(-1) <= most).all() for mask in tries)


def test_flexprefill_spends_a_density_over_its_heads():
    selection = patterns.select("flexprefill", *draw(1024, 1024), CONFIG.replace(density=0.3), tau=0.15)
    per_head = selection.kv_num_blocks.sum(-1)[0].double() / selection.causal_pairs
    assert selection.density() == pytest.approx(0.3, abs=0.01) and per_head.std() > 0.02


def test_random_blocks_beside_the_forced_ones():
    q, k, v = draw(64 * BLOCK, 64 * BLOCK, 2, 1, torch.float32)
    config = CONFIG.replace(density=0.3)
    counts = oracles.constant_rows(int(stem.block_budget(64, config).sum()), 64)
    for name, (sink, local) in {"random": (2, 2), "bigbird": (2, 3)}.items():
        mask = patterns.select(name, q, k, v, config).to_mask()[0]
        assert mask.sum(-1).tolist() == [counts, counts]
        for i in range(64):
            forced = {*range(min(sink, i + 1)), *range(max(0, i - local + 1), i + 1)}
            assert all(mask[:, i, j].all() for j in forced)
        kept = mask[:, 40:, 2:38].float().mean((0, 1))  # of each block that is free in these 24 rows
        assert 0 < kept.min() and kept.max() < 0.5
        assert not torch.equal(mask[0], mask[1])  # heads draw their own
        other = patterns.select(name, q, k, v, config, seed=1).to_mask()[0]
        assert 0.1 < (other != mask).float().mean() < 0.4  # and so do seeds


@pytest.mark.parametrize("native", [dict(random_blocks=3), dict(random_blocks=3, seed=5)])
def test_a_rows_random_blocks_depend_on_no_length_and_no_other_head(native):
    short = patterns.select("bigbird", *draw(320, 320, 2, 1), CONFIG, **native).to_mask()
    long = patterns.select("bigbird", *draw(640, 640, 4, 2), CONFIG, **native).to_mask()
    assert torch.equal(short, long[:, :2, :20, :20])


@pytest.mark.parametrize("name", NAMES)
def test_the_same_call_gives_the_same_blocks(name):
    q, k, v = draw(dtype=torch.float32)
    first = patterns.select(name, q, k, v, CONFIG)
    state = torch.get_rng_state()
    second = patterns.select(name, q, k, v, CONFIG)
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers change
    torch.manual_seed(99)
    third = patterns.select(name, q, k, v, CONFIG)
    assert torch.equal(first.to_mask(), second.to_mask()) and torch.equal(first.to_mask(), third.to_mask())


@pytest.mark.parametrize("name", NAMES)
def test_prompts_of_a_batch_do_not_know_each_other(name):
    one, other = draw(dtype=torch.float32), draw(dtype=torch.float32)
    together = patterns.select(name, *(torch.cat(pair) for pair in zip(one, other, strict=True)), CONFIG).to_mask()
    assert torch.equal(together[:1], patterns.select(name, *one, CONFIG).to_mask())
    assert torch.equal(together[1:], patterns.select(name, *other, CONFIG).to_mask())


BY_THE_CHUNK = {"flexprefill": dict(gamma=0.4, tau=0.0, min_budget=16), "flashprefill": dict(alpha=0.3)}


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_chunk_are_those_of_the_whole_prompt(name):
    """With parameters that are given; at a given density these two solve theirs over the rows they see."""
    native = BY_THE_CHUNK.get(name, {})
    q, k, v = draw()
    whole = patterns.select(name, q, k, v, CONFIG, **native).to_mask()
    chunk = patterns.select(name, q[:, :, 112:], k, v, CONFIG, **native).to_mask()
    assert torch.equal(chunk, whole[:, :, 7:])


@pytest.mark.parametrize("name", BY_THE_CHUNK)
def test_a_density_holds_in_the_rows_of_a_chunk(name):
    q, k, v = draw(400, 1600)
    assert patterns.select(name, q, k, v, CONFIG).density() == pytest.approx(0.45, abs=0.01)


@pytest.mark.parametrize("tokens", [1, 5, 16, 33])
@pytest.mark.parametrize("name", NAMES)
def test_short_prompts_and_the_diagonal(name, tokens):
    for q, k, v in (draw(tokens, tokens), draw(1, tokens), draw(1, 5 * tokens)):
        mask = patterns.select(name, q, k, v, CONFIG).to_mask()
        nq, nk = mask.shape[-2:]
        assert mask[..., range(nq), range(nk - nq, nk)].all()
        assert not mask.triu(nk - nq + 1).any()


@pytest.mark.parametrize("name", NAMES)
def test_a_selection_can_be_attended_to(name):
    q, k, v = draw(75, 187)
    selection = patterns.select(name, q, k, v, CONFIG)
    allowed = oracles.token_mask(selection.to_mask(), BLOCK, 75, 187)
    expected, _ = oracles.attention(q, k, v, allowed)
    torch.testing.assert_close(stem.block_sparse_attention(q, k, v, selection), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision(name, dtype):
    q, k, v = draw(dtype=torch.float32)
    half = patterns.select(name, q.to(dtype), k.to(dtype), v.to(dtype), CONFIG).to_mask()
    full = patterns.select(name, q.to(dtype).float(), k.to(dtype).float(), v.to(dtype).float(), CONFIG).to_mask()
    assert (half != full).float().mean() < 0.02  # sums of bf16 products in fp32


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, vocab_size=50)
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)).eval()


@pytest.mark.parametrize("name", NAMES)
def test_a_model_reads_a_prompt_whole_and_in_chunks(name, model):
    ids = torch.randint(50, (1, 250))
    method = partial(patterns.select, name, config=CONFIG)
    with torch.no_grad(), hf.stem_prefill(model, method) as report:
        first = model(ids[:, :160])
        assert report.density() < 1 or name in ("dense", "tri_shape")  # all rows of so short a prompt are its last
        second = model(ids[:, 160:], past_key_values=first.past_key_values)
    assert second.logits.isfinite().all() and second.logits.shape[1] == 90


def test_oracles_keep_the_most_mass():
    q, k, v = draw()
    recall = {
        name: float(stem.metrics.attention_recall(q, k, patterns.select(name, q, k, v, CONFIG)).mean())
        for name in (*EQUAL_COST, "random")
        if name != "stem"
    }
    assert max(recall, key=recall.get) == "oracle_mass"


def test_without_a_config_the_default_holds():
    q, k, v = draw(1280, 1280, 1, 1, torch.float32)
    assert patterns.select("sliding_window", q, k, v).block_size == 128


def test_a_given_parameter_wins_over_the_density():
    q, k, v = draw()
    kept = {d: patterns.select("sliding_window", q, k, v, CONFIG.replace(density=d), window_blocks=2) for d in (0.2, 1)}
    assert torch.equal(kept[0.2].to_mask(), kept[1].to_mask())
    adaptive = StemConfig(block_size=BLOCK, score_stride=4, allocation="adaptive", threshold=0.1)
    preset = StemConfig.preset("adaptive", dense_up_to=0, block_size=BLOCK, threshold=0.1)
    assert patterns.select("xattention", q, k, v, preset, tau=0.0).density() < 0.3
    for name, native in {"sliding_window": dict(window_blocks=2), "xattention": dict(tau=0.6)}.items():
        found = patterns.select(name, q, k, v, adaptive, **native).to_mask()
        assert torch.equal(found, patterns.select(name, q, k, v, CONFIG, **native).to_mask())


CHANGES = {  # name and keywords, each of which changes what is kept
    "uniform_topk": [dict(row_blocks=3)],
    "sliding_window": [dict(window_blocks=2)],
    "longformer": [dict(window_blocks=2), dict(global_blocks=3), dict(dilation=2)],
    "bigbird": [dict(random_blocks=1), dict(window_blocks=1), dict(global_blocks=0), dict(seed=1)],
    "sparse_transformer_strided": [dict(window_blocks=2), dict(stride_blocks=2)],
    "sparse_transformer_fixed": [dict(stride_blocks=2), dict(summary_blocks=2)],
    "a_shape": [dict(sink_blocks=0), dict(window_blocks=2)],
    "tri_shape": [dict(sink_blocks=0), dict(window_blocks=2), dict(last_tokens=0)],
    "vertical_slash": [dict(verticals=30), dict(slashes=70, verticals=30)],
    "flexprefill": [dict(gamma=0.2, min_budget=16), dict(tau=0.0), dict(min_budget=80)],
    "xattention": [dict(tau=0.3)],
    "flashprefill": [
        dict(alpha=0.9),
        dict(sink_blocks=0),
        dict(window_blocks=6),
        dict(dense_last_blocks=0),
    ],
    "random": [dict(seed=1)],
    "oracle_mass": [dict(tau=0.3)],
    "oracle_output": [dict(tau=0.3)],
}


def test_every_keyword_changes_the_selection():
    q, k, v = draw(320, 320)
    config = CONFIG.replace(density=0.55)
    for name in NAMES:
        assert {keyword for native in CHANGES.get(name, []) for keyword in native} == set(patterns.keywords(name))
        plain = patterns.select(name, q, k, v, config).to_mask()
        for native in CHANGES.get(name, []):
            assert not torch.equal(patterns.select(name, q, k, v, config, **native).to_mask(), plain), (name, native)


@pytest.mark.parametrize(
    ("name", "config", "native", "error", "words"),
    [
        ("longfomer", CONFIG, {}, ValueError, "name must be one of.*'longformer'.*'longfomer'"),
        ("stem", {"density": 0.5}, {}, TypeError, "config must be a StemConfig.*density"),
        (
            "longformer",
            StemConfig(block_size=BLOCK, allocation="adaptive", threshold=0.1),
            {},
            ValueError,
            "allocation='adaptive'.*'stem'",
        ),
        ("longformer", CONFIG, {"window": 3}, TypeError, "takes window_blocks, global_blocks, dilation.*got window"),
        ("stem", CONFIG, {"gamma": 3}, TypeError, "'stem' takes none beside the config, got gamma"),
        ("longformer", CONFIG, {"window_blocks": 0}, ValueError, "window_blocks must be >= 1, got 0"),
        ("longformer", CONFIG, {"window_blocks": 2.5}, TypeError, "window_blocks must be an int >= 1, got 2.5"),
        ("longformer", CONFIG, {"dilation": True}, TypeError, "dilation must be an int >= 1, got True"),
        ("xattention", CONFIG, {"tau": 1.5}, ValueError, r"tau must be in \[0, 1\], got 1.5"),
        ("flexprefill", CONFIG, {"gamma": "0.9"}, TypeError, r"gamma must be a number in \[0, 1\], got '0.9'"),
        (
            "sparse_transformer_fixed",
            CONFIG,
            {"stride_blocks": 3, "summary_blocks": 4},
            ValueError,
            "summary_blocks must be at most stride_blocks=3, got 4",
        ),
    ],
    ids=["unknown", "dict", "adaptive", "keyword", "none", "zero", "fraction", "bool", "share", "text", "summary"],
)
def test_bad_input(name, config, native, error, words):
    with pytest.raises(error, match=words):
        patterns.select(name, *draw(), config, **native)
    with pytest.raises(ValueError, match="q .*at most"):
        patterns.select("dense", *draw(40, 20), CONFIG)
    with pytest.raises(ValueError, match="name must be one of"):
        patterns.keywords("longfomer")


def test_values_that_are_not_finite():
    q, k, v = draw()
    k[0, 0, 3, 2] = torch.nan
    with pytest.raises(ValueError, match="k must be finite, got 1"):
        patterns.select("flashprefill", q, k, v, CONFIG)

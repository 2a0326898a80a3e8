"""Patterns with the parameters of their sources, against masks written from their specifications."""

import math

import oracles
import pattern_oracles
import pytest
import torch
from pattern_inputs import BLOCK, CONFIG, LENGTHS, as_mask, draw, heads

import stem
from stem import patterns

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
    """Return the mask of a pattern that looks at q, k, v: bool [1, Hq, nq, nk]."""
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
    if name.startswith("flashprefill"):
        rule = getattr(pattern_oracles, name)
        settings = {"alpha": native["alpha"]} | {
            short: native[long]
            for short, long in (("sinks", "sink_blocks"), ("window", "window_blocks"), ("last", "dense_last_blocks"))
            if long in native
        }
        return as_mask([rule(*head, BLOCK, **settings) for head in zip(queries, keys, strict=True)], nk)
    if name == "subblock":
        found = []
        for head in zip(queries, keys, strict=True):
            scores, kept = pattern_oracles.subblock_scores(*head, BLOCK, native.get("cells", 4)), []
            for i in pattern_oracles.rows(len(head[0]), len(head[1]), BLOCK):
                row = [scores[i, j] for j in range(i + 1)]
                kept.append(oracles.row_selection(row, i, native["row_blocks"], 2, 2))
            found.append(kept)
        return as_mask(found, nk)
    if name == "blasst":
        per_head = zip(queries, keys, strict=True)
        return as_mask([pattern_oracles.blasst(*head, BLOCK, native["skip_threshold"]) for head in per_head], nk)
    if name == "cosa":
        found = []
        for head in zip(queries, keys, strict=True):
            of, kept = pattern_oracles.cosa(*head, BLOCK, 4), []
            for i in pattern_oracles.rows(len(head[0]), len(head[1]), BLOCK):
                row = [of[i, j] for j in range(i + 1)]
                order = sorted(range(i + 1), key=lambda j: (not row[j][0], -row[j][1]))
                mass = [x[1] for x in row]
                kept.append(pattern_oracles.top_share(mass, i, {0, i}, native["top_p"], order))
            found.append(kept)
        return as_mask(found, nk)
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
    "flashprefill_v2": ("flashprefill_v2", dict(alpha=0.1, dense_last_blocks=2)),
    "flashprefill_v2-free": (
        "flashprefill_v2",
        dict(alpha=0.5, sink_blocks=0, window_blocks=0, dense_last_blocks=0),
    ),
    "flashprefill_v2-dense-rows": ("flashprefill_v2", dict(alpha=1.0, sink_blocks=1)),
    "subblock": ("subblock", dict(row_blocks=5)),
    "subblock-two-cells": ("subblock", dict(row_blocks=6, cells=2)),
    "cosa": ("cosa", dict(top_p=0.7)),
    "cosa-most": ("cosa", dict(top_p=0.95)),
    "blasst": ("blasst", dict(skip_threshold=0.3)),
    "blasst-everything": ("blasst", dict(skip_threshold=0.0)),
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


@pytest.mark.parametrize("native", [dict(random_blocks=3), dict(random_blocks=3, seed=5)])
def test_a_rows_random_blocks_depend_on_no_length_and_no_other_head(native):
    short = patterns.select("bigbird", *draw(320, 320, 2, 1), CONFIG, **native).to_mask()
    long = patterns.select("bigbird", *draw(640, 640, 4, 2), CONFIG, **native).to_mask()
    assert torch.equal(short, long[:, :2, :20, :20])


def test_cosa_at_equal_cost_keeps_the_holders_of_maxima_first():
    q, k, v = draw()
    even = oracles.constant_rows(int(stem.block_budget(12, CONFIG).sum()), 12)
    found = patterns.select("cosa", q, k, v, CONFIG).to_mask()[0]
    order_matters = False
    for head, of in enumerate(pattern_oracles.cosa(*x, BLOCK, 4) for x in zip(heads(q, 4), heads(k, 4), strict=True)):
        for i in range(12):
            by_mass = sorted(range(i + 1), key=lambda j: -of[i, j][1])
            order = sorted(by_mass, key=lambda j: not of[i, j][0])
            forced = [i, 0][: even[i]]
            expected, others = (list(dict.fromkeys(forced + x))[: even[i]] for x in (order, by_mass))
            assert found[head, i].nonzero()[:, 0].tolist() == sorted(expected)
            order_matters |= set(expected) != set(others)
    assert order_matters


def test_blasst_skips_within_any_lists():
    q, k, v = draw(75, 187)
    lists = patterns.select("random", q, k, v, CONFIG.replace(sink_blocks=0, local_blocks=0, density=0.8))
    mask = lists.to_mask()[0]
    first = (187 - 75) // BLOCK
    expected = [
        pattern_oracles.blasst(*x, BLOCK, 0.8, lambda i, j, head=head: bool(mask[head, i - first, j]))
        for head, x in enumerate(zip(heads(q, 4), heads(k, 4), strict=True))
    ]
    found = patterns.skip_negligible(lists, q, k, 0.8)
    assert torch.equal(found.to_mask(), as_mask(expected, 12)) and found.density() < lists.density()
    assert torch.equal(patterns.skip_negligible(lists, q, k, 0.0).to_mask(), lists.to_mask())
    sharper = patterns.skip_negligible(lists, q, k, 0.8, scale=3.0)
    assert sharper.density() < found.density()


def test_blocks_are_skipped_in_the_order_of_cosa():
    q, k, _ = draw(60, 187)
    lists = patterns.select("random", q, k, k, CONFIG.replace(sink_blocks=0, local_blocks=0, density=0.8))
    mask, expected = lists.to_mask()[0], []
    for head, x in enumerate(zip(heads(q, 4), heads(k, 4), strict=True)):
        of, first = pattern_oracles.cosa(*x, BLOCK, 4), mask.shape[2] - mask.shape[1]
        named = lambda i, j, head=head, first=first: bool(mask[head, i - first, j])  # noqa: E731
        place = lambda i, j, of=of: of[i, j][1] + 100 * of[i, j][0]  # noqa: E731
        expected.append(pattern_oracles.blasst(*x, BLOCK, 0.8, named, place))
    found = patterns.skip_negligible(lists, q, k, 0.8, priority=patterns.cosa_priority(q, k, CONFIG))
    assert torch.equal(found.to_mask(), as_mask(expected, 12))
    assert found.density() < lists.density()
    assert not torch.equal(found.to_mask(), patterns.skip_negligible(lists, q, k, 0.8).to_mask())
    with pytest.raises(ValueError, match="priority must be"):
        patterns.skip_negligible(lists, q, k, 0.8, priority=torch.zeros(1, 4, 3, 3))


def test_what_blasst_skips_hardly_matters():
    q, k, v = draw(dtype=torch.float32)
    dense = patterns.select("dense", q, k, v, CONFIG)
    errors, densities = [], []
    for threshold in (0.0, 0.1, 0.5, 0.9):
        selection = patterns.select("blasst", q, k, v, CONFIG, skip_threshold=threshold)
        difference = stem.block_sparse_attention(q, k, v, selection) - stem.block_sparse_attention(q, k, v, dense)
        errors.append(float(difference.norm()))
        densities.append(selection.density())
    assert densities == sorted(densities, reverse=True) and densities[0] == 1.0 > densities[-1]
    assert errors == sorted(errors) and errors[0] == 0.0

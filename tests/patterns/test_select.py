"""`patterns.select` and its names: repeatability, batches, chunks, dtypes, models, parameters and errors."""

import inspect
import re
from functools import partial
from pathlib import Path

import oracles
import pytest
import torch
from pattern_inputs import BLOCK, CONFIG, NAMES, draw
from transformers import LlamaConfig, LlamaForCausalLM

import stem
from stem import StemConfig, hf, patterns


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
BY_THE_CHUNK |= {"flashprefill_v2": dict(alpha=0.3, dense_last_blocks=0), "blasst": dict(skip_threshold=0.3)}


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_chunk_are_those_of_the_whole_prompt(name):
    """Methods that solve a parameter over the rows that they see get it."""
    native = BY_THE_CHUNK.get(name, {})
    q, k, v = draw()
    whole = patterns.select(name, q, k, v, CONFIG, **native).to_mask()
    chunk = patterns.select(name, q[:, :, 112:], k, v, CONFIG, **native).to_mask()
    assert torch.equal(chunk, whole[:, :, 7:])


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
        assert report.density() < 1 or name in (
            "dense",
            "tri_shape",
            "flashprefill_v2",
        )  # all rows of so short a prompt are its last
        second = model(ids[:, 160:], past_key_values=first.past_key_values)
    assert second.logits.isfinite().all() and second.logits.shape[1] == 90


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
        plain = patterns.select(name, q, k, v, CONFIG, **native).to_mask()
        assert torch.equal(found, plain)
        assert torch.equal(patterns.select(name, q, k, v, CONFIG.replace(decay=0.5), **native).to_mask(), plain)


FORCED = dict(sink_blocks=3), dict(local_blocks=4)
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
    "xattention": [dict(tau=0.3), *FORCED],
    "flashprefill": [
        dict(alpha=0.9),
        dict(sink_blocks=0),
        dict(window_blocks=6),
        dict(dense_last_blocks=0),
    ],
    "flashprefill_v2": [
        dict(alpha=0.9, dense_last_blocks=1),
        dict(alpha=0.9, sink_blocks=0),
        dict(alpha=0.9, window_blocks=6),
        dict(dense_last_blocks=0),
    ],
    "subblock": [dict(row_blocks=3), dict(cells=1)],
    "cosa": [dict(top_p=0.3), *FORCED],
    "blasst": [dict(skip_threshold=0.9)],
    "random": [dict(seed=1)],
    "oracle_mass": [dict(tau=0.3), *FORCED],
    "oracle_output": [dict(tau=0.3), *FORCED],
}


def test_every_keyword_changes_the_selection():
    q, k, v = draw(320, 320)
    config = CONFIG.replace(density=0.55)
    for name in NAMES:
        assert {keyword for native in CHANGES.get(name, []) for keyword in native} == set(patterns.keywords(name))
        plain = patterns.select(name, q, k, v, config).to_mask()
        for native in CHANGES.get(name, []):
            assert not torch.equal(patterns.select(name, q, k, v, config, **native).to_mask(), plain), (name, native)


@pytest.mark.parametrize("native", [{}, dict(tau=0.1)], ids=["solved", "tau"])
@pytest.mark.parametrize("name", ["xattention", "cosa", "oracle_mass", "oracle_output"])
def test_forced_blocks_are_kept(name, native):
    q, k, v = draw(320, 320)
    native = {"top_p" if name == "cosa" else key: value for key, value in native.items()}
    kept = patterns.select(name, q, k, v, CONFIG.replace(density=0.6), sink_blocks=3, local_blocks=4, **native)
    row, key = torch.arange(kept.num_q_blocks)[:, None], torch.arange(kept.num_q_blocks)
    assert kept.to_mask()[:, :, ((key < 3) | (row - key < 4)) & (key <= row)].all()


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


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch_gives_an_empty_selection(name):
    q, k, v = (x[:0] for x in draw(75, 187))
    selection = patterns.select(name, q, k, v, CONFIG)
    assert selection.to_mask().shape == (0, 4, 5, 12) and (selection.q_len, selection.kv_len) == (75, 187)
    assert stem.block_sparse_attention(q, k, v, selection).shape == q.shape


@pytest.mark.parametrize("kv_len", [0, 187])
@pytest.mark.parametrize("name", NAMES)
def test_no_queries_give_a_selection_without_queries(name, kv_len):
    q, k, v = (x[:, :, :n] for x, n in zip(draw(75, 187), (0, kv_len, kv_len), strict=True))
    selection = patterns.select(name, q, k, v, CONFIG)
    assert (selection.q_len, selection.kv_len) == (0, kv_len)
    assert stem.block_sparse_attention(q, k, v, selection).shape == q.shape


def test_the_table_of_methods_names_the_file_of_each():
    table = re.findall(r"^\| (\w+) \| (\w+\.py) \|", patterns.__doc__, re.MULTILINE)
    assert dict(table) == {name: Path(inspect.getfile(patterns._SELECT[name])).name for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_docstrings_name_every_parameter(name):
    text = inspect.getdoc(patterns._SELECT[name])
    assert all(re.search(rf"^ +(\w+, )*{keyword}(, \w+)*: ", text, re.MULTILINE) for keyword in patterns.keywords(name))

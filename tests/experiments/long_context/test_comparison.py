"""Methods on equal samples: what is scored, that pairs are pairs, and that the plan asks what it says."""

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from tokenizers.processors import TemplateProcessing
from transformers import AttentionInterface, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import stem
from stem import pretrained
from stem.experiments import documents, records
from stem.experiments.long_context import comparison, processes, ruler
from stem.experiments.long_context.plan import Plan

SPARSE = stem.StemConfig(density=0.4, block_size=16, sink_blocks=1, local_blocks=1)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(pretrained.resolve("smollm2"))


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(1)
    sizes = dict(hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=3)
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, initializer_range=0.3, **sizes)
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def rows(monkeypatch):
    """RULER's samples without lm-eval: questions of different lengths, with answers of one or of two words."""

    def samples(task, tokenizer, length, samples, seed=0):
        text = " ".join(documents.words(documents.prose())[: length // 3])
        return [
            {"input": f"{text} two {'five ' * i}one?", "gen_prefix": "They are", "outputs": ["one", "two"][: 1 + i % 2]}
            for i in range(samples)
        ]

    monkeypatch.setattr(ruler, "stored_samples", samples)


def test_prompts_have_the_length_they_say_and_end_with_the_answer(rows, tokenizer):
    prompts = comparison.exact_prompts("niah_multikey_1", tokenizer, 512, 3)
    assert prompts.ids.shape == (3, 512)
    for ids, count, answers in zip(prompts.ids, prompts.answer_tokens, prompts.answers, strict=True):
        assert tokenizer.decode(ids[-count:]) == " " + ", ".join(answers)
        assert tokenizer.decode(ids).endswith(f"They are {', '.join(answers)}")
    several = comparison.exact_prompts("niah_multivalue", tokenizer, 512, 2)
    assert tokenizer.decode(several.ids[1]).endswith("They are two, one")  # in the order of the text


def test_what_a_tokenizer_begins_a_text_with_stands_at_the_start_and_nowhere_else(rows, tokenizer, monkeypatch):
    mark = tokenizer.bos_token
    marking = copy.deepcopy(tokenizer)
    marking.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{mark} $A", special_tokens=[(mark, tokenizer.bos_token_id)]
    )
    monkeypatch.setitem(documents.KINDS, "prose", lambda: documents.prose()[:20_000])
    monkeypatch.setattr(comparison, "_KIND_TOKENS", {})
    ways = [
        lambda of: comparison.exact_prompts("niah_multikey_1", of, 256, 3).ids,
        lambda of: comparison.document_windows(of, 256, 3, ["prose"])["prose"],
    ]
    for made in ways:
        marked, plain = made(marking), made(tokenizer)
        assert marked.shape == plain.shape == (3, 256)
        assert (marked == tokenizer.bos_token_id).nonzero().tolist() == [[0, 0], [1, 0], [2, 0]]
        assert not (plain == tokenizer.bos_token_id).any()


def test_tasks_without_an_order_of_answers_and_lengths_that_do_not_fit_are_named(rows, tokenizer):
    with pytest.raises(ValueError, match="task must be one of .*'ruler_cwe'"):
        comparison.exact_prompts("ruler_cwe", tokenizer, 512, 1)
    with pytest.raises(ValueError, match="length=8: a sample of niah_single_1 has"):
        comparison.exact_prompts("niah_single_1", tokenizer, 8, 1)


def test_answers_are_scored_as_all_logits_say_whatever_the_batch(rows, tokenizer, model):
    prompts = comparison.exact_prompts("niah_multikey_1", tokenizer, 256, 3)
    logp, right = comparison.answer_scores(model, prompts, tokens_per_batch=512)
    with torch.no_grad():
        logits = model(prompts.ids).logits
    for i, count in enumerate(prompts.answer_tokens):
        losses = F.cross_entropy(logits[i, -count - 1 : -1], prompts.ids[i, -count:], reduction="none")
        assert float(logp[i]) == pytest.approx(-losses.sum().item(), rel=1e-4)
        assert bool(right[i]) == bool((logits[i, -count - 1 : -1].argmax(-1) == prompts.ids[i, -count:]).all())


def test_document_losses_are_those_of_all_logits(model):
    ids = torch.randint(1000, (2, 96))
    losses = comparison.document_losses(model, ids)
    with torch.no_grad():
        logits = model(ids).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(2, 95)
    assert torch.allclose(losses, expected, atol=1e-4)


def test_rows_hold_the_difference_to_dense_on_the_same_samples(rows, tokenizer, model):
    small = comparison.Comparison(model, tokenizer, "tiny")
    prompts = comparison.exact_prompts("niah_multikey_1", tokenizer, 256, 4)
    method = comparison.Method("stem", SPARSE, 16, 0.4)
    windows = {kind: torch.randint(1000, (2, 64)) for kind in "ab"}
    for of in (comparison.Method("dense"), method):
        small.answers(of, prompts)
        small.loss(of, windows)
    dense, sparse = ([row for row in small.rows if row["method"] == name] for name in ("dense", "stem"))
    assert len(dense) == len(sparse) == 2 + 2 + 4
    assert all(row["difference"] == row["low"] == row["high"] == 0 and row["density"] == 1 for row in dense)
    for ours, theirs in zip(sparse, dense, strict=True):
        assert ours["dense"] == theirs["value"]
        assert ours["difference"] == pytest.approx(ours["value"] - ours["dense"], rel=1e-2, abs=1e-3)
        assert ours["low"] <= ours["difference"] <= ours["high"] and 0.3 < ours["density"] < 0.5
    answer = sparse[0]
    with stem.hf.stem_prefill(model, SPARSE):
        logp, _ = comparison.answer_scores(model, prompts)
    assert answer["value"] == pytest.approx(float(logp.mean()), rel=1e-4) and answer["count"] == 4
    assert [(row["start"], row["stop"]) for row in sparse[2:6]] == [(0, 16), (16, 32), (32, 48), (48, 64)]
    assert sparse[7]["task"] == "b" and sparse[7]["start"] == 32
    losses = comparison.document_losses(model, windows["b"])[:, 32:].mean()
    assert sparse[7]["dense"] == pytest.approx(float(losses), rel=1e-4)
    mine = [row for row in small.samples if row["method"] == "stem" and row["measure"] == "answer"]
    assert [row["value"] for row in mine] == pytest.approx(logp.tolist()) and {row["ms"] > 0 for row in mine} == {True}
    small.loss(method, {kind: ids + 1 for kind, ids in windows.items()})
    assert small.rows[-1]["dense"] != sparse[7]["dense"]  # other documents, so dense was measured again


def test_the_interval_covers_the_mean_and_shrinks_with_samples():
    draws = torch.randn(400) + 3
    low, high = comparison.interval(draws)
    assert low < float(draws.mean()) < high and high - low == pytest.approx(4 / 20, rel=0.25)
    assert comparison.interval(torch.ones(5)) == (1.0, 1.0)


def test_every_name_becomes_a_method_and_each_block_size_has_its_control():
    asked = []

    def calibrate(density, config):
        asked.append(density)
        if (density, config.block_size) == (0.1, 128):
            return None
        return config.replace(threshold=0.1)

    found = comparison.methods(comparison.all_names(), (0.1, 0.5), (64, 128), calibrate)
    assert len(found) == 2 * (1 + 2 * (len(comparison.all_names()) - 1)) - 3
    controls = [method for method in found if method.name == "window"]
    assert [method.block_size for method in controls] == [64, 128] and asked == ([0.1] * 3 + [0.5] * 3) * 2
    adaptive, cells_alone, dense_end = (
        next(method.attention for method in found if method.name == name) for name in comparison.ADAPTIVE
    )
    assert adaptive.reduction == "softmax" and adaptive.threshold == 0.1
    assert adaptive.exact_last_blocks == 1 and cells_alone == adaptive.replace(exact_last_blocks=0)
    assert dense_end == cells_alone.replace(dense_last_blocks=1)
    budget = stem.block_budget(20, comparison.window_control(64))
    assert budget.tolist()[:4] == [1, 2, 3, 3] and budget[-1] == 3


def test_a_small_plan_runs_and_stops_at_its_limit(rows, tokenizer, model, monkeypatch):
    monkeypatch.setattr(documents, "KINDS", {"prose": lambda: documents.prose()[:9000]})
    monkeypatch.setattr(comparison, "_KIND_TOKENS", {})
    monkeypatch.setattr(comparison.document_windows, "__defaults__", (("prose",),))
    options = dict(windows=1, names=("stem", "random"), densities=(0.5,), block_sizes=(32,), asked_at=(0.5, 32))
    plan = Plan((256,), (1,), ("niah_multikey_2",), generates="niah_multikey_2", **options)
    told, saved = [], []
    found = comparison.run(plan, model, tokenizer, "tiny", show=told.append, save=saved.append)
    measures = {(row["method"], row["measure"]) for row in found}
    every = {"answer", "right", "loss", "generated", "time"}
    assert measures == {(method, of) for method in ("dense", "window", "stem", "random") for of in every}
    assert saved[-1] == found and all(row["value"] > 0 for row in found if row["measure"] == "time")
    assert comparison.run(plan, model, tokenizer, "tiny", show=told.append, limit_s=-1) == []
    assert told[-1] == "16 measurements left out after -1 s"
    waited = []
    times = comparison.run(
        plan, model, tokenizer, "tiny", part="0/2", wait=lambda: waited.append(told[-1]), show=told.append
    )
    assert "prepared" in waited[0]
    others = [
        row for i in (1, 2) for row in comparison.run(plan, model, tokenizer, "tiny", part=f"{i}/2", show=told.append)
    ]
    assert {row["measure"] for row in times} == {"time"} and len(times) + len(others) == len(found)
    key = ("method", "measure", "task", "start", "value", "dense", "low", "high")
    whole = {tuple(row.get(name) for name in key) for row in found if row["measure"] != "time"}
    assert {tuple(row.get(name) for name in key) for row in others} == whole


def test_the_adaptive_preset_is_calibrated_when_it_is_first_used(rows, tokenizer, model, monkeypatch):
    asked = []

    def calibrator(model, tokenizer, length, show):
        return lambda density, config: (
            asked.append((length, density)) or (config.replace(threshold=0.9) if density > 0.3 else None)
        )

    monkeypatch.setattr(comparison, "calibrator", calibrator)
    monkeypatch.setattr(comparison, "document_windows", lambda *_: {"prose": torch.randint(1000, (1, 64))})
    options = dict(names=tuple(comparison.ADAPTIVE), densities=(0.2, 0.5), block_sizes=(32,), asked_at=(0.5, 32))
    plan = Plan((256,), (1,), ("niah_multikey_2",), generates=None, **options)
    found = comparison.run(plan, model, tokenizer, "tiny", show=lambda line: None)
    adaptive, cells_alone, dense_end, window = (
        {(row["asked"], row["density"]) for row in found if row["method"] == name and row["measure"] == "answer"}
        for name in (*comparison.ADAPTIVE, "window")
    )
    assert sorted(asked) == [(256, 0.2)] * 3 + [(256, 0.5)] * 3
    assert window == {(None, 0.5833)} and adaptive == cells_alone == {(0.5, 0.5833)}  # the forced blocks
    assert dense_end == {(0.5, 0.7222)}  # 26 of 36 pairs: those 21, and all 8 of the last row


def test_a_measurement_that_fails_is_raised_after_the_others(rows, tokenizer, model, monkeypatch):
    def fail(q, k, v):
        raise RuntimeError("no blocks today")

    bad = comparison.Method("random", fail, 32, 0.5)
    monkeypatch.setattr(
        comparison, "methods", lambda *_: [bad, comparison.Method("window", comparison.window_control(32), 32)]
    )
    options = dict(names=("random",), densities=(0.5,), block_sizes=(32,), asked_at=(0.5, 32), generates=None)
    monkeypatch.setattr(comparison, "document_windows", lambda *_: {"prose": torch.randint(1000, (1, 64))})
    saved = []
    with pytest.raises(ExceptionGroup, match="3 of 9 measurements of tiny failed") as raised:
        plan = Plan((256,), (1,), ("niah_multikey_2",), **options)
        comparison.run(plan, model, tokenizer, "tiny", show=lambda line: None, save=saved.append)
    assert {row["method"] for row in saved[-1]} == {"dense", "window"}
    assert "method='random'" in raised.value.exceptions[0].__notes__[0]


def test_thresholds_are_solved_unless_the_forced_blocks_cost_more(tokenizer, model, monkeypatch):
    monkeypatch.setattr(
        comparison, "calibration_texts", lambda: [documents.prose()[:4000], documents.prose()[9000:13000]]
    )
    told = []
    solve = comparison.calibrator(model, tokenizer, 256, told.append)
    config = stem.StemConfig.preset("adaptive", dense_up_to=0, block_size=16)
    assert solve(0.1, config) is None
    solved = solve(0.5, config)
    assert solved.allocation == "adaptive" and 0 < solved.threshold < 1 and told == []
    monkeypatch.setattr(stem, "calibrate", lambda *_, **__: stem.hf.calibration.calibrate(model, [], 0.5))
    assert solve(0.5, config) is None and "is left out: prompts must hold" in told[0]


@pytest.mark.parametrize("name", comparison.BLIND)
def test_blind_patterns_do_not_look_at_the_tensors(name):
    q, k = torch.randn(2, 3, 160, 16), torch.randn(2, 1, 160, 16)
    first, second = (stem.patterns.select(name, q * x, k * x, k, SPARSE).to_mask() for x in (1, -2))
    assert torch.equal(first, second)
    (method,) = (of for of in comparison.methods([name], (0.4,), (16,)) if of.name == name)
    assert method.attention(q, k, k) is method.attention(q + 1, k, k)
    assert torch.equal(
        method.attention(q, k, k).to_mask(),
        stem.patterns.select(name, q, k, k, SPARSE.replace(local_blocks=2)).to_mask(),
    )


def test_fused_layers_are_compiled_for_a_while_and_generation_is_not(rows, tokenizer, model):
    prompts = comparison.exact_prompts("niah_multikey_2", tokenizer, 64, 1)
    layers, registered = model.model.layers, AttentionInterface()[stem.hf.NAME]
    with comparison.fused(model):
        assert all(layer._compiled_call_impl for layer in layers)
        assert AttentionInterface()[stem.hf.NAME] is not registered
        comparison.generated_scores(model, tokenizer, prompts)  # would take a minute of compilation otherwise
        assert all(layer._compiled_call_impl for layer in layers)
    assert not any(layer._compiled_call_impl for layer in layers)
    assert AttentionInterface()[stem.hf.NAME] is registered


def test_the_last_row_shows_what_was_seen_scored_and_kept(rows, tokenizer, model):
    prompts = comparison.exact_prompts("niah_multikey_1", tokenizer, 250, 1)
    row = comparison.last_row(model, prompts.ids, SPARSE)
    assert row.mass.shape == row.rank.shape == row.kept.shape == (2, 3, 16)
    assert torch.allclose(row.mass.sum(-1), torch.ones(2, 3), atol=1e-5)
    assert (row.kept.sum(-1) == stem.block_budget(16, SPARSE)[-1]).all()
    assert (row.rank.sort(-1).values == torch.arange(16)).all()
    chosen = row.kept.clone()
    chosen[..., [0, 15]] = False  # sink and diagonal are kept whatever their rank
    assert row.rank[chosen].max() < stem.block_budget(16, SPARSE)[-1] + 2
    block = comparison.needle_block(prompts, 0, 16)
    assert "one" in tokenizer.decode(prompts.ids[0, block * 16 : block * 16 + 20])


@pytest.mark.parametrize("kind", list(documents.KINDS))
def test_every_kind_of_document_is_long_and_its_windows_do_not_overlap(kind):
    text = documents.KINDS[kind]()
    assert len(text) > 300_000
    found = documents.windows(range(1000), 90, 11)
    assert [len(of) for of in found] == [90] * 11 and found[1][0] == 90
    with pytest.raises(ValueError, match="count=12 windows of length=90 need 1080 tokens, got 1000"):
        documents.windows(range(1000), 90, 12)


def test_stored_samples_are_built_once_and_again_only_for_more(tokenizer, tmp_path, monkeypatch):
    built = []

    def build(task, tokenizer, length, samples, seed):
        built.append(samples)
        return [{"input": f"{task} {length} {seed} {i}"} for i in range(samples)]

    monkeypatch.setenv("STEM_CACHE", str(tmp_path))
    monkeypatch.setattr(ruler, "build_samples", build)
    three = ruler.stored_samples("ruler_vt", tokenizer, 512, 3, 1)
    assert ruler.stored_samples("ruler_vt", tokenizer, 512, 2, 1) == three[:2] and built == [3]
    assert len(ruler.stored_samples("ruler_vt", tokenizer, 512, 5, 1)) == 5 and built == [3, 5]
    ruler.stored_samples("ruler_vt", tokenizer, 512, 5, 2)
    assert built == [3, 5, 5] and len(list((tmp_path / "ruler").iterdir())) == 2


def test_a_run_of_some_methods_leaves_the_rows_of_the_others(monkeypatch, tmp_path, capsys):
    def measure(plan, model, seed, *, save, **options):
        for name in {"dense", *(plan.names or comparison.all_names())}:
            about = dict(method=name, block_size=None if name == "dense" else 64, measure="answer", model=model)
            found.append(about | dict(task="ruler_vt", length=512, seed=seed))
        save(found)

    monkeypatch.setenv("STEM_RESULTS", str(tmp_path))
    monkeypatch.setattr(records, "repository_root", lambda: tmp_path)
    monkeypatch.setattr(processes, "measure", measure)
    for seed, options in ((0, []), (1, ["--methods", "stem adaptive", "longformer"])):
        found = []
        monkeypatch.setattr(sys, "argv", ["compare", "--profile", "full", "--seed", str(seed), *options])
        comparison.main()
    seeds = records.read_rows("long_context/answers").set_index("method").seed
    assert seeds[["dense", "stem adaptive", "longformer"]].eq(1).all() and seeds.sum() == 3
    assert set(seeds.index) == {"dense", *comparison.all_names()}
    monkeypatch.setattr(sys, "argv", ["compare", "--methods", "sten"])
    with pytest.raises(SystemExit):
        comparison.main()
    assert "invalid choice: 'sten'" in capsys.readouterr().err

"""The engine's answers are those of stem.hf: whole prompts, chunks, batches, cached prefixes, preemption."""

import logging

import pytest
import torch
from serving_engine import SETTINGS, answers, expected, largest_difference, prompt, row_errors, sparse

import stem
import stem.vllm
from stem.vllm.report import described

TOLERANCE = 1e-4  # of log-probabilities, fp32
RAGGED = [700, 333, 1000, 129]  # tokens


@pytest.fixture(scope="module")
def aligned(engine):
    """Chunks of at most 500 tokens, and room for 17 pages of 128, fewer than three long prompts need."""
    options = dict(max_num_batched_tokens=500, num_gpu_blocks_override=18, block_size=128)
    return engine(SETTINGS, scheduler_cls="stem.vllm.AlignedScheduler", **options)


@pytest.fixture(scope="module")
def whole(engine):
    """Whole prompts, without cached prefixes; one layer is dense, one adaptive, and short prompts stay dense."""
    adaptive = dict(allocation="adaptive", threshold=0.02)
    settings = {**SETTINGS, "dense_layers": [0], "layers": {"-1": adaptive}, "min_tokens": 300}
    return engine(settings, enable_prefix_caching=False, max_num_batched_tokens=4096, block_size=128)


def methods_of_whole():
    adaptive = stem.StemConfig(**{**SETTINGS, "density": None}, allocation="adaptive", threshold=0.02)
    return [None, *sparse()[:1], adaptive]


def test_scores_matter(model):
    prompts = [prompt(1000)]
    sparse_answers = expected(model, prompts, methods=sparse())
    assert largest_difference(sparse_answers, expected(model, prompts)) > 0.5
    assert largest_difference(sparse_answers, expected(model, prompts, methods=sparse(value_weight=3.0))) > 0.05


def test_chunks_and_ragged_batches_give_the_answers_of_the_whole_prompt(aligned, model):
    prompts = [prompt(length, seed) for seed, length in enumerate(RAGGED)]
    found = answers(aligned, prompts, tokens=3)
    assert largest_difference(found, expected(model, prompts, 3, sparse())) < TOLERANCE


def test_prompts_join_decoding_requests(aligned, model):
    prompts = [prompt(length, 10 + length) for length in (200, 1000, 450)]
    found = answers(aligned, prompts, tokens=12, joins_at=(0, 3, 5))
    assert largest_difference(found, expected(model, prompts, 12, sparse())) < TOLERANCE


def test_chunks_attend_like_the_whole_prompt_in_each_layer(aligned, monkeypatch):
    from stem.vllm.cpu import StemCPUImpl

    found = row_errors(monkeypatch, StemCPUImpl)
    answers(aligned, [prompt(length, 90 + length) for length in RAGGED], tokens=2, joins_at=(0, 1, 2, 4))
    assert len(found) == 3 * 4  # layers, prompts
    assert max(errors.max().item() for errors, _ in found) < 1e-5


def test_a_repeated_prompt_repeats_its_answer(aligned, model, monkeypatch):
    prompts = [prompt(900, 20)]
    first = answers(aligned, prompts, tokens=4)
    manager = aligned.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
    cached, find = [], manager.get_computed_blocks
    monkeypatch.setattr(manager, "get_computed_blocks", lambda request: cached.append(find(request)) or cached[-1])
    again = answers(aligned, [list(prompts[0])], tokens=4)
    assert cached[0][1] == 896  # tokens in seven pages
    assert largest_difference(first, again) < TOLERANCE
    assert largest_difference(again, expected(model, prompts, 4, sparse())) < TOLERANCE


def test_preempted_requests_lose_nothing(aligned, model, monkeypatch):
    scheduler = aligned.llm_engine.engine_core.engine_core.scheduler
    preempted, preempt = [], scheduler._preempt_request
    monkeypatch.setattr(
        scheduler, "_preempt_request", lambda request, *a, **k: (preempted.append(request), preempt(request, *a, **k))
    )
    prompts = [prompt(1015, seed) for seed in (30, 31)]  # 8 pages each, 9 from the tenth answered token on
    found = answers(aligned, prompts, tokens=20)
    assert preempted
    assert largest_difference(found, expected(model, prompts, 20, sparse())) < TOLERANCE


def test_layers_of_their_own_and_short_prompts(whole, model):
    prompts = [prompt(length, 40 + length) for length in (1000, 500, 300)]
    found = answers(whole, prompts, tokens=2)
    assert largest_difference(found, expected(model, prompts, 2, methods_of_whole())) < TOLERANCE
    assert largest_difference(found, expected(model, prompts, 2, sparse())) > 0.05
    short = [prompt(299, 50)]
    assert largest_difference(answers(whole, short), expected(model, short)) < TOLERANCE


def test_density_is_that_of_stem_hf(whole, model):
    before, ids = stem.vllm.density(whole), prompt(800, 60)
    answers(whole, [ids], tokens=2)
    engine = whole.llm_engine.vllm_config.instance_id
    (seen,) = (counts.tolist() for about, counts in described() if about["engine"] == engine)  # by other processes
    report = stem.vllm.density(whole)
    assert seen == [[row["kept"], row["causal"]] for row in report]
    with stem.hf.stem_prefill(model, methods_of_whole()) as wanted, torch.no_grad():
        model(torch.tensor([ids]))
    assert [row["attention"] for row in report] == ["vllm: dense in the settings", "stem", "stem"]
    for row, then, other in list(zip(report, before, wanted, strict=True))[1:]:
        pairs = row["kept"] - then["kept"], row["causal"] - then["causal"]
        assert pairs[0] / pairs[1] == pytest.approx(other["density"], abs=1e-9)
        assert row["density"] == row["kept"] / row["causal"] < 1
    assert report.density() == pytest.approx((report[1]["density"] + report[2]["density"]) / 2)
    assert report[0]["density"] is None


def test_density_one_gives_the_tokens_of_vllm(engine):
    prompts = [prompt(length, 70 + length) for length in RAGGED]
    options = dict(max_num_batched_tokens=500)
    stock = answers(engine(None, **options), prompts, tokens=8)
    dense = answers(engine({"density": 1.0, "block_size": 16}, **options), prompts, tokens=8)
    assert [x.argmax(-1).tolist() for x in dense] == [x.argmax(-1).tolist() for x in stock]
    assert largest_difference(dense, stock) < TOLERANCE


def test_unaligned_chunks_are_a_known_difference(engine, model, caplog):
    with caplog.at_level(logging.WARNING):
        logging.getLogger("vllm").propagate = True
        llm = engine(SETTINGS, max_num_batched_tokens=500)
    assert "add --scheduler-cls stem.vllm.AlignedScheduler" in caplog.text
    prompts = [prompt(1000, 80)]
    difference = largest_difference(answers(llm, prompts), expected(model, prompts, methods=sparse()))
    assert (
        TOLERANCE
        < difference
        < largest_difference(expected(model, prompts), expected(model, prompts, methods=sparse()))
    )


def test_wrong_settings_stop_the_engine_before_weights_are_loaded(engine, monkeypatch):
    monkeypatch.setattr("vllm.model_executor.models.llama.LlamaModel.load_weights", None)
    with pytest.raises(TypeError, match="unknown option densty=0.3"):
        engine({"densty": 0.3})

"""`--use_cache`: each model and configuration answers from a file of its own, and results say how often."""

import json
import sys
from functools import partial, partialmethod

import pytest
from tokenizers import normalizers

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.models.huggingface import HFLM  # noqa: E402

from stem import StemConfig, hf, patterns, pretrained  # noqa: E402
from stem.evaluate import __main__ as command_line  # noqa: E402
from stem.evaluate.harness import StemLM, _method  # noqa: E402

SPARSE = {"block_size": 16, "sink_blocks": 1, "local_blocks": 1}


@pytest.fixture
def run(tiny, tiny_tasks, tmp_path, monkeypatch):
    """A function from model arguments to (responses, what the results file says of Stem), with one --use_cache path."""
    from lm_eval.tasks import TaskManager

    folder, names = tiny_tasks
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "data")
    manager = TaskManager(include_path=str(folder), include_defaults=False)

    def run(model="stem", use_cache=str(tmp_path / "answers"), **options):
        if isinstance(model, str):
            options = {"pretrained": tiny, "max_length": 120, **options}
        found = lm_eval.simple_evaluate(
            model=model, model_args=options, tasks=names, task_manager=manager, use_cache=use_cache, device="cpu",
            bootstrap_iters=0,
        )  # fmt: skip
        responses = [sample["resps"] for name in names for sample in found["samples"][name]]
        return responses, found["config"].get("stem")

    return run


def files(folder):
    return sorted(path.name for path in folder.glob("answers*"))


def test_another_configuration_never_answers(run, tmp_path):
    sparse = SPARSE | {"density": 0.4}
    expected = [run(use_cache=None, **options)[0] for options in (SPARSE | {"density": 1.0}, sparse)]
    assert expected[0] != expected[1]
    (dense, first), (found, second), (again, third) = (
        run(**options) for options in (SPARSE | {"density": 1.0}, sparse, sparse)
    )
    assert [dense, found] == expected and again == found
    assert [stem["from_cache"] for stem in (first, second, third)] == [0, 0, 9]
    assert second["density"] < 0.9 and third["density"] is None  # nothing was computed
    assert len(files(tmp_path)) == 2 and all(name.startswith("answers_rank0_") for name in files(tmp_path))


def test_a_cached_answer_is_used_in_any_batch(run, tmp_path):
    options = SPARSE | {"density": 0.4}
    assert run(**options)[1]["from_cache"] == 0
    assert run(**options, batch_size=2)[1]["from_cache"] == 9
    assert len(files(tmp_path)) == 1


def test_other_models_keep_lm_evals_own_cache(run, tmp_path):
    first, stem = run("hf")
    assert stem is None and files(tmp_path) == ["answers_rank0.db"]
    assert run("hf")[0] == first


def test_a_model_with_other_weights_has_another_fingerprint(tiny):
    model, tokenizer = pretrained.load(tiny, device="cpu")
    fingerprints = [StemLM(model, tokenizer, k_start=2, block_size=16).fingerprint()]
    fingerprints.append(StemLM(model, tokenizer, k_start=2, block_size=16, batch_size=4).fingerprint())
    changes = [{"k_start": 3}, {"dense_layers": 1}, {"layers": {1: None}}, {"pattern": "a_shape"}, {"impl": "torch"}]
    changes += [{"max_length": 99}, {"preset": "angelslim"}, {"layers": {0: {"density": 0.5}, "1": None}}]
    for change in changes:
        options = {"k_start": 2, "block_size": 16, **change}
        fingerprints.append(StemLM(model, tokenizer, **options).fingerprint())
    rows = model.model.layers[1].mlp.down_proj.weight.data
    for change in (
        lambda: model.model.layers[1].self_attn.q_proj.weight.data[0, 0].add_(1),
        lambda: model.lm_head.weight.data[-1, -1].add_(1),
        lambda: rows.copy_(rows.flip(0)),  # of the same sum
        lambda: model.model.rotary_emb.inv_freq.mul_(0.5),
        lambda: setattr(model.config, "rope_parameters", dict(rope_type="default", rope_theta=500.0)),
        lambda: setattr(model.generation_config, "suppress_tokens", [5, 6]),
        lambda: setattr(tokenizer.backend_tokenizer, "normalizer", normalizers.Lowercase()),
    ):
        change()
        fingerprints.append(StemLM(model, tokenizer, k_start=2, block_size=16).fingerprint())
    assert fingerprints[0] == fingerprints[1] and len(set(fingerprints)) == len(fingerprints) - 1


def test_the_fingerprint_is_that_of_the_attention_that_runs(tiny):
    lm = StemLM(tiny, device="cpu", **SPARSE)
    first = lm.fingerprint()
    lm.tok_encode("a text", left_truncate_len=1)
    assert lm.fingerprint() == first == StemLM(tiny, device="cpu", pattern="stem", **SPARSE).fingerprint()
    found = {first}
    for change in (
        lambda: hf.enable(lm.model, StemConfig(density=0.9)),
        lambda: hf.enable(lm.model, partial(patterns.select, "xattention", tau=0.9)),
        lambda: hf.enable(lm.model, partial(patterns.select, "xattention", tau=0.8)),
        lambda: lm.model.set_attn_implementation("eager"),
        lambda: hf.disable(lm.model),
        lambda: lm.model.set_attn_implementation("sdpa"),
    ):
        change()
        found.add(lm.fingerprint())
    assert len(found) == 7
    assert "0x" not in repr(_method(partial(patterns.select, "xattention", tau=0.8)))  # an address, of one process


def test_sampled_answers_are_computed_again(tiny, texts, tmp_path):
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import CachingLM

    lm = CachingLM(StemLM(tiny, device="cpu", **SPARSE), str(tmp_path / "answers.db"))
    for sampled, expected in ((True, [0, 0]), (False, [0, 1])):
        generation = {"until": [], "max_gen_toks": 2, "do_sample": sampled, "temperature": float(sampled)}
        counts = []
        for _ in range(2):
            lm.generate_until([Instance("generate_until", {}, (texts[0], dict(generation)), 0)])
            counts.append(lm.from_cache)
        assert counts == expected


def test_a_cache_of_another_class_is_not_touched(tiny, tmp_path):
    from lm_eval.api.model import CachingLM

    lm = CachingLM(HFLM(tiny, device="cpu"), str(tmp_path / "answers.db"))
    assert lm.cache_db == str(tmp_path / "answers.db") and callable(lm.loglikelihood)


@pytest.mark.slow
def test_the_command_line_caches_by_configuration(tiny, tiny_tasks, tmp_path, monkeypatch):
    from lm_eval.tasks import TaskManager

    folder, names = tiny_tasks
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "data")
    of_the_folder = partialmethod(TaskManager.__init__, include_defaults=False)  # not all of lm-eval's 14,000 files
    monkeypatch.setattr(TaskManager, "__init__", of_the_folder)
    scores, counts = [], []
    for step, density in enumerate((1.0, 0.4, 0.4)):
        model = f"pretrained={tiny},max_length=120,block_size=16,sink_blocks=1,local_blocks=1,density={density}"
        where = f"--use_cache {tmp_path / 'answers'} --output_path {tmp_path / str(step)} --include_path {folder}"
        command = f"run --model stem --device cpu --model_args {model} --tasks {names[0]} {where}"
        monkeypatch.setattr(sys, "argv", ["stem.evaluate", *command.split()])
        command_line.main()
        (path,) = (tmp_path / str(step)).rglob("results_*.json")
        results = json.loads(path.read_text())
        scores.append(results["results"][names[0]]["perplexity,none"])
        counts.append(results["config"]["stem"]["from_cache"])
    assert scores[0] != scores[1] == scores[2] and counts == [0, 0, 3]

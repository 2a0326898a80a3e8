"""lm-eval with Stem as a model, from Python and from the command line."""

import functools
import json
import os
import re
import subprocess
import sys

import pytest
import torch

import stem

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from stem import hf, patterns, pretrained  # noqa: E402
from stem.evaluate import __main__ as command_line  # noqa: E402
from stem.evaluate import harness  # noqa: E402


def _requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, pair, index) for index, pair in enumerate(arguments)]


def _likelihoods(lm, pairs):
    return [logp for logp, _ in lm.loglikelihood(_requests("loglikelihood", pairs), disable_tqdm=True)]


def test_the_model_name_is_registered_and_is_lm_evals_own_class():
    assert get_model("stem") is harness.StemLM
    assert issubclass(harness.StemLM, HFLM)


def test_full_density_scores_what_lm_evals_own_class_scores(tiny, texts):
    pairs = [(text, " the end") for text in texts[:3]]
    expected = _likelihoods(HFLM(pretrained=tiny, device="cpu"), pairs)
    found = _likelihoods(harness.StemLM(pretrained=tiny, device="cpu", density=1.0, block_size=16), pairs)
    assert found == pytest.approx(expected, abs=1e-3)


def test_every_model_argument_reaches_the_attention(tiny, texts):
    pairs = [(texts[3], " the end")]
    options = {"block_size": 16, "sink_blocks": 1, "local_blocks": 1}
    changes = [
        {"density": 1.0},
        {"k_start": 2},
        {"k_start": 2, "dense_layers": 1},
        {"k_start": 4, "decay": 1.0},
        {"k_start": 4, "decay": 1.0, "sink_blocks": 0, "local_blocks": 4},
    ]
    changes += [{"preset": "angelslim", "k_start": 2, "score_stride": 4, "value_weight": 3.0}]
    changes += [{"k_start": 4, "pattern": "sliding_window"}, {"pattern": "sliding_window", "window_blocks": 6}]
    changes += [{"k_start": 2, "layers": {1: {"k_start": 3}}}, {"k_start": 4, "reduction": "softmax", "score_cells": 1}]
    changes += [{"allocation": "adaptive", "threshold": 0.02}]
    for change in changes:
        read = ["block_size"] if "pattern" in change else options
        change.update({name: options[name] for name in read} | change)
    scores = [_likelihoods(harness.StemLM(tiny, device="cpu", **change), pairs)[0] for change in changes]
    assert len({round(score, 3) for score in scores}) == len(changes), scores


def test_padded_batches_answer_what_single_requests_answer(tiny, texts):
    options = {"pretrained": tiny, "device": "cpu", "k_start": 2, "block_size": 16, "sink_blocks": 1, "local_blocks": 1}
    one, four = (harness.StemLM(**options, batch_size=size) for size in (1, 4))
    pairs = [(text, " the end") for text in texts]
    assert _likelihoods(four, pairs) == pytest.approx(_likelihoods(one, pairs), abs=1e-4)
    assert four.batch_size == 4
    generation = {"until": [], "max_gen_toks": 6, "do_sample": False}
    prompts = _requests("generate_until", [(text, dict(generation)) for text in texts])
    assert four.generate_until(prompts, disable_tqdm=True) == one.generate_until(prompts, disable_tqdm=True)


@pytest.fixture(scope="module")
def evaluated(tiny, tiny_tasks, tmp_path_factory):
    """A function from a model class and its options to (results, responses by task, the model)."""
    from lm_eval.tasks import TaskManager

    folder, names = tiny_tasks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        loaded = TaskManager(include_path=str(folder), include_defaults=False).load(names)

    @functools.cache
    def evaluate_once(model_class, **options):
        lm = model_class(pretrained=tiny, device="cpu", max_length=120, **options)
        out = lm_eval.evaluate(lm, loaded, bootstrap_iters=0)
        return out["results"], {name: [sample["resps"] for sample in out["samples"][name]] for name in names}, lm

    return evaluate_once


@pytest.mark.parametrize("batch_size, options", [(1, {"density": 1.0, "block_size": 16}), (3, {"pattern": "dense"})])
def test_dense_scores_are_those_of_lm_evals_own_class(evaluated, batch_size, options):
    expected = evaluated(HFLM, batch_size=batch_size)[:2]
    assert evaluated(harness.StemLM, batch_size=batch_size, **options)[:2] == expected


def test_every_kind_of_request_is_sparse_in_any_batch_and_density_is_recorded(evaluated):
    options = {"block_size": 16, "k_start": 2}
    dense, sparse = evaluated(HFLM, batch_size=1)[1], evaluated(harness.StemLM, batch_size=1, **options)[1]
    assert all(sparse[name] != dense[name] for name in dense)
    results, responses, lm = evaluated(harness.StemLM, batch_size=3, **options)
    assert responses == sparse
    recorded = json.loads(json.dumps(lm.get_model_info()["stem"]))
    assert recorded["k_start"] == recorded["config"]["k_start"] == 2 and recorded["config"]["sink_blocks"] == 4
    assert 0.1 < recorded["density"] < 0.9
    assert recorded["density_by_layer"] == [pytest.approx(recorded["density"])] * 2


def test_looking_for_a_batch_size_does_not_count(tiny, texts):
    lm = harness.StemLM(
        tiny, device="cpu", k_start=1, block_size=16, batch_size="auto", max_batch_size=2, max_length=64
    )
    requests = _requests("loglikelihood_rolling", [(texts[0],)])
    (found,) = lm.loglikelihood_rolling(requests, disable_tqdm=True)
    density = hf.density(lm.model).density()
    one = harness.StemLM(tiny, device="cpu", k_start=1, block_size=16, max_length=64)
    assert one.loglikelihood_rolling(requests, disable_tqdm=True) == [found]
    assert hf.density(one.model).density() == density


WITHOUT_OTHER_TASKS = """
import functools, runpy
from lm_eval.tasks import TaskManager
TaskManager.__init__ = functools.partialmethod(TaskManager.__init__, include_defaults=False)
runpy.run_module("stem.evaluate", run_name="__main__")
"""  # lm-eval reads its 14,000 files of tasks for half a minute


@pytest.mark.slow
def test_processes_of_accelerate_share_the_requests(tiny, tiny_tasks, tmp_path):
    folder, names = tiny_tasks
    (tmp_path / "evaluate_folder.py").write_text(WITHOUT_OTHER_TASKS)
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path), "PYTHONPATH": path}
    model = f"--model stem --device cpu --model_args pretrained={tiny},k_start=2,block_size=16,max_length=120"
    tasks = f"--include_path {folder} --tasks {','.join(names)}"
    command = f"-m evaluate_folder {model} {tasks} --log_samples --output_path"
    launch = "-m accelerate.commands.launch --cpu --num_processes 2 --num_machines 1 --mixed_precision no"
    answers, densities = [], []
    for processes, prefix in (1, ""), (2, f"{launch} --dynamo_backend no --main_process_port 0 "):
        out = tmp_path / str(processes)
        subprocess.run([sys.executable, *f"{prefix}{command} {out}".split()], check=True, env=environment)
        samples = [json.loads(line) for path in out.rglob("samples_*.jsonl") for line in path.read_text().splitlines()]
        answers.append(sorted(json.dumps([sample["prompt_hash"], sample["resps"]]) for sample in samples))
        (path,) = out.rglob("results_*.json")
        densities.append(json.loads(path.read_text())["config"]["stem"]["density"])
    assert answers[0] == answers[1] and len(answers[0]) == 9
    assert densities[0] == pytest.approx(densities[1], rel=0.1)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"density": 1.5}, ValueError, "density"),
        ({"density": 0.5, "k_start": 4}, ValueError, "k_start"),
        ({"blocksize": 64}, TypeError, "blocksize=64; did you mean block_size"),
        ({"preset": "papers"}, ValueError, "preset"),
        ({"pattern": "stems"}, ValueError, "pattern must be one of .*xattention"),
        ({"pattern": "a_shape", "gamma": 0.9}, TypeError, "gamma is no parameter of pattern='a_shape' but of flexpre"),
        ({"gamma": 0.9}, TypeError, "gamma is no parameter of pattern='stem'"),
        ({"impl": "cuda"}, ValueError, "impl"),
        ({"dense_layers": 3}, ValueError, "dense_layers"),
        ({"dense_layers": [0, 5]}, ValueError, "dense_layers"),
        ({"dense_layers": "first"}, ValueError, "dense_layers"),
        ({"dense_layers": 0.5}, ValueError, "dense_layers must be a count 0..2 or layers in -2..1, got 0.5"),
        ({"layers": [1]}, ValueError, "layers must map layers in -2..1 to None or to options out of .*, got \\[1\\]"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_model_arguments_are_named(tiny, options, error, message):
    with pytest.raises(error, match=message):
        harness.StemLM(pretrained=tiny, device="cpu", **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"pattern": "xattention", "tau": "a"}, "tau must be a number in .*'a'"),
        ({"pattern": "xattention", "tau": 2}, "tau must be in .*2"),
        ({"pattern": "flexprefill", "gamma": True}, "gamma must be .*True"),
        ({"pattern": "sliding_window", "window_blocks": 0.5}, "window_blocks must be .*0.5"),
        ({"pattern": "sparse_transformer_fixed", "stride_blocks": 2, "summary_blocks": 3}, "summary_blocks .*3"),
        ({"pattern": "bigbird", "preset": "adaptive"}, "allocation='adaptive' belongs to the pattern 'stem'"),
        ({"pattern": "dense", "density": 0.25}, "pattern='dense' takes no other option, got density=0.25"),
        ({"pattern": "dense", "preset": "paper"}, "got preset='paper'"),
        ({"pattern": "xattention", "tau": 0.9, "density": 0.5}, "density=0.5 has no effect with .*'tau': 0.9"),
        ({"pattern": "a_shape", "window_blocks": 2, "k_start": 4}, "k_start=4 has no effect with .*'window_blocks': 2"),
        ({"pattern": "dense", "impl": "torch"}, "pattern='dense' takes no other option, got impl='torch'"),
        ({"pattern": "dense", "dense_layers": [1]}, "got dense_layers=\\[1\\]"),
        (
            {"pattern": "xattention", "value_weight": 5},
            "value_weight=5 has no effect with .*takes tau.*, and here .*density",
        ),
        ({"pattern": "sliding_window", "sink_blocks": 8}, "sink_blocks=8 has no effect with .*takes window_blocks, "),
        ({"pattern": "uniform_topk", "value_norm": "log"}, "value_norm='log' has no effect"),
        ({"preset": "adaptive", "min_blocks": 3}, "min_blocks=3 has no effect with pattern='stem'; .* threshold"),
        ({"value_weight": 0, "value_norm": "zscore"}, "value_norm='zscore' has no effect"),
        ({"score_cells": 8}, "score_cells=8 has no effect"),
        ({"pattern": "xattention", "compute": "fp8"}, "compute='fp8' has no effect with pattern='xattention'"),
        ({"pattern": 5}, "pattern must be one of .*got 5"),
        ({"pattern": None}, "pattern must be one of .*got None"),
        ({"preset": 5}, "preset must be one of .*got 5"),
        ({"preset": True}, "preset must be one of .*got True"),
        ({"impl": True}, "impl must be one of None, 'reference', .*got True"),
        ({"density": "0.25"}, "density must be a number.*'0.25'"),
        ({"density": True}, "density must be a number.*True"),
        ({"block_size": "64"}, "block_size must be one of .*'64'"),
        ({"k_start": "4"}, "k_start must be a number.*'4'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_options_are_named_before_the_model_is_loaded(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        harness.StemLM(pretrained="there/is-no-such-model", device="cpu", **options)


@pytest.mark.parametrize("pattern", [name for name in patterns.names() if name != "dense"])
def test_parameters_of_every_pattern_are_checked(pattern):
    for name in patterns.keywords(pattern):
        for wrong in ("a", -1, [1], True):
            with pytest.raises((ValueError, TypeError), match=f"{name} must be"):
                harness.method_from_options({"pattern": pattern, name: wrong})
    for preset in ("paper", "angelslim", "hpc_ops"):
        harness.method_from_options({"pattern": pattern, "preset": preset, "block_size": 64})
    harness.method_from_options({"pattern": pattern, "decay": 0.5})


@pytest.mark.parametrize("pattern", [name for name in patterns.names() if "tau" in patterns.keywords(name)])
def test_a_budget_beside_a_parameter_that_sets_the_density_has_no_effect(pattern):
    name = "gamma" if pattern == "flexprefill" else "tau"
    budgets = {"decay": 0.5}, {"min_blocks": 2}, {"preset": "paper"}, {"preset": "angelslim"}, {"density": 0.5}
    for budget in (*budgets, {"allocation": "adaptive", "threshold": 0.1}, {"preset": "adaptive"}):
        with pytest.raises(ValueError, match=rf"has no effect with pattern='{pattern}' and .*: 0.5.*takes .*tau"):
            harness.method_from_options({"pattern": pattern, name: 0.5, "block_size": 64, **budget})


@pytest.mark.parametrize("pattern", [name for name in patterns.names() if name != "dense"])
def test_a_field_that_is_accepted_changes_what_is_kept_and_no_other_does(pattern):
    changes = dict(score_stride=8, decay=0.9, dense_first_blocks=55, dense_last_blocks=20, sink_blocks=9, min_blocks=55)
    changes |= dict(local_blocks=6, forced="on_top", value_weight=9.0, value_norm="zscore", decay_from="k_start")
    changes |= dict(dense_up_to=4096)
    q, k, v = (3 * torch.randn(3, 1, 2, 1024, 16)).unbind(0)
    options = {"block_size": 16, "k_start": 40}
    before = patterns.select(pattern, q, k, v, stem.StemConfig(**options)).to_mask()
    for name in changes.keys() - patterns.keywords(pattern).keys():
        value = changes[name]
        kept = patterns.select(pattern, q, k, v, stem.StemConfig(**options | {name: value})).to_mask()
        try:
            harness.method_from_options({"pattern": pattern} | options | {name: value})
        except ValueError:
            assert torch.equal(kept, before), name
        else:
            assert not torch.equal(kept, before), name


@pytest.mark.parametrize("wrong", [0.5, [0.5], [True], True, None, "0", ["0"], -1, 5, {0: None}, [4], [None]], ids=repr)
def test_bad_dense_layers_are_named(wrong):
    message = f"dense_layers must be a count 0..4 or layers in -4..3, got {wrong!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        harness.per_layer({"k_start": 3}, 4, wrong)


@pytest.mark.parametrize(
    "wrong, got",
    [
        ([1], "[1]"),
        ("x", "'x'"),
        (0, "0"),
        ({"x": None}, "'x': None"),
        ({0.5: None}, "0.5: None"),
        ({True: None}, "True: None"),
        ({"-": None}, "'-': None"),
        ({0: 0.5}, "0: 0.5"),
        ({0: "dense"}, "0: 'dense'"),
        ({0: ["density"]}, "0: ['density']"),
    ],
    ids=str,
)
def test_bad_layers_are_named(wrong, got):
    with pytest.raises(ValueError, match=rf"layers must map layers in -4..3 to None or to .*got {re.escape(got)}$"):
        harness.per_layer({"k_start": 3}, 4, layers=wrong)


def test_a_layer_is_named_once():
    for twice in ({3: None, -1: None}, {1: None, "1": None}):
        with pytest.raises(ValueError, match="layers must name each layer once, got '?-?1'? for layer [13] again"):
            harness.per_layer({"k_start": 3}, 4, layers=twice)


def test_dense_layers_count_from_the_front_or_are_named():
    options, method = {"k_start": 3}, stem.StemConfig(k_start=3)
    assert harness.per_layer(options, 4, 2) == [None, None, method, method]
    assert harness.per_layer(options, 4, [0, -1]) == [None, method, method, None]
    assert harness.per_layer(options, 2) == [method, method]


def test_options_of_single_layers():
    options, method = {"k_start": 3, "block_size": 16}, stem.StemConfig(k_start=3, block_size=16)
    changes = {0: None, "1": {"density": 0.5}, -1: {"pattern": "bigbird", "random_blocks": 2}}
    dense, half, same, bigbird = harness.per_layer(options, 4, layers=changes)
    assert (dense, half, same) == (None, stem.StemConfig(density=0.5, block_size=16), method)
    assert bigbird.args == ("bigbird",) and bigbird.keywords == {"config": method, "random_blocks": 2}
    gamma = {"pattern": "flexprefill", "gamma": 0.9}  # gamma sets the density; the k_start of the others is no mistake
    xattention = {"pattern": "xattention", "tau": 0.5, "block_size": 16}
    methods = harness.per_layer(xattention, 4, layers={0: gamma, 1: {"pattern": "stem"}, 2: {"pattern": "dense"}})
    assert methods[0].args == ("flexprefill",) and "tau" not in methods[0].keywords
    assert methods[1:3] == [stem.StemConfig(block_size=16), None] and methods[3].keywords["tau"] == 0.5
    assert harness.per_layer(options, 1, layers={0: gamma})[0].keywords["gamma"] == 0.9
    with pytest.raises(ValueError, match="density=0.5 has no effect"):
        harness.per_layer(options, 1, layers={0: {**gamma, "density": 0.5}})
    for wrong in ({4: None}, {0: {"densiti": 0.5}}):
        with pytest.raises(ValueError, match="layers must map layers in -4..3"):
            harness.per_layer(options, 4, layers=wrong)


def _parsed(monkeypatch, *command: str):
    """Return the arguments that lm-eval would run for a command line."""
    seen = []
    monkeypatch.setattr("lm_eval._cli.HarnessCLI.execute", lambda self, arguments: seen.append(arguments))
    monkeypatch.setattr(sys, "argv", ["stem.evaluate", *command])
    command_line.main()
    return seen[0]


@pytest.mark.parametrize("wrong", [None, 5, "", ["a"]], ids=repr)
def test_a_model_that_is_none_is_named(wrong):
    with pytest.raises(
        TypeError, match=re.escape(f"pretrained must be a model's name, folder or file, or a model, got {wrong!r}")
    ):
        harness.StemLM(pretrained=wrong)


@pytest.mark.parametrize("option", ["--model_args", "--metadata"])
def test_bad_json_is_named_with_its_option(monkeypatch, option):
    command = "--model stem --model_args pretrained=smollm2 --metadata a=1 --tasks niah_single_1".split()
    command[command.index(option) + 1] = '{"max_seq_lengths"'
    with pytest.raises(ValueError, match=f'^{option}: Invalid JSON: {{"max_seq_lengths"'):
        _parsed(monkeypatch, *command)


def test_command_line_knows_the_embedded_model_wherever_a_name_goes(tmp_path, monkeypatch):
    folder = pretrained.resolve("smollm2")
    arguments = "--model stem --model_args pretrained=smollm2,density=0.25 --tasks niah_single_1".split()
    for command in (arguments, ["run", *arguments]):
        parsed = _parsed(monkeypatch, *command)
        assert parsed.model_args == {"pretrained": folder, "density": 0.25}
    parsed = _parsed(monkeypatch, *arguments, "--metadata", '{"tokenizer": "smollm2", "max_seq_lengths": [512]}')
    assert parsed.metadata == {"tokenizer": folder, "max_seq_lengths": [512]}
    file = tmp_path / "run.yaml"
    file.write_text("model: stem\nmodel_args: {pretrained: smollm2, k_start: 3}\ntasks: [niah_single_1]\n")
    assert _parsed(monkeypatch, "run", "--config", str(file)).model_args == {"pretrained": folder, "k_start": 3}
    parsed = _parsed(monkeypatch, "--model", "hf", "--model_args", "pretrained=org/name", "--tasks", "a")
    assert parsed.model_args == {"pretrained": "org/name"}


@pytest.mark.slow
def test_command_line_of_the_readme_works_offline(tmp_path):
    command = "-m stem.evaluate --model stem --model_args pretrained=smollm2,density=0.25,block_size=64 --limit 1 "
    command += f"--tasks niah_single_1 --gen_kwargs max_gen_toks=4 --output_path {tmp_path} --metadata"
    done = subprocess.run(
        [sys.executable, *command.split(), '{"max_seq_lengths":[512]}'],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = tmp_path.rglob("results_*.json")
    results = json.loads(path.read_text())
    assert results["n-samples"]["niah_single_1"]["effective"] == 1
    assert 0 <= results["results"]["niah_single_1"]["512,none"] <= 1

"""stem.warm_up: which calls it makes, and what it counts."""

import inspect
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny_models import SPARSE, build
from triton import knobs

import stem
from stem import StemConfig, hf, warming

CONFIG = StemConfig(block_size=16, density=0.5, sink_blocks=1, local_blocks=1)


@pytest.fixture
def calls(monkeypatch):
    """Calls of stem_attention, which "compiles" one kernel and finds another one in the cache each time."""
    seen = []

    def attention(q, k, v, config, impl):
        seen.append((tuple(q.shape), tuple(k.shape), q.dtype, config, impl))
        knobs.compilation.listener(src=None, metadata={}, metadata_group={}, times=None, cache_hit=False)
        knobs.compilation.listener(src=None, metadata={}, metadata_group={}, times=None, cache_hit=True)
        return q * 1 + 0 * (k.sum() + v.sum())

    monkeypatch.setattr(warming, "stem_attention", attention)
    monkeypatch.setattr(warming, "_runs_torch", lambda *layer: False)
    return seen


def test_a_shape_runs_each_length_once_and_counts_compilations(calls):
    before = knobs.compilation.listener
    done = stem.warm_up((4, 2, 16), CONFIG, [40, 24, 40], batch_size=2, dtype=torch.float16, device="cpu")
    assert calls == [((2, 4, n, 16), (2, 2, n, 16), torch.float16, CONFIG, None) for n in (24, 40)]
    assert done.kernels == 2 and 0 < done.seconds < 60
    assert knobs.compilation.listener is before


def test_the_defaults_of_a_shape(calls):
    stem.warm_up((4, 2, 16), lengths=[40], device="cpu", impl="triton")
    assert calls == [((1, 4, 40, 16), (1, 2, 40, 16), torch.bfloat16, StemConfig(), "triton")]


def test_the_layers_of_a_model_that_are_alike_run_once(calls):
    model = build("GptOss", layer_types=["full_attention", "sliding_attention", "full_attention"])
    stem.warm_up(model, CONFIG, [40])
    assert calls == [((1, 4, 40, 16), (1, 2, 40, 16), torch.float32, CONFIG, None)]
    calls.clear()
    hf.enable(model, {0: CONFIG, 2: SPARSE}, impl="triton" if stem.TRITON_MODE == "interpret" else None)
    stem.warm_up(model, lengths=[40])
    assert [call[3] for call in calls] == [CONFIG, SPARSE]
    calls.clear()
    hf.enable(model, {0: CONFIG})
    stem.warm_up(model, lengths=[40])
    assert [call[3] for call in calls] == [CONFIG]


def test_sinks_do_not_decide_the_dtype(calls):
    model = build("GptOss").bfloat16()
    for layer in model.model.layers:
        layer.self_attn.sinks.data = layer.self_attn.sinks.data.float()
    stem.warm_up(model, CONFIG, [40])
    assert calls and {call[2] for call in calls} == {torch.bfloat16}


@pytest.mark.parametrize("family, shape", [("Llama", (4, 2, 16)), ("Gemma3Text", (4, 1, 256)), ("Qwen3", (4, 2, 32))])
def test_shapes_of_models(family, shape):
    module = next(iter(hf.models.attention_modules(build(family)).values()))
    assert hf.models.attention_shape(module) == shape


def test_the_listener_is_restored_after_an_error(calls, monkeypatch):
    before = knobs.compilation.listener
    monkeypatch.setattr(warming, "stem_attention", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stem.warm_up((4, 2, 16), CONFIG, [40], device="cpu")
    assert knobs.compilation.listener is before


def test_selectors_are_called(calls, monkeypatch):
    seen, model = [], build("Llama")

    def selector(q, k, v):
        seen.append(q.shape)
        return stem.BlockSelection.every_block(*q.shape[:3], k.shape[2], 16, q.device)

    hf.enable(model, selector)
    stem.warm_up(model, lengths=[40])
    assert seen == [(1, 4, 40, 16)] and not calls


def test_torch_compiles_nothing_and_a_line_says_so(capfd):
    assert stem.warm_up((4, 2, 16), CONFIG, [10**9], device="cpu") == (0, 0.0)
    assert stem.warm_up(build(), CONFIG, [40], impl="torch") == (0, 0.0)
    assert capfd.readouterr().err.count("impl='torch' compiles nothing") == 2


@pytest.mark.skipif(stem.TRITON_MODE != "interpret", reason="compiled kernels do not run on a CPU")
def test_the_operator_runs_interpreted():
    assert stem.warm_up((2, 1, 16), CONFIG, [40], device="cpu", impl="triton", dtype=torch.float32).kernels == 0


def test_progress_needs_no_tqdm(calls, monkeypatch):
    bars = []
    bar = SimpleNamespace(tqdm=lambda items, **options: bars.append((len(items), options["desc"])) or items)
    for module, expected in ((bar, [(2, "stem.warm_up")]), (None, [])):  # None: its import fails
        bars.clear()
        monkeypatch.setitem(sys.modules, "tqdm.auto", module)
        assert stem.warm_up((4, 2, 16), CONFIG, [40, 41], device="cpu").kernels == 2 and bars == expected


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        (((4, 2), None, [40]), TypeError, "model must be a transformers model or"),
        (((4, 3, 16), None, [40]), ValueError, "Hq must be a multiple of Hkv"),
        (((4, 2, 0), None, [40]), ValueError, "D must be >= 1, got 0"),
        (((4, 2, 16), "paper", [40]), TypeError, "config"),
        (((4, 2, 16), None, []), ValueError, "lengths must hold at least one"),
        (((4, 2, 16), None, [0]), ValueError, "lengths must be >= 1, got 0"),
        (((4, 2, 16), None, [1.5]), TypeError, "lengths must be an int"),
        ((torch.nn.Linear(2, 2), None, [40]), ValueError, "no causal attention layers"),
    ],
)
def test_bad_arguments(arguments, error, words):
    with pytest.raises(error, match=words):
        stem.warm_up(*arguments)


def test_the_first_arguments_are_model_config_and_lengths():
    assert list(inspect.signature(stem.warm_up).parameters)[:3] == ["model", "config", "lengths"]

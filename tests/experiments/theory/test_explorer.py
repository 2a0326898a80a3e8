"""The explorer: what it measures, and that it is widgets for a reader and a picture for everybody else."""

import sys
from types import SimpleNamespace

import matplotlib
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

matplotlib.use("Agg")
from matplotlib.figure import Figure  # noqa: E402

import stem  # noqa: E402
from stem import hf, metrics, patterns  # noqa: E402
from stem.experiments.losses import token_losses  # noqa: E402
from stem.experiments.theory import explorer, flow  # noqa: E402
from stem.experiments.theory.explorer import Choice, Explorer, explore  # noqa: E402

START = dict(layer=1, head=2, density=0.4, block_size=16)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=3, vocab_size=50)
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)).eval()
    for layer in model.model.layers:  # sharper attention and larger values than fresh weights give
        layer.self_attn.q_proj.weight.data *= 10
        layer.self_attn.v_proj.weight.data *= torch.linspace(1, 60, 64)
    return model


@pytest.fixture(scope="module")
def ids():
    return torch.randint(50, (1, 393), generator=torch.Generator().manual_seed(1))


def test_measures_are_those_of_the_layer_alone(model, ids):
    choice = Choice(method="xattention", **START)
    found = Explorer(model, ids).measures(choice)
    q, k, v = flow.capture(model, ids, layer=1)
    kept = patterns.select("xattention", q, k, v, choice.config)
    assert found.density == pytest.approx(kept.density()) == pytest.approx(0.4, abs=0.02)
    assert found.recall == pytest.approx(float(metrics.attention_recall(q, k, kept)[0, 2]))
    dense = stem.reference.dense_attention(q, k, v)
    assert found.error == pytest.approx(metrics.rel_l2_error(stem.block_sparse_attention(q, k, v, kept), dense))
    losses = [token_losses(model, ids[:, :-1], ids[:, 1:]).mean()]
    with hf.stem_prefill(model, {1: lambda q, k, v: patterns.select("xattention", q, k, v, choice.config)}) as report:
        losses.append(token_losses(model, ids[:, :-1], ids[:, 1:]).mean())
    assert [row["attention"] for row in report] == ["dense", "selector", "dense"]
    assert found.loss == pytest.approx(float(losses[1] - losses[0]), abs=2e-5) and abs(found.loss) > 1e-6


def test_dense_loses_nothing(model, ids):
    found = Explorer(model, ids).measures(Choice(method="dense", **START))
    assert (found.density, found.recall) == (1, pytest.approx(1))
    assert found.error < 1e-5 and abs(found.loss) < 1e-5


@pytest.mark.parametrize(
    "change", [dict(layer=0), dict(density=0.6), dict(block_size=32), dict(decay=0.1), dict(value_weight=20.0)], ids=str
)
def test_every_setting_changes_the_selection(model, ids, change):
    one = Explorer(model, ids)
    before, after = (one.selection(Choice(**START | other)).to_mask() for other in ({}, change))
    assert before.shape != after.shape or not torch.equal(before, after)


def test_without_widgets_it_is_a_grid_of_pictures(model, ids, monkeypatch):
    monkeypatch.setenv("STEM_WIDGETS", "0")
    before = matplotlib.pyplot.get_fignums()
    figure = explore(model, ids, **START, methods=("stem", "oracle_mass"))
    assert isinstance(figure, Figure) and figure._repr_png_().startswith(b"\x89PNG")
    titles = [ax.get_title(loc="left") for ax in figure.axes if ax.axison]
    assert [title.split("\n")[0] for title in titles] == ["stem", "oracle_mass"]
    assert matplotlib.pyplot.get_fignums() == before  # else a notebook would show it twice


def test_with_widgets_the_picture_follows_them(model, ids, monkeypatch):
    monkeypatch.setenv("STEM_WIDGETS", "1")
    panel = explore(model, ids, **START)
    (*controls, text), picture = panel.children[0].children, panel.children[1]
    by_name = {control.description: control for control in controls}
    assert list(by_name) == ["layer", "head", "method", "density", "block size", "decay", "value weight"]
    assert (by_name["layer"].max, by_name["head"].max) == (2, 3)
    assert by_name["method"].options == patterns.names()
    assert bytes(picture.value[:4]) == b"\x89PNG" and "density 0.4" in text.value
    for name, value in {"method": "sliding_window", "head": 0, "density": 0.7, "block size": 32, "layer": 0}.items():
        before = bytes(picture.value)
        by_name[name].value = value
        assert bytes(picture.value) != before, name
    assert "density 0.6" in text.value or "density 0.7" in text.value
    assert by_name["decay"].disabled and by_name["value weight"].disabled
    by_name["method"].value = "stem"
    assert not by_name["decay"].disabled


def test_the_budget_is_a_grid_of_pictures_or_follows_sliders(monkeypatch):
    monkeypatch.setenv("STEM_WIDGETS", "0")
    figure = explorer.explore_budget(16, k_starts=(4, 99), decays=(1.0, 0.5))
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    kept = sum(min(i + 1, 4) for i in range(16)) / (16 * 17 / 2)
    assert titles[0] == f"k_start 4, μ 1: density {kept:.0%}" and titles[2] == "k_start 16, μ 1: density 100%"
    monkeypatch.setenv("STEM_WIDGETS", "1")
    panel = explorer.explore_budget(16)
    (start, mu), picture = panel.children[0].children, panel.children[1]
    for control, value in ((start, 3), (mu, 0.2)):
        before = bytes(picture.value)
        control.value = value
        assert bytes(picture.value) != before and bytes(picture.value[:4]) == b"\x89PNG"


class Shell:
    """Stands for the shell that IPython.get_ipython returns in a kernel."""

    kernel = object()

    def __init__(self, **names):
        self.user_ns = names


@pytest.mark.parametrize(
    ("shell", "environment", "expected"),
    [
        (None, {}, False),
        (None, {"JPY_SESSION_NAME": "01_theory.ipynb"}, False),
        (Shell(), {}, False),
        (Shell(), {"JPY_SESSION_NAME": "01_theory.ipynb"}, True),
        (Shell(__vsc_ipynb_file__="01_theory.ipynb"), {}, True),
        (Shell(), {"JPY_SESSION_NAME": "01_theory.ipynb", "STEM_WIDGETS": "0"}, False),
        (Shell(), {"STEM_WIDGETS": "1"}, True),
    ],
    ids=["script", "terminal", "papermill", "jupyter", "vs-code", "switched-off", "switched-on"],
)
def test_who_gets_widgets(shell, environment, expected, monkeypatch, model, ids):
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    for name in ("JPY_SESSION_NAME", "STEM_WIDGETS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert explorer.live() is expected
    shown = explore(model, ids, **START, methods=("a_shape",))
    assert isinstance(shown, Figure) is not expected

"""stem.experiments.figures: each title claims what its rows say, axes carry units, SVGs are reproducible."""

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch

import stem

matplotlib.use("Agg")
from stem.experiments import figures  # noqa: E402


@pytest.fixture(autouse=True)
def close_figures():
    yield
    matplotlib.pyplot.close("all")


def drawn():
    """A figure with one line."""
    figure, ax = figures.new()
    frame = pd.DataFrame(dict(step=[1, 2], loss=[3.0, 2.0], run="Stem"))
    figures.lines(frame, "step", "loss", "run", ax, title="falls", xlabel="step", ylabel="loss [nats]")
    return figure


def title(ax):
    return ax.get_title(loc="left")


def test_selections_show_kept_skipped_and_future():
    mask = torch.eye(4, dtype=torch.bool)[None, None]
    (ax,) = figures.selections({"diagonal": stem.BlockSelection.from_mask(mask, 16)}).axes
    assert title(ax) == "diagonal\n0.40"
    picture = ax.images[0].get_array()
    assert (np.diag(picture) == 2).all() and (picture[np.tril_indices(4, -1)] == 1).all()
    assert (picture[np.triu_indices(4, 1)] == 0).all()


def test_lines_shade_a_band_and_keep_the_order():
    frame = pd.DataFrame(dict(step=[1, 2, 1, 2], loss=[3.0, 2.0, 4.0, 3.0], run=["dense", "dense", "Stem", "Stem"]))
    frame = frame.assign(low=frame.loss - 1, high=frame.loss + 1)
    ax = figures.lines(
        frame, "step", "loss", "run", figures.new()[1],
        title="dense learns faster", xlabel="step", ylabel="loss [nats]", band=("low", "high"),
    )  # fmt: skip
    assert [line.get_label() for line in ax.get_lines()] == ["dense", "Stem"]
    assert ax.get_lines()[0].get_color() == figures.COLOURS["dense"] and len(ax.collections) == 2
    labels = {text.get_text(): text for text in ax.texts}
    assert set(labels) == {"dense", "Stem"} and labels["dense"].get_color() == figures.COLOURS["dense"]
    assert labels["Stem"].get_position()[1] > labels["dense"].get_position()[1]  # Stem ends above dense


def test_labels_stand_at_the_ends_of_lines_without_overlap_and_follow_the_scale():
    frame = pd.DataFrame([dict(step=x, loss=y, run=f"run {y}") for y in (10, 10.1, 10.2, 1000) for x in (1, 2)])
    ax = figures.lines(frame, "step", "loss", "run", figures.new()[1], title="t", xlabel="step", ylabel="loss")

    def places():
        return {text.get_text(): text.get_position()[1] for text in ax.texts}

    linear = places()
    ax.get_ylim()
    end = ax.transAxes.inverted().transform(ax.transData.transform((2, 1000)))[1]
    assert end > 0.9 and linear["run 1000"] == pytest.approx(end, abs=0.005)
    heights = sorted(linear.values())
    assert len(linear) == 4 and min(np.diff(heights)) > 0.04 and 0 <= heights[0] and heights[-1] <= 1
    ax.set_ylim(0.1, 1e6)
    figures.log_y(ax)
    assert len(places()) == 4 and places()["run 1000"] == pytest.approx(4 / 7, abs=0.005)


def test_a_method_has_one_colour_and_no_two_methods_share_one():
    methods = [name for name in stem.patterns.names() if not name.startswith("oracle")]
    assert len({figures.COLOURS[name] for name in methods}) == len(methods)
    for order in (["stem", "xattention"], ["xattention", "stem"]):
        frame = pd.DataFrame([dict(step=x, loss=1.0, run=name) for name in order for x in (1, 2)])
        ax = figures.lines(frame, "step", "loss", "run", figures.new()[1], title="t", xlabel="step", ylabel="loss")
        for line in ax.get_lines():
            assert line.get_color() == figures.COLOURS[line.get_label()]


def test_the_alternative_text_reads_the_figure():
    assert figures.describe(drawn()) == "falls: loss [nats] over step: Stem"


@pytest.mark.parametrize(
    ("measured", "labels"),
    [
        ((4096, 1024, 1500), ["1K", "4K"]),
        ((1500, 300), ["300", "1500"]),
        ([1024 << n for n in range(9)], ["1K", "4K", "16K", "64K", "256K"]),
    ],
)
def test_an_axis_of_tokens_is_labelled_at_whole_k(measured, labels):
    _, ax = figures.new()
    figures.tokens_axis(ax, measured)
    assert [label.get_text() for label in ax.get_xticklabels()] == labels


@pytest.mark.parametrize(("tokens", "label"), [(1, "1"), (1000, "1000"), (1024, "1K"), (131072, "128K"), (2**20, "1M")])
def test_token_labels(tokens, label):
    assert figures.tokens_label(tokens) == label


def test_saved_figures_are_reproducible_and_lie_beside_the_rows(monkeypatch, tmp_path):
    monkeypatch.setenv("STEM_RESULTS", str(tmp_path))
    paths = [figures.save(drawn(), "speed", name) for name in ("first", "second")]
    assert paths[0] == tmp_path / "speed" / "first.svg"
    first, second = (path.read_bytes() for path in paths)
    assert first == second and b"<dc:date>" not in first


def test_drawing_leaves_the_settings_of_the_session_alone():
    before = dict(matplotlib.rcParams)
    matplotlib.rcParams["interactive"] = True  # as a notebook's backend sets it while the first figure is made
    drawn()
    assert matplotlib.rcParams["interactive"]
    matplotlib.rcParams["interactive"] = before["interactive"]
    assert dict(matplotlib.rcParams) == before


def test_selections_is_a_grid_with_names_and_densities():
    q = torch.zeros(1, 2, 64, 16)
    config = stem.StemConfig(block_size=16, density=0.7, sink_blocks=1, local_blocks=1)
    chosen = {name: stem.patterns.select(name, q, q, q, config) for name in ("dense", "sliding_window", "a_shape")}
    shown = figures.selections(chosen, head=1, columns=2).axes
    assert [title(ax) for ax in shown] == ["dense\n1.00", "sliding_window\n0.70", "a_shape\n0.70"]
    assert np.array_equal(shown[1].images[0].get_array() == 2, chosen["sliding_window"].to_mask()[0, 1])


def test_the_attention_stands_beside_the_selections():
    mask = torch.eye(4, dtype=torch.bool)[None, None]
    mass = torch.tensor([[1.0, 0, 0, 0], [0.9, 0.1, 0, 0], [0, 0.5, 0.5, 0], [1e-9, 0, 0, 1]])
    attention, kept = figures.selections({"diagonal": stem.BlockSelection.from_mask(mask, 16)}, mass=mass).axes
    shown = attention.images[0].get_array()
    assert shown[0, 0] == 0 and shown[1, 1] == pytest.approx(-1) and shown[3, 0] == pytest.approx(-figures.FAINTEST)
    assert title(kept) == "diagonal\n0.40"


def test_attention_map_is_blue_where_kept_and_grey_elsewhere():
    mask = torch.ones(1, 1, 2, 3, dtype=torch.bool).tril(1)
    mask[..., 0] = False
    kept = stem.BlockSelection.from_mask(mask, 16, q_len=20, kv_len=40)
    ax = figures.attention_map(torch.full((3, 5), 0.2), kept, figures.new()[1], title="mine")  # cells of 8 tokens
    grey, blue = (image.get_array() for image in ax.images)
    assert (grey.mask == [[0, 0, 1, 1, 0], [0, 0, 1, 1, 1], [0, 0, 1, 1, 1]]).all()
    assert (blue.mask == ~grey.mask).all() and grey.data[0, 0] == pytest.approx(np.log10(0.2))
    assert ax.images[0].get_extent() == [0, 40, 40, 16]
    assert title(ax) == "mine"

"""stem.experiments.speed.figures: each title claims what its rows say, axes carry units, dense is grey."""

import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("Agg")
from stem.experiments.figures import COLOURS  # noqa: E402
from stem.experiments.speed import figures  # noqa: E402


def made_up_rows():
    """A machine where dense takes 1 ms at 1K tokens and grows fourfold, and Stem takes a third beyond 1K."""
    rows = [
        dict(operation="ceiling", provider="matmul", tflops=700.0),
        dict(operation="ceiling", provider="copy", gb_per_s=4000.0),
    ]
    for n, ms in ((1024, 1.0), (2048, 4.0), (4096, 16.0)):
        common = dict(tokens=n, flop=ms * 5e11, least_bytes=n * 20480, peak_memory_mib=n / 64)
        rows.append(common | dict(operation="attention", provider="sdpa_cudnn", config="dense", latency_ms=ms))
        rows.append(common | dict(operation="attention", provider="sdpa_flash", config="dense", latency_ms=2 * ms))
        for operation, share in (("scores", 0.02), ("selection", 0.03), ("attention", 0.2), ("operator", 0.25)):
            time = share * ms * (4 if n == 1024 else 1)
            speedups = dict(speedup_vs_sdpa_cudnn=ms / time, speedup_vs_sdpa_flash=2 * ms / time)
            rows.append(
                common
                | speedups
                | dict(operation=operation, provider="stem_triton", config="released", latency_ms=time)
            )
    frame = pd.DataFrame(rows).assign(machine="toy", device="Toy GPU", profile="full")
    frame["tflops"] = frame.tflops.fillna(frame.flop / frame.latency_ms / 1e9)
    return frame.assign(latency_ms_p20=0.9 * frame.latency_ms, latency_ms_p80=1.1 * frame.latency_ms)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    matplotlib.pyplot.close("all")


def title(ax):
    return ax.get_title(loc="left")


def test_speed_names_the_fastest_baseline_and_the_ratio():
    left, right = figures.speed(made_up_rows()).axes
    assert title(left) == "Toy GPU: Stem takes 4 ms at 4K tokens"
    assert title(right) == "4.0× over SDPA cuDNN at 4K (released budget)"
    assert left.get_ylabel() == "time [ms]" and left.get_xlabel() == "tokens"
    assert [tick.get_text() for tick in left.get_xticklabels()] == ["1K", "2K", "4K"]
    assert left.get_xscale() == left.get_yscale() == "log"
    assert len(left.collections) == 3  # one p20-p80 band a line


def beyond():
    """Rows of operations that are no part of one forward pass."""
    times = {"sdpa_cudnn": 9.0, "sdpa_flash": 12.0, "flex": 4.0, "stem_triton": 3.0}
    for operation in ("forward+backward", "ttft", "captured operator"):
        for provider, ms in times.items():
            config = "dense" if provider.startswith("sdpa") else "default"
            yield dict(operation=operation, provider=provider, config=config, tokens=4096, latency_ms=ms)


def test_rows_of_other_operations_change_no_figure_of_the_operator():
    more = pd.concat([made_up_rows(), pd.DataFrame(beyond()).assign(machine="toy", device="Toy GPU", profile="full")])
    assert title(figures.speed(more).axes[1]) == title(figures.speed(made_up_rows()).axes[1])
    assert len(figures.timed(more)[0]) == len(figures.timed(made_up_rows())[0])


NAMED = [("forward+backward", "Forward and backward"), ("ttft", "Time to first token")]


@pytest.mark.parametrize(("operation", "told"), [*NAMED, ("captured operator", "captured operator")])
def test_bars_compare_with_the_fastest_dense(operation, told):
    (ax,) = figures.bars(pd.DataFrame(beyond()), operation, "default").axes
    assert title(ax) == f"{told}: 3.0× over SDPA cuDNN at 4K tokens"
    assert [text.get_text() for text in ax.get_legend().get_texts()][-1] == "Stem, Triton"
    late = pd.DataFrame([*beyond(), dict(next(iter(beyond())), operation=operation, provider="fa3", latency_ms=10.0)])
    (ax,) = figures.bars(late, operation, "default").axes
    assert ax.get_legend().get_texts()[0].get_text() == "dense, FlashAttention-3"  # as in the tables
    with pytest.raises(ValueError, match="operation='decode'"):
        figures.bars(pd.DataFrame(beyond()), "decode", "default")


def test_crossover_names_the_shortest_length_that_wins():
    (ax,) = figures.crossover(made_up_rows()).axes
    assert title(ax) == "Stem beats cuDNN from 2K (released)"
    rows = made_up_rows()
    rows = pd.concat([rows, rows[rows.config == "released"].assign(config="paper")])
    (ax,) = figures.crossover(rows, ["paper"]).axes
    assert title(ax) == "Stem beats cuDNN from 2K (paper)"


def test_never_slower_names_the_slowest():
    ratios = pd.DataFrame(dict(paper=[0.99, 1.5], adaptive=[1.2, float("nan")]), index=pd.Index([1024, 2048]))
    (ax,) = figures.never_slower({"called": ratios}).axes
    assert title(ax) == "called: worst case 0.99×, paper at 1K tokens"
    assert [t.get_text() for t in ax.get_legend().get_texts()] == [
        "paper", "adaptive", "every block", "sinks and window", "at most 3% slower"
    ]  # fmt: skip
    marked = {line.get_label(): line.get_xydata().tolist() for line in ax.get_lines()}
    assert marked["every block"] == [[1024, 1.2]] and [1024, 0.99] in marked["sinks and window"]
    lines = {line.get_label(): line.get_color() for line in ax.get_lines()}
    assert (lines["paper"], lines["adaptive"]) == (COLOURS["paper"], COLOURS["adaptive"])
    assert ax.get_yscale() == "linear" and ax.get_ylim()[0] == 0
    two = figures.never_slower({"called": ratios, "graph": 2 * ratios}).axes
    assert [title(ax) for ax in two] == [
        "called: worst case 0.99×, paper at 1K tokens",
        "graph: worst case 1.98×, paper at 1K tokens",
    ]


def test_dense_is_grey_and_nothing_else_is():
    left, _ = figures.speed(made_up_rows()).axes
    for line in left.get_lines():
        red, green, blue = matplotlib.colors.to_rgb(line.get_color())
        assert (red == green == blue) == line.get_label().startswith("dense")


def test_breakdown_adds_up_and_names_the_overhead():
    (ax,) = figures.breakdown(made_up_rows()).axes
    assert title(ax) == "4K tokens: choosing the blocks is 20 % of the time"
    heights = np.array([[bar.get_height() for bar in bars] for bars in ax.containers])
    np.testing.assert_allclose(heights.sum(0), 100)


def test_memory_and_roofline_titles_hold_their_numbers():
    rows = made_up_rows()
    assert title(figures.memory(rows).axes[0]) == "4K tokens: Stem needs 0.1 GiB beyond its inputs"
    ax = figures.roofline(rows).axes[0]
    attention = rows[(rows.operation == "attention") & (rows.provider == "stem_triton")].iloc[-1]
    assert title(ax) == f"4K tokens: Stem's attention at {attention.tflops / 7:.0f} % of a matmul's rate"
    ceiling = ax.get_lines()[-1].get_ydata()
    assert ceiling.max() == 700.0 and ceiling.min() < 700.0


def test_rows_of_two_machines_or_without_times_are_refused():
    rows = made_up_rows()
    two = pd.concat([rows, rows.assign(machine="other")])
    with pytest.raises(ValueError, match="rows must be of one machine, got .*'other', 'toy'"):
        figures.speed(two)
    with pytest.raises(ValueError, match="config='paper', got .*'released'"):
        figures.speed(rows, "paper")

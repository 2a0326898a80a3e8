"""stem.experiments.speed.report: speed-ups, and the generated tables from made-up rows."""

import itertools

from stem.experiments import records
from stem.experiments.speed import bench, candidates, report


def speed_rows() -> list[dict]:
    shape = dict(batch=1, q_heads=32, kv_heads=8, head_dim=128, dtype="bfloat16")
    rows = [
        dict(
            shape, tokens=tokens, operation=operation, provider=provider, config=config, density=density, latency_ms=ms
        )
        for tokens, operation, provider, config, density, ms in [
            (1024, "attention", "sdpa_cudnn", "dense", 1.0, 1.0),
            (1024, "operator", "stem_triton", "default", 0.25, 2.0),
            (131072, "attention", "sdpa_cudnn", "dense", 1.0, 150.0),
            (131072, "attention", "sdpa_flash", "dense", 1.0, 240.0),
            (131072, "scores", "stem_triton", "default", 0.25, 1.0),
            (131072, "operator", "stem_triton", "default", 0.25, 30.0),
            (1048576, "operator", "stem_triton", "default", 0.25, 1900.0),
            (1048576, "attention", "sdpa_flash", "dense", 1.0, float("nan")),
        ]
    ]
    cases = [list(case) for _, case in itertools.groupby(rows, lambda row: row["tokens"])]
    return [row for case in cases for row in bench.with_speedups(case, 0)]


def test_speed(made_up_machine):
    records.write_rows("speed", speed_rows(), profile="full")
    text = report.speed()
    assert "**Made-up GPU**, 32 query and 8 key-value heads of 128, bfloat16" in text
    assert "At 128K tokens and density 25.0% the whole operator is 5 times as fast as cuDNN and 8 times as fast" in text
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert rows[0].split(" | ")[0] == "| 1K" and "0.5×" in rows[0]
    assert rows[1].endswith("| 150 | 240 | 30 | 5× = 4.00 × 1.25 (cuDNN) | 5× | 8× |")
    assert rows[2].startswith("| 1M") and rows[2].endswith("| – | – | 1900 | – | – | – |")


def test_every_preset_over_the_fastest_dense(made_up_machine):
    times = dict(paper=0.8, released=1.0, hpc_ops=0.5, adaptive=1.02)
    like = dict(speed_rows()[1], provider="stem")
    presets = [dict(like, config=name, latency_ms=ms) for name, ms in times.items()]
    records.write_rows("speed", speed_rows() + presets, profile="full")
    text = report.speed()
    slower = [dict(like, config="adaptive", latency_ms=1.04)]
    records.write_rows("speed", speed_rows() + presets[:2] + slower, profile="full")
    assert "worst case" not in report.speed()  # a preset was not measured anywhere
    records.write_rows("speed", speed_rows() + presets[:3] + slower, profile="full")
    assert "; worst case: paper 1.25×, angelslim 1×, hpc_ops 2×, adaptive 0.962×:" in report.speed()
    assert text.endswith(
        "| tokens | fastest dense | paper | angelslim | hpc_ops | adaptive |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: |\n"
        "| 1K | cuDNN | 1.25× | 1× | 2× | 0.98× |"
    )
    assert "both called from Python; worst case: paper 1.25×, angelslim 1×, hpc_ops 2×, adaptive 0.98×:" in text
    assert "hpc_ops" not in text.split("Speed-up of the operator with each preset")[0]
    in_graphs = [dict(row, operation="graph operator", latency_ms=2.0) for row in presets]
    in_graphs.append(dict(speed_rows()[0], operation="graph attention", latency_ms=1.0, tokens=like["tokens"]))
    records.write_rows("speed", speed_rows() + presets + in_graphs, profile="full")
    before, after = report.speed().rsplit("Speed-up of the operator with each preset", 1)
    assert (
        before.strip() == text.strip()
        and "both replayed from CUDA graphs" in after
        and after.endswith("| 1K | cuDNN | 0.5× | 0.5× | 0.5× | 0.5× |")
    )


def test_over_dense_divides_by_the_fastest_baseline():
    times = [("attention", "sdpa_cudnn", "dense", 2.0), ("attention", "sdpa_flash", "dense", 4.0)]
    times += [("operator", "stem", "paper", 1.0), ("operator", "stem_triton", "paper", 8.0)]
    rows = [dict(operation=o, provider=p, config=c, latency_ms=ms, tokens=1024) for o, p, c, ms in times]
    assert report.over_dense(rows).to_dict() == {"paper": {1024: 2.0}}


def test_graphs_are_compared_with_graphs():
    times = [("attention", "sdpa_cudnn", "dense", 2.0), ("graph attention", "sdpa_cudnn", "dense", 1.0)]
    times += [("operator", "stem", "paper", 4.0), ("graph operator", "stem", "paper", 0.5)]
    rows = [dict(operation=o, provider=p, config=c, latency_ms=ms, tokens=1024) for o, p, c, ms in times]
    assert report.over_dense(rows).to_dict() == {"paper": {1024: 0.5}}
    assert report.over_dense(rows, graph=True).to_dict() == {"paper": {1024: 2.0}}
    speedups = [row["speedup_vs_sdpa_cudnn"] for row in bench.with_speedups(rows, 0)]
    assert speedups == [1.0, 1.0, 0.5, 2.0]


def test_wins_from_needs_every_longer_length_and_every_baseline():
    rows = []
    for tokens, cudnn, flash in [(1, 1.2, 2.0), (2, 0.9, 1.5), (4, 1.1, 1.8), (8, 1.5, 3), (16, None, None)]:
        times = [("attention", "sdpa_cudnn", "dense", cudnn), ("attention", "sdpa_flash", "dense", flash)]
        times += [("operator", "stem_triton", "small", 1.0), ("operator", "stem_torch", "small", 7.0)]
        rows += [dict(operation=o, provider=p, config=c, latency_ms=ms, tokens=tokens) for o, p, c, ms in times]
    speedups = report.over_dense(rows, ["small"], fastest=True)["small"]
    assert report.wins_from(speedups) == 4
    assert report.wins_from(speedups / 1.2) == 8
    assert report.wins_from(speedups / 2) is None


def test_the_break_even_is_the_length_from_which_on_adaptive_is_faster(made_up_machine):
    def row(tokens, ratio, graph="", **more):
        common = dict(operation=f"{graph}captured tiny operator", provider="stem", config=candidates.NEVER_DENSE)
        return common | dict(tokens=tokens, density=0.5, latency_ms=2.0, speedup_vs_fa3=ratio) | more

    rows = [row(4096, 1.1), row(5500, 0.9), row(8192, 1.25, speedup_vs_sdpa_cudnn=1.2)]
    rows += [row(tokens, ratio, candidates.GRAPH) for tokens, ratio in ((4096, 1.05), (5500, 1.3), (8192, 1.5))]
    records.write_rows("speed", rows, "full")
    told, _, _, _, *lines = report.break_even().splitlines()
    assert "beats dense attention from 8K tokens on (called from Python, tiny), and from 4K tokens on (from" in told
    called, replayed = "2.4 (cuDNN) | 2 | 1.2× = 2.00 × 0.60", "3 (FlashAttention-3) | 2 | 1.5× = 2.00 × 0.75"
    assert lines[-1] == f"| tiny | 8K | 50.0% | {called} | {replayed} |"
    records.write_rows("speed", [row(4096, 0.9)], "full")
    assert "dense attention nowhere (called" in report.break_even()


def test_the_factors_of_a_speed_up_multiply_to_it():
    operator = report.factors_told(100.0, dict(latency_ms=20.0, density=0.25))
    assert operator == "4.00 × 1.25"  # 5 times as fast
    model = report.factors_told(100.0, dict(latency_ms=60.0, density=0.25, outside_ms=50.0, operation="ttft"))
    assert model == "50%, 4.00 × 1.25"  # attention 50 -> 10 ms
    for row in (dict(outside_ms=70.0), dict(outside_ms=101.0), dict(outside_ms=None), {}):
        unknown = dict(latency_ms=60.0, density=0.25, operation="prefill 8B")
        assert report.factors_told(100.0, unknown | row) == report.MISSING

"""The table of serving: speed-ups over vLLM's own attention, line by line."""

import pandas as pd

from stem.experiments.serving import report


def rows(*measured):
    columns = ["attention", "density", "chunk", "tokens", "requests", "first_token_ms", "token_ms"]
    return pd.DataFrame(measured, columns=columns).assign(device="NVIDIA H200", lists="head")


def test_the_table_has_a_line_for_each_prompt(monkeypatch):
    measured = rows(
        ("vLLM", 1.0, 0, 32768, 1, 300.0, None),
        ("vLLM", 1.0, 0, 32768, 1, 301.0, 4.0),
        ("Stem", 0.25, 0, 32768, 1, 200.0, None),
        ("Stem", 0.25, 0, 32768, 1, 202.0, 4.0),
        ("Stem", 0.1, 0, 32768, 1, 150.0, None),
        ("vLLM", 1.0, 8192, 32768, 8, 2000.0, None),
        ("Stem", 0.1, 8192, 32768, 8, 1250.0, None),
    )
    monkeypatch.setattr(report, "full_rows", lambda name: measured if name == "serving" else rows())
    lines = report.serving().splitlines()
    assert lines[0] == "**NVIDIA H200**" and lines[2] == "| prompt | vLLM | Stem, density 0.25 | Stem, density 0.1 |"
    assert lines[4] == "| 32K | 300 ms | 200 ms (1.50x) | 150 ms (2.00x) |"
    assert lines[5] == "| 8 of 32K at once, chunks of 8K | 2000 ms | – | 1250 ms (1.60x) |"
    assert lines[6] == "| each further token after 32K | 4 ms | 4 ms (1.00x) | – |"


def test_lists_of_groups_have_columns_of_their_own(monkeypatch):
    measured = rows(
        ("vLLM", 1.0, 0, 32768, 1, 300.0, None),
        ("Stem", 0.1, 0, 32768, 1, 150.0, None),
        ("Stem", 0.1, 0, 32768, 1, 100.0, None),
        ("Stem", 0.25, 0, 32768, 1, 200.0, None),
        ("vLLM", 1.0, 8192, 32768, 1, 300.0, None),
        ("Stem", 0.1, 8192, 32768, 1, 150.0, None),
    )
    measured.loc[2, "lists"] = "group"
    monkeypatch.setattr(report, "full_rows", lambda name: measured if name == "serving" else rows())
    lines = report.serving().splitlines()
    assert lines[2].endswith("| Stem, density 0.25 | Stem, density 0.1 | Stem, density 0.1, lists of groups |")
    assert lines[4] == "| 32K | 300 ms | 200 ms (1.50x) | 150 ms (2.00x) | 100 ms (3.00x) |"
    assert lines[5] == "| 32K, chunks of 8K | 300 ms | – | 150 ms (2.00x) | – |"


def test_fp8_has_columns_of_its_own(monkeypatch):
    measured = rows(*(("Stem", 0.25, 0, 32768, 1, ms, None) for ms in (150.0, 100.0, 120.0)))
    measured = pd.concat([rows(("vLLM", 1.0, 0, 32768, 1, 300.0, None)), measured], ignore_index=True)
    measured = measured.assign(compute=["input", None, "fp8", "input"], lists=["head"] * 3 + ["group"])
    columns = ["attention", "density", "compute", "chunk", "loss", "difference", "largest_difference", "from_dense"]
    answers = [
        ("vLLM", 1.0, "input", 0, 0.5, 0.0, 0.0, 0.0),
        ("vLLM", 1.0, "input", 4096, 0.5, 0.0, 0.0, 0.0),
        ("Stem", 0.25, "input", 0, 0.51, 0.0, 0.0, 0.03),
        ("Stem", 0.25, "input", 4096, 0.511, 0.002, 0.5, 0.03),
        ("Stem", 0.25, "fp8", 0, 0.515, 0.01234, 1.34, 0.04),
        ("Stem", 0.25, "fp8", 4096, 0.6, 0.9, 9.0, 0.9),
    ]
    tables = {
        "serving": measured,
        "speed/variants": pd.DataFrame(
            dict(
                what=["random normal", "random normal", "random normal", "layer"],
                tokens=[131072, 131072, 8192, 131072],
                variant=["released", "released, FP8", "released, FP8", "released, FP8"],
                error=[0.0022, 0.0514, 0.9, 0.9],
            )
        ),
        "serving/accuracy": pd.DataFrame(answers, columns=columns).assign(tokens=16384, model="tiny"),
    }
    monkeypatch.setattr(report, "full_rows", tables.get)
    lines = report.serving().splitlines()
    assert lines[2].endswith("| Stem, density 0.25 | Stem, density 0.25, lists of groups | Stem, density 0.25, FP8 |")
    assert lines[4] == "| 32K | 300 ms | 150 ms (2.00x) | 120 ms (2.50x) | 100 ms (3.00x) |"
    error = "Attention in FP8 is 5.14% from exact attention to the same blocks (random normal), bf16 0.22%."
    assert lines[6] == error
    assert lines[8].startswith("| loss of 16K tokens of a text (tiny) [nats] | whole | chunks of 4K |")
    assert lines[10:14] == [
        "| vLLM | 0.5000 | 0.5000 | 0.0000, 0 | 0.0000, 0 |",
        "| Stem, density 0.25 | 0.5100 | 0.5110 | 0.0000, 0 | 0.0020, 0.5 |",
        "| Stem, density 0.25, FP8 | 0.5150 | 0.6000 | 0.0123, 1.3 | 0.9000, 9 |",
        "",
    ]
    changed = "at density 0.25 the loss by +0.0050 (+0.0890 in chunks) and a single log-probability by up to 9 nats."
    assert lines[14].endswith(f"at the same density. FP8 changes {changed}") and len(lines) == 15
    tables["serving/accuracy"].loc[3, "difference"] = 0.0  # of bf16 in chunks
    assert "chunks change no log-probability by a single bit. FP8" in report.serving()
    tables["serving/accuracy"] = tables["serving/accuracy"][:0]
    assert report.serving().endswith(error)
    tables["speed/variants"] = rows()
    assert "FP8 is" not in report.serving()


def test_chunks_are_compared_with_the_whole_prompt_of_one_run(monkeypatch):
    ways = (("vLLM", 1.0, 20.0), ("Stem", 0.25, 10.0), ("Stem", 0.1, 8.0))
    cases = [(*way, chunk, tokens) for tokens in (8192, 131072) for chunk in (0, 4096) for way in ways]
    measured = rows(*((name, x, cut, n, 1, ms + (cut > 0) / 4, None) for name, x, ms, cut, n in cases))
    measured = measured.assign(speedup=1.0, speedup_low=1.0, speedup_high=1.0, git_commit="a")
    measured.loc[measured.index[-1], "git_commit"] = "b"
    monkeypatch.setattr(report, "full_rows", lambda name: measured if name == "serving" else rows())
    told = "Chunks of 4K change the time to the first token of 128K: vLLM +1.2%; density 0.25 +2.5%."
    assert report.serving().splitlines()[-1] == told
    measured = measured.assign(speedup=None)  # engines that did not take turns
    assert "Chunks of 4K change" not in report.serving()


def test_the_longest_prompt_has_a_bound(monkeypatch):
    ways = (("vLLM", 1.0, 14.0), ("Stem", 0.25, 6.0), ("Stem", 0.1, 4.5))
    measured = rows(*((*way, 0, n, 1, ms, None) for n in (8192, 131072) for *way, ms in ways))
    measured = measured.assign(clock_mhz=1500.0)
    monkeypatch.setattr(report, "full_rows", lambda name: measured if name == "serving" else rows())
    given = []
    monkeypatch.setattr(report.bounds, "perfect_speedups", lambda x: given.append(x) or {0.25: 2.14949, 0.1: 2.6})
    *_, factors, _, told = report.serving().splitlines()
    assert "attention takes 75% of vLLM's time" in factors  # 3.5 ms are outside
    assert factors.endswith("are 4.0 × 1.05 at density 0.25 and 10.0 × 1.05 at density 0.1.")
    assert "at 128K and Stem's clock" in told
    assert told.endswith("would give 2.149x at density 0.25 and 2.600x at density 0.1.")
    assert given[0].index.tolist() == [1.0, 0.25, 0.1] and set(given[0].tokens) == {131072}
    measured = measured.assign(power_w=[1.0] * 3 + [699.6, 690, 701], capped=[0.0] * 3 + [0.975, 0.99, 1.0])
    told = report.serving().splitlines()[-1]
    assert "drew 690 to 701 W" in told and told.endswith("in at least 98% of the samples.")
    measured = measured.assign(capped=1.0)
    assert report.serving().endswith("held the clock down in all samples.")


def test_the_clock_is_told_where_it_is_known(monkeypatch):
    measured = rows(*(("vLLM", 1.0, chunk, tokens, 1, 16.0, None) for chunk in (0, 1) for tokens in (1024, 8192)))
    monkeypatch.setattr(report, "full_rows", lambda name: measured if name == "serving" else rows())
    assert "clock" not in report.serving()
    measured = measured.assign(clock_mhz=[1980.0, 1500.0, 1.0, 2.0])
    assert report.serving().endswith("multiprocessors in these rounds: 1980 MHz at 1K and 1500 MHz at 8K.")


def test_a_speedup_of_rounds_comes_with_its_interval(monkeypatch):
    measured = rows(("vLLM", 1.0, 0, 2048, 1, 16.0, 4.0), ("Stem", 0.25, 0, 2048, 1, 20.0, 2.0))
    measured = measured.assign(speedup=[1.0, 0.9], speedup_low=[1.0, 0.85], speedup_high=[1.0, 0.96])
    monkeypatch.setattr(report, "full_rows", lambda name: measured if name == "serving" else rows())
    lines = report.serving().splitlines()
    assert lines[4] == "| 2K | 16 ms | 20 ms (0.90x, 0.85 to 0.96) |"
    assert lines[5] == "| each further token after 2K | 4 ms | 2 ms (2.00x) |"


def test_without_rows_the_command_is_named(monkeypatch):
    monkeypatch.setattr(report, "full_rows", lambda name: rows())
    assert "make serving PROFILE=full" in report.serving()


def test_without_vllm_the_rows_of_a_cpu_are_stored_ones(monkeypatch):
    measured = pd.concat([rows(("Stem", 0.25, 0, 3000, 1, 9.0, None)), rows(("Stem", 0.25, 0, 3000, 1, 7.0, None))])
    measured["device"] = ["NVIDIA H200", "AMD EPYC (2 cores)"]
    monkeypatch.setattr(report, "full_rows", lambda name: measured if name == "serving" else rows())
    monkeypatch.setattr(report.engines, "is_installed", lambda: False)
    source, found = report.rows_of_a_cpu()
    assert source.endswith("not installed here: rows stored by AMD EPYC (2 cores)")
    assert found.first_token_ms.tolist() == [7.0]

"""stem.experiments.speed.fresh: what a process times and counts, its two processes, and the table."""

import json
from types import SimpleNamespace

import pandas as pd
import pytest
from triton import knobs
from triton.knobs import CompileTimes

from stem.experiments.speed import first_token, fresh


def row(prefill, tokens, ms, compiled, loaded):
    return dict(tokens=tokens, prefill=prefill, latency_ms=ms, compiled=compiled, loaded=loaded)


def test_a_process_counts_the_kernels_of_each_prefill(monkeypatch, capsys):
    monkeypatch.setattr(fresh, "SHAPE", {"cpu": first_token.TINY | dict(num_hidden_layers=1)})
    seen, original = [], first_token.first_token

    def prefill(model, ids):
        seen.append((model.config._attn_implementation, ids.shape[1]))
        if len(seen) == 3:  # the first one through stem.hf
            src, times = SimpleNamespace(name="kernel"), CompileTimes(0, [("ttir", 200_000), ("cubin", 1_100_000)], 0)
            for hit in (False, True, False):
                knobs.compilation.listener(src=src, metadata={}, metadata_group={}, times=times, cache_hit=hit)
        return original(model, ids)

    monkeypatch.setattr(first_token, "first_token", prefill)
    found = fresh.process("paper", (150, 40), "cpu")
    assert seen == [("sdpa", 150), ("sdpa", 40), ("stem", 150), ("stem", 150), ("stem", 40)]
    assert [(row["prefill"], row["tokens"], row["compiled"], row["loaded"]) for row in found] == [
        ("first", 150, 2, 1), ("second", 150, 0, 0), ("another length", 40, 0, 0),
    ]  # fmt: skip
    assert all(row["latency_ms"] > 0 for row in found) and knobs.compilation.listener is None
    assert capsys.readouterr().err.count("compiled kernel in 1.3 s: ttir 0.2, cubin 1.1\n") == 2


def test_the_second_process_finds_the_disk_cache_of_the_first(monkeypatch, tmp_path, capsys):
    caches = []

    def run(command, env, **options):
        caches.append(env["TRITON_CACHE_DIR"])
        return SimpleNamespace(stdout="a warning\n" + json.dumps([row("first", 300, len(caches), 2, 1)]) + "\n")

    monkeypatch.setattr(fresh, "subprocess", SimpleNamespace(run=run, PIPE=-1))
    monkeypatch.setenv("STEM_RESULTS", str(tmp_path))
    fresh.main(["--device", "cpu"])
    assert len(caches) == 2 and caches[0] == caches[1]
    assert "paper  empty  300  first  1  2  1" in capsys.readouterr().out
    fresh.main(["--device", "cpu", "--configs", "adaptive"])
    (written,) = tmp_path.glob("speed/fresh/*-smoke.csv")  # results/ may hold smoke rows of other machines
    assert list(pd.read_csv(written).config) == ["paper"] * 2 + ["adaptive"] * 2  # other rows stay
    monkeypatch.setattr(fresh, "process", lambda *args: list(args))
    fresh.main(["--device", "cpu", "--process", "paper"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == ["paper", list(fresh.LENGTHS["cpu"]), "cpu"]


@pytest.mark.parametrize("profile", ["full", "smoke"])
def test_the_table(made_up_machine, profile):
    rows = [row("first", 12007, 7400, 8, 0), row("second", 12007, 2.9, 0, 0)]
    rows += [row("another length", 2048, 5, 1, 0), row("another length", 700, 4, 0, 2)]
    fresh.records.write_rows("speed/fresh", [dict(config="paper", disk_cache="empty") | each for each in rows], profile)
    if profile == "smoke":
        assert fresh.table().startswith("No full run")
        return
    assert fresh.table().splitlines()[-1] == "| paper | empty | 12007 | 7.4 | 0.0029 | 8 and 0 | 1 and 2 | 2K, 700 |"

"""stem.experiments.speed.variants: thresholds for a density, rows, and the command line."""

import pandas as pd
import pytest
import torch

import stem
from stem.experiments.hopper import report as hopper_report
from stem.experiments.speed import report, variants


@pytest.mark.parametrize("density", [0.3, 0.6])
def test_threshold_gives_the_density(density):
    q, k, v = (torch.randn(1, heads, 1024, 16) for heads in (4, 2, 2))
    config = variants.threshold_for(density, q, k, v, variants.ADAPTIVE.replace(block_size=32, score_cells=2))
    assert stem.stem_attention(q, k, v, config, return_selection=True)[1].density() == pytest.approx(density, rel=0.02)


def test_rows(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("STEM_RESULTS", str(tmp_path))
    small = stem.StemConfig(density=0.3, block_size=32, sink_blocks=1, local_blocks=1)
    kinds = {"kept": small, "means": small.replace(dropped="mean"), "fails": small.replace(compute="fp8")}
    monkeypatch.setattr(variants, "VARIANTS", kinds)
    monkeypatch.setattr(variants, "ON_CPU", tuple(kinds))
    monkeypatch.setitem(variants.TOKENS, ("cpu", "smoke"), 512)
    variants.main(["--device", "cpu"])
    (file,) = (tmp_path / "speed" / "variants").iterdir()
    rows = pd.read_csv(file).set_index("variant")
    assert list(rows.index) == ["dense", *kinds] and set(rows.provider) == {"sdpa_cpu", "stem"}
    assert rows.error[:3].max() < 1e-5 and (rows.latency_ms[:3] > 0).all()
    assert rows.density["kept"] == rows.density["means"] == pytest.approx(0.3, abs=0.05)
    assert "hopper_fp8" in rows.message["fails"] and rows.message[:3].isna().all()
    assert "wrote" in capsys.readouterr().out


def test_an_error_counts_late_rows_like_early_ones():
    q, k, v = torch.randn(3, 1, 2, 512, 16)
    out = stem.stem_attention(q, k, v, stem.StemConfig(density=1.0, block_size=32))
    right, wrong = out.clone(), out.clone()
    wrong[:, :, -1] *= 2
    errors = [variants.row_of(lambda found=found: found, (q, k, v), None, 0)["error"] for found in (right, wrong)]
    rows = len(variants.gate.sampled_rows(512, variants.candidates.CONFIGS["released"].block_size, 0))
    assert errors[0] < 1e-5 and errors[1] == pytest.approx(1 / rows, rel=1e-3)


def test_table(monkeypatch):
    common = dict(what="random normal", tokens=2048, device="a GPU", profile="full", error=0.002, tflops=500.0)
    rows = [
        dict(variant="dense", provider="fa3", density=1.0, latency_ms=8.0),
        dict(variant="dense", provider="fa3_fp8", density=1.0, latency_ms=4.0),
        dict(variant="released, FP8", provider="stem", density=0.2, latency_ms=2.0, choosing_ms=0.5),
    ]
    rates = {"shipped": 900.0, "without row maxima": 1000.0, "without exponentials": 1100.0}
    bounds = [dict(stage=stage, device="a GPU", tokens=2048, density=0.2, tflops=rate) for stage, rate in rates.items()]
    tables = {"speed/variants": pd.DataFrame([common | row for row in rows]), "hopper/bounds": pd.DataFrame(bounds)}
    for module in (report, hopper_report):
        monkeypatch.setattr(module, "full_rows", tables.get)
    *_, fa3, fp8, stem_row, _, told = report.variants().splitlines()[2:]
    assert "dense, FlashAttention-3 | 100.0% | 8 | – | 500 | 1× | 0.2%" in fa3 + fp8
    assert stem_row == "| random normal | 2K | released, FP8 | 20.0% | 2 | 0.5 | 500 | 4× = 5.00 × 0.80 | 0.2% |"
    found = [told.index(f"{rate:.0f} TFLOP/s") for rate in rates.values()]
    assert found == sorted(found) and "At 2K tokens and density 20.0% the FP8 kernel alone" in told
    bounds[0]["device"] = bounds[1]["device"] = bounds[2]["device"] = "another GPU"
    tables["hopper/bounds"] = pd.DataFrame(bounds)
    assert report.variants().splitlines()[-1] == stem_row

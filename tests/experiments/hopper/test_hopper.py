"""Variants of the kernels: their sources, their results where a CPU can run them, and the rows of their stamps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import stem
from stem.cells import kernel_cells
from stem.experiments.hopper import measure, variants
from stem.experiments.speed.gate import WrongResult

IN_HOPPER = variants.HOPPER | variants.DIARY
STAGES = [("hopper_forward", stage) for stage in IN_HOPPER] + [("cell_pairs", stage) for stage in variants.CELLS]
STAGES += [("fp8_forward", stage) for stage in variants.BOUNDS]
SHIPPED = [("hopper_forward", "first maximum"), ("fp8_forward", "fp8"), ("cell_pairs", "block sums by a product")]
EDITS = IN_HOPPER | variants.CELLS | variants.BOUNDS | {"fp8": variants.FP8}


@pytest.mark.parametrize(("kernel", "stage"), SHIPPED)
def test_the_last_stage_without_stamps_is_the_shipped_source(kernel, stage):
    source = variants.source_of(kernel)
    assert variants.edited(source, EDITS[stage], stamped=False) == source
    assert variants.edited(source, EDITS[stage], stamped=True).count("    stamp(") >= 4


@pytest.mark.parametrize(("kernel", "stage"), STAGES)
def test_stages_differ_and_keep_no_stamp_unless_asked(kernel, stage):
    source = variants.source_of(kernel)
    plain = variants.edited(source, EDITS[stage], stamped=False)
    assert "stamp(" not in plain
    others = [other for name, other in STAGES if name == kernel and other != stage]
    assert plain not in [variants.edited(source, EDITS[other], stamped=False) for other in others]


def test_lines_that_are_not_there_once_are_refused():
    with pytest.raises(ValueError, match="0 lines begin with 'nowhere'"):
        variants.edited("somewhere\n", {"nowhere": []}, stamped=False)
    with pytest.raises(ValueError, match="2 lines begin with 'a = '"):
        variants.edited("a = 1\n    a = 2\n", {"a = ": []}, stamped=False)


def test_replacements_keep_the_indentation():
    edits = {"b": ["stamp(1)", "$", "c"], "a": []}
    assert variants.edited("a\n    b", edits, stamped=True) == "    stamp(1)\n    b\n    c"
    assert variants.edited("a\n    b", edits, stamped=False) == "    b\n    c"


@pytest.fixture(scope="module")
def features():
    from stem.kernels.cell_features import cell_features

    generator = torch.Generator().manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k = (3 * torch.randn(1, heads, 1024, 32, generator=generator).to(device) for heads in (2, 1))
    cells = kernel_cells(1024, 1024, stem.StemConfig.preset("adaptive"))
    return cell_features(q, k, cells, 32**-0.5), cells


@pytest.mark.parametrize("stage", variants.CELLS)
def test_every_stage_of_the_cells_is_right(stage, features):
    sums = measure.pairing(variants.load("cell_pairs", variants.CELLS[stage]), *features)()
    assert measure.sums_error(sums, *features[0], features[1]) < 1e-5
    with pytest.raises(WrongResult, match="shares of cells differ"):
        measure.sums_error(sums.roll(1, 2), *features[0], features[1])


def test_timeline_rows_count_from_the_first_stamp_of_each_multiprocessor(monkeypatch):
    found = torch.zeros(3, 3, 64, 16, dtype=torch.int64)
    place = {mark: i for i, mark in enumerate(variants.MARKS)}
    for program, sm, start in ((0, 7, 1000), (1, 9, 50), (2, 7, 5000)):
        found[program, 0, 0, [place[mark] for mark in ("task", "stored", "sm", "ns")]] = torch.tensor(
            [start, start + 900, sm, 10**12 + start]
        )
    found[0, 2, 30, place["tile"]] = 1250
    found[0, 2, 5, place["tile"]] = 1100  # outside the window
    found[1, 1, 30, place["tile"]] = 70  # of another program
    monkeypatch.setattr(measure, "stamps", lambda seed: iter([("attention", "overlap", found)]))
    rows = list(measure.timeline_rows())
    places = [(row["program"], row["group"], row["step"]) for row in rows]
    assert places == [(0, 0, 0), (0, 2, 30), (1, 0, 0), (2, 0, 0)]
    assert [row.get("task") for row in rows] == [0, None, 0, 4000] and rows[1]["tile"] == 250
    assert [row["ns"] for row in rows] == [950, None, 0, 4950] and rows[3]["stored"] == 4900


def compile_for_sm90(stage):
    """Compile a stamped stage as a launch would; bytes of shared memory, and how many places read the clock."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    module = variants.load("hopper_forward", variants.HOPPER[stage], address=2**40)

    def tile(rows):
        return f"tensordesc<bf16[1, 1, {rows}, 128],{module.TMA_LAYOUT!r}>"

    kernel = module.hopper_forward_kernel
    types = dict(
        q_desc=tile(128 // module.NUM_CONSUMERS.value), k_desc=tile(128), v_desc=tile(128), out_ptr="*bf16",
        lse_ptr="*fp32", kv_indices_ptr="*i32", kv_num_blocks_ptr="*i32", scratch_ptr="*i32", scale="fp32",
    )  # fmt: skip
    constants = dict(k_means_desc=None, v_means_desc=None, masks_desc=None, pages_ptr=None, PER_BLOCK=0)
    names, types = kernel.arg_names, types | dict.fromkeys(constants, "constexpr")
    constants = {(names.index(name),): value for name, value in constants.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types.get(name, "").startswith("*")}
    source = GluonASTSource(kernel, {name: types.get(name, "i32") for name in names}, constants, aligned)
    options = {"num_warps": module.CONSUMER_WARPS.value, "maxnreg": module.LAUNCH_REGISTERS}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return compiled.metadata.shared, compiled.asm["ptx"].count("%clock64")


@pytest.mark.slow
def test_a_stamped_stage_compiles_for_sm90(tmp_path):
    pytest.importorskip("triton.backends.nvidia")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    root = str(Path(__file__).resolve().parents[3])
    environment["PYTHONPATH"] = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    process = subprocess.run([sys.executable, __file__, "one slot"], capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr[-3000:]
    shared, clocks = json.loads(process.stdout)
    assert shared <= 227 * 1024 and clocks >= 10


if __name__ == "__main__":
    print(json.dumps(compile_for_sm90(sys.argv[1])))

"""Every kernel compiles for an H100 and fits into its shared memory; ahead of time, so no GPU is needed.

The compiler needs a process of its own, because Triton interprets or compiles, and decides when it is imported:
this file is both the test and that process.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

SHARED_MEMORY_BYTES = 227 * 1024  # what one program may use on sm_90
POINTERS = {
    "q_ptr": "x", "k_ptr": "x", "v_ptr": "x", "x_ptr": "x", "out_ptr": "x", "budget_ptr": "i32", "flags_ptr": "i32",
    "kv_indices_ptr": "i32", "kv_num_blocks_ptr": "i32", "pages_ptr": "i32", "q_blocks_ptr": "i32", "slots_ptr": "i64",
    "k_means_ptr": "x", "v_means_ptr": "x", "masks_ptr": "x",
    "features_ptr": "x", "q_features_ptr": "x", "k_features_ptr": "x",
}  # fmt: skip  # "x" is the type of the inputs; all other pointers are fp32


ALIGNED = ("_ptr", "b", "h", "n")


def compile_for_sm90(kernel, input_type, constants, num_warps=4, num_stages=3, sums_type="fp32"):
    """Compile one specialisation, as a launch with aligned pointers and strides would; bytes of shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def type_of(name):
        if name in constants:
            return "constexpr"
        if name.endswith("_ptr"):
            pointed = sums_type if name.endswith("sums_ptr") else POINTERS.get(name, "fp32")
            return "*" + (input_type if pointed == "x" else pointed)
        if name.endswith("_source"):
            names_of_tiles = ("BLOCK_N", "HEAD_DIM"), ("KEYS", "BLOCK_D"), ("COLUMNS", "DEPTH_TILE")
            rows, columns = next(names for names in names_of_tiles if names[0] in constants)
            tile = f"{constants[rows]}, {constants[columns]}"
            return f"tensordesc<{input_type}[1, 1, {tile}]>" if constants["TMA"] else "*" + input_type
        return "fp32" if name in ("scale", "value_weight", "peak", "threshold") else "i32"

    names = kernel.arg_names
    aligned = [name for name in names if name not in constants and name.endswith(ALIGNED)]
    source = ASTSource(
        kernel,
        {name: type_of(name) for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).metadata.shared


def sparse_forward_cases(head_dim, block_size, dtype):
    """Arguments of compile_for_sm90 for the forward kernel, with the tiles that the library chooses from."""
    from stem.kernels import common, sparse_forward

    operands = common.operand_dtype(dtype)
    block_d = common.padded_dim(head_dim)
    constants = dict(HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_SIZE=block_size, DTYPE=operands)
    choices = sparse_forward.tile_choices(head_dim, block_size, dtype)
    for tiles in choices if head_dim == block_size == 128 and dtype == torch.bfloat16 else choices[:1]:
        sizes = {name: x for name, x in tiles.items() if name not in ("num_warps", "num_stages")}
        options = tiles["num_warps"], tiles["num_stages"]
        for tma in (False, True) if dtype == torch.bfloat16 and head_dim == 128 else (False,):
            arguments = operands.name, constants | sizes | dict(TMA=tma), *options
            yield f"{tiles} {options} {tma}", (sparse_forward.sparse_forward_kernel, *arguments)


def cases():
    """(name, arguments of compile_for_sm90) over kernels and the extremes of their shapes."""
    import triton.language as tl
    from stem.kernels import block_scores, block_select, gathered, score_inputs, score_select, value_norms

    shapes = {
        torch.bfloat16: [(8, 16), (16, 16), (40, 32), (64, 128), (128, 64), (128, 128), (256, 128)],
        torch.float16: [(128, 128)],
        torch.float32: [(64, 128), (128, 128), (256, 128)],
    }
    for dtype in shapes:
        for head_dim, block_size in shapes[dtype]:
            for name, arguments in sparse_forward_cases(head_dim, block_size, dtype):
                yield f"sparse_forward {dtype} {head_dim} {block_size} {name}", arguments
    depth = dict(HEAD_DIM=128, BLOCK_SIZE=128, STRIDE=16)
    for dtype, input_type, sums_type in ((torch.bfloat16, "bf16", "bf16"), (torch.float32, "fp32", "fp32")):
        parts = score_inputs.num_parts(dtype)
        sums = depth | dict(BLOCK_D=128, GROUPS=16, PARTS=parts)
        one = dict(stride_xd=1, REVERSE=True, HEADS=4)
        yield f"block_sums {dtype}", (score_inputs.block_sums_kernel, input_type, sums | one, 4, 3, sums_type)
        norms = dict(HEAD_DIM=128, DIM_TILE=64, BLOCK_SIZE=128)
        one = dict(stride_vd=1, GROUP_SIZE=16)
        yield f"value_norms {dtype}", (value_norms.value_norms_kernel, input_type, norms | one)
        for log_term in (False, True) if parts == 2 else (False,):
            all_three = sums | norms | dict(stride_qd=1, stride_kd=1, stride_vd=1, LOG_TERM=log_term, CAN_OVERLAP=True)
            kernel = score_inputs.score_inputs_kernel
            for pages in (dict(pages_ptr=None, HEADS=4), dict(HEADS=1)):
                name = f"score_inputs {dtype} {log_term} {pages}"
                yield name, (kernel, input_type, all_three | pages, 4, 3, sums_type)
        for num_rows, is_small in ((32, True), (4096, True), (4096, False)) if parts == 2 else ((4096, False),):
            tiles = block_scores.score_tiles(parts, num_rows, is_small)
            options = [tiles.pop(name) for name in ("num_warps", "num_stages")]
            operands = tl.float32 if parts == 1 else tl.bfloat16
            product = tiles | dict(DEPTH=2048, PARTS=parts, DTYPE=operands, PRECISION="tf32x3", CAN_OVERLAP=True)
            for positions in (dict(q_blocks_ptr=None), {}) if num_rows > 32 else ({},):
                name = f"score_blocks {dtype} {num_rows} {is_small} {positions}"
                kernel = block_scores.score_blocks_kernel
                yield name, (kernel, input_type, product | positions, *options, sums_type)
        short = dict(ON_TOP=True, DEPTH=2048, PARTS=parts, ROWS=score_select.ROWS, ROW_SIZE=32, PRECISION="tf32x3")
        short |= dict(WARPS=score_select.WARPS, DEPTH_TILE=score_select.DEPTH_TILE // (2 // parts), DTYPE=operands)
        short |= dict(CAN_OVERLAP=True)
        warps, stages = score_select.WARPS, score_select.STAGES
        yield f"score_select {dtype}", (score_select.score_select_kernel, input_type, short, warps, stages, sums_type)
    standard = dict(GROUPS_PER_BLOCK=16, BLOCKS_PER_TILE=value_norms.NORM_TILE // 16)
    yield "standardize", (value_norms.standardize_kernel, "fp32", standard)
    yield "rows_in_order", (gathered.rows_in_order_kernel, "bf16", dict(TILE=gathered.TILE))
    for on_top in (False, True):
        row = dict(ON_TOP=on_top, ROW_SIZE=8192, CAN_OVERLAP=True) | ({} if on_top else dict(q_blocks_ptr=None))
        yield (
            f"select_topk {on_top}",
            (block_select.select_topk_kernel, "fp32", row, 8192 // block_select.KEYS_PER_WARP),
        )
    yield from stand_in_cases()
    yield from cell_cases()


def stand_in_cases():
    """Arguments of compile_for_sm90 for the kernels of stand-ins."""
    from stem.kernels import common, stand_ins

    for per_block in (1, 8):
        constants = dict(PER_BLOCK=per_block, NUMBERS=stand_ins.MASKS, AT_ONCE=stand_ins.MASKS_AT_ONCE)
        yield f"masks {per_block}", (stand_ins.masks_kernel, "bf16", constants, 1)
    for dtype, head_dim, tma in ((torch.bfloat16, 128, True), (torch.float16, 64, False), (torch.float32, 128, False)):
        operands = common.operand_dtype(dtype)
        dims = dict(HEAD_DIM=head_dim, BLOCK_D=head_dim, TOKENS=128)
        yield f"means {dtype}", (stand_ins.means_kernel, operands.name, dims | dict(ROWS=32), stand_ins.MEANS_WARPS)
        tiles = stand_ins.tile_sizes(head_dim, 128, dtype)
        options = [tiles.pop(name) for name in ("num_warps", "num_stages")]
        constants = dims | tiles | dict(BLOCK_SIZE=128, LOG2_TOKENS=7.0, DTYPE=operands, TMA=tma)
        yield f"stand_ins {dtype}", (stand_ins.stand_ins_kernel, operands.name, constants, *options)


def cell_cases():
    """Arguments of compile_for_sm90 for the kernels of the preset "adaptive", and of scores without corners."""
    import triton.language as tl
    from stem.kernels import cell_features, cell_pairs, cell_scores, share_select, token_pairs

    for peak in (False, True):
        features = dict(HEAD_DIM=128, BLOCK_D=128, Q_CELL=16, K_CELL=16, STRIDE=1 if peak else 8, PEAK=peak)
        features |= dict(CELLS=cell_features.FEATURE_TILE, UNROLL=cell_features.UNROLL, stride_qd=1, stride_kd=1)
        features |= dict(HEADS=4 if peak else 1, CAN_OVERLAP=True)
        yield f"cell_features {peak}", (cell_features.cell_features_kernel, "bf16", features)
    for name, depth, depth_tile, operand, columns, stages in (
        ("corners", 256, 256, "bf16", 64, 4),
        ("narrow corners", 128, 128, "bf16", 64, 4),
        ("one-token cells", 256, 256, "bf16", 128, 2),
        ("strided", 512, 128, "bf16", 64, 1),
        ("fp32", 256, 64, "fp32", 64, 1),
    ):
        cells = columns if columns > cell_pairs.COLUMN_TILE else 8
        tiles = dict(Q_CELL=128 // cells, K_CELL=128 // cells, CELLS_PER_BLOCK=cells)
        tiles |= dict(ROWS=cell_pairs.ROW_TILE, COLUMNS=columns, SUMS=16)
        operands = dict(bf16=tl.bfloat16, fp32=tl.float32)[operand]
        wide = dict(DEPTH=depth, DEPTH_TILE=depth_tile, DTYPE=operands, STAGES=stages, TMA=operand != "fp32")
        optional = {} if name == "strided" else dict(bonus_ptr=None)
        for redo in (False, True):
            constants = tiles | wide | optional | dict(CAN_OVERLAP=True, REDO=redo)
            options = cell_pairs.WARPS, 2, operand
            yield f"pair_cells {name} {redo}", (cell_pairs.pair_cells_kernel, operand, constants, *options)
    for size in (16, 64, 128):
        tokens = dict(HEAD_DIM=128, BLOCK_D=128, BLOCK=size, DTYPE=tl.bfloat16, stride_qd=1, stride_kd=1)
        tokens |= dict(KEYS=min(size, token_pairs.KEY_TILE), STAGES=token_pairs.STAGES, CAN_OVERLAP=True)
        tokens |= dict(bonus_ptr=None) if size == 64 else {}
        for redo in (False, True):
            constants, options = tokens | dict(REDO=redo, TMA=size > 16), (8 if size == 128 else 4, 2, "bf16")
            yield f"pair_tokens {size} {redo}", (token_pairs.pair_tokens_kernel, "bf16", constants, *options)
    lists = dict(COPIES=1, CAN_OVERLAP=True)
    for rms, sums_type in ((False, "fp32"), (True, "bf16")):
        row = dict(CELL=16, CELLS=8, CELL_TILE=1, RMS=rms, HEADS=1, ROW_SIZE=8192)
        yield f"pool_shares {rms}", (cell_scores.pool_shares_kernel, "fp32", row, 16, 3, sums_type)
        yield f"pool_select {rms}", (share_select.pool_select_kernel, "fp32", row | lists, 16, 3, sums_type)
    short = dict(CELL=1, CELLS=128, CELL_TILE=128, RMS=True, HEADS=4, ROW_SIZE=64, COPIES=4, CAN_OVERLAP=True)
    yield "pool_select tokens", (share_select.pool_select_kernel, "fp32", short, 8, 3, "bf16")
    row = dict(ROW_SIZE=8192)
    yield "select_above", (share_select.select_above_kernel, "fp32", row, 8192 // share_select.KEYS_PER_WARP)


@pytest.mark.slow
def test_kernels_compile_for_sm90(tmp_path):
    pytest.importorskip("triton.backends.nvidia")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    process = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr[-3000:]
    shared = json.loads(process.stdout)
    assert len(shared) == 74
    too_large = {name: size for name, size in shared.items() if size > SHARED_MEMORY_BYTES}
    assert not too_large


if __name__ == "__main__":
    print(json.dumps({name: compile_for_sm90(*arguments) for name, arguments in cases()}))

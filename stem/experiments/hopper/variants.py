"""Variants of the shipped kernels: the shipped source with a few lines changed, loaded as a module of its own.

A variant lacks what its stage and the later stages add. Stamped, it also stores the clock at certain lines.
"""

import importlib.util
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import stem.kernels

Edits = dict[str, list[str]]
"""Beginning of a line, which occurs once in a source -> the lines that take its place; "$" is the line itself."""

MARKS = ("tile", "issued", "logits", "weights", "output", "task", "attended", "stored", "sm", "ns")
"""Kinds of stamps [clock cycles]. With "task" go "sm", the multiprocessor's number, and "ns", the global timer."""

SHAPE = (1024, 3, 64, 16)
"""Of a buffer of stamps, int64: programs, groups of four warps (two consumers, the producer), steps, kinds."""

STAMP = """

STAMPS = gl.constexpr({address})
{marks}


@gluon.jit
def register(ASM: gl.constexpr):
    return gl.inline_asm_elementwise(ASM, "=l", [], gl.int64, False, 1)


@gluon.jit
def stamp(step, MARK: gl.constexpr):
    clock = register("mov.u64 $0, %clock64;")
    group = register("cvt.u64.u32 $0, %tid.x;") // 128
    program = gl.program_id(0) + gl.num_programs(0) * (gl.program_id(1) + gl.num_programs(1) * gl.program_id(2))
    place = ((program * {shape[1]} + group) * {shape[2]} + step) * {shape[3]}
    place = (STAMPS + 8 * place).to(gl.pointer_type(gl.int64))
    fits = (program < {shape[0]}) & (step < {shape[2]})
    gl.store(place + MARK, clock, mask=fits)
    if MARK == AT_TASK:
        gl.store(place + AT_SM, register("cvt.u64.u32 $0, %smid;"), mask=fits)
        gl.store(place + AT_NS, register("mov.u64 $0, %globaltimer;"), mask=fits)
"""

TASKS: Edits = {  # marks of a task
    "batch_head, batch, head, _kv_head": ["$", "stamp(first_step, AT_TASK)"],
    "row_sums = gl.where(row_sums == 0.0": ["stamp(first_step, AT_ATTENDED)", "$"],
    "first_step += ": ["stamp(first_step, AT_STORED)", "$"],
}
COPIES: Edits = {  # marks of the producer
    "fill_slot(k_desc, k_ring": ["stamp(steps_before + step, AT_TILE)", "$"],
    "fill_slot(v_desc, v_ring": ["stamp(steps_before + step, AT_LOGITS)", "$", "stamp(steps_before + step, AT_OUTPUT)"],
}
PRODUCTS: Edits = {  # marks of a consumer
    "logits = start_logits(q_tile, wait_for_tile(k_ring, step)": ["stamp(step, AT_TILE)", "$"],
    "logits = hopper.warpgroup_mma_wait(1": ["stamp(step, AT_ISSUED)", "$", "stamp(step, AT_LOGITS)"],
    "release_tile(v_ring, step - 1)": ["stamp(step, AT_OUTPUT)", "$"],
}
IN_TURN: Edits = {  # QK^T, PV and exponentials one after the other, with marks
    "logits = start_logits(q_tile, wait_for_tile(k_ring, step)": [
        "stamp(step, AT_TILE)",
        "$",
        "stamp(step, AT_ISSUED)",
        "logits = hopper.warpgroup_mma_wait(0, [logits])",
        "stamp(step, AT_LOGITS)",
    ],
    "logits = hopper.warpgroup_mma_wait(1": [
        "accumulator = hopper.warpgroup_mma_wait(0, [accumulator])",
        "stamp(step, AT_OUTPUT)",
    ],
}
ONE_SLOT: Edits = {"NUM_STAGES = ": ["NUM_STAGES = gl.constexpr(1)"]}
ONE_CONSUMER: Edits = {  # of eight warps, with the rows of both
    "NUM_CONSUMERS = ": ["NUM_CONSUMERS = gl.constexpr(1)"],
    "CONSUMER_WARPS = ": ["CONSUMER_WARPS = gl.constexpr(8)"],
    "(consume, (1, PER_BLOCK": [],
    "[CONSUMER_WARPS, PRODUCER_WARPS],": ["[PRODUCER_WARPS],"],
    "[CONSUMER_REGISTERS, PRODUCER_REGISTERS],": ["[PRODUCER_REGISTERS],"],
}
ONE_TASK: Edits = {"tasks = Tasks.of(": ["$", "tasks = tasks._replace(programs=tasks.number)"]}
RUNNING_MAXIMUM: Edits = {"NO_ROOM: gl.constexpr": ["NO_ROOM: gl.constexpr = True"]}

SHIPPED: Edits = TASKS | COPIES | PRODUCTS
PERSISTENT: Edits = SHIPPED | RUNNING_MAXIMUM
OVERLAP: Edits = PERSISTENT | ONE_TASK
TWO_CONSUMERS: Edits = TASKS | COPIES | IN_TURN | RUNNING_MAXIMUM | ONE_TASK
RING: Edits = TWO_CONSUMERS | ONE_CONSUMER

HOPPER: dict[str, Edits] = {
    "one slot": RING | ONE_SLOT,
    "ring": RING,
    "two consumers": TWO_CONSUMERS,
    "overlap": OVERLAP,
    "persistent": PERSISTENT,
    "first maximum": SHIPPED,
}
"""Stage -> edits of hopper_forward.py. Each stage adds one idea to the one before; the last is the shipped kernel."""

DIARY: dict[str, Edits] = {
    "three key tiles in the ring": {
        "shared = (q_inbox, make_ring(k_desc": [
            "shared = (q_inbox, make_ring(k_desc, 3), make_ring(v_desc, NUM_STAGES), redo, num_tasks, problem)"
        ]
    },
    "short rows first": {"row = num_q_blocks - 1 - turn": ["row = turn"]},
    "one head after the other": {
        "tasks = Tasks.of(": ["$", "tasks = tasks._replace(numbers=(*tasks.numbers[:5], 1, *tasks.numbers[6:]))"]
    },
    "registers as launched": {
        "[CONSUMER_REGISTERS, PRODUCER_REGISTERS],": ["[LAUNCH_REGISTERS, LAUNCH_REGISTERS],"],
        "LAUNCH_REGISTERS = ": ["LAUNCH_REGISTERS = gl.constexpr(168)"],
        "LAUNCH_OPTIONS = ": ["LAUNCH_OPTIONS = dict(num_warps=CONSUMER_WARPS.value, maxnreg=LAUNCH_REGISTERS.value)"],
    },
    "products in turn": IN_TURN,
    "one consumer": ONE_CONSUMER,
    "one task a program": ONE_TASK,
}
"""The shipped kernel with one change each, for the appendix of notebook 02."""

FP8: Edits = TASKS | {  # exponentials and PV are those of the tile before
    "next_logits = start_product(": ["stamp(step + 1, AT_TILE)", "$", "stamp(step + 1, AT_ISSUED)"],
    "part = start_product(weights, wait_for_tile(v_ring, step)": ["stamp(step + 1, AT_WEIGHTS)", "$"],
    "release_tile(k_ring, step + 1)": ["stamp(step + 1, AT_LOGITS)", "$"],
    "release_tile(v_ring, step)": ["stamp(step + 1, AT_OUTPUT)", "$"],
}
BOUNDS: dict[str, Edits] = {
    "shipped": {},
    "without row maxima": {
        "partial = gl.max(logits.reshape": [],
        "largest = gl.convert_layout(gl.max(partial": [],
        "raised = gl.maximum(reference, largest": ["raised = reference"],
        'reference = gl.full([ROWS], float("-inf")': [
            "reference = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, LOGITS))"
        ],
    },
    "without exponentials": {"weights = gl.exp2(logits * factor": ["weights = logits * factor - reference[:, None]"]},
}
"""The FP8 kernel without a part of its softmax: its rate is a bound, its weights are not those of attention."""

SHIPPED_CELLS: Edits = {
    "total = tl.zeros([ROWS, SUMS]": ["$", "stamp(0, AT_TASK)"],
    "sums = sum_weights(": [
        "stamp((first_column - start) // COLUMNS, AT_LOGITS)",
        "$",
        "stamp((first_column - start) // COLUMNS, AT_WEIGHTS)",
    ],
    "total += sums": ["$", "stamp((first_column - start) // COLUMNS, AT_STORED)"],
}
ONE_TILE: Edits = {"STAGES = ": ["STAGES = 1"]}
ALONG_THE_AXIS: Edits = {  # block sums without a product
    "cell_block = ": [],
    "member = ": [],
    "return tl.dot(weights, member": [
        "weights = weights.to(tl.float32).reshape([logits.shape[0], SUMS, CELLS_PER_BLOCK])",
        "return tl.sum(weights, axis=2)",
    ],
    "SUMS=max(SMALLEST_DOT, columns": ["SUMS=columns // cells.key_cells,"],
}
CELLS: dict[str, Edits] = {
    "one tile": SHIPPED_CELLS | ALONG_THE_AXIS | ONE_TILE,
    "tiles ahead": SHIPPED_CELLS | ALONG_THE_AXIS,
    "block sums by a product": SHIPPED_CELLS,
}
"""Stage -> edits of cell_pairs.py, as in `HOPPER`."""


def edited(source: str, edits: Edits, stamped: bool) -> str:
    """Apply edits to a source; unless `stamped`, without the stamps.

    Raises:
        ValueError: If a line to change does not occur exactly once.
    """
    lines = source.split("\n")
    for beginning, replacement in edits.items():
        places = [i for i, line in enumerate(lines) if line.lstrip().startswith(beginning)]
        if len(places) != 1:
            raise ValueError(f"{len(places)} lines begin with {beginning!r}, one is expected")
        line = lines[places[0]]
        indent = line[: len(line) - len(line.lstrip())]
        new = [line if text == "$" else indent + text for text in replacement]
        if not stamped:
            new = [text for text in new if not text.lstrip().startswith("stamp(")]
        lines[places[0] : places[0] + 1] = new
    return "\n".join(lines)


def source_of(kernel: str) -> str:
    """Source of a module of stem.kernels."""
    return (Path(stem.kernels.__path__[0]) / f"{kernel}.py").read_text()


def load(kernel: str, edits: Edits, address: int | None = None) -> ModuleType:
    """Load a module of stem.kernels with edits; with the address of a buffer of stamps on the device, stamped."""
    text = edited(source_of(kernel), edits, address is not None)
    if address is not None:
        marks = "\n".join(f"AT_{mark.upper()} = gl.constexpr({i})" for i, mark in enumerate(MARKS))
        stamp = STAMP.format(address=address, marks=marks, shape=SHAPE)
        text += stamp if "import gluon" in text else stamp.replace("gl.", "tl.").replace("@gluon", "@triton")
    with tempfile.NamedTemporaryFile("w", prefix=f"{kernel}_", suffix=".py", delete=False) as file:
        file.write(text)
    name = f"stem.kernels.{Path(file.name).stem}"
    spec = importlib.util.spec_from_file_location(name, file.name)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)  # Triton looks the module up
    spec.loader.exec_module(module)
    return module

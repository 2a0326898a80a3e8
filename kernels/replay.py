"""Replay of calls: the launches of an earlier call, repeated with the addresses of other tensors.

On short prompts the CPU needs longer to check inputs, look up the budget, allocate intermediate tensors and launch
kernels than the GPU needs to run them. All of that depends on shapes, strides and options alone. When a call comes
again, its recorded launches are started one after the other and nothing else is done. A CUDA graph would do the same,
but its inputs would have to stay at one address.

A call is replayed from the third time on: the first may compile kernels, and the second is recorded. Calls that
allocate more than 256 MiB for outputs and workspace, and calls with a tensor whose address is no multiple of 16 bytes,
are not replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .driver import DirectLaunch
from .launch import ALIGNMENT, ON_LAUNCH, Tiles, compiling_together, current_stream, is_watched, layout

aten = torch.ops.aten
ALLOCATIONS = {aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided}
PLACE_BYTES = 256  # alignment of intermediate tensors, that of torch's allocator
MOST_STREAMS = 64  # with a recording of one kind of call; more clear them
MOST_BYTES = 256 << 20  # that a recorded call may allocate; calls that allocate more are bound by the GPU
MOST_READY = 4096  # entries of READY; more clear them: about 10 KB each
NEVER_MET, MET = "never met", "met once"  # a recording is None if the call cannot be repeated

NUMBERS = count()
READY: dict[tuple, list[Callable[[], int]]] = {}
"""(number of a recording, stream, addresses of its memories) -> its launches, in buffers of their own; [] if met once.

Layers of a model that meet the same addresses in every pass then only call the driver.
"""


class Launch(NamedTuple):
    """One launch of a recording."""

    start: DirectLaunch
    grid: tuple[int, int, int]
    places: list[tuple[int, int]]
    """Place of each tensor: (index of its memory, offset in bytes)."""

    layouts: list
    overlap: bool
    """For layouts and overlap see DirectLaunch."""


class Recording(NamedTuple):
    """A recorded call. Its memories are the inputs, the outputs, the workspace, and all memory from address 0 on."""

    launches: list[Launch]
    outputs: list[tuple | None]
    """(shape, strides, dtype) of each output; None for an output that is None."""

    workspace_bytes: int
    """Memory of all intermediate tensors."""

    device: torch.device
    kept: list[Tensor]
    """Tensors that stay in place from call to call, such as tables; kept alive here."""

    number: int
    """Its own among all recordings, for READY."""

    def repeat(self, addresses: list[int], stream: int) -> list[Tensor | None] | None:
        """Launch all kernels for inputs at these addresses; returns the outputs, None if a launch fails."""
        device = self.device
        outputs = [
            made and torch.empty_strided(made[0], made[1], dtype=made[2], device=device) for made in self.outputs
        ]
        workspace = torch.empty(self.workspace_bytes, dtype=torch.uint8, device=device)
        memories = (*addresses, *[0 if x is None else x.data_ptr() for x in outputs], workspace.data_ptr(), 0)
        key = self.number, stream, memories
        ready = READY.get(key)
        if not ready:
            calls = [
                (start, (grid, stream, [memories[memory] + offset for memory, offset in places], layouts, overlap))
                for start, grid, places, layouts, overlap in self.launches
            ]
            if ready is None:  # the first time at these addresses, which may be the last
                if len(READY) >= MOST_READY:
                    READY.clear()
                READY[key] = []
                return None if any(start(*call) for start, call in calls) else outputs
            ready = READY[key] = [start.ready(*call) for start, call in calls]
        for start in ready:
            if start():
                return None
        return outputs


class Recorder(TorchDispatchMode):
    """Context that notes allocations and launches, and whether any other torch operation ran, except views."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated: list[Tensor] = []  # kept until the end, so that no address is used twice
        self.launches: list[tuple] = []
        self.complete, self.bytes = True, 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import its compiler for that, which takes seconds

    def __enter__(self) -> Recorder:
        self._token = ON_LAUNCH.set(self.note)
        return super().__enter__()

    def __exit__(self, *error) -> None:
        ON_LAUNCH.reset(self._token)
        super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in ALLOCATIONS:
            self.allocated.append(result)
            self.bytes += result.untyped_storage().nbytes()
        elif not func.is_view:
            self.complete = False
        if not self.complete or self.bytes > MOST_BYTES:
            self.complete = False
            self.allocated.clear()
        return result

    def note(self, start: DirectLaunch | None, grid: tuple[int, int, int], tensors: tuple, overlap: bool) -> None:
        """See ON_LAUNCH."""
        self.launches.append((start, grid, tensors, overlap))
        self.complete = self.complete and start is not None

    def recording(self, inputs: tuple[Tensor, ...], outputs: tuple[Tensor | None, ...]) -> Recording | None:
        """Recording of the call with these inputs and outputs; None if it cannot be repeated."""
        starts = {x.data_ptr(): (memory, 0) for memory, x in enumerate(inputs)}
        if not self.complete or not self.launches or len(starts) < len(inputs):  # two of them at one address
            return None
        allocated = {storage(x): x for x in self.allocated}
        owned = {}  # where memory begins that the call allocated -> its place
        for memory, x in enumerate(outputs, len(inputs)):
            if x is not None and allocated.pop(x.data_ptr(), None) is None:  # not a whole allocation, or used twice
                return None
            if x is not None:
                owned[x.data_ptr()] = memory, 0
        workspace, everything = len(inputs) + len(outputs), len(inputs) + len(outputs) + 1
        workspace_bytes = 0
        for start, x in allocated.items():
            owned[start] = workspace, workspace_bytes
            workspace_bytes += -(-x.untyped_storage().nbytes() // PLACE_BYTES) * PLACE_BYTES
        of_inputs, kept = {storage(x) for x in inputs}, []

        def place(x: Tensor | None) -> tuple[int, int] | None:
            if x is None:
                return everything, 0
            if x.data_ptr() in starts:
                return starts[x.data_ptr()]
            if storage(x) in owned:
                memory, offset = owned[storage(x)]
                return memory, offset + x.data_ptr() - storage(x)
            if storage(x) in of_inputs:  # a part of an input; which one is unknown
                return None
            kept.append(x)
            return everything, x.data_ptr()

        launches = []
        for start, grid, tensors, overlap in self.launches:
            places = [place(x.base if type(x) is Tiles else x) for x in tensors]
            if None in places:
                return None
            launches.append(Launch(start, grid, places, [layout(x) for x in tensors if type(x) is Tiles], overlap))
        made = [None if x is None else (x.shape, x.stride(), x.dtype) for x in outputs]
        return Recording(launches, made, workspace_bytes, inputs[0].device, kept, next(NUMBERS))


def storage(x: Tensor) -> int:
    """Address at which the memory of x begins."""
    return x.untyped_storage().data_ptr()


def replay(
    recordings: dict[int, Recording | str | None],
    inputs: tuple[Tensor, ...],
    call: Callable[[], tuple],
    compile_first: bool = False,
) -> tuple:
    """Results of call(); from the third time on its launches are replayed, if it can be recorded.

    Args:
        recordings: Recordings of one kind of call, one for each stream, filled here. All calls with one dict have
            inputs of the same dtypes, shapes and strides, and whatever else decides what `call` does is the same.
        inputs: All tensors that differ from call to call, the first on a CUDA device.
        call: Returns tensors that it allocates, or None.
        compile_first: Whether a first call compiles all kernels together before it runs them. `call` must bear
            intermediate tensors of any values.
    """
    device = inputs[0].get_device()
    stream = current_stream(device)
    recording = recordings.get(stream, NEVER_MET)
    if recording is None or not is_quiet(device):
        return call()
    addresses = [x.data_ptr() for x in inputs]
    if any(address % ALIGNMENT for address in addresses):
        return call()
    if type(recording) is Recording:
        return recording.repeat(addresses, stream) or call()
    if recording is NEVER_MET:  # a first call may compile kernels, so it is not recorded
        if len(recordings) >= MOST_STREAMS:
            recordings.clear()
        recordings[stream] = MET
        if compile_first:
            with compiling_together():
                call()
        return call()
    with Recorder() as recorder:
        outputs = call()
    recordings[stream] = recorder.recording(inputs, outputs)
    return outputs


def is_quiet(device: int) -> bool:
    """Whether launches can be replayed: the device is the current one, without graph capture or profiler."""
    return device == torch.cuda.current_device() and not (torch.cuda.is_current_stream_capturing() or is_watched())

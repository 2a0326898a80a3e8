"""Replay of calls: the launches of an earlier call, repeated with the addresses of other tensors.

On short prompts the CPU needs longer to check inputs, look up the budget, allocate intermediate tensors and launch
kernels than the GPU needs to run them. All of that depends on shapes, strides and options alone. When a call comes
again, one call of C writes the addresses of the new inputs and outputs into the parameters of its recorded launches and
starts them one after the other. A CUDA graph would do the same, but its inputs would have to stay at one address.

A call is replayed from the third time on: the first may compile kernels, and the second is recorded. All calls on a
stream share the memory of their intermediate tensors. Calls that allocate more than 256 MiB, or more than 64 MiB of
intermediate tensors, and calls with a tensor whose address is no multiple of 16 bytes, are not replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .driver import DirectLaunch, address_of, cuda_driver
from .launch import ALIGNMENT, ON_LAUNCH, Tiles, compiling_together, current_stream, is_watched, layout
from .program import Program, library

aten = torch.ops.aten
ALLOCATIONS = {aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided}
PLACE_BYTES = 256  # alignment of intermediate tensors, that of torch's allocator
MOST_STREAMS = 64  # with a recording of one kind of call; more clear them
MOST_BYTES = 256 << 20  # that a recorded call may allocate; calls that allocate more are bound by the GPU
MOST_WORKSPACE = 64 << 20  # bytes of intermediate tensors of a recorded call
NEVER_MET, MET = "never met", "met once"  # a recording is None if the call cannot be repeated
LIKE_FIRST = "like the first input"

LOCK = Lock()  # of the buffers of all recordings and of the workspaces, while a call is repeated
WORKSPACES: dict[tuple[torch.device, int], Tensor] = {}
"""Memory for intermediate tensors by device and stream, on which the launches of all calls run one after the other."""


class Recording(NamedTuple):
    """A recorded call on one stream."""

    outputs: list[tuple | str | None]
    """(shape, strides, dtype) of each output; LIKE_FIRST for one like the first input; None for one that is None."""

    program: Program
    """Its launches; memories are the inputs, then the outputs."""

    device: torch.device
    kept: list
    """What stays in place from call to call: the workspace, tables and buffers of launches; kept alive here."""

    def repeat(self, first: Tensor, addresses: list[int]) -> list[Tensor | None] | None:
        """Launch all kernels for the first input and all inputs' addresses; returns the outputs, None on an error."""
        outputs = []
        for made in self.outputs:
            if made is LIKE_FIRST:  # faster than with shape and strides
                outputs.append(torch.empty_like(first))
            else:
                outputs.append(made and torch.empty_strided(*made[:2], dtype=made[2], device=self.device))
        with LOCK:
            error = self.program.run(*addresses, *[0 if x is None else x.data_ptr() for x in outputs])
        return None if error else outputs


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

    def recording(
        self, inputs: tuple[Tensor, ...], outputs: tuple[Tensor | None, ...], stream: int
    ) -> Recording | None:
        """Recording of the call with these inputs and outputs on a stream; None if it cannot be repeated."""
        of_inputs = {x.data_ptr(): memory for memory, x in enumerate(inputs)}
        if not self.complete or not self.launches or len(of_inputs) < len(inputs):  # two of them at one address
            return None
        allocated, of_outputs = {storage(x): x for x in self.allocated}, {}
        for memory, x in enumerate(outputs, len(inputs)):
            if x is not None and allocated.pop(x.data_ptr(), None) is None:  # not a whole allocation, or used twice
                return None
            if x is not None:
                of_outputs[x.data_ptr()] = memory
        places, size = {}, 0  # of intermediate tensors in the workspace
        for begin, x in allocated.items():
            places[begin], size = size, size + -(-x.untyped_storage().nbytes() // PLACE_BYTES) * PLACE_BYTES
        if size > MOST_WORKSPACE:
            return None
        device, storages = inputs[0].device, {storage(x) for x in inputs}
        workspace = workspace_of(device, stream, size)
        made = [None if x is None else (x.shape, x.stride(), x.dtype) for x in outputs]
        like_first = torch.empty_like(inputs[0], device="meta")
        like_first = like_first.shape, like_first.stride(), like_first.dtype
        made = [LIKE_FIRST if of_output == like_first else of_output for of_output in made]
        starts, places, maps, kept = [], [], [], [workspace]
        for start, grid, tensors, overlap in self.launches:
            addresses, layouts, differing = [], [layout(x) for x in tensors if type(x) is Tiles], []
            for number, x in enumerate(x.base if type(x) is Tiles else x for x in tensors):
                address, begin = (0, 0) if x is None else (x.data_ptr(), storage(x))
                if address in of_inputs:
                    differing.append((number, of_inputs[address], 0))
                elif begin in of_outputs:
                    differing.append((number, of_outputs[begin], address - begin))
                elif begin in places:
                    address += workspace.data_ptr() + places[begin] - begin
                elif begin in storages:  # a part of an input; which one is unknown
                    return None
                elif x is not None:
                    kept.append(x)
                addresses.append(address)
            launch = start.prepare(grid, stream, addresses, layouts, overlap)
            starts.append(launch.start)
            kept += launch.buffers, start
            for number, *place in differing:
                target, is_map = launch.slots[number]
                (maps if is_map else places).append((target, *place))
        replace = address_of(cuda_driver().cuTensorMapReplaceAddress) if maps else 0
        return Recording(made, Program(replace, places, maps, starts), device, kept)


def workspace_of(device: torch.device, stream: int, size: int) -> Tensor:
    """Memory of at least `size` bytes for the intermediate tensors of calls on a stream."""
    found = WORKSPACES.get((device, stream))
    if found is None or len(found) < size:
        if len(WORKSPACES) >= MOST_STREAMS:
            WORKSPACES.clear()
        found = torch.empty(1 << size.bit_length(), dtype=torch.uint8, device=device)
        WORKSPACES[device, stream] = found
    return found


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
    addresses, all_bits = [], 0
    for x in inputs:
        addresses.append(address := x.data_ptr())
        all_bits |= address
    if all_bits % ALIGNMENT:
        return call()
    if type(recording) is Recording:
        return recording.repeat(inputs[0], addresses) or call()
    if recording is NEVER_MET:  # a first call may compile kernels, so it is not recorded
        if len(recordings) >= MOST_STREAMS:
            recordings.clear()
        recordings[stream] = MET
        if compile_first:
            with compiling_together() as pool:
                pool.submit(library)  # which the recording needs
                call()
        return call()
    with Recorder() as recorder:
        outputs = call()
    recordings[stream] = recorder.recording(inputs, outputs, stream)
    return outputs


def is_quiet(device: int) -> bool:
    """Whether launches can be replayed: the device is the current one, without graph capture or profiler."""
    return device == torch._C._cuda_getDevice() and not (torch._C._cuda_isCurrentStreamCapturing() or is_watched())

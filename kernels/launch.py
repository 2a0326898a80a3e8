"""Launches: which compiled variant of a kernel fits its arguments is worked out once, not on every call.

Triton looks at every argument of every call for that, which takes the host longer than a short prompt takes the GPU.
Here the variant is remembered by the types of the tensors and by the numbers themselves, and started by the driver.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import NamedTuple

import torch
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from .driver import DirectLaunch

ALIGNMENT = 16  # bytes; a variant is compiled for addresses that are, or are not, multiples of it
MOST_VARIANTS = 4096  # remembered; each new length of a prompt adds one to every kernel
VARIANTS: dict[tuple, Variant] = {}
ON_LAUNCH: ContextVar[Callable | None] = ContextVar("ON_LAUNCH", default=None)
"""Called after each launch of this thread: note(its DirectLaunch or None, grid, tensors, overlap)."""


class Tiles(NamedTuple):
    """A tensor that a kernel reads tile by tile, by TMA: what it takes as a tensor descriptor."""

    base: torch.Tensor
    shape: tuple[int, ...]
    """Of a tile."""

    describe: Callable
    """Triton's or Gluon's way to make the descriptor: describe(base, shape)."""


class Variant(NamedTuple):
    """A compiled kernel."""

    compiled: object
    constants: tuple
    """Its constant arguments in order."""

    direct: DirectLaunch | None
    """Starts it without Triton, where that is possible."""


def launch(
    kernel, grid: tuple[int, ...], tensors: tuple, numbers: tuple, *, overlap: bool = False, **constants
) -> None:
    """kernel[grid](*tensors, *numbers, **constants) on the device of the tensors, which the kernel takes in this order.

    Args:
        kernel: A kernel of Triton or Gluon.
        grid: Programs along up to three axes.
        tensors: Tensors, `Tiles` and None; the first is no None.
        numbers: Ints and floats; an argument is always the one or always the other.
        overlap: Whether the kernel may begin while the kernel launched before it still runs (programmatic dependent
            launch, on NVIDIA GPUs from compute capability 9.0 on), once each program of that kernel has ended or called
            gdc_launch_dependents. It must call gdc_wait before it reads results of that kernel. Only a hint.
        constants: What is known when the kernel is compiled, with num_warps and its like.
    """
    first = tensors[0]
    device = (first.base if type(first) is Tiles else first).get_device()  # -1: the CPU
    if device >= 0 and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, grid, tensors, numbers, overlap=overlap, **constants)
    key, addresses = variant_key(kernel, device, tensors, numbers, constants)
    variant = key and (VARIANTS.get(key) or remember(key, kernel, grid, tensors, numbers, constants))
    if variant is None:
        kernel[grid](*with_descriptors(tensors), *numbers, **constants)
    else:
        grid = (*grid, 1, 1)[:3]
        start, layouts = variant.direct, [layout(x) for x in tensors]
        # where the driver reports an error, Triton meets it too, and raises it
        if start is None or is_watched() or start(grid, current_stream(device), addresses, layouts, overlap):
            variant.compiled[grid](*with_descriptors(tensors), *numbers, *variant.constants)
    note = ON_LAUNCH.get()
    if note:
        note(variant and variant.direct, grid, tensors, overlap)


def is_watched() -> bool:
    """Whether a profiler wants Triton to tell it of launches."""
    runtime = knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


def current_stream(device: int) -> int:
    """Handle of the current stream of a CUDA device; torch's own objects take the host 5 us."""
    return driver.active.get_current_stream(device)


def variant_key(kernel, device: int, tensors: tuple, numbers: tuple, constants: dict) -> tuple[tuple | None, list[int]]:
    """What decides the compiled variant, and the tensors' addresses, 0 for None.

    The key is None where the variant is left to Triton: interpreted, or a tensor is not aligned.
    """
    types, addresses, all_bits = [], [], 0
    for x in tensors:
        if x is None:
            types.append(None)
            addresses.append(0)
            continue
        if type(x) is Tiles:
            types.append(x.shape)
            x = x.base
        types.append(x.dtype)
        address = x.data_ptr()
        addresses.append(address)
        all_bits |= address
    if all_bits % ALIGNMENT or not isinstance(kernel, JITFunction):
        return None, addresses
    return (kernel.fn, device, *types, *numbers, *constants.values()), addresses


def remember(key: tuple, kernel, grid: tuple, tensors: tuple, numbers: tuple, constants: dict) -> Variant:
    """Let Triton compile and load the variant for these arguments, and keep it."""
    if len(VARIANTS) == MOST_VARIANTS:
        VARIANTS.clear()
    compiled = kernel.warmup(*with_descriptors(tensors), *numbers, grid=grid, **constants)
    compiled.run  # noqa: B018 - loads the variant, whose function is there only then
    in_order = tuple(constants[name] for name in kernel.arg_names[len(tensors) + len(numbers) :])
    VARIANTS[key] = Variant(compiled, in_order, DirectLaunch.of(compiled, tensors, numbers))
    return VARIANTS[key]


def layout(x: torch.Tensor | Tiles | None) -> tuple | None:
    """(shape, strides, dtype) of a tensor that a kernel takes as a tensor descriptor; None for others."""
    return (x.base.shape, x.base.stride(), x.base.dtype) if type(x) is Tiles else None


def with_descriptors(tensors: tuple) -> list:
    """The tensors as Triton takes them."""
    return [x.describe(x.base, x.shape) if type(x) is Tiles else x for x in tensors]

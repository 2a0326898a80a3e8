"""Kernel launches that cost little host time: compiled variants are cached, and the CUDA driver starts them.

Triton inspects every argument at every launch. On short prompts that takes the CPU longer than the kernel takes the
GPU. Here the compiled variant is cached by the dtypes of the tensors and by the values of the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from triton import knobs
from triton.runtime.jit import JITFunction

from .driver import DirectLaunch

ALIGNMENT = 16  # bytes; Triton compiles one variant for addresses that are multiples of it, and one for others
MOST_VARIANTS = 4096  # in the cache; each new prompt length adds one for every kernel
COMPILERS = 8  # threads; with 4 or with 16, a first prefill takes no less time, see compiling_together
VARIANTS: dict[tuple, Variant] = {}
ON_LAUNCH: ContextVar[Callable | None] = ContextVar("ON_LAUNCH", default=None)
"""Called after each launch of this thread: note(its DirectLaunch or None, grid, tensors, overlap)."""

COMPILE: ContextVar[Callable | None] = ContextVar("COMPILE", default=None)
"""Called in place of each launch of this thread: compile(key, kernel, grid, tensors, numbers, constants)."""


class Tiles(NamedTuple):
    """A tensor that a kernel reads by TMA, tile by tile, and takes as a tensor descriptor."""

    base: torch.Tensor
    shape: tuple[int, ...]
    """Shape of a tile."""

    describe: Callable
    """Function that makes Triton's or Gluon's descriptor: describe(base, shape)."""


class Variant(NamedTuple):
    """A compiled kernel."""

    compiled: object
    constants: tuple
    """Constant arguments of the kernel, in order."""

    direct: DirectLaunch | None
    """Launches the kernel without Triton; None where Triton has to launch it."""


def launch(
    kernel,
    grid: tuple[int, ...],
    tensors: tuple,
    numbers: tuple,
    *,
    overlap: bool = False,
    also: Callable[[], list[tuple[tuple, dict]]] | None = None,
    **constants,
) -> None:
    """Launch kernel[grid](*tensors, *numbers, **constants) on the device of the tensors.

    Args:
        kernel: A kernel of Triton or Gluon.
        grid: Programs along up to three axes.
        tensors: Tensors, `Tiles` and None, the first arguments of the kernel; the first one is not None.
        numbers: Ints and floats, the next arguments; each has the same of the two types at every launch.
        overlap: Whether the kernel may begin while the kernel launched before it still runs (programmatic dependent
            launch, on NVIDIA GPUs from compute capability 9.0 on), once each program of that kernel has ended or called
            gdc_launch_dependents. It must call gdc_wait before it reads results of that kernel. Only a hint.
        also: Gives numbers and constants of other prompt lengths, whose variants `compiling_together` compiles too.
        constants: Compile-time constants, the last arguments, and options such as num_warps.
    """
    first = tensors[0]
    device = (first.base if type(first) is Tiles else first).get_device()  # -1: the CPU
    if device >= 0 and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, grid, tensors, numbers, overlap=overlap, also=also, **constants)
    key, addresses, layouts = variant_key(kernel, device, tensors, numbers, constants)
    compile_only = COMPILE.get()
    if compile_only:
        for others in ((numbers, constants), *(also() if also else ())):
            compile_only(variant_key(kernel, device, tensors, *others)[0], kernel, grid, tensors, *others)
        return None
    variant = key and (VARIANTS.get(key) or remember(key, kernel, grid, tensors, numbers, constants))
    if variant is None:
        kernel[grid](*with_descriptors(tensors), *numbers, **constants)
    else:
        grid = (*grid, 1, 1)[:3]
        start = variant.direct
        # after an error of the driver, Triton launches again and raises it
        if start is None or is_watched() or start(grid, current_stream(device), addresses, layouts, overlap):
            variant.compiled[grid](*with_descriptors(tensors), *numbers, *variant.constants)
    note = ON_LAUNCH.get()
    if note:
        note(variant and variant.direct, grid, tensors, overlap)


@contextmanager
def compiling_together() -> Iterator[ThreadPoolExecutor]:
    """Context in which launches compile the variants that they and other prompt lengths need, and run nothing.

    Prompts of more than common.ROW_SIZES[-1] blocks of keys (128K tokens in blocks of 128) need more. They are
    compiled at the same time, in the threads that this yields. Triton reads a kernel in Python, one thread at a time,
    and leaves Python to other threads afterwards. The attention kernel, which takes longest, is launched last and
    compiled first: after all others, its source would be read last.
    """
    found: dict[tuple, tuple] = {}

    def compile_later(key: tuple | None, kernel, *arguments) -> None:
        if key and key not in VARIANTS and key not in found:
            kernel.cache_key  # noqa: B018 - Triton's hash depends on which kernels were hashed before
            found[key] = kernel, *arguments

    with ThreadPoolExecutor(COMPILERS) as pool:
        token = COMPILE.set(compile_later)
        try:
            yield pool
        finally:
            COMPILE.reset(token)
        variants = [pool.submit(on_device, key, *found[key]) for key in reversed(found)]
    for variant in variants:
        variant.result()  # raises its error


def on_device(key: tuple, *arguments) -> Variant:
    """`remember` in a thread whose current device is another one."""
    with torch.cuda.device(key[1]):
        return remember(key, *arguments)


def is_watched() -> bool:
    """Whether a profiler has a hook in Triton's launches."""
    runtime = knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


def current_stream(device: int) -> int:
    """Handle of the current stream of a CUDA device; torch's stream objects would cost 5 us of host time."""
    return torch._C._cuda_getCurrentRawStream(device)


def variant_key(
    kernel, device: int, tensors: tuple, numbers: tuple, constants: dict
) -> tuple[tuple | None, list[int], list[tuple]]:
    """Cache key of the compiled variant, the address of each tensor, 0 for None, and the `layout` of each Tiles.

    The key is None where Triton has to choose the variant: in the interpreter, or if a tensor is not aligned.
    """
    types, addresses, layouts, all_bits = [], [], [], 0
    for x in tensors:
        if x is None:
            types.append(None)
            addresses.append(0)
            continue
        if type(x) is Tiles:
            types.append(x.shape)
            layouts.append(layout(x))
            x = x.base
        types.append(x.dtype)
        address = x.data_ptr()
        addresses.append(address)
        all_bits |= address
    if all_bits % ALIGNMENT or not isinstance(kernel, JITFunction):
        return None, addresses, layouts
    return (kernel.fn, device, *types, *numbers, *constants.values()), addresses, layouts


def remember(key: tuple, kernel, grid: tuple, tensors: tuple, numbers: tuple, constants: dict) -> Variant:
    """Compile and load the variant for these arguments with Triton, and cache it."""
    if len(VARIANTS) == MOST_VARIANTS:
        VARIANTS.clear()
    compiled = kernel.warmup(*with_descriptors(tensors), *numbers, grid=grid, **constants)
    compiled.run  # noqa: B018 - loads the variant, whose function is there only then
    in_order = tuple(constants[name] for name in kernel.arg_names[len(tensors) + len(numbers) :])
    VARIANTS[key] = Variant(compiled, in_order, DirectLaunch.of(compiled, tensors, numbers))
    return VARIANTS[key]


def layout(tiles: Tiles) -> tuple:
    """(shape, strides, dtype) of a tensor that a kernel takes as a tensor descriptor."""
    x = tiles.base
    return x.shape, x.stride(), x.dtype


def with_descriptors(tensors: tuple) -> list:
    """The tensors, with Triton's or Gluon's descriptors in place of `Tiles`."""
    return [x.describe(x.base, x.shape) if type(x) is Tiles else x for x in tensors]

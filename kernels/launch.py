"""Launches: which compiled variant of a kernel fits its arguments is worked out once, not on every call.

Triton looks at every argument of every call for that, which takes the host longer than a short prompt takes the GPU.
Here the variant is remembered by the types of the tensors and by the numbers themselves, and called without detours.
"""

import torch
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

ALIGNMENT = 16  # bytes; a variant is compiled for addresses that are, or are not, multiples of it
MOST_VARIANTS = 4096  # remembered; each new length of a prompt adds one to every kernel
VARIANTS: dict[tuple, tuple] = {}  # see `variant_key` -> (compiled variant, its constants in order)


def launch(kernel, grid: tuple[int, ...], tensors: tuple, numbers: tuple, **constants) -> None:
    """kernel[grid](*tensors, *numbers, **constants) on the device of the tensors, which the kernel takes in this order.

    Args:
        kernel: A kernel of Triton or Gluon.
        grid: Programs along up to three axes.
        tensors: Tensors and tensor descriptors, the first of them no None.
        numbers: Ints and floats; an argument is always the one or always the other.
        constants: What is known when the kernel is compiled, with num_warps and its like.
    """
    device = getattr(tensors[0], "base", tensors[0]).get_device()  # base: what a descriptor describes; -1: the CPU
    if device >= 0 and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, grid, tensors, numbers, **constants)
    key = variant_key(kernel, device, tensors, numbers, constants)
    if key is None:
        kernel[grid](*tensors, *numbers, **constants)
        return
    if key not in VARIANTS:
        if len(VARIANTS) == MOST_VARIANTS:
            VARIANTS.clear()
        names = kernel.arg_names[len(tensors) + len(numbers) :]
        variant = kernel.warmup(*tensors, *numbers, grid=grid, **constants)
        VARIANTS[key] = variant, tuple(constants[name] for name in names)
    variant, in_order = VARIANTS[key]
    if knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls:  # a profiler wants to be told
        variant[(*grid, 1, 1)[:3]](*tensors, *numbers, *in_order)
        return
    run, (x, y, z) = variant.run, (*grid, 1, 1)[:3]  # `run` loads the variant, and so comes before its function
    stream = current_stream(device)
    run(x, y, z, stream, variant.function, variant.packed_metadata, None, None, None, *tensors, *numbers, *in_order)


def current_stream(device: int) -> int:
    """Handle of the current stream of a CUDA device; torch's own objects take the host 5 us."""
    return driver.active.get_current_stream(device)


def variant_key(kernel, device: int, tensors: tuple, numbers: tuple, constants: dict) -> tuple | None:
    """What decides the compiled variant; None where that is left to Triton: interpreted, or a tensor is not aligned."""
    if not isinstance(kernel, JITFunction):
        return None
    types, addresses = [], 0
    for x in tensors:
        if x is None:
            types.append(None)
            continue
        if not isinstance(x, torch.Tensor):
            types.extend(x.block_shape)
            x = x.base
        types.append(x.dtype)
        addresses |= x.data_ptr()
    if addresses % ALIGNMENT:
        return None
    return (kernel.fn, device, *types, *numbers, *constants.values())

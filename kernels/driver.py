"""Kernels started by the CUDA driver, called through ctypes, without Triton's launcher.

Triton's launcher computes every parameter at each launch, tensor descriptors in Python. That costs 12 to 20 us of host
time. Here each compiled variant has a buffer of parameters, and a launch only writes addresses into it. If a variant
has a feature that this file does not know, `DirectLaunch.of` returns None, and Triton launches the variant.
"""

from __future__ import annotations

import ctypes
import re
import struct
import threading
from collections.abc import Callable
from functools import cache, lru_cache
from typing import NamedTuple

import torch

SLOT = 192  # bytes of a tensor's parameters: an address, or a tensor map with shape and strides of up to 5 dimensions
MAP_BYTES, MAP_ALIGNMENT = 128, 64  # of a CUtensorMap
ADDRESS_BYTES = 8
NUMBERS = {"i32": "i", "i64": "q", "u64": "Q", "fp32": "f"}  # Triton's types as formats of struct
NUMBER_BYTES = 8  # of the buffer, for each number
WARP = 32  # threads
# Values of the driver's enumerations (cuda.h).
MAP_TYPES = {torch.float16: 6, torch.bfloat16: 9, torch.float8_e4m3fn: 0}  # FP8 as bytes
NOT_INTERLEAVED, PROMOTION_128_BYTES, FILL_WITH_ZEROS = 0, 2, 0
PROGRAMMATIC_STREAM_SERIALIZATION = 6
# As formats of struct: CUlaunchConfig (grid, block, bytes of shared memory, stream, attributes, how many), and one
# CUlaunchAttribute.
LAUNCH_CONFIG, LAUNCH_ATTRIBUTE = struct.Struct("7I4xQQI4x"), struct.Struct("I4xi60x")


@cache
def cuda_driver() -> ctypes.CDLL | None:
    """Library of the CUDA driver; None without CUDA, or before CUDA 12."""
    if not torch.version.cuda:
        return None
    try:
        library = ctypes.CDLL("libcuda.so.1")
        launch, encode = library.cuLaunchKernelEx, library.cuTensorMapEncodeTiled
        replace = library.cuTensorMapReplaceAddress
    except (OSError, AttributeError):
        return None
    number, pointer = ctypes.c_uint, ctypes.c_void_p
    launch.argtypes, replace.argtypes = [pointer] * 4, [pointer] * 2
    encode.argtypes = [pointer, number, number, *[pointer] * 5, *[number] * 4]
    return library


def address_of(function: Callable) -> int:
    """Address of a function of a library."""
    return ctypes.cast(function, ctypes.c_void_p).value


class Buffers(NamedTuple):
    """Memory that the driver reads at a launch."""

    memory: ctypes.Array
    """Values of the parameters: a slot for every tensor, then the numbers."""

    first: int
    """Offset of the first slot, an aligned address."""

    parameters: ctypes.Array
    """Address of each parameter in the memory."""

    config: ctypes.Array
    """A CUlaunchConfig."""


class Prepared(NamedTuple):
    """A launch in buffers of its own, in which addresses can be rewritten before it starts."""

    start: tuple[int, int, int, int]
    """Address of the function cuLaunchKernelEx, and its config, function and parameters."""

    slots: list[tuple[int, bool]]
    """Of each tensor: where its address lies, or (True) its tensor map, for cuTensorMapReplaceAddress."""

    buffers: Buffers


class DirectLaunch:
    """A compiled variant that the driver launches; each launch writes addresses into the buffers."""

    def __init__(self, variant, layout: Parameters) -> None:
        self._function, self._threads = variant.function, WARP * variant.metadata.num_warps
        self._shared_bytes = variant.metadata.shared
        self._layout, self._slots = layout, struct.Struct("=" + "".join(layout.slots))
        self._overlap = ctypes.create_string_buffer(LAUNCH_ATTRIBUTE.pack(PROGRAMMATIC_STREAM_SERIALIZATION, 1))
        self._attributes = ctypes.addressof(self._overlap)
        self._buffers, self._lock = self._new_buffers(), threading.Lock()  # for launches that no other one repeats
        self._launch = cuda_driver().cuLaunchKernelEx

    @classmethod
    def of(cls, variant, tensors: tuple, numbers: tuple) -> DirectLaunch | None:
        """DirectLaunch of a variant that Triton compiled; None where Triton has to launch it.

        Args:
            variant: From `kernel.warmup`, loaded.
            tensors: Tensors, None and `stem.kernels.launch.Tiles`, the kernel's first arguments.
            numbers: Ints and floats, the arguments after the tensors. All others are constants.
        """
        metadata = variant.metadata
        scratch = metadata.global_scratch_size or metadata.profile_scratch_size
        special = metadata.num_ctas != 1 or metadata.launch_cooperative_grid or metadata.launch_pdl
        if not cuda_driver() or scratch or special:
            return None
        layout = Parameters.of(variant, tensors, numbers)
        return cls(variant, layout) if layout and parameter_sizes(variant.asm["ptx"]) == layout.sizes else None

    def __call__(
        self, grid: tuple[int, int, int], stream: int, addresses: list[int], layouts: list, overlap: bool
    ) -> int:
        """Launch the kernel; returns the driver's error code, 0 for none.

        Args:
            addresses: Address of each tensor, 0 for None.
            layouts: (shape, strides, dtype) of each tensor that the kernel takes as a tensor descriptor, in order.
            overlap: See stem.kernels.launch.launch.
        """
        with self._lock:  # until the driver has read the buffers
            self._write(self._buffers, grid, stream, addresses, layouts, overlap)
            return self._launch(self._buffers.config, self._function, self._buffers.parameters, None)

    def prepare(self, *args) -> Prepared:
        """A launch with these arguments of __call__, from buffers of its own."""
        buffers = self._new_buffers()
        self._write(buffers, *args)
        start = address_of(self._launch), ctypes.addressof(buffers.config), self._function
        first, maps = ctypes.addressof(buffers.memory) + buffers.first, {slot for slot, *_ in self._layout.boxes}
        slots = [(first + number * SLOT, number in maps) for number in range(len(self._layout.slots))]
        return Prepared((*start, ctypes.addressof(buffers.parameters)), slots, buffers)

    def _new_buffers(self) -> Buffers:
        numbers = self._layout.numbers
        memory = ctypes.create_string_buffer(self._slots.size + len(numbers) + MAP_ALIGNMENT)
        first = -ctypes.addressof(memory) % MAP_ALIGNMENT
        struct.pack_into(f"{len(numbers)}s", memory, first + self._slots.size, numbers)
        start, places = ctypes.addressof(memory) + first, self._layout.places
        parameters = (ctypes.c_void_p * len(places))(*[start + place for place in places])
        return Buffers(memory, first, parameters, ctypes.create_string_buffer(LAUNCH_CONFIG.size))

    def _write(self, buffers: Buffers, grid: tuple, stream: int, addresses: list, layouts: list, overlap: bool) -> None:
        if layouts:
            addresses = addresses.copy()
            for (slot, *box), layout in zip(self._layout.boxes, layouts, strict=True):
                addresses[slot] = described(addresses[slot], *layout, *box)
        self._slots.pack_into(buffers.memory, buffers.first, *addresses)
        sizes = self._threads, 1, 1, self._shared_bytes
        LAUNCH_CONFIG.pack_into(buffers.config, 0, *grid, *sizes, stream, self._attributes, overlap)


class Parameters:
    """Parameters of a variant, in its order: the place of each in the buffer, and its size."""

    def __init__(self) -> None:
        self.places: list[int] = []
        self.sizes: list[int] = []
        self.slots: list[str] = []
        """Format of struct for the slot of each tensor, which a launch writes."""

        self.boxes: list[tuple] = []
        """For each tensor map the number of its slot, its swizzle and box, see `described`."""

        self.numbers = b""

    @classmethod
    def of(cls, variant, tensors: tuple, numbers: tuple) -> Parameters | None:
        """Parameters of a variant, see `DirectLaunch.of`; None if the type of one is unknown."""
        self, types = cls(), list(variant.src.signature.values())
        maps = iter(getattr(variant.metadata, "tensordesc_meta", None) or ())
        for x, kind in zip(tensors, types, strict=False):
            if kind.startswith("tensordesc"):
                tensor_map = next(maps, None)
                if tensor_map is None or tensor_map.get("fp4_padded") or x.base.dtype not in MAP_TYPES:
                    return None
                self.add_tensor_map(x.base.ndim, tensor_map["swizzle"], tuple(tensor_map["block_size"]))
            elif kind.startswith("*") or kind == "constexpr":  # Triton compiles None into the kernel
                self.add_address(missing=kind == "constexpr")
            else:
                return None
        kinds = [(number, kind) for number, kind in zip(numbers, types[len(tensors) :], strict=False)]
        for number, kind in kinds:
            if kind in NUMBERS:
                self.add_number(NUMBERS[kind], number)
            elif kind != "constexpr":  # Triton compiles 1 into the kernel
                return None
        for _ in range(2):
            self.add_number("Q", 0)  # two addresses of scratch memory that Triton appends, none here
        return self

    def add_address(self, missing: bool) -> None:
        """Add the parameter of a tensor; a missing tensor has none."""
        if not missing:
            self.places.append(len(self.slots) * SLOT)
            self.sizes.append(ADDRESS_BYTES)
        self.slots.append(f"Q{SLOT - ADDRESS_BYTES}x")

    def add_tensor_map(self, rank: int, swizzle: int, box: tuple[int, ...]) -> None:
        """Add the parameters of a tensor descriptor, as `described` packs them: tensor map, shape, strides."""
        place = len(self.slots) * SLOT
        shape = place + MAP_BYTES
        strides = place + MAP_BYTES + struct.calcsize(f"{rank}i0q")
        self.places += [place, *(shape + 4 * i for i in range(rank)), *(strides + 8 * i for i in range(rank))]
        self.sizes += [MAP_BYTES, *[4] * rank, *[8] * rank]
        self.boxes.append((len(self.slots), swizzle, box))
        self.slots.append(f"{SLOT}s")

    def add_number(self, form: str, number: float) -> None:
        """Add a parameter that is the same at every call, in a format of struct."""
        self.places.append(len(self.slots) * SLOT + len(self.numbers))
        self.sizes.append(struct.calcsize(form))
        self.numbers += struct.pack(form, number).ljust(NUMBER_BYTES, b"\0")


def parameter_sizes(ptx: str) -> list[int]:
    """Bytes of each parameter that the kernel of a PTX module takes."""
    declared = re.search(r"\.entry\s+\w+\((.*?)\)", ptx, re.S)[1]
    found = re.findall(r"\.param(?: \.align \d+)? \.[a-z](\d+)[^\[,]*(?:\[(\d+)\])?", declared)
    return [int(bits) // 8 * int(length or 1) for bits, length in found]


@lru_cache(maxsize=4096)
def described(
    address: int, shape: tuple, strides: tuple, dtype: torch.dtype, swizzle: int, box: tuple[int, ...]
) -> bytes:
    """Bytes that a kernel takes for a tensor descriptor: tensor map, shape and strides of a tensor at an address.

    Args:
        shape, strides: Of the tensor [elements]; the last stride is 1.
        swizzle: The driver's number for how a tile is laid out in shared memory.
        box: Shape of the tile that one copy reads [elements].
    Raises:
        RuntimeError: If the driver refuses.
    """
    rank = len(shape)
    memory = ctypes.create_string_buffer(MAP_BYTES + MAP_ALIGNMENT)
    first = -ctypes.addressof(memory) % MAP_ALIGNMENT
    error = cuda_driver().cuTensorMapEncodeTiled(
        ctypes.addressof(memory) + first,
        MAP_TYPES[dtype],
        rank,
        address,
        (ctypes.c_uint64 * rank)(*reversed(shape)),
        (ctypes.c_uint64 * (rank - 1))(*(dtype.itemsize * stride for stride in reversed(strides[:-1]))),
        (ctypes.c_uint32 * rank)(*reversed(box)),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        NOT_INTERLEAVED,
        swizzle,
        PROMOTION_128_BYTES,
        FILL_WITH_ZEROS,
    )
    if error:
        raise RuntimeError(f"cuTensorMapEncodeTiled: error {error} for shape {tuple(shape)}, strides {strides}")
    return memory[first : first + MAP_BYTES] + struct.pack(f"{rank}i{rank}q", *shape, *strides)

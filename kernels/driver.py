"""Compiled kernels started by the CUDA driver itself, called through ctypes.

Triton's launcher works out every parameter anew at each call, tensor descriptors in Python, which takes the host 12 to
20 us. Here all that stays the same is written once for each compiled variant, and a call writes addresses alone. What
this file does not understand of a variant (`DirectLaunch.of` gives None then) Triton launches.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from functools import cache, lru_cache

import torch

SLOT = 192  # bytes of a tensor's parameters: an address, or a tensor map with shape and strides of up to 5 dimensions
MAP_BYTES, MAP_ALIGNMENT = 128, 64  # of a CUtensorMap
NUMBERS = {"i32": "i", "i64": "q", "u64": "Q", "fp32": "f"}  # Triton's types as formats of struct
# Values of the driver's enumerations (cuda.h).
MAP_TYPES = {torch.float16: 6, torch.bfloat16: 9}
NOT_INTERLEAVED, PROMOTION_128_BYTES, FILL_WITH_ZEROS = 0, 2, 0


@cache
def cuda_driver() -> ctypes.CDLL | None:
    """The driver's library with the three functions that are called; None without CUDA, or before CUDA 12.4."""
    if not torch.version.cuda:
        return None
    try:
        library = ctypes.CDLL("libcuda.so.1")
        launch, param_info, encode = library.cuLaunchKernel, library.cuFuncGetParamInfo, library.cuTensorMapEncodeTiled
    except (OSError, AttributeError):
        return None
    number, pointer = ctypes.c_uint, ctypes.c_void_p
    launch.argtypes = [pointer, *[number] * 7, pointer, pointer, pointer]
    param_info.argtypes = [pointer, ctypes.c_size_t, pointer, pointer]
    encode.argtypes = [pointer, number, number, *[pointer] * 5, *[number] * 4]
    return library


class DirectLaunch:
    """A compiled variant and the buffer that its parameters are read from.

    The buffer holds a slot for every tensor, which each call writes, then the numbers, which belong to the variant.
    """

    def __init__(self, variant, slots: struct.Struct, numbers: bytes, places: list[int], boxes: list) -> None:
        self.function, self.threads = variant.function, 32 * variant.metadata.num_warps
        self.shared_bytes = variant.metadata.shared
        self.slots, self.boxes = slots, boxes
        self._memory = ctypes.create_string_buffer(slots.size + len(numbers) + SLOT)
        self._start_of_slots = -ctypes.addressof(self._memory) % MAP_ALIGNMENT
        struct.pack_into(f"{len(numbers)}s", self._memory, self._start_of_slots + slots.size, numbers)
        first = ctypes.addressof(self._memory) + self._start_of_slots
        self._parameters = (ctypes.c_void_p * len(places))(*[first + place for place in places])
        self._lock = threading.Lock()  # from writing the buffer until the driver has read it
        self._start = cuda_driver().cuLaunchKernel

    @classmethod
    def of(cls, variant, tensors: tuple, numbers: tuple) -> DirectLaunch | None:
        """That of a variant that Triton compiled for arguments like these; None where Triton has to launch it.

        Args:
            variant: From `kernel.warmup`, loaded.
            tensors: Tensors, None and `stem.kernels.launch.Tiles`, the kernel's first arguments.
            numbers: Ints and floats, the next ones. All others are constants.
        """
        metadata = variant.metadata
        scratch = metadata.global_scratch_size or metadata.profile_scratch_size
        if not cuda_driver() or scratch or metadata.num_ctas != 1 or metadata.launch_cooperative_grid:
            return None
        if metadata.launch_pdl:
            return None
        types = list(variant.src.signature.values())
        maps = iter(getattr(metadata, "tensordesc_meta", None) or ())
        formats, places, sizes, boxes = [], [], [], []
        for slot, (x, kind) in enumerate(zip(tensors, types, strict=False)):
            place, box = slot * SLOT, None
            if kind.startswith("tensordesc"):
                description = next(maps, None)
                if description is None or description.get("fp4_padded") or x.base.dtype not in MAP_TYPES:
                    return None
                box = description["swizzle"], tuple(description["block_size"])
                rank = x.base.ndim
                strides = MAP_BYTES + -(-4 * rank // 8) * 8
                places += [place, *(place + MAP_BYTES + 4 * i for i in range(rank))]
                places += [place + strides + 8 * i for i in range(rank)]
                sizes += [MAP_BYTES, *[4] * rank, *[8] * rank]
            elif kind.startswith("*"):
                places.append(place)
                sizes.append(8)
            elif kind != "constexpr":  # a missing tensor is one
                return None
            formats.append(f"{SLOT}s" if box else f"Q{SLOT - 8}x")
            boxes.append(box)
        slots = struct.Struct("=" + "".join(formats))
        packed = b""
        for number, kind in zip(numbers, types[len(tensors) :], strict=False):
            if kind == "constexpr":  # 1 is one
                continue
            if kind not in NUMBERS:
                return None
            places.append(slots.size + len(packed))
            sizes.append(struct.calcsize(NUMBERS[kind]))
            packed += struct.pack(NUMBERS[kind], number).ljust(8, b"\0")
        for _scratch in range(2):  # two addresses that Triton appends, none here
            places.append(slots.size + len(packed))
            sizes.append(8)
        packed += bytes(8)
        return cls(variant, slots, packed, places, boxes) if parameter_sizes(variant.function) == sizes else None

    def __call__(self, grid: tuple[int, int, int], stream: int, addresses: list[int], layouts: list) -> int:
        """Start the kernel; returns the driver's error, 0 for none.

        Args:
            addresses: Of all tensors, 0 for None.
            layouts: (shape, strides, dtype) of what the kernel takes as a tensor descriptor, None for other tensors.
        """
        values = [
            described(address, *layout, *box) if box else address
            for address, layout, box in zip(addresses, layouts, self.boxes, strict=True)
        ]
        with self._lock:
            self.slots.pack_into(self._memory, self._start_of_slots, *values)
            return self._start(
                self.function, *grid, self.threads, 1, 1, self.shared_bytes, stream, self._parameters, None
            )


def parameter_sizes(function: int) -> list[int]:
    """Bytes of each parameter that a loaded kernel takes."""
    sizes, offset, size = [], ctypes.c_size_t(), ctypes.c_size_t()
    while not cuda_driver().cuFuncGetParamInfo(function, len(sizes), ctypes.byref(offset), ctypes.byref(size)):
        sizes.append(size.value)
    return sizes


@lru_cache(maxsize=4096)
def described(
    address: int, shape: tuple, strides: tuple, dtype: torch.dtype, swizzle: int, box: tuple[int, ...]
) -> bytes:
    """What a kernel takes for a tensor descriptor: the tensor map of a tensor at an address, its shape and strides.

    Args:
        shape, strides: Of the tensor [elements]; the last stride is 1.
        swizzle: The driver's number for how a tile is laid out in shared memory.
        box: Shape of what one copy brings [elements].
    Raises:
        RuntimeError: If the driver refuses.
    """
    rank = len(shape)
    memory = ctypes.create_string_buffer(MAP_BYTES + MAP_ALIGNMENT)
    start = -ctypes.addressof(memory) % MAP_ALIGNMENT
    error = cuda_driver().cuTensorMapEncodeTiled(
        ctypes.addressof(memory) + start,
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
    return memory[start : start + MAP_BYTES] + struct.pack(f"{rank}i{rank}q", *shape, *strides)

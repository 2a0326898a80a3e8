"""Constants, operand dtypes, padded dimensions, indices and TMA alignment that several kernels share."""

from collections.abc import Callable
from functools import cache, lru_cache
from inspect import signature

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LOG2_E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x * LOG2_E)
LN_2 = tl.constexpr(0.6931471805599453)
LARGEST_SUM = tl.constexpr(2.0**64)  # of weights relative to a guessed maximum; fp32 and bf16 end at 2^128
SUMS = tl.constexpr(8)  # partial sums of a row's weights: as many as keep every addition inside a thread
SMALLEST_SCALE = 1e-30  # stands for 0: kernels take row maxima before they scale, and divide by the scale
SMALLEST_DOT = 16  # columns of the smallest product
BUFFER_BYTES = 512 * 2**20  # of the sums of pairs of cells at a time, or of the masks of stand-ins
TMA_BYTES = 16  # alignment of addresses and strides
TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def take_turn(CAN_OVERLAP: tl.constexpr):
    """Wait until the kernel launched before has ended, then let the next one begin; see `overlap` of launch.launch."""
    if CAN_OVERLAP:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def wait_for_last(CAN_OVERLAP: tl.constexpr):
    """In the last program of the grid, wait until the kernel launched before has ended."""
    if CAN_OVERLAP:
        if (tl.program_id(0) == tl.num_programs(0) - 1) & (tl.program_id(1) == tl.num_programs(1) - 1):
            gdc_wait()


@triton.jit
def let_next_begin(CAN_OVERLAP: tl.constexpr):
    """Let the next kernel begin while this one runs; it must not need the results of this one before gdc_wait."""
    if CAN_OVERLAP:
        gdc_launch_dependents()


def for_all_lengths(function: Callable, aligned: str = "") -> triton.JITFunction:
    """triton.jit for a kernel that is not compiled again for every kind of prompt length.

    Triton compiles again where an int becomes 1 or a multiple of 16. Here only strides may cause that, and the argument
    `aligned`, the length of rows that are written in wider pieces if it is a multiple of 16. The kernel takes tensors
    first, the last one named *_ptr or *_source.
    """
    names = [name for name, of in signature(function).parameters.items() if of.annotation is not tl.constexpr]
    last_tensor = max(i for i, name in enumerate(names) if name.endswith(("_ptr", "_source")))
    numbers = [name for name in names[last_tensor + 1 :] if not name.startswith("stride_") and name != aligned]
    return triton.jit(function, do_not_specialize=numbers)


ALIGNED_OR_NOT = 16, 17  # a number of each kind for which Triton compiles, see for_all_lengths
SHORT_ROWS = 16, 32  # lanes of a row of few blocks, where one kernel scores and selects
ROW_SIZES = 64, 256, 1024  # lanes of other rows; few, since a first call compiles a kernel for each


@cache
def row_size(num_kv_blocks: int, sizes: tuple[int, ...] = ROW_SIZES) -> int:
    """Lanes of a row of blocks: the first of `sizes` that is no smaller, else the next power of two.

    Rows longer than `sizes` are for prompts so long that padding costs more than another compilation.
    """
    return next((lanes for lanes in sizes if num_kv_blocks <= lanes), triton.next_power_of_2(num_kv_blocks))


@triton.jit
def split_pair(index, num_heads):
    """Batch entry and head of a flat index, both int64."""
    index = index.to(tl.int64)
    return index // num_heads, index % num_heads


@cache
def padded_dim(head_dim: int) -> int:
    """Columns of a tile of D: the next power of two that a product takes."""
    return max(SMALLEST_DOT, triton.next_power_of_2(head_dim))


@cache
def operand_dtype(dtype: torch.dtype) -> tl.dtype:
    """Triton dtype in which tiles are multiplied: that of the inputs, but fp32 in the interpreter (no bf16 there)."""
    return tl.float32 if triton.knobs.runtime.interpret else TRITON_DTYPES[dtype]


@cache
def at_least_sm90(device: torch.device) -> bool:
    """Whether a device has TMA and programmatic dependent launch: NVIDIA, compute capability 9.0 or newer."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def num_multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors of a CUDA device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=4096)
def are_aligned(strides: tuple[int, ...], element_bytes: int) -> bool:
    """Whether TMA can step by the strides of B, H and N [elements]: multiples of 16 bytes, above 0."""
    batch, head, row, _ = strides
    return min(batch, head, row) > 0 and not (batch | head | row) * element_bytes % TMA_BYTES


def is_aligned(x: torch.Tensor) -> bool:
    """Whether TMA can address x [B, H, N, D]: its address is a multiple of 16 bytes, and `are_aligned` its strides."""
    return not x.data_ptr() % TMA_BYTES and are_aligned(x.stride(), x.element_size())


def with_dense_rows(x: torch.Tensor, tma: bool = False) -> torch.Tensor:
    """`x` itself if its last stride is 1 and, with `tma`, TMA can read it; else a contiguous copy."""
    if x.stride()[-1] == 1 and (not tma or is_aligned(x)):
        return x
    return x.clone(memory_format=torch.contiguous_format)

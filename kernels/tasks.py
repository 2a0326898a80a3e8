"""Tasks of the persistent kernels for sm_90: their number, their order and the scratch memory of a launch.

A task is one query block of one head, or of a pair of heads. A persistent program takes task after task from a counter.
"""

from functools import cache, lru_cache
from threading import Lock
from typing import NamedTuple

import torch

from .common import num_multiprocessors
from .launch import current_stream, launch

# With a quarter, 2K tokens and 16 key-value heads take 1.17 times as long on an NVIDIA H200.
BYTES_AT_ONCE = 16 << 20  # of keys and values of the heads in turn
NOTES = 2  # of a task in scratch memory: one for each consumer
GRAPH_TASKS = 1 << 19  # of all launches that graphs record, 4 MiB of scratch memory
FOR_GRAPHS: dict[torch.device, torch.Tensor] = {}  # what is left of it, zeros since before the first capture
LOCK = Lock()  # of FOR_GRAPHS


@cache
def is_sm90(device: torch.device) -> bool:
    """Whether a device is an NVIDIA GPU of compute capability 9.0; AMD's MI200 reports 9.0 too."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) == (9, 0)


@lru_cache(maxsize=4096)
def heads_at_once(num_keys: int, key_bytes: int, num_kv_heads: int) -> int:
    """Number of KV heads of all batch entries that take turns, a divisor of their number; several for short prompts.

    With several heads, all long tasks come before all short ones, and no multiprocessor begins a long one near the end.
    """
    most = max(1, BYTES_AT_ONCE // (2 * num_keys * key_bytes))
    return max(n for n in range(1, num_kv_heads + 1) if num_kv_heads % n == 0 and n <= most)


def new_scratch(device: torch.device, num_tasks: int) -> torch.Tensor:
    """Scratch memory of a launch: two counters, 0, and room to note tasks. Never an inference tensor: it is cached."""
    with torch.inference_mode(False):
        return torch.zeros(2 + NOTES * num_tasks, dtype=torch.int32, device=device)


@lru_cache(maxsize=64)  # launches of a stream run one after the other, and each leaves the counters at 0
def stream_scratch(device: torch.device, stream: int, num_tasks: int) -> torch.Tensor:
    """Scratch memory shared by all launches of a size on the current stream."""
    if device not in FOR_GRAPHS:
        FOR_GRAPHS[device] = new_scratch(device, GRAPH_TASKS)
    return new_scratch(device, num_tasks)


def launch_scratch(device: torch.device, num_tasks: int) -> torch.Tensor:
    """Scratch memory of a launch on the current stream; one that a CUDA graph records has its own, for good.

    A graph may run on any stream. Zeros within the graph, for want of FOR_GRAPHS, would cost each replay some us.
    """
    if not torch.cuda.is_current_stream_capturing():
        return stream_scratch(device, current_stream(device.index), num_tasks)
    size = -(-(2 + NOTES * num_tasks) // 4) * 4  # addresses stay multiples of 16 bytes
    with LOCK:
        left = FOR_GRAPHS.get(device)
        if left is None or len(left) < size:
            return new_scratch(device, num_tasks)
        FOR_GRAPHS[device] = left[size:]
        return left[:size]


class Tasks(NamedTuple):
    """Tasks of a problem as the forward kernels for sm_90 take them."""

    number: int
    programs: int
    heads: int
    """Query heads that take turns."""

    numbers: tuple[int, ...]
    """Arguments of a kernel from the strides of its output to num_q_blocks."""

    @classmethod
    @lru_cache(maxsize=4096)
    def of(
        cls,
        device: torch.device,
        q_shape: torch.Size,
        num_kv_heads: int,
        num_keys: int,
        out_strides: tuple[int, ...],
        bytes_of: int,
        size: int,
        heads: int = 1,
    ) -> "Tasks":
        """Tasks for queries and keys of which each number takes `bytes_of` bytes in the kernel.

        A task is a query block of `size` tokens of as many heads as `heads`, which count as one.
        """
        batch, num_q_heads, num_queries, head_dim = q_shape
        num_q_heads //= heads
        num_q_blocks = -(-num_keys // size) - (num_keys - num_queries) // size
        heads_per_kv_head = num_q_heads // num_kv_heads
        heads = heads_at_once(num_keys, head_dim * bytes_of, batch * num_kv_heads) * heads_per_kv_head
        num_tasks = num_q_blocks * batch * num_q_heads
        num_programs = min(num_tasks, num_multiprocessors(device))
        numbers = *out_strides[:3], num_q_heads, heads_per_kv_head, heads, num_queries, num_keys, num_q_blocks
        return cls(num_tasks, num_programs, heads, numbers)

    def launch(
        self, kernel, tensors: tuple, max_blocks: int, numbers: tuple = (), full_rows: int = 0, **constants: int
    ) -> None:
        """Launch a kernel of these tasks, with its first tensors and its numbers after the number of tasks."""
        ahead = min(full_rows, -(-self.programs // self.heads))  # a full row for each program until lists are written
        num_q_blocks = self.numbers[-1]
        numbers = *self.numbers, max_blocks, full_rows, ahead, self.number, *numbers
        launch(kernel, (self.programs,), tensors, numbers, overlap=full_rows < num_q_blocks, **constants)

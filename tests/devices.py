"""Library functions for tests on CPU tensors: impl="triton" runs on the GPU where there is one."""

from dataclasses import replace
from functools import wraps

import torch

from stem import BlockSelection


def to(device, value):
    """Tensors, selections and tuples of them on a device; anything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, BlockSelection):
        lists = dict(kv_indices=value.kv_indices.to(device), kv_num_blocks=value.kv_num_blocks.to(device))
        return replace(value, **lists)
    return tuple(to(device, x) for x in value) if isinstance(value, tuple) else value


def on_its_device(function):
    """`function` with tensors moved to the GPU and back when it is called with impl="triton" on a CUDA machine."""

    @wraps(function)
    def call(*args, **kwargs):
        if kwargs.get("impl") != "triton" or not torch.cuda.is_available():
            return function(*args, **kwargs)
        return to("cpu", function(*to("cuda", args), **{name: to("cuda", x) for name, x in kwargs.items()}))

    return call

"""Autocast as SDPA treats it: inputs are cast once, at the entry, and products inside keep their own precision."""

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor


def is_autocast(x: object) -> bool:
    """Whether autocast is on for the device of a tensor; False for anything else."""
    is_on = torch._C._is_any_autocast_enabled()  # 1 us faster than the question for a device
    return is_on and isinstance(x, Tensor) and not x.is_meta and torch.is_autocast_enabled(x.device.type)


def autocast_once(function: Callable) -> Callable:
    """The function with its tensors cast as autocast casts those of SDPA (fp64 stays), and with autocast off inside.

    The keyword argument `sinks` stays: autocast leaves the other logits of a softmax in fp32 too.
    """

    @wraps(function)
    def call(*args, **kwargs):
        if not torch._C._is_any_autocast_enabled():
            return function(*args, **kwargs)
        first = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        if not is_autocast(first):
            return function(*args, **kwargs)
        kind = first.device.type
        dtype = torch.get_autocast_dtype(kind)

        def cast(x):
            low = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
            return x.to(dtype) if low and x.device.type == kind else x

        with torch.autocast(kind, enabled=False):
            return function(*map(cast, args), **{k: x if k == "sinks" else cast(x) for k, x in kwargs.items()})

    return call

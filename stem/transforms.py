"""torch.func and forward-mode AD: impl="torch" and "reference" take part, the others raise an error that says so."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, peek_interpreter_stack
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes


def is_transformed(*tensors: Tensor) -> bool:
    """Whether a torch.func transform wraps one of the tensors, or forward-mode AD gave it a tangent."""
    if peek_interpreter_stack() is None and forward_ad._current_level < 0:
        return False
    return any(is_functorch_wrapped_tensor(x) or forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def refuse_transforms(error: Exception | None, *tensors: Tensor) -> None:
    """Raise NotImplementedError in place of an internal error of torch if the tensors are transformed."""
    if is_transformed(*tensors):
        raise NotImplementedError(
            "stem attention under torch.func and forward-mode AD: grad, vjp, jvp and their compositions need "
            "impl='torch' or 'reference'; vmap is not supported, so put the mapped dimension into the batch"
        ) from error


@contextmanager
def lasting_tensors() -> Iterator[None]:
    """Context for the tensors of a cache: outside inference mode and torch.func, they serve later calls of any kind."""
    with torch.inference_mode(False), torch._C._DisableFuncTorch():
        yield


@contextmanager
def vmap_inside_operators() -> Iterator[None]:
    """Context in an operator that uses vmap, which the checks of a compiled graph's first run would switch off."""
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for name in ("Batched", "VmapMode", "DynamicLayerFrontMode", "DynamicLayerBackMode"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, f"FuncTorch{name}"))
    with _disable_current_modes(), torch._C._ForceDispatchKeyGuard(included, excluded):
        yield

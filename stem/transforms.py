"""torch.func, forward-mode AD, tracing and meta tensors: what takes part, and errors that name what does not."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, peek_interpreter_stack
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

DATA_DECIDE = "a trace would keep the blocks that its example's data chose; use torch.compile or torch.export"


def is_transformed(*tensors: Tensor) -> bool:
    """Whether a torch.func transform wraps one of the tensors, or forward-mode AD gave it a tangent."""
    if peek_interpreter_stack() is None and forward_ad._current_level < 0:
        return False
    return any(is_functorch_wrapped_tensor(x) or forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def refuse_transforms(error: Exception | None, name: str, *tensors: Tensor) -> None:
    """Raise NotImplementedError in place of an internal error of torch if the tensors are transformed."""
    if is_transformed(*tensors):
        raise NotImplementedError(
            f"{name} under torch.func and forward-mode AD: grad, vjp, jvp and their compositions need impl='torch' or "
            "'reference'; vmap works over block_sparse_attention with these two, otherwise put the mapped dimension "
            "into the batch"
        ) from error


def _refuse_without_data(error: Exception, name: str, *tensors: Tensor) -> None:
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:
        raise NotImplementedError(f"{name} under make_fx: {DATA_DECIDE}") from error
    for x in tensors:
        fake = "fake" if type(x).__name__ == "FakeTensor" else None
        kind = "meta" if x.is_meta else fake or ("nested" if x.is_nested else x.layout)
        if kind is not torch.strided:
            raise NotImplementedError(f"{name} needs the data of its tensors, got {kind} tensors") from error


def refused_by_name(name: str) -> Callable:
    """Decorator for a function of that name: NotImplementedError where torch cannot transform, trace or compute it."""

    def decorate(function: Callable) -> Callable:
        @wraps(function)
        def call(*args, **kwargs):
            if torch.compiler.is_compiling():
                return function(*args, **kwargs)
            if torch.jit.is_tracing():
                raise NotImplementedError(f"{name} under torch.jit.trace: {DATA_DECIDE}")
            try:
                return function(*args, **kwargs)
            except (RuntimeError, AssertionError) as error:
                tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
                _refuse_without_data(error, name, *tensors)
                refuse_transforms(error, name, *tensors)
                raise

        return call

    return decorate


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

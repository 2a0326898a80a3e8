"""Say in words how a reader's answer to an exercise differs from the expected one."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def difference(found: Any, expected: Any) -> str | None:
    """Return a sentence on the first kind of difference found, or None if the answers agree.

    Floats agree to rtol 1e-4, atol 1e-5; whole numbers and booleans are equal.

    Args:
        found: Answer of the reader; dtype and device may differ from those expected, NaN equals NaN.
        expected: Number, tensor, or a dataclass, mapping or sequence of them.
    """
    if dataclasses.is_dataclass(expected) and type(found) is type(expected):
        found, expected = vars(found), vars(expected)
    if isinstance(expected, Mapping | list | tuple):
        return _difference_of_items(found, expected)
    if isinstance(expected, Tensor) and not isinstance(found, Tensor):
        return f"a tensor of shape {list(expected.shape)} is expected, got {type(found).__name__}"
    try:
        found, expected = (torch.as_tensor(x).detach().cpu() for x in (found, expected))
    except (TypeError, ValueError, RuntimeError):
        return None if found == expected else f"got {found!r}, expected {expected!r}"
    if found.shape != expected.shape:
        return f"the shape is {list(found.shape)}, expected {list(expected.shape)}"
    near = dict(rtol=1e-4, atol=1e-5) if expected.is_floating_point() else dict(rtol=0.0, atol=0.0)
    found, expected = (x.double() for x in (found, expected))
    wrong = ~torch.isclose(found, expected, equal_nan=True, **near)
    return _reason(found, expected, wrong) if wrong.any() else None


def _difference_of_items(found: Any, expected: Mapping | list | tuple) -> str | None:
    if not isinstance(found, type(expected)) or len(found) != len(expected):
        return f"a {type(expected).__name__} of {len(expected)} is expected, got {type(found).__name__}"
    keys = expected if isinstance(expected, Mapping) else range(len(expected))
    if isinstance(expected, Mapping) and set(found) != set(expected):
        return f"the keys are {list(found)}, expected {list(expected)}"
    told = ((key, difference(found[key], expected[key])) for key in keys)
    return next((f"item {key!r}: {reason}" for key, reason in told if reason), None)


def _reason(found: Tensor, expected: Tensor, wrong: Tensor) -> str:
    """Name a common mistake that explains all entries of `wrong`, else the first wrong entry."""
    unwritten = found.isnan() & ~expected.isnan()
    if unwritten.any():
        return f"{unwritten.sum()} of {found.numel()} entries are NaN: never written, or 0 / 0{_where(unwritten)}"
    if found.ndim == 0:
        return f"got {found.item():g}, expected {expected.item():g}"
    both = found.isfinite() & expected.isfinite()
    factor = (found * expected)[both].sum() / expected[both].square().sum()
    if factor.abs() > 1e-3 and torch.allclose(found, factor * expected, rtol=1e-4, atol=1e-5, equal_nan=True):
        return f"every entry is {factor:.4g} times the expected one: is a scale missing, or applied twice?"
    for dim in range(found.ndim):
        for change, turned in (("reversed", expected.flip(dim)), ("shifted by one", expected.roll(1, dim)),
                               ("shifted by one", expected.roll(-1, dim))):  # fmt: skip
            if torch.allclose(found, turned, rtol=1e-4, atol=1e-5, equal_nan=True):
                return f"dimension {dim} is {change}"
    if found.ndim > 1 and found.shape[-1] == found.shape[-2]:
        if torch.allclose(found, expected.mT, rtol=1e-4, atol=1e-5, equal_nan=True):
            return "the last two dimensions are transposed"
        if not (wrong & ~torch.eye(found.shape[-1], dtype=torch.bool)).any():
            return "only the diagonal is wrong: is it part of the mask?"
        if not wrong.tril().any():
            return "only entries above the diagonal, which lie in the future, are wrong"
    first = wrong.nonzero()[0].tolist()
    got, wanted = found[tuple(first)].item(), expected[tuple(first)].item()
    told = f"{wrong.sum()} of {found.numel()} entries are wrong{_where(wrong)}"
    return f"{told}; the first is {first}: got {got:.5g}, expected {wanted:.5g}"


def _where(wrong: Tensor) -> str:
    """Name the dimension along which the wrong entries lie in less than half of the indices, if there is one."""
    for dim, size in enumerate(wrong.shape):
        low, high = (f(wrong.nonzero()[:, dim]).item() for f in (torch.min, torch.max))
        if 2 * (high - low + 1) <= size:
            return f", all at indices {low} to {high} of dimension {dim}"
    return ""

"""Fixtures that several test files use: seeds, poisoned buffers, and the one tolerance rule."""

import dataclasses
import math
import os
from types import FunctionType

import pytest
import torch
from torch.utils._device import _device_constructors


def _interpret_faster() -> None:
    """Leave out what Triton's interpreter does for nothing, two thirds of the time of a small kernel.

    It replaces the functions of triton.language at every launch and, with nothing left to replace, at every call of a
    device function: here once, for good. It computes whether integers overflow and, as it does not debug, asserts
    nothing about it.
    """
    from triton.runtime import interpreter

    options = interpreter.interpreter_builder.options
    assert not options.debug
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
    language = interpreter.tl
    interpreter._patch_lang(FunctionType((lambda: None).__code__, {"tl": language, "core": language.core}))
    nothing_to_restore = interpreter._LangPatchScope()
    interpreter._patch_lang = lambda function: nothing_to_restore


if os.environ["TRITON_INTERPRET"] == "1":
    _interpret_faster()


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point():
        return tensor.fill_(float("nan"))
    if tensor.dtype in (torch.int16, torch.int32, torch.int64):
        return tensor.fill_(torch.iinfo(tensor.dtype).max)
    return tensor


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same generators."""
    torch.manual_seed(0)


@pytest.fixture
def fresh_plans(monkeypatch):
    """No plan of an earlier test is found, and none of this test's later."""
    import stem.planning

    monkeypatch.setattr(stem.planning, "PLANS", {})


@pytest.fixture
def poisoned_empty(monkeypatch):
    """torch.empty and its relatives return NaN (the largest integer for int types), so that unwritten values show."""
    _device_constructors()  # torch caches its functions for torch.device, which must not be the poisoned ones
    for owner, name in [
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ]:
        original = getattr(owner, name)

        def poisoned(*args, original=original, **kwargs):
            return _poison(original(*args, **kwargs))

        monkeypatch.setattr(owner, name, poisoned)


@pytest.fixture
def assert_close_to_oracle():
    """The tolerance rule: an implementation may be as wrong as eager code of its own precision, plus rounding.

    `assert_close_to_oracle(out, oracle, eager, reduction)`: the largest error of `out` against `oracle` (float64)
    is at most that of `eager` (the same formula in plain torch, in the dtype of `out`) plus sqrt(reduction) * eps,
    relative to the largest oracle value. `reduction` is the length of the longest sum: for attention, of the keys.
    `terms`: the largest value among terms that cancel, where the oracle is the small difference that they leave.
    """

    def assert_close(
        out: torch.Tensor, oracle: torch.Tensor, eager: torch.Tensor, reduction: int, terms: float = 0.0
    ) -> None:
        assert oracle.dtype == torch.float64, f"oracle must be float64, got {oracle.dtype}"
        assert out.shape == oracle.shape == eager.shape
        assert out.isfinite().all(), "out holds NaN or infinity"
        oracle, size = oracle.cpu(), max(oracle.abs().max().item(), terms)
        error = (out.cpu().double() - oracle).abs().max().item()
        eager_error = (eager.cpu().double() - oracle).abs().max().item()
        allowed = eager_error + math.sqrt(reduction) * torch.finfo(out.dtype).eps * size
        assert error <= allowed, f"error {error:.3g} exceeds {allowed:.3g} (eager {eager_error:.3g})"

    return assert_close

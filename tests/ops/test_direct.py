"""Calls that skip the dispatcher (ops/_direct.py): only where it could have ended in the CPU implementation alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import moeyard
from moeyard.ops import _direct, identity
from moeyard.ops.identity import _op


def is_direct(*args: Any) -> bool:
    return _op._direct.with_gradient(args) is not None


class Subclass(Tensor):
    pass


class SeesDispatch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class SeesFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_plain_tensors_and_parameters_are_direct() -> None:
    x = torch.randn(3)
    with torch.inference_mode():
        inference = torch.randn(3)
        direct = [is_direct(x), is_direct(inference)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        direct.append(is_direct(x))
    for plain in (x, inference, torch.nn.Parameter(x), torch.randn(4, 6)[::2, ::3], torch.ones(0)):
        direct.append(is_direct(plain))
    assert all(direct)


def test_anything_else_is_not() -> None:
    x = torch.randn(3, dtype=torch.complex64)
    for other in (
        torch.randn(3).as_subclass(Subclass),
        x.conj(),
        torch.imag(x.conj()),
        torch._efficientzerotensor(3),
        torch.eye(3).to_sparse(),
        torch.randn(3, device="meta"),
        torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.quint8),
        None,
        [1.0],
        1,
    ):
        assert not is_direct(other)


def test_a_lazy_negation_is_seen() -> None:
    x = torch.randn(3, dtype=torch.complex64)
    negative = torch.imag(x.conj())
    assert negative.is_neg()
    torch.testing.assert_close(identity(negative), -x.imag, rtol=0, atol=0)


def test_modes_see_the_op() -> None:
    x = torch.randn(3)
    with SeesDispatch() as dispatch:
        assert not is_direct(x)
        identity(x)
    assert any("moeyard.identity" in name for name in dispatch.seen)
    with SeesFunctions() as functions:
        assert not is_direct(x)
        identity(x)
    assert any("identity" in name for name in functions.seen)
    with torch.device("meta"):
        assert identity(x).device == x.device


def test_the_profiler_sees_the_op() -> None:
    x = torch.randn(3)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        identity(x)
    assert any(event.key == "moeyard::identity" for event in profile.key_averages())


def test_transforms_and_tracers_see_the_op() -> None:
    x = torch.randn(3)
    seen: list[bool] = []

    def f(v: Tensor) -> Tensor:
        seen.append(is_direct(v))
        return v * 2

    torch.vmap(f)(x)
    torch.func.grad(lambda v: f(v).sum())(x)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError):
        identity(torch.autograd.forward_ad.make_dual(x, torch.ones(3)))
    assert seen == [False, False]


def test_a_torch_with_other_internals_takes_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_direct, "_KNOWN", False)
    assert _direct.DirectCalls([("Tensor", False)]).with_gradient((torch.randn(3),)) is None


def test_another_number_of_arguments_is_not_direct() -> None:
    x = torch.randn(3)
    assert not is_direct()
    assert not is_direct(x, x)
    with pytest.raises(ValueError, match="zip"):
        _op(x, x)


def test_gradients_stay_the_outer_ops_business() -> None:
    x = torch.randn(3, requires_grad=True)
    with torch._C._AutoDispatchBelowAutograd():
        assert not identity(x).requires_grad
    assert identity(x).requires_grad
    with torch.no_grad():
        assert not identity(x).requires_grad


def test_both_ways_give_the_same_bits_and_errors() -> None:
    logits = torch.randn(50, 8)
    direct = moeyard.topk_gating(logits, 2)
    with SeesDispatch():
        dispatched = moeyard.topk_gating(logits, 2)
    for a, b in zip(direct, dispatched, strict=True):
        assert torch.equal(a, b)
    for k, error in ((9, ValueError), (True, TypeError), (2.0, TypeError), (2**63, ValueError), (None, TypeError)):
        with pytest.raises(error, match=r"^k: "):
            moeyard.topk_gating(logits, k)  # type: ignore[arg-type]
        with SeesDispatch(), pytest.raises(error, match=r"^k: "):
            moeyard.topk_gating(logits, k)  # type: ignore[arg-type]

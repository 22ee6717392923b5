"""The fuzz: every op under hostile shapes and values. A call returns a result that keeps the invariants, or raises
ValueError, TypeError or NotImplementedError; it changes nothing but its outputs, gives the same bits on any number of
threads and over any garbage in fresh memory, and so do its gradients.

1,000 calls here; `make sanitize` makes 100,000 under AddressSanitizer and UBSan (MOEYARD_FUZZ_CALLS).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from fuzz.cases import CASES, Arguments, Case
from fuzz.conftest import CALLS, SEED
from fuzz.guards import guarded
from fuzz.hostile import Hostile
from fuzz.invariants import same_bits

REFUSALS = (ValueError, TypeError, NotImplementedError)
#: several tests per op, so that workers share the load evenly
SHARES = 1 if CALLS < 10_000 else 8
EACH = -(-CALLS // (len(CASES) * SHARES))


@pytest.mark.timeout(120 if SHARES == 1 else 1800)
@pytest.mark.parametrize("share", range(SHARES))
@pytest.mark.parametrize("name", CASES)
def test_fuzz(name: str, share: int, record_property: Callable[[str, object], None]) -> None:
    calls = 0

    @seed(SEED * SHARES + share)
    @settings(
        max_examples=EACH,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def fuzz(data: st.DataObject) -> None:
        nonlocal calls
        calls += 1
        one_call(name, Hostile(data))

    try:
        fuzz()
    finally:
        record_property("fuzz_calls", calls)
    assert calls >= EACH


def one_call(name: str, h: Hostile) -> None:
    case = CASES[name]
    arguments = case.arguments(h)
    if h.rarely(4):
        arguments = h.spoil(arguments, types=case.public)
    remember(name, arguments)
    leaves = differentiated(case, arguments) if h.rarely(3) else []
    gradients = Gradients(leaves, h)
    first = outcome(case, arguments, gradients, threads=2, garbage=0xA5)
    if h.rarely(4):
        again = outcome(case, arguments, gradients, threads=h.pick(1, 5), garbage=0x3C)
        assert_equal(first, again)
    for storage, before in h.storages:
        assert torch.equal(storage, before), "an argument was written to"
    if first.result is not None:
        case.check(first.result, arguments)


class Outcome:
    """What a call came to: its result and gradients, or its refusal."""

    def __init__(self) -> None:
        self.result: Any = None
        self.tensors: list[Tensor] = []
        self.refusal = ""


def outcome(case: Case, arguments: Arguments, gradients: Gradients, *, threads: int, garbage: int) -> Outcome:
    out = Outcome()
    torch.set_num_threads(threads)
    with guarded(garbage):
        try:
            result = case.function(**arguments)
            tensors = [result] if isinstance(result, Tensor) else list(result)
            out.tensors = [*(t.detach() for t in tensors), *gradients.of(tensors)]
            out.result = result
        except REFUSALS as error:
            out.refusal = f"{type(error).__name__}: {error}"
    return out


class Gradients:
    """Gradients to the leaves for hostile incoming ones, the same on every call."""

    def __init__(self, leaves: list[Tensor], h: Hostile) -> None:
        self.leaves, self.h = leaves, h
        self.incoming: list[Tensor] | None = None

    def of(self, outputs: list[Tensor]) -> list[Tensor]:
        outputs = [o for o in outputs if o.requires_grad]
        if not self.leaves or not outputs:
            return []
        if self.incoming is None:
            self.incoming = [self.h.floats(list(o.shape), o.dtype) for o in outputs]
        return [g for g in torch.autograd.grad(outputs, self.leaves, self.incoming, allow_unused=True) if g is not None]


def differentiated(case: Case, arguments: Arguments) -> list[Tensor]:
    """Turns the differentiable arguments into leaves, in place."""
    leaves = []
    for name in case.differentiable:
        value = arguments.get(name)
        if isinstance(value, Tensor) and value.is_floating_point() and value.device.type == "cpu":
            arguments[name] = value.detach().requires_grad_()
            leaves.append(arguments[name])
    return leaves


def assert_equal(a: Outcome, b: Outcome) -> None:
    assert a.refusal == b.refusal
    assert len(a.tensors) == len(b.tensors)
    for x, y in zip(a.tensors, b.tensors, strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        assert same_bits(x, y), "other bits with other threads or other garbage"


def remember(name: str, arguments: Arguments) -> None:
    """Names the call in a failure's report; and in the file MOEYARD_FUZZ_LAST, for when it ends the process."""
    call = f"{name}(**{arguments})"
    note(call)
    if path := os.environ.get("MOEYARD_FUZZ_LAST"):
        Path(f"{path}.{os.environ.get('PYTEST_XDIST_WORKER', 'main')}").write_text(call)

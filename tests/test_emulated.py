"""Ops on the emulation of CUDA from Python, and what kernels report that they cannot raise."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys

import pytest
import torch

import moeyard
from emulation import ROOT, emulated
from moeyard import _native
from moeyard.ops import _device_errors, _register
from moeyard.ops.identity import _op


def report(kinds: int) -> None:
    """What a kernel does that has met bad values."""
    index, _ = _register.device_and_stream(torch.empty(0))
    word = ctypes.c_uint.from_address(_native.cuda().device_errors(index))
    word.value |= kinds


def test_ops_run_their_cuda_implementation_and_nothing_stays_behind() -> None:
    before = [op.cpu for op in _register.OPS]
    cuda = _native.cuda
    with emulated(seed=3):
        assert _op.cpu is _op.cuda
        module = _native.cuda()
        assert "emulation" in str(module.__file__)
        assert torch.isnan(torch.empty(3)).all()
        x = torch.randn(5, 7)
        assert torch.equal(moeyard.identity(x), x)
        assert _device_errors.used == {-1}
    assert [op.cpu for op in _register.OPS] == before
    assert _native.cuda is cuda
    assert not _device_errors.used
    assert not torch.are_deterministic_algorithms_enabled()


def test_every_way_to_the_cpu_gets_there(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def cuda(x: torch.Tensor) -> torch.Tensor:
        ran.append(x.shape[0])
        return x.clone()

    monkeypatch.setattr(_op, "cuda", cuda)
    x = torch.randn(3)
    with emulated():
        moeyard.identity(x)
        moeyard.identity(torch.randn(4, requires_grad=True)).sum().backward()
        torch.ops.moeyard.identity(torch.randn(5))
        torch.compile(moeyard.identity, backend="eager")(torch.randn(6))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
            moeyard.identity(torch.randn(7))
    moeyard.identity(x)
    assert ran == [3, 4, 4, 5, 6, 7]


def test_errors_of_the_engine_reach_python() -> None:
    with emulated(), pytest.raises(RuntimeError, match="kernel launch: invalid configuration"):
        _native.cuda().identity(0, 0, -5, -1, 0)


def test_check_device_errors() -> None:
    with emulated():
        moeyard.check_device_errors()
        report(8)
        report(4)
        with pytest.raises(ValueError, match=r"^selection_bias: expected no NaN.*; experts: expected ids .*cuda:-1$"):
            moeyard.check_device_errors()
        moeyard.check_device_errors()


@pytest.mark.parametrize(
    ("kind", "argument"),
    [
        (1, "forced_experts"),
        (2, "forced_experts"),
        (4, "selection_bias"),
        (8, "experts"),
        (16, "plan"),
        (32, "experts"),
        (64, "index"),
        (128, "ptr"),
        (256, "total"),
        (512, "ptr"),
        (1024, "batch"),
        (2048, "ptr"),
        (4096, "pos"),
        (8192, "cell"),
        (16384, "pos"),
        (32768, "cell"),
        (65536, "pos"),
        (131072, "edge_index"),
    ],
)
def test_each_kind_names_its_argument(kind: int, argument: str) -> None:
    with emulated():
        report(kind)
        with pytest.raises(ValueError, match=f"^{argument}: expected "):
            moeyard.check_device_errors()


def test_without_cuda_there_is_nothing_to_check() -> None:
    moeyard.identity(torch.randn(3))
    moeyard.check_device_errors()


def test_the_texts_stand_for_the_kinds_of_the_native_code() -> None:
    header = (ROOT / "csrc" / "common" / "device_errors.hpp").read_text()
    assert [int(value) for value in re.findall(r"^  k\w+ = (\d+),$", header, re.M)] == list(_device_errors._TEXTS)


CHECKED = """
import torch, moeyard
from emulation import ROOT, emulated
from test_emulated import report
with emulated():
    report(2)
    try:
        moeyard.identity(torch.zeros(3))
    except ValueError as e:
        print(e)
"""


@pytest.mark.parametrize("check", ["0", "1"])
def test_debug_mode_checks_at_once(check: str) -> None:
    environment = {**os.environ, "MOEYARD_CHECK_DEVICE": check, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", CHECKED], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("forced_experts: expected distinct ids") == (check == "1")

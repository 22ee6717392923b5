"""`moeyard doctor` tells what is there, what is missing and how to mend it, on the base install."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest
import torch

import moeyard
from moeyard import _native, doctor


def test_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    for topic in ("moeyard", "torch", "CPU kernels", "SIMD level", "threads", "CUDA kernels"):
        assert topic in text


def test_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "moeyard.doctor"], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    assert "built and working" in done.stdout


def test_build_without_cuda_is_said_with_its_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "cuda_built", False)
    (finding,) = (f for f in doctor.findings() if f.topic == "CUDA kernels")
    assert finding.state.startswith("not compiled in")
    assert finding.mend is not None
    assert "nvcc" in finding.mend


def test_rocm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    (finding,) = (f for f in doctor.findings() if f.topic.startswith("CUDA"))
    assert finding.state == "not usable: this torch is a ROCm build"
    assert doctor.missing_for_cuda() is not None
    with pytest.raises(RuntimeError, match="no kernels for ROCm"):
        _native.cuda()


def test_a_missing_extra_is_named_with_its_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        importlib.metadata, "requires", lambda name: ["torch>=2.8", 'no-such-thing>=1; extra == "chemistry"']
    )
    (finding,) = (f for f in doctor.findings() if f.topic.startswith("extra"))
    assert finding == doctor.Finding("extra chemistry", "missing no-such-thing", 'pip install "moeyard[chemistry]"')


def test_wrong_kernels_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moeyard, "identity", lambda x: x + 1)
    assert doctor.main([]) == 1


def test_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--help"]) == 0
    assert doctor.main(["--fix"]) == 2
    assert "--fix" in capsys.readouterr().err

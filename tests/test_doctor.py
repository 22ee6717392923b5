"""`moeyard doctor` tells what is there, what is missing and how to mend it, on the base install."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from types import SimpleNamespace

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


def pretend(monkeypatch: pytest.MonkeyPatch, *, runtime: int, driver: int, architectures: str = "80-real,90") -> None:
    """A GPU that torch is content with, and kernels built with that runtime."""
    module = SimpleNamespace(runtime_version=runtime, architectures=architectures)
    monkeypatch.setattr(_native, "cuda_built", True)
    monkeypatch.setattr(_native, "cuda", lambda: module)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "a GPU")
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)


def test_a_driver_older_than_the_kernels_runtime_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, runtime=13000, driver=12080)
    *_, finding = doctor._cuda()
    assert finding.state == "not usable: driver for CUDA 12.8, kernels built with CUDA 13.0"
    assert finding.mend == "update the driver"
    assert doctor.missing_for_cuda() == f"CUDA device: {finding.state}; update the driver"


@pytest.mark.parametrize("driver", [12020, 12080, 13000])
def test_a_driver_of_the_same_major_version_serves(monkeypatch: pytest.MonkeyPatch, driver: int) -> None:
    pretend(monkeypatch, runtime=12080, driver=driver)
    *_, finding = doctor._cuda()
    assert finding == doctor.Finding("CUDA device", "usable: a GPU")
    assert doctor.missing_for_cuda() is None


@pytest.mark.parametrize(
    ("architectures", "codes"),
    [
        ("80-real,90", "sm_80, sm_90, PTX"),
        ("75", "sm_75, PTX"),
        ("80-real,90a-real", "sm_80, sm_90a"),
        ("80-real,90-virtual", "sm_80, PTX"),
        ("native", "native"),
    ],
)
def test_what_the_kernels_were_compiled_for(monkeypatch: pytest.MonkeyPatch, architectures: str, codes: str) -> None:
    pretend(monkeypatch, runtime=12080, driver=12080, architectures=architectures)
    finding, _ = doctor._cuda()
    assert finding.state == f"compiled in (CUDA 12.8, {codes})"


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

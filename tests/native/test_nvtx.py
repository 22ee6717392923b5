"""Launches are NVTX ranges that bear the launcher's name. No GPU is needed: ranges open before the first CUDA call."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from emulation import ROOT
from moeyard import _native

LAUNCH = """
from moeyard import _native
try:
    _native.cuda().identity(0, 0, 16, 0, 0)
except RuntimeError:
    pass  # no driver, or an address that is none
"""


def test_a_profiler_sees_the_ranges(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if not _native.cuda_built or nvcc is None:
        pytest.skip("needs a build with CUDA, and nvcc for NVTX's header")
    library = tmp_path / "nvtx_ranges.so"
    source = Path(__file__).with_name("nvtx_ranges.cpp")
    subprocess.run([nvcc, "-std=c++20", "-shared", "-Xcompiler", "-fPIC", str(source), "-o", str(library)], check=True)
    environment = {**os.environ, "NVTX_INJECTION64_PATH": str(library)}
    done = subprocess.run([sys.executable, "-c", LAUNCH], env=environment, capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == ["push moeyard::identity", "pop"], done.stderr


def test_every_launcher_has_a_range_of_its_name() -> None:
    launchers = 0
    for path in sorted((ROOT / "csrc").glob("*/*_cuda.cu")):
        for name, body in re.findall(
            r"^void (\w+)\([^{;]*void\* stream\) \{\n(.*?)^\}$", path.read_text(), re.M | re.S
        ):
            launchers += 1
            assert re.search(rf"^  const LaunchScope scope\(\"moeyard::{name}\", device\);$", body, re.M), (
                path.name,
                name,
            )
    assert launchers >= 7

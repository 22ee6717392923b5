"""Every CPU source compiles for 64-bit ARM, and its kernels give there the bits that they give here.

Needs g++-aarch64-linux-gnu; the comparison of bits also needs qemu-user.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).resolve().parents[2]
LISTED = re.search(r"set\(CPU_SOURCES\n(.*?)\)", (ROOT / "CMakeLists.txt").read_text(), re.S)
SOURCES = LISTED[1].split() if LISTED else []
FLAGS = ["-std=c++20", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{ROOT / 'csrc'}"]


def tool(*names: str) -> str:
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"no {' or '.join(names)} on PATH")
    return found


@pytest.mark.parametrize("source", SOURCES)
def test_compiles_for_arm(source: str) -> None:
    """The host's Python headers serve for the bindings: their types are as wide there."""
    include = sysconfig.get_paths()["include"]
    if "bind" in source and "aarch64-linux-gnu" in (Path(include) / "pyconfig.h").read_text():
        pytest.skip("this Python's headers include other ones by architecture")  # Debian's
    headers = [f"-isystem{path}" for path in (include, pybind11.get_include())]
    command = [tool("aarch64-linux-gnu-g++"), *FLAGS, *headers, "-c", str(ROOT / source), "-o", "/dev/null"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr


@pytest.mark.timeout(600)
def test_same_bits_on_arm(tmp_path: Path) -> None:
    cross, emulator = tool("aarch64-linux-gnu-g++"), tool("qemu-aarch64", "qemu-aarch64-static")
    sources = [ROOT / "tests" / "native" / "kernel_digests.cpp", *(ROOT / s for s in SOURCES if "bind" not in s)]
    digests = []
    for compiler, run in ((tool("c++", "g++", "clang++"), []), (cross, [emulator])):
        program = tmp_path / Path(compiler).name
        static = ["-static"] if run else []
        subprocess.run([compiler, *FLAGS, *static, *map(str, sources), "-o", str(program)], check=True, timeout=300)
        done = subprocess.run([*run, str(program)], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        digests.append(done.stdout)
    assert digests[0].count("\n") >= 5
    assert digests[0] == digests[1]

"""The emulation of CUDA: builds it on demand, and runs ops on it.

    with emulated(seed=4):
        moeyard.topk_gating(logits, 2)      # CPU tensors, the CUDA kernels, one fibre per CUDA thread

See csrc/emulation/README.md. The flavour comes from MOEYARD_EMULATION: plain (the default), preempt, address, thread,
folded or blocks; those after preempt need their sanitizer loaded before Python: `under_sanitizer`, `.ci/sanitize`.
MOEYARD_EMULATION_ROOT names another tree to build the kernels of.
"""

from __future__ import annotations

import ctypes
import fcntl
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch

from moeyard import _native
from moeyard.ops import _device_errors, _register

ROOT = Path(__file__).resolve().parents[1]
SOURCES = Path(os.environ.get("MOEYARD_EMULATION_ROOT", ROOT))
FLAVOURS = {
    "plain": [],
    "preempt": ["-DMOEYARD_EMULATION_PREEMPT=ON"],
    "address": ["-DMOEYARD_SANITIZE=address,undefined"],
    "thread": ["-DMOEYARD_SANITIZE=thread"],
}
IDENTITIES = {"folded": 256, "blocks": 1}  # as how many threads the build `thread` shows a block to its sanitizer
FLAVOUR = os.environ.get("MOEYARD_EMULATION", "plain")
SANITIZERS = {"address": "libasan.so"} | dict.fromkeys(["thread", *IDENTITIES], "libtsan.so")


def tool(name: str) -> str:
    """A build tool, best the one of this environment."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        pytest.fail(f"no {name}: install the [test] extra")
    return found


def compiler() -> str:
    """GCC where there is one: Clang does not check the alignment of whole structs."""
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if found is None:
        pytest.skip("no C++ compiler to build the emulation of CUDA with; set PATH or CXX")
    return found


@contextmanager
def only_process(lock: Path) -> Iterator[None]:
    """Waits until no other process (of pytest-xdist, say) is inside."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def built_as(flavour: str) -> str:
    return "thread" if flavour in IDENTITIES else flavour


def build(flavour: str, target: str = "_cuda", root: Path = SOURCES) -> Path:
    """The folder with the built `target`: the module _cuda, or the program emulation_kernels. It is built again where
    sources are newer, and an error shows the compiler's output."""
    flavour = built_as(flavour)
    room = root / "build" / f"emulation-{flavour}"
    configure = [
        tool("cmake"),
        "-G",
        "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
        "-S",
        str(root),
        "-B",
        str(room),
    ]
    configure += [f"-DCMAKE_CXX_COMPILER={compiler()}", f"-DPython_EXECUTABLE={sys.executable}", *FLAVOURS[flavour]]
    configure += ["-DMOEYARD_EMULATION=ON"]
    with only_process(room.with_suffix(".lock")):
        stamp = room / "configured"
        if not stamp.exists() or stamp.read_text() != repr(configure):
            shutil.rmtree(room, ignore_errors=True)
            run(configure)
            stamp.write_text(repr(configure))
        run([tool("cmake"), "--build", str(room), "--target", target])
    return room


def run(command: list[str]) -> None:
    # A sanitizer that watches Python need not watch compilers.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    if done.returncode != 0:
        pytest.fail(f"{' '.join(command)}\n{done.stdout}", pytrace=False)


def fixed_addresses() -> list[str]:
    """The beginning of a command: randomisation of addresses with many bits leaves no room for a sanitizer's tables."""
    command = [shutil.which("setarch") or "setarch", "-R"]
    with suppress(OSError):
        return command if subprocess.run([*command, "true"], capture_output=True).returncode == 0 else []
    return []


def under_sanitizer(flavour: str) -> tuple[list[str], dict[str, str]]:
    """The beginning of a command and the environment in which Python can load the module of a flavour. libstdc++ too
    comes first: a sanitizer looks for __cxa_throw there when it starts."""
    if flavour not in SANITIZERS:
        return [], {}

    def path(library: str) -> str:
        command = [compiler(), f"-print-file-name={library}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    libraries = f"{path(SANITIZERS[flavour])}:{path('libstdc++.so.6')}"
    thread = "halt_on_error=1:report_mutex_bugs=0:history_size=0:ignore_noninstrumented_modules=1"
    thread += f":suppressions={ROOT}/tests/native/thread_sanitizer.supp"
    return fixed_addresses(), {"LD_PRELOAD": libraries, "ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": thread}


@cache
def module(flavour: str = FLAVOUR) -> ModuleType:
    path = build(flavour) / f"_cuda{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    spec = importlib.util.spec_from_file_location("_cuda", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def set_options(seed: int = 0, poison: int = 0xFF, resident_blocks: int = 0, strict_exit: bool = True) -> None:
    """The engine's options (csrc/emulation/engine.hpp), all of them."""
    library = ctypes.CDLL(str(module().__file__))
    identities = IDENTITIES.get(FLAVOUR, 0)
    library.moeyard_emulation_set_options(seed, poison, resident_blocks, int(strict_exit), identities)


@contextmanager
def emulated(seed: int = 0, **options: int) -> Iterator[None]:
    """CPU tensors go to the CUDA implementation of every op that has one, and its kernels run under the emulation.

    What torch.empty gives holds NaN and the largest integers, so that an output that a kernel forgot is seen.
    """
    native = module()

    def cuda() -> ModuleType:
        return native

    set_options(seed, **options)
    before = [op.cpu for op in _register.OPS]
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        for op in _register.OPS:
            op.cpu = op.cuda or op.cpu
        torch.use_deterministic_algorithms(True, warn_only=True)
        with mock.patch.object(_native, "cuda", cuda):
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        for op, cpu in zip(_register.OPS, before, strict=True):
            op.cpu = cpu
        native.take_device_errors(-1)
        _device_errors.used.discard(-1)
        set_options()

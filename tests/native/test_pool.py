"""The thread pool alone, in a program of its own: many callers, nested calls, exceptions, forks while it is busy.

`make sanitize` runs the same program under ThreadSanitizer and AddressSanitizer.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(300)
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the program forks")
def test_pool_stress(tmp_path: Path) -> None:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler; set PATH")
    program = tmp_path / "pool_stress"
    sources = [ROOT / "tests" / "native" / "pool_stress.cpp", ROOT / "csrc" / "common" / "parallel.cpp"]
    flags = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{ROOT / 'csrc'}"]
    subprocess.run([compiler, *flags, *map(str, sources), "-o", str(program)], check=True, timeout=60)
    done = subprocess.run([str(program), "300", "10"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "clean" in done.stdout


def in_python(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert not done.stderr


COPY = """
import os, threading, torch
from moeyard import _native
x = torch.arange(5_000_011, dtype=torch.uint8)
def copy(threads, size=len(x)):
    out = torch.empty(size, dtype=torch.uint8)
    _native.cpu.identity(x.data_ptr(), out.data_ptr(), size, threads)
    assert out.numpy().tobytes() == x[:size].numpy().tobytes()
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="no /proc/self/task to count threads in")
def test_small_work_makes_no_thread_and_large_work_no_more_than_asked_for() -> None:
    in_python(
        COPY
        + """
count = lambda: len(os.listdir("/proc/self/task"))
before = count()
copy(1)
copy(8, size=1000)
assert count() == before, "a thread for one piece"
for threads, workers in ((3, 2), (2, 2), (5, 4), (64, 4)):
    copy(threads)
    assert count() == before + workers, (threads, count() - before)
"""
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_forks_while_another_thread_computes() -> None:
    """The children and their children compute too, and the parent ends cleanly with its workers asleep."""
    in_python(
        COPY
        + """
done = threading.Event()
def compute():
    while not done.is_set():
        copy(3)
busy = threading.Thread(target=compute)
busy.start()
def family(generations):
    child = os.fork()
    if child == 0:
        try:
            copy(3)
            family(generations - 1) if generations else None
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of a fork with threads about, which is the point
for _ in range(20):
    family(2)
done.set()
busy.join()
"""
    )


def test_the_interpreter_ends_with_workers_asleep() -> None:
    for _ in range(2):
        in_python(COPY + "copy(3)")

"""Scripts that must print the same on every SIMD level that this machine has."""

from __future__ import annotations

import os
import subprocess
import sys

from moeyard import _native

LEVELS = ("baseline", "avx2", "avx512")


def assert_same_on_all_levels(script: str, baseline_argument: str = "", other_argument: str = "") -> None:
    """Runs `script`, which prints a digest, once per level; the level is read once per process. Its argument may differ
    too (a number of threads, say)."""
    printed = set()
    for level in LEVELS[: LEVELS.index(_native.cpu.simd_best()) + 1]:
        environment = {**os.environ, "MOEYARD_SIMD": level, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", script, baseline_argument if level == LEVELS[0] else other_argument]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        printed.add(done.stdout)
    assert len(printed) == 1
    assert printed.pop().strip()

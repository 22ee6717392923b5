"""The machine, the versions and the threads that rows are measured with; nothing that names the host."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch

import moeyard
from moeyard import _native

#: Versions that the document states, of those that are installed.
DISTRIBUTIONS = (
    "torch", "numpy", "scipy", "transformers", "torch-geometric", "torch-cluster", "pyg-lib", "vesin", "vesin-torch",
    "nvalchemi-toolkit-ops", "matscipy", "freud-analysis", "tonari", "megatron-core", "fairchem-core", "axolotl",
    "numba",
)  # fmt: skip


def machine() -> str:
    """Processor, and the cores that this process may use."""
    info: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            info.setdefault(key.strip(), value.strip())
    name = info.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in info:
        name += f", family {info['cpu family']} model {info.get('model', '?')}"
    cores = all_threads()
    return f"{name}, {cores} core{'s' if cores > 1 else ''}"


def folder_name(machine_name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", machine_name.lower()).strip("-")


def versions() -> dict[str, str]:
    """Of moeyard, its SIMD level, Python, and whatever peers are installed."""
    found = {"moeyard": moeyard.__version__, "simd": _native.cpu.simd_level(), "python": platform.python_version()}
    for name in DISTRIBUTIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


@contextlib.contextmanager
def using_threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def all_threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

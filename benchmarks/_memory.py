"""Peak memory of a call, in a process of its own.

The kernel's record of the largest resident set (VmHWM) is reset through /proc/self/clear_refs just before the call.
malloc is told to map every block of 64 KiB or more by itself, so that nothing freed earlier hides what a call takes.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from _harness import Suite, _arrays

METHOD = "VmHWM of a child process, 1 thread"


def record(suite: Suite, file: str, output_share: float = 1.5, extra_mb: float = 16.0) -> None:
    """Rows for the `memory_cases(quick)` of a benchmark file: {row: a call}."""
    target = f"peak: at most {output_share:g} times the outputs" + (f" + {extra_mb:g} MB" if extra_mb else "")
    for row, found in measure(file, suite.quick).items():
        if found is None:
            suite.record(f"{row}: peak memory", None, "MB", note="not measured: /proc/self/clear_refs is not writable")
            continue
        peak, outputs = (n / 2**20 for n in found)
        limit = f"<= {output_share * outputs + extra_mb:.1f} MB"
        suite.record(
            f"{row}: peak memory", peak, "MB", peer=outputs, peer_name="its outputs", target=limit,
            note=f"{target}; {METHOD}",
        )  # fmt: skip


def measure(file: str, quick: bool) -> dict[str, list[int] | None]:
    """{row: [peak, outputs]} in bytes; None where the kernel does not let us."""
    malloc = {"MALLOC_MMAP_THRESHOLD_": str(64 * 1024), "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0"}
    command = [sys.executable, __file__, file, *(["--quick"] if quick else [])]
    done = subprocess.run(command, env=os.environ | malloc, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, list[int] | None] = json.loads(done.stdout.splitlines()[-1])
    return found


def _status(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


def _peak(call: Any) -> list[int] | None:
    call()  # the first call makes what is kept: code pages, the allocator's own tables
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = _status("VmRSS")
    outputs = call()
    peak = _status("VmHWM")
    return [max(0, peak - before), sum(a.nbytes for a in _arrays(outputs))]


def _child(file: str, quick: bool) -> None:
    import torch

    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("measured", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["measured"] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    print(json.dumps({row: _peak(call) for row, call in module.memory_cases(quick).items()}))


if __name__ == "__main__":
    _child(sys.argv[1], "--quick" in sys.argv[2:])

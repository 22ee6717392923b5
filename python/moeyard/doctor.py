"""`moeyard doctor`: what this installation holds, what it lacks, and how to mend each. Needs the base install only."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch

import moeyard
from moeyard import _native


@dataclass(frozen=True)
class Finding:
    """One line of the report; `mend` says what to do about it, None where there is nothing to do."""

    topic: str
    state: str
    mend: str | None = None


def findings() -> list[Finding]:
    """Everything the doctor looks at, in the order of the report."""
    return [*_versions(), *_cpu(), *_cuda(), *_extras()]


def _versions() -> Iterator[Finding]:
    yield Finding("moeyard", f"{moeyard.__version__}, Python {platform.python_version()}, {platform.machine()}")
    yield Finding("torch", f"{torch.__version__} (any version from 2.8 on works, without a rebuild)")


def _cpu() -> Iterator[Finding]:
    x = torch.arange(8.0)
    works = torch.equal(moeyard.identity(x), x)
    yield Finding(
        "CPU kernels",
        "built and working" if works else "built, but the identity op gives a wrong result",
        None if works else "reinstall: pip install --force-reinstall --no-deps moeyard",
    )
    try:
        level, best = _native.cpu.simd_level(), _native.cpu.simd_best()
        forced = "" if level == best else f" (this machine can do {best}; MOEYARD_SIMD is set)"
        yield Finding("SIMD level", level + forced)
    except ValueError as error:
        yield Finding("SIMD level", str(error), "unset MOEYARD_SIMD, or set it to a level that this machine has")
    cores = os.cpu_count() or 1
    yield Finding("threads", f"{torch.get_num_threads()} of {cores} cores (torch.set_num_threads changes it)")


def _cuda() -> Iterator[Finding]:
    if torch.version.hip is not None:
        yield Finding("CUDA device", "not usable: this torch is a ROCm build", "ROCm is not supported; use CPU tensors")
        return
    if not _native.cuda_built:
        mend = "for GPU kernels: put nvcc (CUDA 12 or later) on PATH and reinstall from source"
        yield Finding("CUDA kernels", "not compiled in; CPU tensors work", mend)
        return
    version = _native.cuda().runtime_version
    codes = _codes(_native.cuda().architectures)
    yield Finding("CUDA kernels", f"compiled in (CUDA {_release(version)}, {codes})")
    if torch.version.cuda is None:
        yield Finding("CUDA device", "not usable: this torch is a CPU build", "install a CUDA build of torch")
    elif not torch.cuda.is_available():
        mend = "check `nvidia-smi` and the driver; CPU tensors work meanwhile"
        yield Finding("CUDA device", "not usable: torch finds no GPU or driver", mend)
    elif (driver := torch._C._cuda_getDriverVersion()) // 1000 < version // 1000:  # type: ignore[attr-defined]
        # torch brings its own CUDA runtime, which may be older than ours and content with this driver.
        state = f"not usable: driver for CUDA {_release(driver)}, kernels built with CUDA {_release(version)}"
        yield Finding("CUDA device", state, "update the driver")
    else:
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        yield Finding("CUDA device", f"usable: {names}")


def missing_for_cuda() -> str | None:
    """What stands between this installation and a GPU, and how to mend it; None if nothing does."""
    return next((f"{f.topic}: {f.state}; {f.mend}" for f in _cuda() if f.mend), None)


def _release(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _codes(architectures: str) -> str:
    """Machine code of 80 and 90 and PTX of 90 from "80-real,90", as CMake means it; words such as all stay."""
    listed = architectures.split(",")
    codes = [re.sub(r"^(\d+[af]?)(-real)?$", r"sm_\1", arch) for arch in listed if not arch.endswith("-virtual")]
    has_ptx = any(re.fullmatch(r"\d+[af]?(-virtual)?", arch) for arch in listed)
    return ", ".join([*codes, "PTX"] if has_ptx else codes)


def _extras() -> Iterator[Finding]:
    try:
        required = importlib.metadata.requires("moeyard") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding(
            "extras", "unknown: moeyard runs from a source tree", "pip install . (or -e .) in the source tree"
        )
        return
    wanted: dict[str, list[str]] = {}
    for line in required:
        match = re.match(r"\s*([\w.-]+).*;.*extra\s*==\s*['\"]([\w-]+)['\"]", line)
        if match and match[1] != "moeyard":
            wanted.setdefault(match[2], []).append(match[1])
    for extra, packages in wanted.items():
        missing = [name for name in packages if not _installed(name)]
        if missing:
            yield Finding(f"extra {extra}", f"missing {', '.join(missing)}", f'pip install "moeyard[{extra}]"')
        else:
            yield Finding(f"extra {extra}", "complete")


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def main(argv: list[str] | None = None) -> int:
    """Prints the report. Exit status 0 when the base install works, 1 when it does not, 2 for wrong arguments."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments in (["-h"], ["--help"]):
        print("usage: moeyard doctor\n\nTells what was built, what is usable, what is missing and how to mend it.")
        return 0
    if arguments:
        print(f"moeyard doctor: takes no arguments, got {' '.join(arguments)}", file=sys.stderr)
        return 2
    report = findings()
    width = max(len(f.topic) for f in report)
    for finding in report:
        print(f"{finding.topic:<{width}}  {finding.state}")
        if finding.mend:
            print(f"{'':<{width}}    mend: {finding.mend}")
    broken = any(f.topic == "CPU kernels" and f.mend for f in report)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())

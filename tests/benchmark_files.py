"""What tests of benchmarks/ share: its files as modules, and an environment in which they run."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"

if not BENCHMARKS.is_dir():
    pytest.skip("not in a checkout", allow_module_level=True)


def load(stem: str) -> Any:
    """A file of benchmarks/ with its neighbours importable."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.append(str(BENCHMARKS))
    if stem in sys.modules:
        return sys.modules[stem]
    spec = importlib.util.spec_from_file_location(stem, BENCHMARKS / f"{stem}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[stem] = module
    spec.loader.exec_module(module)
    return module


def environment() -> dict[str, str]:
    """For a process in another folder: what is importable here is importable there. Not a part of pytest-xdist's run,
    for which pytest-benchmark would switch itself off."""
    paths = [str(BENCHMARKS), *(str(Path(p).resolve()) for p in sys.path if p)]
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return own | {"PYTHONPATH": os.pathsep.join(paths)}

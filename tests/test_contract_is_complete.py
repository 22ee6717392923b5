"""No public op escapes the contract suite."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import moeyard.ops
from ops.contract import OpContract


def test_every_public_op_has_a_contract_class() -> None:
    for path in sorted((Path(__file__).parent / "ops").glob("test_*.py")):
        importlib.import_module(f"ops.{path.stem}")
    covered = set()
    pending = [OpContract]
    while pending:
        cls = pending.pop()
        pending += cls.__subclasses__()
        if "function" in cls.__dict__:
            covered.add(cls.__dict__["function"].__func__.__name__)
    functions = {n for n in moeyard.ops.__all__ if inspect.isfunction(getattr(moeyard.ops, n))}
    assert functions
    assert functions <= covered

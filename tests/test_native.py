"""The native modules: what they promise at import, threads, fork, SIMD levels, stubs."""

from __future__ import annotations

import ast
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import emulation
import moeyard
from moeyard import _native

PACKAGE = Path(__file__).resolve().parents[1] / "python" / "moeyard"
LARGE = 5_000_011  # bytes: several pieces of the copy kernel


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=110
    )


def test_importing_makes_no_thread_and_touches_no_gpu() -> None:
    code = (
        "import os, torch; before = len(os.listdir('/proc/self/task')) if os.path.isdir('/proc/self/task') else 0\n"
        "import moeyard\n"
        "after = len(os.listdir('/proc/self/task')) if os.path.isdir('/proc/self/task') else 0\n"
        "assert before == after, (before, after)\n"
        "assert not torch.cuda.is_initialized()\n"
        "import sys; assert not {'lightning', 'rdkit', 'gemmi', 'typer', 'pandas'} & set(sys.modules)\n"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["_cpu", "_cuda"])
def test_stubs_name_what_the_module_has(module: str) -> None:
    if module == "_cpu":
        native = _native.cpu
    else:  # without CUDA the emulated one, which has the same bindings
        native = _native.cuda() if _native.cuda_built else emulation.module()
    tree = ast.parse((PACKAGE / f"{module}.pyi").read_text())
    stub = {n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    stub |= {n.target.id for n in tree.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    assert stub == {name for name in vars(native) if not name.startswith("__")}


def test_without_cuda_the_error_says_how_to_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "cuda_built", False)
    with pytest.raises(RuntimeError, match=r"built without CUDA.*reinstall"):
        _native.cuda()


def test_fork_after_the_pool_was_used() -> None:
    x = torch.arange(LARGE, dtype=torch.uint8)
    moeyard.identity(x)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def child() -> None:
        out = torch.empty_like(x)
        _native.cpu.identity(x.data_ptr(), out.data_ptr(), LARGE, 4)
        queue.put(bool((out.numpy() == x.numpy()).all()))

    process = context.Process(target=child)
    process.start()
    assert queue.get(timeout=60)
    process.join(60)
    assert process.exitcode == 0


def test_many_python_threads_share_the_pool() -> None:
    x = torch.randint(0, 255, (LARGE,), dtype=torch.uint8)
    outputs: list[torch.Tensor | None] = [None] * 8

    def work(i: int) -> None:
        for _ in range(20):
            outputs[i] = moeyard.identity(x)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert all(o is not None and torch.equal(o, x) for o in outputs)


def test_simd_level_can_be_forced_down() -> None:
    done = python("from moeyard import _native; print(_native.cpu.simd_level())", MOEYARD_SIMD="baseline")
    assert done.stdout.strip() == "baseline", done.stderr


def test_unknown_simd_level_is_named() -> None:
    done = python("from moeyard import _native; _native.cpu.simd_level()", MOEYARD_SIMD="mmx")
    assert "ValueError: MOEYARD_SIMD: expected baseline, avx2 or avx512, got 'mmx'" in done.stderr

"""The law of layers: _native < ops < nn, data < models < train < cli. An arrow points down only."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "python" / "moeyard"

# What each room may see. `integrations` also sees the foreign library that it serves.
MAY_SEE: dict[str, set[str]] = {
    "_native": set(),
    "ops": {"_native"},
    "nn": {"ops"},
    "data": {"ops"},
    "models": {"ops", "nn", "data"},
    "train": {"ops", "nn", "data", "models", "doctor"},
    "integrations": {"ops", "nn"},
    "doctor": {"_native", "ops"},
    "cli": {"ops", "nn", "data", "models", "train", "doctor"},
    "__init__": {"ops"},
    "__main__": {"cli"},
}
BASE_INSTALL = {"torch", "numpy"}


def sources() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path


def imported_modules(path: Path) -> Iterator[tuple[str, int]]:
    """Full dotted names; `from moeyard import x` is `moeyard.x` where x is a room, else the public ops."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: use an absolute import, so that the room is visible"
            if node.module == "moeyard":
                yield from ((f"moeyard.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield str(node.module), node.lineno


def room_of(module: str) -> str:
    parts = module.split(".")
    room = parts[1] if len(parts) > 1 else "ops"  # `import moeyard` gives the public ops
    if room in {"_cpu", "_cuda"}:
        return "_native"
    return room if room in MAY_SEE else "ops"


@pytest.mark.parametrize(("room", "path"), [pytest.param(r, p, id=str(p.relative_to(PACKAGE))) for r, p in sources()])
def test_imports_point_down(room: str, path: Path) -> None:
    assert room in MAY_SEE, f"{path.name}: a room that the law does not know; add it to MAY_SEE"
    for module, line in imported_modules(path):
        top = module.split(".")[0]
        if top == "moeyard":
            seen = room_of(module)
            assert seen == room or seen in MAY_SEE[room], f"{path}:{line}: {room} may not import {module}"
        elif room in {"_native", "ops", "doctor", "__init__"}:
            allowed = top in BASE_INSTALL or top in sys.stdlib_module_names
            assert allowed, f"{path}:{line}: {room} imports {module}, which the base install does not bring"


def test_the_law_itself_has_no_cycle() -> None:
    order = ["_native", "ops", "nn", "data", "models", "doctor", "train", "cli"]
    for i, room in enumerate(order):
        assert MAY_SEE[room] <= set(order[:i])
    assert "data" not in MAY_SEE["nn"]
    assert "nn" not in MAY_SEE["data"]


def test_a_violation_is_caught(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("from moeyard.nn import router\nimport moeyard\nfrom moeyard import topk_gating\n")
    rooms = [room_of(module) for module, _ in imported_modules(bad)]
    assert rooms == ["nn", "ops", "ops"]
    assert "nn" not in MAY_SEE["data"]


@pytest.mark.parametrize("path", sorted((ROOT / "csrc").rglob("*.[chp]*")), ids=lambda p: str(p.relative_to(ROOT)))
def test_headers_that_native_code_does_without(path: Path) -> None:
    text = path.read_text()
    for header in ("torch/", "ATen/", "c10/"):
        assert f"#include <{header}" not in text, f"{path}: kernels know nothing of torch"
    for header in ("iostream", "sstream", "fstream", "iomanip", "locale", "regex"):
        assert f"#include <{header}>" not in text, f"{path}: no locales beside torch's (see common/check.hpp)"


def test_one_stem_in_every_layer() -> None:
    """Each op's folder in csrc has its Python file, its test and its header of the same name."""
    stems = {p.name for p in (ROOT / "csrc").iterdir() if p.is_dir()} - {"common", "emulation"}
    assert stems
    for stem in stems:
        assert (ROOT / "csrc" / stem / f"{stem}.hpp").is_file()
        assert (PACKAGE / "ops" / f"{stem}.py").is_file()
        assert (ROOT / "tests" / "ops" / f"test_{stem}.py").is_file()


def test_public_names() -> None:
    """Everything that is public in moeyard.ops is public at the top level."""
    import moeyard.ops

    assert set(moeyard.ops.__all__) <= set(moeyard.__all__)
    for name in moeyard.__all__:
        assert hasattr(moeyard, name)

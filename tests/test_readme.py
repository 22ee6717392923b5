"""The README keeps its word: its snippets run, its commands exist, its file map is the tree."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
LAYERS = (ROOT / "python" / "moeyard" / "nn" / "README.md").read_text()


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


@pytest.mark.parametrize(
    "code", [*blocks("python"), *blocks("python", LAYERS)], ids=lambda c: c.strip().splitlines()[-1][:40]
)
def test_snippet_runs(code: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr


def test_first_example_is_short() -> None:
    lines = [line for line in blocks("python")[0].splitlines() if line.strip() and not line.startswith(("import", "#"))]
    assert len(lines) <= 10


def commands() -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line.removeprefix("$ ") for line in lines if line]


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = {c.split()[1] for c in commands() if c.startswith("make ")}
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M), f"make {target} is in the README, not in the Makefile"


@pytest.mark.parametrize("command", sorted({c for c in commands() if c.startswith("moeyard ")}))
def test_moeyard_commands_exist(command: str) -> None:
    """The subcommand and each option that the README shows are known to the command line."""
    words = command.split()
    done = subprocess.run(
        [sys.executable, "-m", "moeyard", words[1], "--help"], capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr
    for option in (w for w in words if w.startswith("--")):
        assert option in done.stdout


def file_map() -> list[str]:
    (block,) = re.findall(r"## File map\n.*?```\n(.*?)```", README, re.S)
    return [line.split()[0] for line in block.splitlines() if line.strip()]


def test_file_map_names_what_exists() -> None:
    for path in file_map():
        assert (ROOT / path).exists(), f"{path}: in the README's file map, not in the tree"


def test_file_map_is_complete() -> None:
    """Every room of the tree has its line."""
    named = {p.rstrip("/") for p in file_map()}
    rooms = {
        str(d.relative_to(ROOT))
        for parent in (ROOT / "csrc", ROOT / "python" / "moeyard")
        for d in parent.iterdir()
        if d.is_dir() and d.name != "__pycache__"
    }
    assert rooms <= named


DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "DESIGN.md",
    "docs/integrations.md",
    *(f"python/moeyard/{room}/README.md" for room in ("models", "nn", "ops")),
]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_relative_links_lead_somewhere(document: str) -> None:
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / target).exists(), f"{document}: {target} does not exist"

"""The examples and the snippets of docs/integrations.md run as pasted."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "integrations.md"
#: Several processes: tests/nn/test_distributed.py runs it.
APART = ("expert_parallel.py",)
EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*.py") if path.name not in APART)
SNIPPETS = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.S)
FOREIGN = {"lightning": None, "torch_geometric": None, "transformers": "5.0"}


def needs(code: str) -> None:
    """Skips where a library that the code imports is missing."""
    for name, version in FOREIGN.items():
        if re.search(rf"^(from|import) .*\b{name}\b", code, re.M):
            pytest.importorskip(name, minversion=version)
    if "transformers.Trainer" in code:
        pytest.importorskip("accelerate")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(
    path: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs(path.read_text())
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed.strip()
    assert "False" not in printed, "an example that finds its results unequal"


@pytest.mark.parametrize("code", SNIPPETS, ids=[code.strip().splitlines()[-1][:40] for code in SNIPPETS])
def test_snippet(code: str) -> None:
    needs(code)
    exec(compile(code, str(DOCUMENT), "exec"), {"__name__": "__main__"})


def test_document_names_what_exists() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", DOCUMENT.read_text())
    for target in links:
        assert (DOCUMENT.parent / target).exists(), target
    assert {path.name for path in EXAMPLES} <= {Path(target).name for target in links}

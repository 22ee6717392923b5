"""`moeyard report`: what it writes and prints, and mistakes in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("typer", reason="needs moeyard[cli]")
pytest.importorskip("matplotlib", reason="needs moeyard[train]")

from cli.test_cli import in_process, without
from moeyard.cli import main, report_command
from moeyard.train import report
from train.runs import write_run


@pytest.fixture(autouse=True)
def _a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs/structures/1a2b3c4d", 3)


@pytest.mark.parametrize("name", ["structures/1a2b3c4d", "runs/structures/1a2b3c4d"])
def test_writes_and_prints(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", name]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "structures/1a2b3c4d: finished"
    assert lines[-1] == "written to runs/structures/1a2b3c4d/report.html"
    assert Path("runs/structures/1a2b3c4d/report.html").is_file()


def test_open(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    opened: list[str] = []
    monkeypatch.setattr(report_command.webbrowser, "open", opened.append)
    assert main(["report", "structures/1a2b3c4d", "--open"]) == 0
    assert opened == [Path("runs/structures/1a2b3c4d/report.html").resolve().as_uri()]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("runs/structures", "run.json or config.json in it, none is; runs below it: 1a2b3c4d"),
        ("structures/1a2b3c4e", "did you mean structures/1a2b3c4d?"),
        ("nothing", "below runs/; 1 runs are there"),
    ],
)
def test_what_is_no_run_is_one_line(name: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", name]) == 2
    error = capsys.readouterr().err
    assert error.startswith("moeyard: ")
    assert line in error
    assert error.count("\n") == 1


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(run: object) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "write_report", full)
    assert main(["report", "structures/1a2b3c4d"]) == 1
    error = capsys.readouterr().err
    assert error == "moeyard: cannot write into runs/structures/1a2b3c4d: No space left on device\n"


def test_a_report_needs_no_trainer() -> None:
    result = in_process(["report", "structures/1a2b3c4d"], without("lightning", "tensorboard", "safetensors"))
    assert result.returncode == 0, result.stderr

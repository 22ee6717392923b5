"""The command line: help, versions, exit codes, missing extras, mistakes, Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import moeyard
from moeyard.cli import main
from train.tiny import tiny_table

PACKAGE = str(Path(moeyard.__file__).resolve().parents[1])


def without(*packages: str) -> str:
    """Python code that makes imports of these packages fail as if they were not installed."""
    return (
        "import sys\n"
        "class Hide:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {packages!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Hide())\n"
    )


def in_process(arguments: list[str], prelude: str = "") -> subprocess.CompletedProcess[str]:
    code = f"{prelude}\nimport sys\nfrom moeyard.cli import main\nsys.exit(main({arguments!r}))"
    environment = {**os.environ, "COLUMNS": "100"}
    environment["PYTHONPATH"] = os.pathsep.join([PACKAGE, os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, env=environment, check=False
    )


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"moeyard {moeyard.__version__}\n"


def test_doctor_passes_on_arguments_and_status(monkeypatch: pytest.MonkeyPatch) -> None:
    from moeyard import doctor

    seen: list[list[str] | None] = []
    monkeypatch.setattr(doctor, "main", lambda argv=None: seen.append(argv) or 7)
    assert main(["doctor"]) == 7
    assert main(["doctor", "--help"]) == 7
    assert seen == [[], ["--help"]]


def test_the_base_install_has_doctor_and_version_and_says_what_is_missing() -> None:
    bare = without("typer", "rich", "click", "lightning", "matplotlib", "rdkit", "gemmi")
    calls = [["doctor"], ["--version"], ["demo"], [], ["--help"]]
    # One process for all: most of its time is the import of torch.
    prelude = bare + f"from moeyard.cli import main\nprint([main(a) for a in {calls!r}])"
    result = in_process(["demo"], prelude)
    assert result.stdout.splitlines()[-1] == "[0, 0, 2, 2, 2]"
    assert result.returncode == 2
    assert result.stderr == 4 * "moeyard: this command needs Typer and Rich: pip install moeyard[cli]\n"


class TestWithTyper:
    @pytest.fixture(autouse=True)
    def _needs_the_extra(self) -> None:
        pytest.importorskip("typer", reason="needs moeyard[cli]")

    def test_help(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--help"]) == 0
        top = capsys.readouterr().out
        assert "demo" in top
        assert "doctor" in top
        assert main(["demo", "--help"]) == 0
        text = capsys.readouterr().out
        for option in ("structures", "steps", "seconds", "max-atoms-per-batch", "experts", "top-k", "seed", "out"):
            assert f"--{option}" in text
        assert "--workers" in text

    @pytest.mark.parametrize(
        "arguments", [["demos"], ["demo", "--step", "3"], ["demo", "--steps", "many"], ["demo", "x"]]
    )
    def test_mistakes_in_the_call(self, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert main(arguments) == 2
        assert "Traceback" not in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "line"),
        [
            (["--structures", "no/such/folder"], "no/such/folder does not exist"),
            (["--steps", "0"], "--steps: expected 1 to 2147483647, got 0"),
            (["--top-k", "9"], "--top-k: expected 1 to 8, got 9"),
            (["--out", os.devnull + "/run"], "--out: cannot write into"),
        ],
    )
    def test_a_users_mistake_is_one_line(
        self, arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pytest.importorskip("lightning", reason="needs moeyard[train]")
        assert main(["demo", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("moeyard: ")
        assert line in error
        assert error.count("\n") == 1

    def test_a_missing_extra_is_one_line(self) -> None:
        result = in_process(["demo"], without("lightning"))
        assert result.returncode == 2
        assert result.stderr == "moeyard: demo needs lightning: pip install moeyard[train]\n"

    def test_rdkit_missing(self, tmp_path: Path) -> None:
        pytest.importorskip("lightning", reason="needs moeyard[train]")
        result = in_process(["demo", "--out", str(tmp_path)], without("rdkit"))
        assert result.returncode == 2
        assert "pip install" in result.stderr
        assert "moeyard[structures]" in result.stderr
        assert result.stderr.count("\n") == 1

    def test_an_empty_folder(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for package in ("lightning", "rdkit", "gemmi"):
            pytest.importorskip(package, reason="needs moeyard[train,structures]")
        (tmp_path / "empty").mkdir()
        assert main(["demo", "--structures", str(tmp_path / "empty"), "--out", str(tmp_path / "run")]) == 2
        error = capsys.readouterr().err
        assert "no readable PDB, mmCIF or SDF structure" in error
        assert error.count("\n") == 1


TINY_DEMO = """
import sys
sys.path.insert(0, {tests!r})
from train.tiny import tiny_table
from moeyard.train import demo
import torch
torch.set_num_threads(1)
demo.embed_molecules = lambda progress=None, seed=0: (tiny_table(), [])
"""


class TestTinyDemo:
    """The whole command on generated molecules."""

    @pytest.fixture(autouse=True)
    def _needs_the_extras(self) -> None:
        for package in ("typer", "lightning", "matplotlib"):
            pytest.importorskip(package, reason="needs moeyard[cli,train]")

    prelude = TINY_DEMO.format(tests=str(Path(__file__).resolve().parents[1]))

    def test_prints_the_summary(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from moeyard.train import demo

        monkeypatch.setattr(demo, "embed_molecules", lambda progress=None, seed=0: (tiny_table(), []))
        torch.set_num_threads(1)
        assert main(["demo", "--steps", "5", "--out", str(tmp_path)]) == 0
        text = capsys.readouterr().out
        for word in ("structures/s", "atoms/s", "batch fill", "median step", "loss", "expert usage", str(tmp_path)):
            assert word in text
        assert "step 5/5" in text
        # Not a terminal: plain lines only.
        assert "\x1b" not in text
        assert "\r" not in text

    @pytest.mark.skipif(os.name == "nt", reason="SIGINT to another process is a POSIX matter")
    def test_interrupt_writes_and_returns_130(self, tmp_path: Path) -> None:
        arguments = ["demo", "--steps", "9999", "--out", str(tmp_path)]
        code = f"{self.prelude}\nfrom moeyard.cli import main\nsys.exit(main({arguments!r}))"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([PACKAGE, os.environ.get("PYTHONPATH", "")])}
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        metrics = tmp_path / "metrics.jsonl"
        deadline = time.monotonic() + 80
        while time.monotonic() < deadline and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 130, err
        assert "Traceback" not in err
        assert "interrupted" in out
        assert (tmp_path / "loss.png").exists()
        assert (tmp_path / "summary.json").exists()

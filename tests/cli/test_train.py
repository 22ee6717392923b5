"""moeyard train, eval and runs: what they print, exit codes, mistakes, Ctrl-C, a full disk."""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer", reason="needs moeyard[cli]")
pytest.importorskip("lightning", reason="needs moeyard[train]")
pytest.importorskip("tensorboard", reason="needs moeyard[train]")

from engines import has_gpu
from moeyard.cli import main
from moeyard.models.tokens_demo import TokenClassifier
from moeyard.train.callbacks import Stop
from moeyard.train.runs import Run, RunStore
from train.toy import SMALL, curve, run

SETTINGS = [word for setting in SMALL for word in ("--set", setting)]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # these batches are too small to share


def command(root: Path, *more: str) -> list[str]:
    return ["train", "tokens-demo", *SETTINGS, "--out", str(root), *more]


def only(root: Path) -> Run:
    (found,) = RunStore(root).runs()
    return found


def test_train_eval_and_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tmp_path)) == 0
    text = capsys.readouterr().out
    found = only(tmp_path)
    for part in ("step 24/24", "finished after 24 steps", "best val_loss", f"written to {found.folder}/"):
        assert part in text
    assert "\x1b" not in text
    names = {path.name for path in found.folder.iterdir()}
    assert {"config.json", "run.json", "metrics.jsonl", "checkpoints", "tensorboard"} <= names
    last = curve(found.folder)[-2]
    assert (last["step"], last["epoch"]) == (24, 4)
    assert {"loss_label", "loss_balance", "accuracy", "learning_rate", "grad_norm", "tokens", "batch_fill"} <= set(last)

    assert main(command(tmp_path)) == 0
    assert f"already finished: {found.folder}, 24 steps" in capsys.readouterr().out

    assert main(["eval", "tokens-demo", found.signature[:4], "--last", "--out", str(tmp_path), "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "step 24" in text
    assert f"{curve(found.folder)[-1]['val_loss']:.6g}" in text

    other = run(tmp_path, "seed=1").folder.name
    assert main(["runs", "list", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert found.signature in text
    assert other in text
    assert main(["runs", "show", found.signature, "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for part in ("finished", "val_accuracy", "model.dim", "optimizer.learning_rate"):
        assert part in text
    assert main(["runs", "compare", found.signature, other, "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "seed" in text
    assert "last val_loss" in text
    assert "model.dim" not in text


def test_the_config_of_a_run_is_a_config(tmp_path: Path) -> None:
    """config.json trains the same run again, elsewhere."""
    first = run(tmp_path / "first")
    arguments = [
        "train",
        "tokens-demo",
        "--config",
        str(first.folder / "config.json"),
        "--out",
        str(tmp_path / "again"),
    ]
    assert main(arguments) == 0
    again = only(tmp_path / "again")
    assert again.signature == first.folder.name
    assert curve(again.folder) == curve(first.folder)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["train", "token-demo"],
            "system token-demo: expected one of structures-demo, tokens-demo; did you mean tokens",
        ),
        (["train", "tokens-demo", "--set", "model.dims=3"], "model.dims: unknown key; did you mean model.dim?"),
        (["train", "tokens-demo", "--set", "seed=x"], "seed: expected a valid integer, got 'x'"),
        (["train", "tokens-demo", "--config", "no.toml"], "--config: cannot read no.toml: No such file"),
        (["train", "tokens-demo", "--seconds", "0"], "--seconds: expected a positive number up to 1e9, got 0"),
        (["train", "tokens-demo", "--steps", "0"], "max_steps: expected greater than or equal to 1, got 0"),
        (
            ["train", "tokens-demo", "--set", "model.experts_per_token=9"],
            "expected experts_per_token <= num_experts = 4",
        ),
        (
            ["train", "tokens-demo", "--set", "data.evaluation_sequences=0", "--set", "early_stopping.patience=2"],
            "early_stopping.patience: expected evaluations to go by",
        ),
        (["train", "tokens-demo", "--out", os.devnull], f"cannot write into {os.devnull}/tokens-demo"),
        (["train", "structures-demo", "--set", "data.folder=nowhere"], "nowhere does not exist"),
        (["eval", "tokens-demo", "abc"], "signature abc: no runs in"),
        (["eval", "nothing", "abc"], "system nothing: expected one of"),
        (["runs", "show", "abc"], "signature abc: no runs in runs"),
        (["runs", "compare", "abc"], "signatures: expected two or more"),
        (["sweep", "tokens-demo"], "--grid: expected at least one"),
        (
            ["sweep", "tokens-demo", "--grid", "seed=0", "--engine", "cloud"],
            "--engine: expected one of local, slurm, ray",
        ),
        (["sweep", "tokens-demo", "--grid", "seed=0", "--jobs", "0"], "--jobs: expected at least 1, got 0"),
        (["sweep", "tokens-demo", "--grid", "seed"], "--grid: expected key=value,value"),
        (["sweep", "tokens-demo", "--grid", "sed=1"], "--set: sed: unknown key; did you mean seed?"),
    ],
)
def test_a_users_mistake_is_one_line(
    arguments: list[str],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("moeyard: ")
    assert line in error
    assert error.count("\n") == 1


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
@pytest.mark.parametrize("system", ["tokens-demo", "structures-demo"])
def test_a_device_that_is_not_there(system: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", system, "--set", "device=cuda", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("moeyard: device = cuda: CUDA ")
    assert error.count("\n") == 1
    assert RunStore(tmp_path).runs() == []


def test_two_runs_on_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished = run(tmp_path)
    with Run(finished.folder).lock():
        assert main(command(tmp_path, "--restart")) == 2
    assert f"{finished.folder} is in use by process {os.getpid()}" in capsys.readouterr().err
    assert only(tmp_path).status == "finished"


def interrupt_twice(begun: threading.Event, seen: threading.Event) -> None:
    """Sends two Ctrl-C, the second well after this process has dealt with the first, however slow the machine."""
    if begun.wait(60):
        os.kill(os.getpid(), signal.SIGINT)
        if seen.wait(30):
            time.sleep(1.2)
            os.kill(os.getpid(), signal.SIGINT)


def send_signal(number: int, when: Callable[[], bool]) -> threading.Thread:
    """Sends the signal to this process as soon as `when` says so."""

    def send() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not when():
            time.sleep(0.005)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def steps_done(root: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in root.glob("*/*/metrics.jsonl"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_taken_up_again(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        slow_steps(patch, 0.02)
        handler = signal.getsignal(number)
        thread = send_signal(number, lambda: steps_done(tmp_path / "run") >= 3)
        try:
            assert main(command(tmp_path / "run")) == 130
        finally:
            thread.join()
        assert signal.getsignal(number) is handler
    found = only(tmp_path / "run")
    assert " steps; the same command goes on\n" in capsys.readouterr().out
    assert found.status == "interrupted"
    assert 3 <= found.info["steps"] < 24
    assert (found.folder / "checkpoints" / f"step-{found.info['steps']:08d}").is_dir()
    assert main(command(tmp_path / "run")) == 0
    assert curve(found.folder) == curve(whole.folder)


def slow_steps(patch: pytest.MonkeyPatch, seconds: float) -> threading.Event:
    """Makes every batch take so long; the event tells that one has begun."""
    step, begun = TokenClassifier.training_step, threading.Event()

    def slow(self: TokenClassifier, *arguments: Any) -> Any:
        begun.set()
        # In short pieces: a signal that another thread receives does not end a sleep.
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(min(seconds, 0.05))
        return step(self, *arguments)

    patch.setattr(TokenClassifier, "training_step", slow)
    return begun


def test_the_second_interrupt_ends_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        # The first Ctrl-C would have to wait for these steps.
        begun, seen = slow_steps(patch, 30.0), threading.Event()
        thread = threading.Thread(target=interrupt_twice, args=(begun, seen))
        handle = Stop._handle

        def note(self: Stop, number: int, frame: object) -> None:
            handle(self, number, frame)
            seen.set()

        patch.setattr(Stop, "_handle", note)
        thread.start()
        started = time.monotonic()
        try:
            assert main(command(tmp_path / "run")) == 130
        finally:
            thread.join()
        assert time.monotonic() - started < 30
    assert capsys.readouterr().err == "moeyard: interrupted\n"
    assert only(tmp_path / "run").status == "interrupted"
    assert main(command(tmp_path / "run")) == 0
    assert curve(only(tmp_path / "run").folder) == curve(whole.folder)


def test_a_full_disk_keeps_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(tmp_path / "whole")
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if "step-00000012" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert main(command(tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert error.startswith("moeyard: cannot write the checkpoint of step 12 to ")
    assert error.endswith("(step-00000008 is kept): No space left on device\n")
    found = only(tmp_path / "run")
    assert found.status == "failed"
    assert "No space left" in found.info["error"]
    assert main(command(tmp_path / "run")) == 0
    assert curve(found.folder) == curve(whole.folder)


@pytest.mark.parametrize(
    "share", [pytest.param(0.1, marks=pytest.mark.slow), 0.5, pytest.param(0.8, marks=pytest.mark.slow)]
)
def test_a_disk_that_fills_up(tmp_path: Path, share: float) -> None:
    """A real file system without room for the whole run: it stops with a message, and ends like any other once there
    is room."""
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir(), kept.mkdir()
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    mount = f"mount -t tmpfs -o size=1m tmpfs {disk}"
    if not shutil.which("unshare") or subprocess.run([*namespace, "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("no file system of one's own: needs unshare and user namespaces")
    whole = run(tmp_path / "whole")
    room = int(share * sum(path.stat().st_size for path in whole.folder.rglob("*") if path.is_file()))
    train = shlex.join([sys.executable, "-m", "moeyard", *command(disk)])
    script = f"""
        {mount} && mount -o remount,size={room} {disk} || exit 90
        {train} && exit 91
        [ $? = 2 ] || exit 92
        mount -o remount,size=64m {disk} && {train} && cp -r {disk}/. {kept}
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*namespace, "sh", "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (error,) = done.stderr.strip().splitlines()
    assert error.startswith("moeyard: cannot write ")
    assert error.endswith(": No space left on device")
    assert curve(only(kept).folder) == curve(whole.folder)


@pytest.mark.parametrize(
    "arguments", [["train", "tokens-demo", "--set", "sed=1"], ["eval", "tokens-demo", "abc"]], ids=lambda a: a[0]
)
def test_a_mistake_does_not_wait_for_lightning(arguments: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; from moeyard.cli import main; "
        "code = main(sys.argv[1:]); print('lightning' in sys.modules); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, *arguments, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "False\n"), done.stderr


def test_a_sweep_can_be_looked_at_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for steps in (["--steps", "6"], ["--set", "max_steps=6"], []):
        assert main(["sweep", "tokens-demo", "--grid", "seed=0,1", "--out", str(tmp_path), "--dry-run", *steps]) == 0
        shown.append(capsys.readouterr().out)
    assert "tokens-demo: 2 runs" in shown[0]
    assert shown[0] == shown[1] != shown[2]
    assert not list(tmp_path.iterdir())


def test_a_time_limit_is_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command(tmp_path, "--steps", "100000", "--seconds", "0.5")]) == 0
    assert "(time limit); the same command goes on" in capsys.readouterr().out
    assert only(tmp_path).status == "interrupted"

"""torchrun on the CPU (gloo): several processes do what one does, and stop and resume together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning", reason="needs moeyard[train]")
pytest.importorskip("typer", reason="needs moeyard[cli]")

import moeyard
from moeyard.train.checkpoint import Checkpoints
from moeyard.train.errors import UsageError
from moeyard.train.processes import Processes
from moeyard.train.runs import RunStore
from moeyard.train.trainer import count_batches, fit
from train.toy import SMALL, curve, run, settings, toy

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")


def torchrun(count: int, root: Path, *more: str) -> subprocess.Popen[str]:
    words = [word for setting in (*SMALL, *more) for word in ("--set", setting)]
    paths = [str(Path(moeyard.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, "-m", "moeyard", "train", "tokens-demo", *words, "--out", str(root)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def same_curve(first: Path, second: Path) -> None:
    """Integers exactly, the rest to rounding: the processes add in another order."""
    for want, got in zip(curve(first), curve(second), strict=True):
        assert set(want) == set(got)
        for name, value in want.items():
            if isinstance(value, float):
                assert got[name] == pytest.approx(value, rel=1e-4, abs=1e-6), (want["step"], name)
            else:
                assert got[name] == value, (want["step"], name)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_do_what_one_does(tmp_path: Path, count: int) -> None:
    torch.set_num_threads(1)
    more = (f"accumulate={count}", "max_steps=12")
    process = torchrun(count, tmp_path / "several", *more)
    text, _ = process.communicate(timeout=180)
    assert process.returncode == 0, text
    # One of them speaks.
    assert text.count("finished after 12 steps") == 1
    one = run(tmp_path / "one", *more)
    (several,) = RunStore(tmp_path / "several").runs()
    assert several.signature == one.folder.name
    same_curve(one.folder, several.folder)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_interrupted_together_and_finished_by_one(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    # More batches per epoch than a moment trains on.
    process = torchrun(2, tmp_path / "several", "max_steps=300")
    folder = next(iter([tmp_path / "several" / "tokens-demo"]))
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not any(p.stat().st_size for p in folder.glob("*/metrics.jsonl")):
        time.sleep(0.02)
    # As a terminal does: to the launcher and all of its processes.
    os.killpg(process.pid, signal.SIGINT)
    text, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    (stopped,) = RunStore(tmp_path / "several").runs()
    assert stopped.status == "interrupted", text
    assert 0 < stopped.info["steps"] < 300
    again = run(tmp_path / "several", "max_steps=300")
    assert again.status == "finished"
    same_curve(run(tmp_path / "one", "max_steps=300").folder, again.folder)


def test_a_checkpoint_of_two_processes_counts_the_batches_of_one(tmp_path: Path) -> None:
    """A step is two batches here, of which each of two processes had one: an odd number of steps shows it."""
    torch.set_num_threads(1)
    whole = run(tmp_path / "whole", "max_steps=7")
    part = run(tmp_path / "parts", "max_steps=7", "checkpoint_every=3", seconds=1e-9)
    assert part.steps == 1
    kept = Checkpoints(part.folder / "checkpoints", system="tokens-demo", signature=part.folder.name)
    state = kept.load(kept.latest() or tmp_path)
    as_written = {**state, "loops": json.loads(json.dumps(state["loops"]))}
    count_batches(state, 1)
    assert state["loops"] != as_written["loops"]
    kept.save(state, 1)
    assert curve(run(tmp_path / "parts", "max_steps=7").folder) == curve(whole.folder)
    count_batches(state, 2)
    assert state["loops"] == as_written["loops"]


def test_processes_that_cannot_share_a_step(tmp_path: Path) -> None:
    config = settings("accumulate=3")
    data = toy().open_data(config)
    with pytest.raises(
        UsageError, match=r"accumulate: expected a multiple of the 2 processes.*got 3; --set accumulate=4"
    ):
        fit(toy().build_model(config, data), data, config, tmp_path, processes=Processes(0, 2, 2))


def test_one_process_is_its_own_first() -> None:
    assert Processes().first
    assert Processes().from_first(lambda: 7) == 7

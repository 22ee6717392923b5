"""Resume: a run that was stopped or killed at any moment ends with the records and weights of the undisturbed one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning", reason="needs moeyard[train]")
pytest.importorskip("tensorboard", reason="needs moeyard[train]")

import moeyard
from moeyard.train.checkpoint import Checkpoints
from moeyard.train.config import signature
from moeyard.train.errors import UsageError
from moeyard.train.metrics import read_metrics
from moeyard.train.runs import Run
from train.toy import curve, run, settings, stop_after, toy


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # these batches are too small to share


def weights(folder: Path) -> dict[str, torch.Tensor]:
    kept = Checkpoints(folder / "checkpoints", system=folder.parent.name, signature=folder.name)
    place = kept.latest()
    assert place is not None
    state = kept.load(place)
    optimizer = state["optimizer_states"][0]["state"]
    moments = {f"{key}.{name}": value for key, entry in optimizer.items() for name, value in entry.items()}
    return {**state["state_dict"], **moments}


def same(first: Path, second: Path) -> None:
    assert curve(first) == curve(second)
    want, got = weights(first), weights(second)
    assert set(want) == set(got)
    for name, tensor in want.items():
        assert torch.equal(tensor, got[name]), name


PLATEAU = ("schedule.name=plateau", "schedule.patience=1", "schedule.min_delta=0.5", "early_stopping.patience=9")


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("ema_decay=0.9", "precision=bf16", "gradient_clip=null"),
        ("workers=1", "accumulate=1", *PLATEAU),
    ],
    ids=["cosine", "average-bf16", "plateau-worker"],
)
def test_stopped_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]) -> None:
    whole = run(tmp_path / "whole", *more)
    for steps in (7, 6):
        stop_after(monkeypatch, steps)
        part = run(tmp_path / "parts", *more)
        assert (part.status, part.reason) == ("interrupted", "time limit")
        assert Run(part.folder).status == "interrupted"
    assert part.steps == 13
    # Lines after the checkpoint, one of them torn: as a kill leaves them.
    with (part.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 14, "loss": 9.0}\n{"step": 15, "lo')
    monkeypatch.undo()
    part = run(tmp_path / "parts", *more)
    assert (part.status, part.steps) == ("finished", 24)
    assert Run(part.folder).info["starts"] == 3
    assert part.best == whole.best
    assert part.warnings == whole.warnings
    same(whole.folder, part.folder)


def test_what_is_random_in_a_model_resumes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout draws from the global generator, and so does whoever runs before and after."""
    build = type(toy()).build_model

    def with_dropout(self: Any, config: Any, data: Any) -> Any:
        model = build(self, config, data)
        model.norm = torch.nn.Sequential(model.norm, torch.nn.Dropout(0.3))
        return model

    monkeypatch.setattr(type(toy()), "build_model", with_dropout)
    state = torch.random.get_rng_state()
    whole = run(tmp_path / "whole")
    assert torch.equal(torch.random.get_rng_state(), state), "the global random state was touched"
    with monkeypatch.context() as patch:
        stop_after(patch, 9)
        run(tmp_path / "parts")
    torch.rand(3)
    same(whole.folder, run(tmp_path / "parts").folder)


def test_settings_that_change_no_result_may_change_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 9)
        run(tmp_path / "parts")
    again = run(tmp_path / "parts", "workers=1", "checkpoint_every=7")
    same(whole.folder, again.folder)


def test_a_finished_run_is_left_alone_until_restarted(tmp_path: Path) -> None:
    first = run(tmp_path)
    before = (first.folder / "metrics.jsonl").read_bytes()
    again = run(tmp_path)
    assert again.already
    assert (again.status, again.steps, again.best) == ("finished", 24, first.best)
    assert (first.folder / "metrics.jsonl").read_bytes() == before
    anew = run(tmp_path, restart=True)
    assert not anew.already
    assert (first.folder / "metrics.jsonl").read_bytes() != before
    assert len(curve(first.folder)) == 24 + 5


def test_a_damaged_checkpoint_is_an_error_and_restart_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 9)
        part = run(tmp_path)
    path = part.folder / "checkpoints" / "step-00000009" / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UsageError, match=r"weights.safetensors: damaged: .*--restart trains anew"):
        run(tmp_path)
    assert Run(part.folder).status == "failed"
    assert run(tmp_path, restart=True).status == "finished"


DRIVER = """
import os, sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from train.toy import run
torch.set_num_threads(1)
# The imports take longer than the run: they are done once, and every attempt is a fork of this process.
for request in sys.stdin:
    child = os.fork()
    if child == 0:
        run(Path({root!r}), *{more!r})
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def kill_at_random(root: Path, kills: int, *more: str) -> Path:
    """Trains with so many kill -9 in between, each when a step drawn at random is on the disk or up to 30 ms later."""
    tests = str(Path(__file__).resolve().parents[1])
    packages = os.pathsep.join([str(Path(moeyard.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")])
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER.format(tests=tests, root=str(root), more=more)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": packages},
    )
    config = settings(*more)
    folder = root / toy().name / signature(config)
    draw = random.Random(kills)
    for step in [*sorted(draw.randrange(config.max_steps - 4) for _ in range(kills)), None]:
        assert driver.stdin is not None
        assert driver.stdout is not None
        print(file=driver.stdin, flush=True)
        child = int(driver.stdout.readline())
        if step is not None:
            # What an earlier attempt wrote counts: then the kill strikes while the run is being taken up again.
            while last_step(folder) < step:
                time.sleep(0.001)
            time.sleep(0.03 * draw.random())
            os.kill(child, signal.SIGKILL)
        assert int(driver.stdout.readline()) == (0 if step is None else -signal.SIGKILL)
    driver.stdin.close()
    assert driver.wait(timeout=60) == 0
    return folder


def last_step(folder: Path) -> int:
    try:
        return int(read_metrics(folder / "metrics.jsonl")[-1]["step"])
    except (FileNotFoundError, IndexError):
        return 0


@pytest.mark.parametrize(
    ("kills", "more"),
    [
        (3, ("max_steps=60",)),
        pytest.param(20, ("max_steps=200", "workers=2", "ema_decay=0.9"), marks=pytest.mark.slow),
        pytest.param(20, ("max_steps=200",), marks=pytest.mark.slow),
    ],
)
@pytest.mark.timeout(400)
def test_killed_at_random_moments(tmp_path: Path, kills: int, more: tuple[str, ...]) -> None:
    whole = run(tmp_path / "whole", *more)
    killed = kill_at_random(tmp_path / "killed", kills, *more)
    assert Run(killed).status == "finished"
    assert Run(killed).info["starts"] <= kills + 1
    same(whole.folder, killed)

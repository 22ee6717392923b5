"""Sweeps: the grid by hand, real jobs on submitit's local executor and on a local Ray cluster, failures, going on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning", reason="needs moeyard[train]")
pytest.importorskip("tensorboard", reason="needs moeyard[train]")

from moeyard.train.errors import UsageError
from moeyard.train.runs import RunStore
from moeyard.train.sweep import Job, Outcome, Sweep, expand, outcome, plan, ranked
from train.toy import SMALL, curve, run, toy


def test_every_combination() -> None:
    got = expand(["seed=0,1", "optimizer.betas=[0.9,0.99],[0.8,0.9]", 'monitor="a,b"'])
    assert got == [
        ("seed=0", "optimizer.betas=[0.9,0.99]", 'monitor="a,b"'),
        ("seed=0", "optimizer.betas=[0.8,0.9]", 'monitor="a,b"'),
        ("seed=1", "optimizer.betas=[0.9,0.99]", 'monitor="a,b"'),
        ("seed=1", "optimizer.betas=[0.8,0.9]", 'monitor="a,b"'),
    ]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (["seed"], "--grid: expected key=value,value such as seed=0,1,2, got 'seed'"),
        (["seed="], "--grid: expected key=value,value"),
        (["seed=1", "seed=2"], "--grid: expected every setting once, got seed twice"),
    ],
)
def test_bad_grids(grid: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        expand(grid)


def jobs(root: Path, *grid: str) -> list[Job]:
    return plan(toy(), RunStore(root), grid, settings=[*SMALL, "max_steps=6"])


def test_equal_points_are_one_job(tmp_path: Path) -> None:
    planned = jobs(tmp_path, "optimizer.weight_decay=0,0.0,1e-2", "workers=0,1")
    assert [job.point for job in planned] == [
        ("optimizer.weight_decay=0", "workers=0"),
        ("optimizer.weight_decay=1e-2", "workers=0"),
    ]
    with pytest.raises(UsageError, match=r"model.dim: expected greater than or equal to 1, got 0"):
        jobs(tmp_path, "model.dim=8,0")


def test_the_best_comes_first(tmp_path: Path) -> None:
    def done(value: float | None, mode: str) -> Outcome:
        (job,) = plan(toy(), RunStore(tmp_path), [f"mode={mode}"], settings=["monitor=val_accuracy"])
        return Outcome(job, "finished", 1, None if value is None else {"name": "val_accuracy", "value": value})

    for mode, want in (("max", [0.9, 0.5, None]), ("min", [0.5, 0.9, None])):
        got = ranked([done(value, mode) for value in (None, 0.5, 0.9)])
        assert [item.best["value"] if item.best else None for item in got] == want


def check(tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One job is finished already, one fails while it runs, one is trained."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run(tmp_path, "max_steps=6", "seed=1")
    lines: list[str] = []
    planned = [*jobs(tmp_path, "seed=0,1"), *jobs(tmp_path, "monitor=val_nothing")]
    got = Sweep(RunStore(tmp_path), engine, 2, write=lines.append).run(planned)
    assert {item.job.point: (item.status, item.steps) for item in got} == {
        ("seed=0",): ("finished", 6),
        ("seed=1",): ("finished", 6),
        ("monitor=val_nothing",): ("failed", 0),
    }
    (failed,) = [item for item in got if item.status == "failed"]
    assert failed.error.startswith("monitor: expected one of val_loss, val_accuracy")
    assert lines[0] == "already finished: 1 of 3 runs"
    first, second = [item.best["value"] for item in got if item.best and item.status == "finished"]
    assert first <= second
    # The same as training it here, with as many threads: torch's sums depend on their number.
    torch.set_num_threads(1)
    alone = run(tmp_path / "alone", "max_steps=6")
    assert curve(tmp_path / "tokens-demo" / alone.folder.name) == curve(alone.folder)
    # Once more: nothing is left to do for what is finished.
    lines.clear()
    again = Sweep(RunStore(tmp_path), engine, write=lines.append).run(planned[:2])
    assert lines == ["already finished: 2 of 2 runs"]
    assert [item.best for item in again] == [item.best for item in got if item.status == "finished"]


@pytest.mark.timeout(240)
def test_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit", reason="needs moeyard[cluster]")
    check(tmp_path, "local", monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_on_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="needs moeyard[cluster]")
    check(tmp_path, "ray", monkeypatch)


def test_engines_that_are_not_there_or_do_not_understand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit", reason="needs moeyard[cluster]")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError, match=r"--engine slurm: Could not detect"):
        Sweep(RunStore(tmp_path), "slurm").run(jobs(tmp_path, "seed=0"))
    with pytest.raises(UsageError, match=r"--engine local: .*nonsense"):
        Sweep(RunStore(tmp_path), options=["nonsense=3"]).run(jobs(tmp_path, "seed=0"))
    with pytest.raises(UsageError, match="--option: expected key=value, got 'x'"):
        Sweep(RunStore(tmp_path), options=["x"]).run(jobs(tmp_path, "seed=0"))


def test_a_job_whose_process_dies_is_a_failure_with_a_reason(tmp_path: Path) -> None:
    class Dead:
        def result(self) -> dict[str, object]:
            raise RuntimeError("Job 7 ended\nkilled by signal 9")

    (job,) = jobs(tmp_path, "seed=0")
    sweep = Sweep(RunStore(tmp_path), write=lambda line: None)
    sweep._note(job, Dead())
    (got,) = sweep._outcomes.values()
    assert (got.status, got.error) == ("failed", "killed by signal 9")
    assert outcome(job).status == "new"

"""The run store: what a run notes, its lock, looking runs up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moeyard.train.errors import UsageError
from moeyard.train.runs import Run, RunStore, differences

PYTHON = [sys.executable, "-c"]


def begun(store: RunStore, signature: str, system: str = "toy", status: str = "finished", **config: object) -> Run:
    run = store.run(system, signature)
    run.begin({"seed": 0, **config})
    run.end(status, steps=3)
    return run


def test_a_run_notes_its_course(tmp_path: Path) -> None:
    run = RunStore(tmp_path).run("toy", "01234567")
    assert run.status == "new"
    run.begin({"seed": 4, "model": {"dim": 8}}, domains=["a"])
    info = run.info
    assert (info["system"], info["signature"], info["seed"], info["starts"]) == ("toy", "01234567", 4, 1)
    assert info["domains"] == ["a"]
    assert info["versions"]["torch"]
    assert f", {os.cpu_count()} cores, " in info["machine"]
    assert json.loads((run.folder / "config.json").read_text()) == {"seed": 4, "model": {"dim": 8}}
    run.end("interrupted", steps=7)
    assert run.status == "interrupted"
    run.begin({"seed": 4})
    again = run.info
    assert again["started"] == info["started"]
    assert (again["starts"], again["steps"], again["ended"]) == (2, 7, None)
    with pytest.raises(ValueError, match="status: expected one of running, finished"):
        run.end("done")


def test_a_run_that_says_running_without_its_lock_was_killed(tmp_path: Path) -> None:
    run = RunStore(tmp_path).run("toy", "01234567")
    with run.lock():
        run.begin({"seed": 0})
        assert run.status == "running"
    assert run.status == "interrupted"


def test_two_processes_cannot_share_a_folder(tmp_path: Path) -> None:
    run = RunStore(tmp_path).run("toy", "01234567")
    code = f"""
from pathlib import Path
from moeyard.train.runs import Run
from moeyard.train.errors import UsageError
try:
    with Run(Path({str(run.folder)!r})).lock():
        print("locked")
except UsageError as error:
    print(error)
"""
    with run.lock():
        other = subprocess.run([*PYTHON, code], capture_output=True, text=True, check=True, timeout=60)
        assert other.stdout.startswith(f"{run.folder} is in use by process {os.getpid()} on ")
        with pytest.raises(UsageError, match="in use by"), run.lock():
            pass
    other = subprocess.run([*PYTHON, code], capture_output=True, text=True, check=True, timeout=60)
    assert other.stdout == "locked\n"


def test_a_forked_worker_does_not_keep_the_lock(tmp_path: Path) -> None:
    run = RunStore(tmp_path).run("toy", "01234567")
    with run.lock():
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
    try:
        # The child needs a moment to begin.
        deadline = time.monotonic() + 20
        while run.in_use() and time.monotonic() < deadline:
            time.sleep(0.01)
        with run.lock():
            pass
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_clearing_keeps_the_lock_only(tmp_path: Path) -> None:
    run = begun(RunStore(tmp_path), "01234567")
    (run.folder / "checkpoints").mkdir()
    (run.folder / "checkpoints" / "x").write_text("")
    with run.lock():
        run.clear()
        assert [p.name for p in run.folder.iterdir()] == ["run.lock"]


def test_a_place_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "toy").write_text("")
    with pytest.raises(UsageError, match=r"cannot write into .*: not a folder"), Run(tmp_path / "toy" / "x").lock():
        pass


def test_listing_and_finding(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    assert store.runs() == []
    for signature in ("aaaa1111", "aabb2222", "cccc3333"):
        begun(store, signature)
    begun(store, "cccc3333", system="other")
    (tmp_path / "toy" / "logs").mkdir()
    assert [r.signature for r in store.runs("toy")] == ["aaaa1111", "aabb2222", "cccc3333"]
    assert len(store.runs()) == 4
    assert store.find("aaaa1111").signature == "aaaa1111"
    assert store.find("aab").signature == "aabb2222"
    assert store.find("other/c").system == "other"
    assert store.find("cccc3333", "toy").system == "toy"


@pytest.mark.parametrize(
    ("signature", "message"),
    [
        ("aa", "signature aa: expected one run, got toy/aaaa1111, toy/aabb2222"),
        ("aaaa1112", "signature aaaa1112: no such run in .*; nearest: aaaa1111"),
        ("zzzzzzzz", "signature zzzzzzzz: no such run in .*; there are: toy/aaaa1111, toy/aabb2222"),
        ("none/aa", "signature aa: no runs in .*none"),
        ("", "signature : no such run"),
    ],
)
def test_what_is_not_found_offers_what_is_near(tmp_path: Path, signature: str, message: str) -> None:
    store = RunStore(tmp_path)
    for known in ("aaaa1111", "aabb2222"):
        begun(store, known)
    with pytest.raises(UsageError, match=message):
        store.find(signature)


def test_differences_are_the_settings_that_differ(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    runs = [
        begun(store, "aaaa1111", model={"dim": 8, "kind": "x"}),
        begun(store, "bbbb1111", model={"dim": 9, "kind": "x"}, more=1),
    ]
    assert differences(runs) == {"model.dim": [8, 9], "more": [None, 1]}


def test_a_damaged_run_json_is_named(tmp_path: Path) -> None:
    run = begun(RunStore(tmp_path), "aaaa1111")
    (run.folder / "run.json").write_text("{")
    with pytest.raises(UsageError, match=r"run.json: not readable as JSON"):
        _ = run.status

"""The run store: one folder per system and signature, everything about a run in it.

runs/<system>/<signature>/config.json   the settings
                          run.json      system, status, versions, machine, seed, started, ended, steps
                          metrics.jsonl checkpoints/ tensorboard/ *.png report.html
                          run.lock      held while a process works on the run
"""

from __future__ import annotations

import difflib
import fcntl
import json
import os
import platform
import shutil
import socket
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import torch

import moeyard
from moeyard.train.errors import UsageError
from moeyard.train.files import clear_disk_errors, write_json

#: What a run may be. "interrupted" can be continued: by Ctrl-C, by the time limit, or by a kill that it could not note.
STATUSES = ("running", "finished", "interrupted", "failed")

#: What `Run.clear` leaves: the lock is held by whoever clears.
_LOCK = "run.lock"

#: Open lock files of this process; a forked worker must not hold on to them after its parent has died.
_held: weakref.WeakSet[TextIO] = weakref.WeakSet()


def _let_go_of_locks() -> None:
    # The descriptor stays valid, so that nothing else gets its number; only what it stands for goes.
    for file in list(_held):
        with suppress(OSError, ValueError), open(os.devnull, "rb") as nothing:
            os.dup2(nothing.fileno(), file.fileno())


os.register_at_fork(after_in_child=_let_go_of_locks)


class Run:
    """One run's folder.

    Args:
        folder: `<root>/<system>/<signature>`; made by `begin`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def system(self) -> str:
        return self.folder.parent.name

    @property
    def signature(self) -> str:
        return self.folder.name

    @property
    def info(self) -> dict[str, Any]:
        """What run.json says; empty where there is none."""
        return _read_json(self.folder / "run.json")

    @property
    def config(self) -> dict[str, Any]:
        """The settings, all of them, defaults included."""
        return _read_json(self.folder / "config.json")

    @property
    def status(self) -> str:
        """One of `STATUSES`, or "new". A run that says "running" while nobody holds its lock was killed."""
        status = str(self.info.get("status", "new"))
        return "interrupted" if status == "running" and not self.in_use() else status

    def begin(self, config: dict[str, Any], **facts: Any) -> None:
        """Notes settings, versions, machine and start; a run that goes on keeps its first start."""
        before = self.info
        with clear_disk_errors(f"into {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "config.json", config)
        self.note(
            **{
                "system": self.system,
                "signature": self.signature,
                "status": "running",
                "seed": config["seed"],
                "started": before.get("started", now()),
                "ended": None,
                "error": None,
                "steps": before.get("steps", 0),
                "starts": before.get("starts", 0) + 1,
                "versions": versions(),
                "machine": machine(),
                **facts,
            }
        )

    def note(self, **facts: Any) -> None:
        """Adds to run.json."""
        with clear_disk_errors(str(self.folder / "run.json")):
            write_json(self.folder / "run.json", {**self.info, **facts})

    def end(self, status: str, **facts: Any) -> None:
        """Notes how the run ended, and when."""
        if status not in STATUSES:
            raise ValueError(f"status: expected one of {', '.join(STATUSES)}, got {status!r}")
        self.note(status=status, ended=now(), **facts)

    def clear(self) -> None:
        """Removes everything but the lock: the run starts anew."""
        paths = list(self.folder.iterdir()) if self.folder.is_dir() else []
        # Should this be cut short: no run.json that says finished, and no checkpoint whose metrics are gone.
        order = {"run.json": 0, "checkpoints": 1}
        for path in sorted(paths, key=lambda path: order.get(path.name, 2)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != _LOCK:
                path.unlink()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the run for this process.

        Raises:
            UsageError: another process works on it, or the folder cannot be written.
        """
        with clear_disk_errors(f"into {self.folder}"):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except (NotADirectoryError, FileExistsError):
                raise UsageError(f"cannot write into {self.folder}: not a folder") from None
            file = (self.folder / _LOCK).open("a+", encoding="utf-8")
        with file:
            if not _try_lock(file, fcntl.LOCK_EX, seconds=1.0):
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise UsageError(f"{self.folder} is in use by {holder}; two runs cannot share a folder")
            _held.add(file)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield

    def in_use(self) -> bool:
        """Whether some process holds the lock."""
        try:
            with (self.folder / _LOCK).open(encoding="utf-8") as file:
                return not _try_lock(file, fcntl.LOCK_SH, seconds=0.0)
        except FileNotFoundError:
            return False


def _try_lock(file: TextIO, kind: int, *, seconds: float) -> bool:
    """Tries for a moment: somebody may just be asking whether the lock is held."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)


class RunStore:
    """All runs under one folder.

    Args:
        root: such as `runs`; need not exist.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def run(self, system: str, signature: str) -> Run:
        """The run of exactly this signature, there or not."""
        return Run(self.root / system / signature)

    def runs(self, system: str | None = None) -> list[Run]:
        """All runs that have begun, of one system or of all, by system and start."""
        found = [Run(path.parent) for path in self.root.glob(f"{system or '*'}/*/run.json")]
        return sorted(found, key=lambda run: (run.system, str(run.info.get("started")), run.signature))

    def find(self, signature: str, system: str | None = None) -> Run:
        """The run whose signature is, or alone begins with, `signature`; "system/signature" names both.

        Raises:
            UsageError: none or several; the nearest are offered.
        """
        if "/" in signature:
            system, signature = signature.split("/", 1)
        runs = self.runs(system)
        exact = [run for run in runs if run.signature == signature]
        found = exact or [run for run in runs if signature and run.signature.startswith(signature)]
        if len(found) == 1:
            return found[0]
        if found:
            raise UsageError(f"signature {signature}: expected one run, got {_names(found)}")
        where = self.root / (system or "")
        if not runs:
            raise UsageError(f"signature {signature}: no runs in {where}")
        near = difflib.get_close_matches(signature, [run.signature for run in runs], n=3, cutoff=0.3)
        offer = f"nearest: {', '.join(near)}" if near else f"there are: {_names(runs[-5:])}"
        raise UsageError(f"signature {signature}: no such run in {where}; {offer}")


def _names(runs: Sequence[Run]) -> str:
    return ", ".join(f"{run.system}/{run.signature}" for run in runs)


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The settings in which runs differ: dotted path -> one value per run, None where a run has no such setting."""
    tables = [dict(flat(run.config)) for run in runs]
    paths = dict.fromkeys(path for table in tables for path in table)
    rows = {path: [table.get(path) for table in tables] for path in paths}
    return {path: row for path, row in rows.items() if any(value != row[0] for value in row)}


def flat(table: dict[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    """Settings with their dotted paths."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from flat(value, f"{at}{key}.")
        else:
            yield f"{at}{key}", value


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers."""
    found = {"moeyard": moeyard.__version__, "torch": torch.__version__, "python": platform.python_version()}
    for name in ("lightning", "numpy"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def machine() -> str:
    """Where a run happened, in words."""
    threads = torch.get_num_threads()
    return (
        f"{socket.gethostname()}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores, {threads} threads"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as error:
        raise UsageError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path}: expected a table, got {type(value).__name__}")
    return value

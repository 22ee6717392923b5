"""A run as its files tell it: configuration, environment, status, history."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeyard.train.errors import UsageError
from moeyard.train.reporting.history import History, read_history

#: Any one of these makes a folder a run.
MARKS = ("metrics.jsonl", "run.json", "config.json")
#: Shown elsewhere than in the environment table.
_NOT_ENVIRONMENT = ("system", "signature", "status", "versions", "domains", "config", "warnings")


@dataclass(frozen=True)
class RunFolder:
    """What the files of a run say.

    Attributes:
        path: the folder.
        config: `config.json`, without what describes the machine.
        info: `run.json`; for a run without one, what `summary.json` and `config.json` say of the same.
        history: `metrics.jsonl`.
        problems: files that are damaged, in one line each.
    """

    path: Path
    config: dict[str, Any]
    info: dict[str, Any]
    history: History
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """`system/signature`; the folder's own name where neither is recorded."""
        parts = [str(self.info[key]) for key in ("system", "signature") if self.info.get(key)]
        return "/".join(parts) or self.path.resolve().name

    @property
    def status(self) -> str:
        """running, finished, interrupted, failed, or unknown."""
        return str(self.info.get("status") or "unknown")

    @property
    def versions(self) -> dict[str, Any]:
        versions = self.info.get("versions")
        return versions if isinstance(versions, dict) else {}

    @property
    def environment(self) -> dict[str, Any]:
        """Everything else of `info`: machine, seed, started, ended, ..."""
        return {key: value for key, value in self.info.items() if key not in _NOT_ENVIRONMENT}

    @property
    def domains(self) -> list[str]:
        """A name for each domain of the usage counts: the recorded one, or "domain 3"."""
        names = self.info.get("domains")
        named = [str(name) for name in names] if isinstance(names, list) else []
        number = self.history.usage.shape[1]
        return [*named[:number], *(f"domain {d}" for d in range(len(named), number))]

    @property
    def experts_per_token(self) -> int | None:
        """k as the configuration has it, wherever it stands there; None where it does not."""
        for key in ("experts_per_token", "num_experts_per_tok", "top_k", "k"):
            found = _find(self.config, key)
            if isinstance(found, int) and not isinstance(found, bool) and found >= 1:
                return found
        return None


def _find(tree: Any, key: str) -> Any:
    """The first value of that name in nested dictionaries, outer ones first."""
    level = [tree]
    while level:
        level = [node for node in level if isinstance(node, dict)]
        for node in level:
            if key in node:
                return node[key]
        level = [child for node in level for child in node.values()]
    return None


def read_run(folder: Path) -> RunFolder:
    """Reads a run folder; files that are missing or damaged leave their part empty.

    Raises:
        UsageError: `folder` is no folder, or holds none of the files of a run.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: expected the folder of a run, which is not there")
    if not any((folder / mark).is_file() for mark in MARKS):
        below = sorted(p.parent.name for p in folder.glob("*/metrics.jsonl"))
        hint = f"; runs below it: {', '.join(below[:10])}" if below else ""
        raise UsageError(f"{folder} is no run: expected {', '.join(MARKS[:-1])} or {MARKS[-1]} in it, none is{hint}")
    problems: list[str] = []
    config, info, summary = (_read_object(folder / f"{n}.json", problems) for n in ("config", "run", "summary"))
    if summary and "status" not in info:
        info["status"] = "interrupted" if summary.get("interrupted") else "finished"
    if "warnings" in summary:
        info.setdefault("warnings", summary["warnings"])
    for key in ("versions", "machine", "threads", "domains"):
        if key in config:
            info.setdefault(key, config.pop(key))
    history = read_history(folder / "metrics.jsonl")
    if history.unreadable:
        problems.append(f"metrics.jsonl: {history.unreadable:,} entries are not what a step writes; they are left out")
    if history.cut_off:
        problems.append("metrics.jsonl: the last line is cut off, or still being written; it is left out")
    return RunFolder(folder, config, info, history, problems)


def _read_object(path: Path, problems: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        problems.append(f"{path.name}: not readable as JSON ({error})")
        return {}
    if isinstance(value, dict):
        return value
    problems.append(f"{path.name}: expected a JSON object, got {type(value).__name__}")
    return {}


def find_run(name: str, root: Path = Path("runs")) -> Path:
    """The folder that a user means: a path, or `system/signature` below `root`.

    Raises:
        UsageError: neither is there; the nearest names below `root` are offered.
    """
    for folder in (Path(name), root / name):
        if folder.is_dir():
            return folder
    known = sorted({p.parent.relative_to(root).as_posix() for mark in MARKS for p in root.glob(f"**/{mark}")})
    nearest = difflib.get_close_matches(name, known, n=3)
    hint = f"; did you mean {' or '.join(nearest)}?" if nearest else f"; {len(known)} runs are there"
    raise UsageError(f"{name}: expected the folder of a run, or system/signature below {root}/{hint}")

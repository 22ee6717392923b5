"""Where a run's numbers go: metrics.jsonl, TensorBoard, the collapse alarm, a terminal. All take the same records.

A record of training has step, epoch, loss and its parts, learning_rate, grad_norm, step_seconds (forward to optimizer),
data_seconds (waiting for the batches), sizes such as tokens and their rates as tokens_per_second, batch_fill where the
system knows it, and experts[layer][domain][expert] where there are any. A record of an evaluation has step, epoch and
val_* alone.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from moeyard.nn import collapse_warnings
from moeyard.train.errors import UsageError
from moeyard.train.files import clear_disk_errors, write_text

Record = dict[str, Any]


class Sink(Protocol):
    """Takes records, in order; `close` comes last, after an error too."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


class MetricsFile:
    """Writes one JSON object per record, flushed at once: what is on disk is what was done.

    Args:
        path: the file; lines are added to it.

    Numbers that are not finite are written as null.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with clear_disk_errors(str(path)):
            self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        with clear_disk_errors(str(self.path)):
            self._file.write(json.dumps({k: _finite(v) for k, v in record.items()}) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Waits until all lines are on the disk: a checkpoint shall not be ahead of them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> list[Record]:
    """The records of a `metrics.jsonl`; a last line cut off by a crash is left out."""
    return [record for _, record in _lines(path)]


def cut_metrics(path: Path, step: int) -> None:
    """Takes a `metrics.jsonl` back to `step`: later lines go, and a half one."""
    if not path.exists():
        return
    kept = [line for line, record in _lines(path) if record["step"] <= step]
    with clear_disk_errors(str(path)):
        write_text(path, "".join(kept))


def _lines(path: Path) -> Iterator[tuple[str, Record]]:
    """Whole lines and what they say."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                return
            try:
                record = json.loads(line)
                record["step"]
            except (ValueError, TypeError, KeyError):
                raise UsageError(f"{path}:{number}: expected a record with a step, got {line[:40]!r}") from None
            yield line, record


class TensorBoard:
    """Writes every number of a record to TensorBoard, the experts' shares of each layer among them.

    Args:
        folder: where the event files go.
        step: of the checkpoint that the run goes on from; later points of earlier files are hidden.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        # Slow to import, and nothing else needs it.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import FileWriter

        self._summary = Summary
        with clear_disk_errors(str(folder)):
            self._writer = FileWriter(str(folder))
        if step:
            self._writer.add_event(Event(session_log=SessionLog(status=SessionLog.START)), step + 1)

    def write(self, record: Record) -> None:
        values = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
        for layer, domains in enumerate(record.get("experts", ())):
            slots = [sum(column) for column in zip(*domains, strict=True)]
            total = max(sum(slots), 1)
            values |= {f"experts/layer{layer}/{expert}": count / total for expert, count in enumerate(slots)}
        # One event for all: an event each costs more than the step of a small model.
        made = [self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._writer.add_summary(self._summary(value=made), record["step"])

    def close(self) -> None:
        self._writer.close()


class CollapseAlarm:
    """Warns, once per layer and finding, when one expert takes most tokens or gets none over the last steps.

    Args:
        k: experts per token.
        span: steps that are judged together; nothing is said before they are full.
        warn: takes each line, such as "layer 2, step 100: expert 3 takes 71% of the tokens".
    """

    def __init__(self, k: int, *, span: int = 50, warn: Callable[[str], None] | None = None) -> None:
        self.k, self.span, self._warn = k, span, warn
        self.warnings: list[str] = []
        self._recent: deque[torch.Tensor] = deque(maxlen=span)
        self._seen: list[str] = []
        self._step = 0

    def write(self, record: Record) -> None:
        if "experts" not in record:
            return
        self._step = record["step"]
        self._recent.append(torch.tensor(record["experts"]).sum(1))
        if len(self._recent) == self.span:
            self.judge(self._step)
            self._recent.clear()

    def close(self) -> None:
        # A run shorter than one span is judged as a whole.
        if self._recent and self._step < self.span:
            self.judge(self._step)

    def judge(self, step: int) -> None:
        for layer, counts in enumerate(torch.stack(list(self._recent)).sum(0)):
            for finding in collapse_warnings(counts, self.k):
                # The share changes from span to span; the finding is the same.
                key = f"{layer}: {finding.split(' takes ')[0]}"
                if key not in self._seen:
                    self._seen.append(key)
                    self.warnings.append(f"layer {layer}, step {step}: {finding}")
                    if self._warn is not None:
                        self._warn(self.warnings[-1])

    def state_dict(self) -> dict[str, Any]:
        return {"warnings": list(self.warnings), "seen": list(self._seen), "recent": list(self._recent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.warnings, self._seen = list(state["warnings"]), list(state["seen"])
        self._recent = deque(state["recent"], maxlen=self.span)


class PlainProgress:
    """Progress as plain lines, for logs and pipes: the first step, the last, every evaluation, and one every few
    seconds.

    Args:
        max_steps: of the whole run.
        write: takes a line.
        every_seconds: least time between lines.
    """

    def __init__(self, max_steps: int, write: Callable[[str], None] = print, *, every_seconds: float = 5.0) -> None:
        self._max_steps, self._write, self._every = max_steps, write, every_seconds
        self._started, self._last, self._line = time.perf_counter(), -math.inf, ""
        self._given: dict[str, int] = {}

    def write(self, record: Record) -> None:
        if "loss" not in record:
            parts = [f"{name} {value:.4f}" for name, value in record.items() if name.startswith("val_")]
            self._line = "  ".join([f"step {record['step']}/{self._max_steps}", *parts])
            self._flush(time.perf_counter())
            return
        now = time.perf_counter()
        self._line = f"step {record['step']}/{self._max_steps}  loss {record['loss']:.4f}{self._rate(record, now)}"
        if now - self._last >= self._every:
            self._flush(now)

    def _rate(self, record: Record, now: float) -> str:
        # The first size is the unit in which a system counts.
        unit = next((name.removesuffix("_per_second") for name in record if name.endswith("_per_second")), None)
        if unit is None:
            return ""
        self._given[unit] = self._given.get(unit, 0) + record[unit]
        return f"  {self._given[unit] / max(now - self._started, 1e-9):,.0f} {unit}/s"

    def close(self) -> None:
        self._flush(time.perf_counter())

    def _flush(self, now: float) -> None:
        if self._line:
            self._write(self._line)
        self._line, self._last = "", now

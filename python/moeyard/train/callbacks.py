"""Callbacks: metrics line by line, progress, a clean stop on Ctrl-C, the collapse alarm.

They read what a LightningModule's `training_step` returns (`metrics`, `usage`, `edges`) and the batch's `ptr`; nothing
here knows a model.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from moeyard.nn import collapse_warnings


class MetricsWriter(Callback):
    """Writes one JSON object per step to `metrics.jsonl`, flushed at once: what is on disk is what was done.

    Args:
        path: the file, overwritten.
        max_atoms_per_batch: the budget that `batch_fill` is measured against. A structure larger than the budget is a
            batch of its own and counts as full.

    A line holds step, loss and its parts, step_seconds (forward to optimizer), data_seconds (waiting for the batch),
    structures, atoms, edges, their rates per second of both, batch_fill, and experts[layer][domain][expert] counts.
    Numbers that are not finite are written as null.
    """

    def __init__(self, path: Path, *, max_atoms_per_batch: int) -> None:
        self.path, self.max_atoms = path, max_atoms_per_batch
        self.records: list[dict[str, Any]] = []
        self._file: TextIO | None = None

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._file = self.path.open("w", encoding="utf-8")
        self._ended = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        step_seconds, data_seconds = now - self._started, self._started - self._ended
        structures, atoms = len(batch.ptr) - 1, int(batch.ptr[-1])
        seconds = max(step_seconds + data_seconds, 1e-9)
        record = {
            "step": trainer.global_step,
            **{name: float(value) for name, value in outputs["metrics"].items()},
            "step_seconds": step_seconds,
            "data_seconds": data_seconds,
            "structures": structures,
            "atoms": atoms,
            "edges": outputs["edges"],
            "structures_per_second": structures / seconds,
            "atoms_per_second": atoms / seconds,
            "batch_fill": min(1.0, atoms / self.max_atoms),
            "experts": outputs["usage"].tolist(),
        }
        self.records.append(record)
        assert self._file is not None
        self._file.write(json.dumps({k: _finite(v) for k, v in record.items()}) + "\n")
        self._file.flush()
        self._ended = time.perf_counter()

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`; a last line cut off by a crash is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            records.append(json.loads(line))
    return records


class CollapseAlarm(Callback):
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
        self._seen: set[tuple[int, str]] = set()

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._recent.append(outputs["usage"].sum(1))
        if len(self._recent) == self.span:
            self.judge(trainer.global_step)
            self._recent.clear()

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        # A run shorter than one span is judged as a whole.
        if self._recent and trainer.global_step < self.span:
            self.judge(trainer.global_step)

    def judge(self, step: int) -> None:
        for layer, counts in enumerate(torch.stack(list(self._recent)).sum(0)):
            for finding in collapse_warnings(counts, self.k):
                # The share changes from span to span; the finding is the same.
                key = (layer, finding.split(" takes ")[0])
                if key not in self._seen:
                    self._seen.add(key)
                    self.warnings.append(f"layer {layer}, step {step}: {finding}")
                    if self._warn is not None:
                        self._warn(self.warnings[-1])


class PlainProgress(Callback):
    """Progress as plain lines, for logs and pipes: the first step, the last, and one every few seconds.

    Args:
        write: takes a line.
        every_seconds: least time between lines.
    """

    def __init__(self, write: Callable[[str], None] = print, *, every_seconds: float = 5.0) -> None:
        self._write, self._every, self._last = write, every_seconds, -math.inf

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._started, self._last, self._atoms, self._line = time.perf_counter(), -math.inf, 0, ""

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        self._atoms += int(batch.ptr[-1])
        metrics = outputs["metrics"]
        self._line = (
            f"step {trainer.global_step}/{trainer.max_steps}  loss {float(metrics['loss']):.4f}  "
            f"{self._atoms / (now - self._started):,.0f} atoms/s"
        )
        if now - self._last >= self._every:
            self._flush(now)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._flush(time.perf_counter())

    def _flush(self, now: float) -> None:
        if self._line:
            self._write(self._line)
        self._line, self._last = "", now


class StopOnInterrupt(Callback):
    """The first Ctrl-C ends training after the running step, a second one at once.

    Lightning's own way ends the process from inside `fit`; this one comes back, so that the results are still written.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._previous: Any = None

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        # Signals belong to the main thread; elsewhere there is nothing to catch.
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, lambda number, frame: self._stop(trainer))

    def _stop(self, trainer: Trainer) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        trainer.should_stop = True

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

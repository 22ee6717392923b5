"""A system's run from settings to report: what `moeyard train` and `moeyard eval` do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moeyard.train.checkpoint import Checkpoints
from moeyard.train.config import TrainConfig, config_class, signature
from moeyard.train.errors import UsageError
from moeyard.train.evaluation import evaluate
from moeyard.train.files import clear_disk_errors
from moeyard.train.module import random_state_apart
from moeyard.train.processes import Processes, joined, need_device
from moeyard.train.runs import Run, RunStore
from moeyard.train.system import Data, Progress, System, load_system
from moeyard.train.trainer import FitResult, fit


@dataclass(frozen=True)
class TrainResult:
    """How a run stands. `status` is "finished" or "interrupted"; `reason` says why it was; `already`: it was finished
    before, and nothing was done."""

    folder: Path
    status: str
    steps: int
    reason: str = ""
    already: bool = False
    best: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)
    report: Path | None = None


def train(
    system: System,
    config: TrainConfig,
    store: RunStore,
    *,
    restart: bool = False,
    seconds: float | None = None,
    progress: Progress | None = None,
    terminal: bool = False,
    write: Callable[[str], None] = print,
) -> TrainResult:
    """Trains a system in its run's folder; goes on where an unfinished run of the same settings ended.

    Args:
        system, config: what to train; see `load_system` and `load_config`.
        store: where the run's folder is.
        restart: forget what is there.
        seconds: time limit; the run is then "interrupted" and can go on.
        progress: told (done, total, what) while data are opened.
        terminal: a live bar; otherwise plain lines.
        write: takes those lines, and warnings.

    Raises:
        UsageError: the folder is in use, a checkpoint is damaged or of other settings, a full disk, bad data.
    """
    need_device(config.device)
    run = store.run(system.name, signature(config))
    with joined(config.device) as processes:
        if not processes.first:
            progress, write, terminal = None, _nothing, False
        with _held(run, processes):
            done = processes.from_first(lambda: _prepare(run, config, restart))
            if done is not None:
                return done
            try:
                data, model = _built(system, config, progress)
                checkpoints = Checkpoints(run.folder / "checkpoints", system=run.system, signature=run.signature)
                processes.from_first(lambda: _same_data(run, data, checkpoints, "; or start over with --restart"))
                if processes.first:
                    usage = {"domains": list(data.domains), "experts_per_token": model.experts_per_token}
                    run.note(**usage, data=getattr(data, "fingerprint", None))
                result = fit(
                    model,
                    data,
                    config,
                    run.folder,
                    checkpoints=checkpoints,
                    tensorboard=True,
                    seconds=seconds,
                    terminal=terminal,
                    write=write,
                    processes=processes,
                )
            except BaseException as error:
                if processes.first:
                    _note_failure(run, error)
                raise
            return _finish(run, result, processes)


def _nothing(line: str) -> None:
    pass


class _held:
    """The run's lock, in the first process; all processes hear when it cannot be had."""

    def __init__(self, run: Run, processes: Processes) -> None:
        self._lock, self._processes = run.lock(), processes

    def __enter__(self) -> None:
        self._processes.from_first(self._lock.__enter__)

    def __exit__(self, *error: Any) -> None:
        if self._processes.first:
            self._lock.__exit__(*error)


def _prepare(run: Run, config: TrainConfig, restart: bool) -> TrainResult | None:
    """Notes the start; the result when there is nothing left to do."""
    if restart:
        run.clear()
    info = run.info
    if info.get("status") == "finished":
        return TrainResult(run.folder, "finished", info["steps"], already=True, best=info.get("best"))
    run.begin(config.model_dump(mode="json"))
    return None


def _built(system: System, config: TrainConfig, progress: Progress | None) -> tuple[Data, nn.Module]:
    try:
        data = system.open_data(config, progress)
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(f"{system.name}: {error}") from error
    # Seeded without a trace: whoever trains from a program keeps their own random state.
    with random_state_apart():
        torch.manual_seed(config.seed)
        return data, system.build_model(config, data)


def _same_data(run: Run, data: Data, checkpoints: Checkpoints, otherwise: str = "") -> None:
    before, now = run.info.get("data"), getattr(data, "fingerprint", None)
    if before != now and before is not None and checkpoints.latest() is not None:
        raise UsageError(
            f"{run.folder}: expected the data that it was trained on (fingerprint {before}), got others ({now}); "
            f"put them back{otherwise}"
        )


def _note_failure(run: Run, error: BaseException) -> None:
    interrupted = isinstance(error, KeyboardInterrupt)
    try:
        run.end("interrupted" if interrupted else "failed", error=f"{type(error).__name__}: {error}")
    except UsageError:
        # On a full disk not even that can be noted; the first error is the one to show.
        return


def _finish(run: Run, result: FitResult, processes: Processes) -> TrainResult:
    status = "interrupted" if result.reason else "finished"
    report = None
    if processes.first:
        run.end(status, steps=result.steps, reason=result.reason, best=result.best, warnings=result.warnings)
        from moeyard.train.report import write_report  # matplotlib: only a run that has come to its end waits for it

        with clear_disk_errors(f"the report into {run.folder}"):
            report = write_report(run.folder)
    return TrainResult(
        run.folder, status, result.steps, result.reason, best=result.best, warnings=result.warnings, report=report
    )


def evaluate_run(
    run: Run, *, kind: str = "best", device: str | None = None, progress: Progress | None = None
) -> tuple[int, dict[str, float]]:
    """Scores a run's weights on its evaluation batches.

    Args:
        run: see `RunStore.find`.
        kind: "best", the best evaluation's (the last ones where none was), or "last".
        device: "cpu" or "cuda"; None for the one that it was trained on.
        progress: told while data are opened.

    Returns:
        The step of the weights, and the numbers.

    Raises:
        UsageError: no checkpoint, a damaged one, no such device, or nothing to evaluate on.
    """
    system = load_system(run.system)
    config = config_class(system.Config).model_validate_json(_text(run.folder / "config.json"))
    checkpoints = Checkpoints(run.folder / "checkpoints", system=run.system, signature=run.signature)
    place = (checkpoints.latest("best") if kind == "best" else None) or checkpoints.latest()
    if place is None:
        raise UsageError(f"{run.folder}: no checkpoint to evaluate")
    config = config.model_copy(update={"device": device or config.device})
    need_device(config.device)
    data, model = _built(system, config, progress)
    _same_data(run, data, checkpoints)
    if not data.evaluation_batches:
        raise UsageError(f"{run.system}: no evaluation batches with these settings")
    model.load_state_dict(checkpoints.weights(place))
    where = torch.device(config.device)
    return int(checkpoints.manifest(place)["step"]), evaluate(model.to(where), data, config, device=where)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None

"""The trainer: `fit` trains a model on data.

One Lightning Trainer for all systems. Training is one pass of `max_steps` steps, whatever the epochs: the workers are
started once. On several processes (torchrun) each takes its share of a step's batches, and the first one alone writes.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from moeyard.train.callbacks import StepEnd, Stop
from moeyard.train.checkpoint import Checkpoints
from moeyard.train.config import TrainConfig
from moeyard.train.errors import UsageError
from moeyard.train.evaluation import Judge
from moeyard.train.loading import RepeatedEpochs, leave_ending_to_the_main_process
from moeyard.train.metrics import CollapseAlarm, MetricsFile, PlainProgress, Sink, TensorBoard, cut_metrics
from moeyard.train.module import SystemModule, random_state_apart
from moeyard.train.processes import Processes
from moeyard.train.system import Data


@dataclass(frozen=True)
class FitResult:
    """How a training ended. `reason` is "" at its end, also by early stopping, else "interrupted" or "time limit"."""

    steps: int
    seconds: float
    reason: str = ""
    best: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)


def fit(
    model: nn.Module,
    data: Data,
    config: TrainConfig,
    folder: Path,
    *,
    checkpoints: Checkpoints | None = None,
    tensorboard: bool = False,
    seconds: float | None = None,
    terminal: bool = False,
    write: Callable[[str], None] = print,
    processes: Processes | None = None,
) -> FitResult:
    """Trains a model in place, from the newest of its checkpoints where there is one.

    Args:
        model, data: see `moeyard.train.system`.
        config: the trainer's settings.
        folder: where metrics.jsonl is written and added to.
        checkpoints: None keeps none, and starts metrics.jsonl anew.
        tensorboard: also write event files into `folder`/tensorboard.
        seconds: time limit.
        terminal: a live bar; otherwise plain lines.
        write: takes those lines, and warnings.
        processes: None for this one alone.

    Raises:
        UsageError: a checkpoint that cannot be used, a full disk, settings that do not go together.

    Determinism: the same settings give the same records, times apart, whether or not the run was interrupted and
    resumed, for any number of workers, and, to rounding, of processes and on a GPU. The global random state is left
    alone.
    """
    processes = processes or Processes()
    _check(config, data, processes)
    place = checkpoints.latest() if checkpoints is not None else None
    state = checkpoints.load(place) if checkpoints is not None and place is not None else {}
    step = int(state.get("global_step", 0))
    if step:
        count_batches(state, step * config.accumulate // processes.count)
    if processes.first:
        cut_metrics(folder / "metrics.jsonl", step)
    batches, judge, stop = _batches(config, data, processes, state), Judge(config), Stop(seconds)
    k: Any = model.experts_per_token
    alarm = CollapseAlarm(k, warn=lambda line: write(f"warning: {line}"))
    sinks: list[Sink] = []
    started = time.perf_counter()
    try:
        if processes.first:
            sinks += [MetricsFile(folder / "metrics.jsonl"), alarm]
            sinks += [TensorBoard(folder / "tensorboard", step)] if tensorboard else []
            sinks += [] if terminal else [PlainProgress(config.max_steps, write)]
        end = StepEnd(data, batches, judge, sinks=sinks, stop=stop, checkpoints=checkpoints)
        module = SystemModule(model, config)
        with stop, random_state_apart(), _quiet_lightning():
            bar = [_Bar()] if terminal and processes.first else []
            trainer = _trainer(config, [end, *bar], _Io(checkpoints, state), processes)
            _run(trainer, module, _loader(config, data, batches), place, stop)
        steps = max(trainer.global_step, step)
    finally:
        for sink in sinks:
            sink.close()
    if module.ema is not None:
        model.load_state_dict(module.evaluated_model().state_dict())
    return FitResult(steps, time.perf_counter() - started, stop.reason, judge.best, alarm.warnings)


def count_batches(state: dict[str, Any], done: int) -> None:
    """Tells Lightning how many batches this process has behind it: it keeps that number in its checkpoints, but another
    number of processes may have written them."""
    progress = state["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for count in (progress["current"], progress["total"]):
        # As at the end of a batch, where checkpoints are taken.
        count.update(ready=done, started=done, processed=done, completed=done - 1)


def _batches(config: TrainConfig, data: Data, processes: Processes, state: dict[str, Any]) -> RepeatedEpochs:
    """This process's batches, from where the checkpoint's `state` was taken."""
    return RepeatedEpochs(
        data.training_batches,
        config.max_steps * config.accumulate,
        rank=processes.rank,
        processes=processes.count,
        first=int(state.get("global_step", 0)) * config.accumulate,
        position=tuple(state.get("position", (0, 0))),
    )


def _loader(config: TrainConfig, data: Data, batches: RepeatedEpochs) -> Iterable[Any]:
    return data.loader(
        batches,
        num_workers=config.workers,
        worker_init_fn=leave_ending_to_the_main_process,
        # Its own generator: a loader reads one when it starts.
        generator=torch.Generator().manual_seed(config.seed),
    )


def _check(config: TrainConfig, data: Data, processes: Processes) -> None:
    if config.accumulate % processes.count:
        next_multiple = -(-config.accumulate // processes.count) * processes.count
        raise UsageError(
            f"accumulate: expected a multiple of the {processes.count} processes, which share the batches of a step, "
            f"got {config.accumulate}; --set accumulate={next_multiple}"
        )
    if data.evaluation_batches:
        return
    for name, wanted in (
        ("early_stopping.patience", config.early_stopping.patience is not None),
        ("schedule.name = plateau", config.schedule.name == "plateau"),
    ):
        if wanted:
            raise UsageError(f"{name}: expected evaluations to go by, but the system has no evaluation batches")


def _trainer(config: TrainConfig, callbacks: list[Any], io: CheckpointIO, processes: Processes) -> Trainer:
    several = processes.count > 1
    return Trainer(
        accelerator={"cpu": "cpu", "cuda": "gpu"}[config.device],
        devices=processes.here,
        num_nodes=processes.count // processes.here,
        strategy=DDPStrategy(process_group_backend=processes.backend(config.device)) if several else "auto",
        precision={"32": "32-true", "bf16": "bf16-mixed"}[config.precision],
        max_steps=config.max_steps,
        max_epochs=1,
        accumulate_grad_batches=config.accumulate // processes.count,
        enable_progress_bar=any(isinstance(c, RichProgressBar) for c in callbacks),
        callbacks=callbacks,
        # Said outright: inside a Slurm job Lightning would take over its signals.
        plugins=[io, TorchElasticEnvironment() if several else LightningEnvironment()],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def _run(trainer: Trainer, module: SystemModule, loader: Any, place: Path | None, stop: Stop) -> None:
    try:
        trainer.fit(module, loader, ckpt_path=str(place) if place is not None else None)
    except SystemExit:
        # Lightning's answer to a KeyboardInterrupt, which the second Ctrl-C is.
        if not stop.interrupted:
            raise
        raise KeyboardInterrupt from None


class _Io(CheckpointIO):
    """Hands Lightning's checkpoints to ours, which have been read and checked already.

    Args:
        checkpoints: None where none are kept.
        state: what the newest one holds.
    """

    def __init__(self, checkpoints: Checkpoints | None, state: dict[str, Any]) -> None:
        self.checkpoints, self.state = checkpoints, state

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        assert self.checkpoints is not None
        self.checkpoints.save(checkpoint, checkpoint["global_step"])

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: Any = None) -> dict[str, Any]:
        return self.state

    def remove_checkpoint(self, path: Any) -> None:
        raise NotImplementedError("checkpoints are removed by those that follow them")


class _Bar(RichProgressBar):
    """Lightning's bar; the run is one pass, so it is not called an epoch."""

    def _get_train_description(self, current_epoch: int) -> str:
        return "training"


class _quiet_lightning:
    """Keeps Lightning's remarks on devices, workers and stop reasons out of the output; errors still come."""

    _loggers = ("lightning.pytorch", "lightning.fabric")

    def __enter__(self) -> None:
        self._levels = [logging.getLogger(name).level for name in self._loggers]
        for name in self._loggers:
            logging.getLogger(name).setLevel(logging.ERROR)
        self._caught = warnings.catch_warnings()
        self._caught.__enter__()
        warnings.filterwarnings("ignore", module="lightning.*")

    def __exit__(self, *error: object) -> None:
        self._caught.__exit__(None, None, None)
        for name, level in zip(self._loggers, self._levels, strict=True):
            logging.getLogger(name).setLevel(level)

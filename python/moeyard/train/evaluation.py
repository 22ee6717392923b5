"""Evaluation: means over batches that are never trained on, and what follows from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor, nn

from moeyard.train.config import TrainConfig
from moeyard.train.errors import UsageError
from moeyard.train.loading import leave_ending_to_the_main_process
from moeyard.train.module import EVALUATION, autocast, random_state_apart, scored
from moeyard.train.schedule import Patience
from moeyard.train.system import Data


def evaluate(
    model: nn.Module,
    data: Data,
    config: TrainConfig,
    *,
    device: torch.device | None = None,
    rank: int = 0,
    processes: int = 1,
    total: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> dict[str, float]:
    """Scores all evaluation batches.

    Args:
        model: left in the mode, training or not, in which it came.
        data, config: as for training.
        device: None for the CPU.
        rank, processes: this process takes every `processes`-th batch.
        total: sums a float64 tensor over all processes.

    Returns:
        "val_loss" and "val_<metric>": means over the batches by their weight; empty without batches.

    Determinism: the same weights give the same numbers; random draws depend on the seed and the batch's number. The
    global random state is left alone.
    """
    device = device or torch.device("cpu")
    batches = list(data.evaluation_batches)
    if not batches:
        return {}
    if len(batches) < processes:
        # Too few to share: everybody does all.
        rank, processes, total = 0, 1, lambda sums: sums
    numbers = range(rank, len(batches), processes)
    sums: dict[str, float] = {}
    weight, training = 0.0, model.training
    model.eval()
    try:
        with random_state_apart(), torch.no_grad(), autocast(config.precision, device):
            # Loaders read the global generator when they start.
            loader = data.loader(
                [batches[n] for n in numbers],
                num_workers=config.workers,
                worker_init_fn=leave_ending_to_the_main_process,
            )
            for number, batch in zip(numbers, loader, strict=True):
                output = scored(model, move_data_to_device(batch, device), config.seed, number, EVALUATION)
                weight += output.weight
                for name, value in {"loss": output.loss, **output.metrics}.items():
                    sums[name] = sums.get(name, 0.0) + output.weight * float(value)
    finally:
        model.train(training)
    names = sorted(sums, key=lambda name: (name != "loss", name))
    reduced = total(torch.tensor([weight, *(sums[name] for name in names)], dtype=torch.float64, device=device))
    return {f"val_{name}": float(value / reduced[0]) for name, value in zip(names, reduced[1:], strict=True)}


class Judge:
    """Decides upon every evaluation: is it the best, is the learning rate to fall, is training to end.

    Args:
        config: `monitor`, `mode`, `early_stopping` and `schedule`.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.monitor = config.monitor
        stop, schedule = config.early_stopping, config.schedule
        self._stopping = Patience(stop.patience, min_delta=stop.min_delta, mode=config.mode)
        plateau = schedule.patience if schedule.name == "plateau" else None
        self._plateau = Patience(plateau, min_delta=schedule.min_delta, mode=config.mode)
        self._best = Patience(None, mode=config.mode)
        self.best_step = 0

    @property
    def best(self) -> dict[str, Any] | None:
        """Name, value and step of the best evaluation so far."""
        if self._best.best is None:
            return None
        return {"name": self.monitor, "value": self._best.best, "step": self.best_step}

    def observe(self, values: dict[str, float], step: int) -> tuple[bool, bool, bool]:
        """(best so far, reduce the learning rate, stop)."""
        if self.monitor not in values:
            raise UsageError(f"monitor: expected one of {', '.join(values)}, got {self.monitor}")
        value = values[self.monitor]
        before = self._best.best
        self._best.observe(value)
        best = self._best.best != before
        if best:
            self.best_step = step
        return best, self._plateau.observe(value), self._stopping.observe(value)

    def state_dict(self) -> dict[str, Any]:
        parts = {"stopping": self._stopping, "plateau": self._plateau, "best": self._best}
        return {"best_step": self.best_step, **{name: part.state_dict() for name, part in parts.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best_step = state["best_step"]
        self._stopping.load_state_dict(state["stopping"])
        self._plateau.load_state_dict(state["plateau"])
        self._best.load_state_dict(state["best"])

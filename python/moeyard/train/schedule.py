"""How the learning rate moves, and what "no better for a while" means."""

from __future__ import annotations

import math
from typing import Any

from moeyard.train.config import ScheduleConfig


class Patience:
    """Tells when a value has not improved for `patience` observations in a row.

    Args:
        patience: None for never.
        min_delta: what an improvement is more than.
        mode: "min", the value is to fall, or "max".
    """

    def __init__(self, patience: int | None, *, min_delta: float = 0.0, mode: str = "min") -> None:
        self.patience, self.min_delta, self.sign = patience, min_delta, 1.0 if mode == "min" else -1.0
        self.best: float | None = None
        self.waited = 0

    def observe(self, value: float) -> bool:
        """Takes the next value; True when patience has run out, upon which the waiting starts again. NaN is no
        improvement."""
        if not math.isnan(value) and (self.best is None or self.sign * (self.best - value) > self.min_delta):
            self.best, self.waited = value, 0
            return False
        self.waited += 1
        if self.patience is None or self.waited < self.patience:
            return False
        self.waited = 0
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.waited = state["best"], state["waited"]


class Factor:
    """The learning rate of a step as a multiple of the first one; torch's LambdaLR saves and restores its attributes.

    warm-up: (s + 1) / w while s < w.
    cosine: m + (1 - m) (1 + cos(pi (s - w) / (S - w))) / 2 with m the least rate over the first.
    plateau: max(m, factor^reductions).
    """

    def __init__(self, config: ScheduleConfig, *, learning_rate: float, max_steps: int) -> None:
        self.name, self.warmup, self.max_steps = config.name, config.warmup_steps, max_steps
        self.least = min(config.min_learning_rate / learning_rate, 1.0)
        self.reduce_by, self.max_reductions, self.reductions = config.factor, config.max_reductions, 0

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return min(1.0, (step + 1) / self.warmup)
        if self.name == "cosine":
            done = min((step - self.warmup) / max(self.max_steps - self.warmup, 1), 1.0)
            return self.least + (1.0 - self.least) * 0.5 * (1.0 + math.cos(math.pi * done))
        if self.name == "plateau":
            return max(self.least, self.reduce_by**self.reductions)
        return 1.0

    def reduce(self) -> bool:
        """One reduction more, for "plateau"; False when all have been used."""
        if self.name != "plateau" or self.reductions >= self.max_reductions:
            return False
        self.reductions += 1
        return True

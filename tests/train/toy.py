"""tokens-demo in a size that trains in a second, and what two runs of it must have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moeyard.train.callbacks import Stop
from moeyard.train.config import TrainConfig, load_config
from moeyard.train.metrics import read_metrics
from moeyard.train.runs import RunStore
from moeyard.train.system import System, load_system
from moeyard.train.training import TrainResult, train

#: 11 batches per epoch and two per step: no step ends where an epoch does, but by chance.
SMALL = (
    "max_steps=24",
    "data.sequences=60",
    "data.evaluation_sequences=20",
    "data.max_tokens_per_batch=128",
    "model.dim=16",
    "model.hidden=8",
    "eval_every=5",
    "checkpoint_every=4",
)


def toy() -> System:
    return load_system("tokens-demo")


def settings(*more: str) -> TrainConfig:
    return load_config(toy().Config, defaults=toy().defaults, settings=[*SMALL, *more])


def run(root: Path, *more: str, **options: Any) -> TrainResult:
    options = {"write": lambda line: None, **options}
    return train(toy(), settings(*more), RunStore(root), **options)


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """The time limit strikes after so many steps of this process."""
    asked = []

    def wanted(self: Stop) -> str:
        asked.append(1)
        return "time limit" if len(asked) == steps else ""

    monkeypatch.setattr(Stop, "wanted", wanted)


def curve(folder: Path) -> list[dict[str, Any]]:
    """All records without what a clock measured."""
    timed = ("_seconds", "_per_second")
    records = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in record.items() if not k.endswith(timed)} for record in records]

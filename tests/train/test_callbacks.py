"""Around a step: signals and the time limit, records summed over batches and processes, what evaluations lead to."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

pytest.importorskip("lightning", reason="needs moeyard[train]")

from moeyard.models.step import StepOutput
from moeyard.train.callbacks import Recorder, Stop
from moeyard.train.config import EarlyStoppingConfig, ScheduleConfig, TrainConfig
from moeyard.train.errors import UsageError
from moeyard.train.evaluation import Judge


def test_first_interrupt_stops_second_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Stop() as stop:
        assert stop.wanted() == ""
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.wanted() == "interrupted"
        assert stop.interrupted
        # The launcher's copy of the same Ctrl-C, and a cluster's SIGTERM, are no second one.
        os.kill(os.getpid(), signal.SIGINT)
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 2.0)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_sigterm_stops_too_even_after_somebody_else_took_it() -> None:
    with Stop() as stop:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        stop.catch()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wanted() == "interrupted"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    with Stop(10.0) as stop:
        now = time.monotonic()
        assert stop.wanted() == ""
        monkeypatch.setattr(time, "monotonic", lambda: now + 10.0)
        assert stop.wanted() == "time limit"
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.wanted() == "interrupted"


def output(loss: float, tokens: int, fill: float | None = 0.5, usage: list[int] | None = None) -> StepOutput:
    return StepOutput(
        torch.tensor(loss),
        {"accuracy": torch.tensor(loss / 4)},
        {"tokens": tokens, "edges": 2 * tokens},
        None if usage is None else torch.tensor([[usage]]),
        fill,
    )


def test_a_record_is_the_mean_of_its_batches_and_the_sum_of_their_sizes() -> None:
    recorder = Recorder()
    for part in (output(1.0, 10, 0.5, [3, 7]), output(4.0, 20, 1.0, [20, 0])):
        recorder.begin()
        recorder.add(part)
    # Two processes that do the same.
    got = recorder.take(lambda tensor: 2 * tensor, 2)
    assert got["loss"] == 2.5
    assert got["accuracy"] == 0.625
    assert (got["tokens"], got["edges"]) == (60, 120)
    assert got["batch_fill"] == 0.75
    assert got["experts"] == [[[46, 14]]]
    seconds = got["step_seconds"] + got["data_seconds"]
    assert got["tokens_per_second"] == pytest.approx(60 / seconds)
    recorder.begin()
    recorder.add(output(1.0, 1, None))
    assert {"experts", "batch_fill"}.isdisjoint(recorder.take(lambda tensor: tensor, 1))


def test_what_evaluations_lead_to() -> None:
    config = TrainConfig(
        monitor="val_accuracy",
        mode="max",
        early_stopping=EarlyStoppingConfig(patience=3),
        schedule=ScheduleConfig(name="plateau", patience=2),
    )
    judge = Judge(config)
    assert judge.best is None
    seen = []
    for step, value in enumerate([0.1, 0.5, 0.5, 0.4, 0.3, 0.6], start=1):
        again = Judge(config)
        again.load_state_dict(judge.state_dict())
        judge = again
        seen.append(judge.observe({"val_loss": 1.0, "val_accuracy": value}, step))
    best, reduce, stop = (list(column) for column in zip(*seen, strict=True))
    assert best == [True, True, False, False, False, True]
    assert reduce == [False, False, False, True, False, False]
    assert stop == [False, False, False, False, True, False]
    assert judge.best == {"name": "val_accuracy", "value": 0.6, "step": 6}


def test_a_monitor_that_does_not_exist() -> None:
    with pytest.raises(UsageError, match="monitor: expected one of val_loss, val_accuracy, got val_acc"):
        Judge(TrainConfig(monitor="val_acc")).observe({"val_loss": 1.0, "val_accuracy": 0.5}, 1)

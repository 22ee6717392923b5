"""Where records go: metrics.jsonl and its repair, the collapse alarm, plain progress, TensorBoard."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

pytest.importorskip("lightning", reason="needs moeyard[train]")

from moeyard.train.errors import UsageError
from moeyard.train.metrics import CollapseAlarm, MetricsFile, PlainProgress, TensorBoard, cut_metrics, read_metrics


def record(step: int, usage: list[list[list[int]]]) -> dict[str, object]:
    return {"step": step, "experts": usage}


def test_metrics_are_strict_json_on_disk_at_once_and_survive_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.write({"step": 1, "loss": 2.0, "experts": [[[1, 2]]]})
    file.write({"step": 2, "loss": math.nan})
    # On disk before the file is closed.
    lines = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 2.0, "experts": [[[1, 2]]]}, {"step": 2, "loss": None}]
    file.close()
    with path.open("a") as torn:
        torn.write('{"step": 3, "lo')
    assert read_metrics(path) == lines


def test_metrics_are_cut_back_to_a_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    cut_metrics(path, 3)
    assert not path.exists()
    lines = [f'{{"step": {n}, "loss": 1.5}}\n' for n in (1, 2, 2, 3, 3, 4)]
    path.write_text("".join(lines) + '{"step": 3, "lo')
    cut_metrics(path, 3)
    assert path.read_text() == "".join(lines[:5])
    cut_metrics(path, 0)
    assert path.read_text() == ""


def test_a_line_that_is_no_record_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"loss": 1}\n')
    with pytest.raises(UsageError, match=r"metrics.jsonl:2: expected a record with a step, got '\{\"loss\": 1\}"):
        read_metrics(path)


def test_collapse_alarm_warns_once() -> None:
    lines: list[str] = []
    alarm = CollapseAlarm(1, span=2, warn=lines.append)
    even, one = [[[5, 5]], [[5, 5]]], [[[5, 5]], [[9, 1]]]
    for step, usage in enumerate([even, even, one, one, one, one], start=1):
        alarm.write(record(step, usage))
    assert lines == ["layer 1, step 4: expert 0 takes 90% of the tokens"]
    assert alarm.warnings == lines


def test_collapse_alarm_goes_on_after_a_resume() -> None:
    first = CollapseAlarm(1, span=2)
    for step in (1, 2, 3):
        first.write(record(step, [[[9, 1]]]))
    again = CollapseAlarm(1, span=2)
    again.load_state_dict(first.state_dict())
    again.write(record(4, [[[0, 7]]]))
    assert again.warnings == ["layer 0, step 2: expert 0 takes 90% of the tokens"]
    again.write(record(5, [[[0, 7]]]))
    again.write(record(6, [[[0, 7]]]))
    assert again.warnings[1:] == [
        "layer 0, step 6: expert 1 takes 100% of the tokens",
        "layer 0, step 6: expert 0 got no token",
    ]


def test_collapse_alarm_judges_a_short_run() -> None:
    alarm = CollapseAlarm(1, span=100)
    alarm.write({"step": 1, "val_loss": 1.0})
    alarm.write(record(1, [[[10, 0]]]))
    alarm.close()
    assert alarm.warnings == [
        "layer 0, step 1: expert 0 takes 100% of the tokens",
        "layer 0, step 1: expert 1 got no token",
    ]


def test_plain_progress_ends_with_the_last_step_and_tells_evaluations() -> None:
    lines: list[str] = []
    progress = PlainProgress(4, lines.append, every_seconds=1e9)
    for step in (1, 2, 3):
        progress.write({"step": step, "loss": 0.5, "atoms": 5, "edges": 9, "atoms_per_second": 1.0, "lr": 1.0})
    progress.write({"step": 3, "epoch": 0, "val_loss": 0.25, "val_accuracy": 0.5})
    progress.write({"step": 4, "loss": 0.25})
    progress.close()
    assert [line.split("  ")[0] for line in lines] == ["step 1/4", "step 3/4", "step 4/4"]
    assert lines[0].endswith(" atoms/s")
    assert lines[1:] == ["step 3/4  val_loss 0.2500  val_accuracy 0.5000", "step 4/4  loss 0.2500"]


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = TensorBoard(tmp_path)
    board.write({"step": 1, "loss": 2.0, "tokens": 5, "experts": [[[1, 2], [0, 1]]]})
    board.write({"step": 2, "loss": 9.0})
    board.close()
    board = TensorBoard(tmp_path, 1)
    board.write({"step": 2, "loss": 1.0})
    board.close()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 2.0), (2, 1.0)]
    assert [e.value for e in events.Scalars("tokens")] == [5.0]
    assert [e.value for e in events.Scalars("experts/layer0/1")] == [0.75]

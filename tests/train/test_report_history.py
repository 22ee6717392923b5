"""Reading and thinning a run's history: hand-made tables, damage, and long runs against what is known of them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from moeyard.train.reporting import history as module
from moeyard.train.reporting.charts import MAX_CURVES, Chart, chart_data, charts, curve_data, spoken
from moeyard.train.reporting.history import MAX_BINS, History, Series, UsageBins, read_history
from moeyard.train.reporting.verdicts import duration, number


def test_bins_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BINS", 4)
    bins = UsageBins()
    for step in range(1, 8):
        assert bins.add(step, [[[step, 10 * step]]])
    # Four bins of one record were merged into two of two; then came 5, 6 and 7.
    assert bins.width == 2
    assert bins.counts[:, 0, 0].tolist() == [[3, 30], [7, 70], [11, 110], [7, 70]]
    assert bins.spans == [(1, 2), (3, 4), (5, 6), (7, 7)]
    assert bins.late().tolist() == [[[3 + 4 + 5 + 6 + 7, 250]]], "from the bin in which the second half begins"


@pytest.mark.parametrize("records", [1, 2, 59, 60, 61, 120, 121, 5000])
def test_bins_lose_nothing(records: int) -> None:
    rng = np.random.default_rng(records)
    usage = rng.integers(0, 9, size=(records, 2, 3, 4))
    bins = UsageBins()
    for step, counts in enumerate(usage):
        assert bins.add(step, counts.tolist())
    assert len(bins.counts) <= MAX_BINS
    assert (bins.counts.sum(axis=0) == usage.sum(axis=0)).all()
    for (first, last), counts in zip(bins.spans, bins.counts, strict=True):
        assert (counts == usage[int(first) : int(last) + 1].sum(axis=0)).all()
    # The late half begins at most one bin before the middle.
    begin = records // 2 // bins.width * bins.width
    assert 0 <= records // 2 - begin < bins.width
    assert (bins.late() == usage[begin:].sum(axis=0)).all()


def test_bins_stay_within_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_COUNTS", 100)
    bins = UsageBins()
    for step in range(40):
        bins.add(step, np.ones((1, 3, 5), dtype=int).tolist())
    assert len(bins.counts) <= 6
    assert bins.counts.sum() == 40 * 15


@pytest.mark.parametrize(
    "usage",
    [
        [[1, 2]],
        [[[1, 2], [3]]],
        [[[1, 2, 3]]],
        [[[-1, 2]]],
        [[["a", 2]]],
        [[[1.5, 2.0]]],
        [[[None, 2]]],
        "abc",
        7,
        [[[]]],
    ],
)
def test_what_is_no_usage_is_left_out_and_counted(usage: object) -> None:
    history = History.of([{"step": 1, "experts": [[[1, 2]]]}, {"step": 2, "loss": 1.0, "experts": usage}])
    assert history.unreadable == 1
    assert history.usage.records == 1
    assert history.series("loss").values.tolist() == [1.0]


def test_columns_by_hand() -> None:
    history = History.of(
        [
            {"step": 1, "loss": 2.0, "name": "a", "flag": True},
            {"step": 2, "loss": None, "list": [1]},
            {"step": 2, "val_loss": 1.5},
            {"step": 3, "loss": math.inf, "count": 10**400},
        ]
    )
    assert history.names == ["step", "loss", "val_loss", "count"]
    assert history.last_step == 3
    steps, values = history.series("loss")
    assert steps.tolist() == [1, 2, 3]
    np.testing.assert_equal(values, [2.0, np.nan, np.nan])
    assert [column.tolist() for column in history.series("val_loss")] == [[2.0], [1.5]]
    assert len(history.series("not there").steps) == 0


def test_steps_done_again_replace_the_earlier_ones() -> None:
    history = History.of([{"step": s, "loss": v} for s, v in [(1, 1), (2, 2), (3, 3), (2, 20), (3, 30), (4, 40)]])
    steps, values = history.series("loss")
    assert steps.tolist() == [1, 2, 3, 4]
    assert values.tolist() == [1, 20, 30, 40]


def test_damaged_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [
        b'{"step": 1, "loss": 3.0}',
        b"",
        b'{"step": 2, "lo{"step": 3, "loss": 1.0}',
        b"[1, 2]",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"loss": 2.0}',
        b'{"step": NaN, "loss": 2.0}',
        b'{"step": 4, "loss": NaN}',
    ]
    path.write_bytes(b"\n".join(lines) + b'\n{"step": 5, "loss": 1.0}')
    history = read_history(path)
    assert history.series("step").steps.tolist() == [1, 4]
    assert history.unreadable == 7
    assert history.cut_off, "a line without its end may be half a line"
    assert read_history(tmp_path / "missing.jsonl").names == []


class TestCurves:
    def test_short_ones_are_kept_whole(self) -> None:
        series = Series(np.array([1.0, 2, 3]), np.array([0.123456789, np.nan, 2.0]))
        assert curve_data(series, 3) == {"x": [1, 2, 3], "y": [0.12346, None, 2], "bad": [2]}

    def test_buckets_by_hand(self) -> None:
        series = Series(np.arange(1.0, 9), np.array([1.0, 5, 2, 2, np.nan, np.nan, 9, 7]))
        assert curve_data(series, 4) == {
            "x": [1, 2, 7, 8],
            "y": [1, 5, 9, 7],
            "mx": [2, 6],
            "my": [2.5, 8],
            "bad": [5, 6],
        }
        empty = curve_data(Series(np.arange(4.0), np.array([np.nan, np.nan, 3.0, 3.0])), 2)
        assert (empty["x"], empty["y"], empty["my"]) == ([2], [3], [3])
        gap = curve_data(Series(np.arange(6.0), np.array([1.0, 2] + 4 * [np.nan])), 5)
        assert gap["my"] == [1.5, None]  # two buckets of three

    @pytest.mark.parametrize("length", [1001, 1999, 10_000, 123_456])
    def test_no_spike_is_lost(self, length: int) -> None:
        rng = np.random.default_rng(length)
        values = rng.normal(size=length)
        up, down = rng.choice(length, size=2, replace=False)
        values[up], values[down] = 50.0, -50.0
        data = curve_data(Series(np.arange(length, dtype=float), values), 1000)
        points = dict(zip(data["x"], data["y"], strict=True))
        assert len(data["x"]) <= 1000
        assert points[up] == 50
        assert points[down] == -50
        assert data["x"] == sorted(set(data["x"]))
        assert all(y == pytest.approx(values[x], rel=1e-4) for x, y in points.items())

    def test_means_are_means(self) -> None:
        values = np.random.default_rng(0).lognormal(size=10_000)
        data = curve_data(Series(np.arange(10_000.0), values), 1000)
        expected = values.reshape(500, 20).mean(axis=1)
        assert data["my"] == pytest.approx(expected.tolist(), rel=1e-4)


class TestCharts:
    def test_every_metric_has_its_place(self) -> None:
        names = [
            "loss",
            "val_loss",
            "loss_a",
            "val_loss_a",
            "b_loss",
            "loss_z",
            "learning_rate",
            "grad_norm",
            "atoms_per_second",
        ]
        names += ["atoms_per_second", "step_seconds", "data_seconds", "batch_fill", "top_accuracy", "atoms", "all_null"]
        values = {name: None if name == "all_null" else 1.0 for name in names}
        drawn, left_out = charts(History.of([{"step": 1, "epoch": 0, **values}]))
        got = {(c.section, c.title): c.names for c in drawn}
        assert got == {
            ("loss", "Loss"): ("loss", "val_loss"),
            ("loss", "Parts of the loss"): ("loss_a", "val_loss_a", "b_loss"),
            ("loss", "Router losses"): ("loss_z",),
            ("optimizer", "Learning rate"): ("learning_rate",),
            ("optimizer", "Gradient norm"): ("grad_norm",),
            ("speed", "Atoms per second"): ("atoms_per_second",),
            ("speed", "Time of a step"): ("step_seconds", "data_seconds"),
            ("speed", "Batch fill"): ("batch_fill",),
            ("metrics", "Accuracy"): ("top_accuracy",),
            ("metrics", "Atoms"): ("atoms",),
        }
        assert left_out == []

    def test_many_metrics(self) -> None:
        parts = {f"loss_{i}": 1.0 for i in range(2 * MAX_CURVES + 1)}
        others = {f"metric {i}": 1.0 for i in range(80)}
        drawn, left_out = charts(History.of([{"step": 1, **parts, **others}]))
        assert [len(c.names) for c in drawn[:3]] == [MAX_CURVES, MAX_CURVES, 1]
        assert len(drawn) == 60
        assert len(left_out) == 23

    def test_data_and_words(self) -> None:
        history = History.of([{"step": 1, "batch_fill": 0.5}, {"step": 2, "batch_fill": 0.75}])
        chart = Chart("speed", "Batch fill", ("batch_fill",), unit="%", scale=100.0, from_zero=True)
        data = chart_data(chart, history, 1000)
        curve = {"name": "batch_fill", "evaluation": False, "colour": 0, "x": [1, 2], "y": [50, 75]}
        assert data == {
            "title": "Batch fill",
            "unit": "%",
            "zero": True,
            "noisy": True,
            "log": False,
            "curves": [curve],
        }
        assert spoken(chart, history) == "Batch fill, %: batch_fill goes from 50 to 75, lowest 50, highest 75."

    def test_log_axis_only_for_positive_values_that_span_much(self) -> None:
        def log(*values: float) -> bool:
            history = History.of([{"step": i, "loss": v} for i, v in enumerate(values)])
            return bool(chart_data(Chart("loss", "Loss", ("loss",)), history, 10)["log"])

        assert log(10, 1)
        assert not log(1, 1.1)
        assert not log(10, -1)
        assert not log(10)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (1, "1"), (0.74012, "0.7401"), (42_181.7, "42,182"), (-3.14159, "-3.142"), (2e-5, "2.000e-05"),
        (999.96, "1000"), (math.nan, "not finite"), (math.inf, "not finite"), (1e12, "1.000e+12"),
    ],
)  # fmt: skip
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (36.12, "36.1 s"),
        (60, "1 min 0 s"),
        (725, "12 min 5 s"),
        (4320, "1 h 12 min"),
        (183_600, "2 d 3 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_records_and_lines_give_the_same(tmp_path: Path) -> None:
    records = [{"step": s, "loss": 1.0 / s, "experts": [[[s, 2 * s]]]} for s in range(1, 200)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    read, given = read_history(path), History.of(records)
    assert not read.cut_off
    assert (read.series("loss").values == given.series("loss").values).all()
    assert (read.usage.counts == given.usage.counts).all()

"""Which curves a report draws, and how long ones are thinned without losing a spike."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from moeyard.train.reporting.history import Floats, History, Series
from moeyard.train.reporting.verdicts import number

Section = Literal["loss", "optimizer", "metrics", "speed"]

#: Points of a curve, at most, and of all curves together: what keeps a page small.
MAX_POINTS = 1000
MAX_TOTAL = 60_000
#: Beyond these, curves go to a further chart, and metrics are named instead of drawn.
MAX_CURVES = 8
MAX_CHARTS = 60
#: Steps without a finite value that are marked on a curve.
MAX_MARKS = 200


@dataclass(frozen=True)
class Chart:
    """One chart: the columns that it draws, the training ones and those of the evaluations."""

    section: Section
    title: str
    names: tuple[str, ...]
    unit: str = ""
    scale: float = 1.0  # values are multiplied by it
    from_zero: bool = False
    noisy: bool = True  # worth smoothing
    wide: bool = False


def charts(history: History) -> tuple[list[Chart], list[str]]:
    """The charts of a run, in reading order, and the names of the metrics that are left out for want of room."""
    names = [n for n in history.names if n not in ("step", "epoch") and np.isfinite(history.series(n).values).any()]
    bases = list(dict.fromkeys(_base(name) for name in names))
    found: list[Chart] = []
    for title, members, style in _groups(bases):
        for start in range(0, len(members), MAX_CURVES):
            wanted = members[start : start + MAX_CURVES]
            suffix = f" ({start // MAX_CURVES + 1})" if len(members) > MAX_CURVES else ""
            columns = tuple(name for name in names if _base(name) in wanted)
            found.append(Chart(title=title + suffix, names=columns, **style))
    left_out = [name for chart in found[MAX_CHARTS:] for name in chart.names]
    return found[:MAX_CHARTS], left_out


def _base(name: str) -> str:
    """What is measured: `val_loss` and `loss` go into one chart."""
    return name.removeprefix("val_").removeprefix("test_").removeprefix("train_")


def is_router_loss(base: str) -> bool:
    """Whether a part of the loss keeps the router in order instead of teaching the task."""
    return not {"balance", "importance", "router", "z"}.isdisjoint(base.split("_"))


def _groups(bases: list[str]) -> Iterable[tuple[str, list[str], dict[str, Any]]]:
    """(title, metrics, style) of every chart; each metric goes to the first rule that takes it."""
    percent = {"unit": "%", "scale": 100.0, "from_zero": True}
    rest = dict.fromkeys(bases)

    def take(wanted: Iterable[str]) -> list[str]:
        taken = list(wanted)
        for base in taken:
            del rest[base]
        return taken

    yield "Loss", take(b for b in bases if b == "loss"), {"section": "loss", "wide": True}
    parts = take(b for b in rest if b.startswith("loss_") or b.endswith("_loss"))
    yield "Parts of the loss", [b for b in parts if not is_router_loss(b)], {"section": "loss", "wide": True}
    yield "Router losses", [b for b in parts if is_router_loss(b)], {"section": "loss", "wide": True}
    rates = take(b for b in rest if b.startswith(("learning_rate", "lr")))
    yield "Learning rate", rates, {"section": "optimizer", "from_zero": True, "noisy": False}
    yield "Gradient norm", take(b for b in rest if b.startswith("grad_norm")), {"section": "optimizer"}
    for base in take(b for b in rest if b.endswith("_per_second")):
        title = f"{base.removesuffix('_per_second').replace('_', ' ').capitalize()} per second"
        yield title, [base], {"section": "speed", "from_zero": True}
    seconds = take(b for b in rest if b.endswith("_seconds"))
    yield "Time of a step", seconds, {"section": "speed", "unit": "ms", "scale": 1e3}
    yield "Batch fill", take(b for b in rest if b == "batch_fill"), {"section": "speed", **percent}
    yield "Accuracy", take(b for b in rest if b.endswith("accuracy")), {"section": "metrics", **percent}
    for base in take(list(rest)):
        yield base.replace("_", " ").capitalize(), [base], {"section": "metrics"}


def chart_data(chart: Chart, history: History, points: int) -> dict[str, Any]:
    """What the page's script draws a chart from."""
    several = len({_base(name) for name in chart.names}) > 1
    colours = {base: i for i, base in enumerate(dict.fromkeys(_base(name) for name in chart.names))}
    curves = []
    for name in chart.names:
        evaluation = name.startswith(("val_", "test_"))
        series = history.series(name)
        # With one metric only, training and evaluation differ in colour, else in line style alone.
        colour = colours[_base(name)] if several else int(evaluation)
        scaled = Series(series.steps, series.values * chart.scale)
        curves.append({"name": name, "evaluation": evaluation, "colour": colour, **curve_data(scaled, points)})
    log = not chart.from_zero and any(_spans_decades(history.series(name).values) for name in chart.names)
    style = {"unit": chart.unit, "zero": chart.from_zero, "noisy": chart.noisy, "log": log}
    return {"title": chart.title, **style, "curves": curves}


def _spans_decades(values: Floats) -> bool:
    finite = values[np.isfinite(values)]
    return len(finite) > 1 and finite.min() > 0 and float(finite.max() / finite.min()) > 5


def curve_data(series: Series, points: int) -> dict[str, Any]:
    """A curve in at most `points` points.

    A longer one is cut into buckets of equally many records. `x`, `y` hold the lowest and the highest value of each
    where they stand, so that no spike is lost; `mx`, `my` the middle and the mean, from which the page smooths: a mean
    of extremes would be no mean. `bad` lists steps without a finite value.
    """
    bad = [int(step) for step in series.steps[np.isnan(series.values)][:MAX_MARKS]]
    marks = {"bad": bad} if bad else {}
    if len(series.steps) <= points:
        return {"x": _steps(series.steps), "y": _values(series.values), **marks}
    chosen, means = _buckets(series, points // 2)
    return {
        "x": _steps(series.steps[chosen]),
        "y": _values(series.values[chosen]),
        "mx": _steps(means.steps),
        "my": _values(means.values),
        **marks,
    }


def _buckets(series: Series, number_of_buckets: int) -> tuple[list[int], Series]:
    """Positions of each bucket's extremes, in order; and the buckets' middles and means."""
    edges = np.linspace(0, len(series.steps), number_of_buckets + 1).astype(np.int64)
    chosen: list[int] = []
    middles, means = [], []
    for low, high in pairwise(edges):
        values = series.values[low:high]
        middles.append(series.steps[(low + high - 1) // 2])
        if np.isnan(values).all():
            chosen.append(int(low))
            means.append(math.nan)
        else:
            chosen += sorted({int(low + np.nanargmin(values)), int(low + np.nanargmax(values))})
            means.append(float(np.nanmean(values)))
    return chosen, Series(np.array(middles), np.array(means))


def _steps(steps: Floats) -> list[int]:
    return [int(step) for step in steps]


def _values(values: Floats) -> list[float | int | None]:
    # Five digits are more than a screen shows. A whole number needs no ".0".
    short = [None if math.isnan(v) else float(f"{v:.5g}") for v in values]
    return [int(v) if v is not None and v.is_integer() and abs(v) < 1e15 else v for v in short]


def spoken(chart: Chart, history: History) -> str:
    """The chart in words, for those who cannot see it."""
    sentences = []
    for name in chart.names:
        values = history.series(name).values * chart.scale
        values = values[np.isfinite(values)]
        first, last, low, high = (number(float(v)) for v in (values[0], values[-1], values.min(), values.max()))
        sentences.append(f"{name} goes from {first} to {last}, lowest {low}, highest {high}")
    return f"{chart.title}{f', {chart.unit}' if chart.unit else ''}: {'; '.join(sentences)}."

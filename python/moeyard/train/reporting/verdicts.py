"""What a run comes to: the figures on top of a report, each with a judgement, and the state of each layer's experts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from moeyard.nn import collapse_warnings
from moeyard.train.reporting.history import Counts, Floats, History
from moeyard.train.reporting.run_folder import RunFolder

State = Literal["good", "warn", "bad", "plain"]

#: Below this batch fill, and above this share of time spent waiting for data, a run is worth a look.
LEAST_FILL = 0.9
MOST_WAITING = 0.1


@dataclass(frozen=True)
class Verdict:
    """One figure: `value` as printed, `note` in small type."""

    label: str
    value: str
    note: str = ""
    state: State = "plain"


@dataclass(frozen=True)
class LayerUsage:
    """Routing of one layer over the last half of the run.

    Attributes:
        shares: [E] of the slots.
        effective: exp of the shares' entropy: how many evenly used experts are as diverse as these.
        findings: what `collapse_warnings` says.
    """

    layer: int
    shares: Floats
    effective: float
    findings: list[str]


def verdicts(run: RunFolder) -> list[Verdict]:
    """The figures of a run, in reading order; those that it did not record are left out."""
    history = run.history
    found = [_steps(run), _time(history), _loss(history), _validation(history), _rate(history)]
    found += [_fill(history), _waiting(history), _experts(run)]
    return [verdict for verdict in found if verdict is not None]


def _steps(run: RunFolder) -> Verdict:
    states: dict[str, State] = {"finished": "good", "interrupted": "warn", "failed": "bad"}
    epochs = run.history.series("epoch").values
    epoch = f", epoch {int(epochs[-1])}" if len(epochs) and math.isfinite(epochs[-1]) else ""
    return Verdict("Steps", f"{run.history.last_step:,}", run.status + epoch, states.get(run.status, "plain"))


def _time(history: History) -> Verdict | None:
    steps = _finite(history.series("step_seconds").values)
    if not len(steps):
        return None
    median = f"{number(1e3 * float(np.median(steps)))} ms a step (median)"
    return Verdict("Training time", duration(_busy(history)), median)


def _busy(history: History) -> float:
    """Seconds spent in steps and in waiting for their data."""
    return float(sum(_finite(history.series(name).values).sum() for name in ("step_seconds", "data_seconds")))


def first_and_last(values: Floats) -> tuple[float, float]:
    """Means over the first and the last tenth of the records, of those that are finite."""
    tenth = max(len(values) // 10, 1)
    return _mean(values[:tenth]), _mean(values[-tenth:])


def _loss(history: History) -> Verdict | None:
    name = next((n for n in ("loss", "train_loss") if n in history), None)
    if name is None:
        return None
    steps, values = history.series(name)
    broken = steps[np.isnan(values)]
    if len(broken):
        note = f"not finite at {len(broken):,} steps, first at {int(broken[0]):,}"
        return Verdict("Loss", number(first_and_last(values)[1]), note, "bad")
    if len(values) < 10:
        return Verdict("Loss", number(float(values[-1])), "last step")
    first, last = first_and_last(values)
    state: State = "good" if last < first else "warn"
    return Verdict("Loss", number(last), f"from {number(first)} (last and first tenth)", state)


def _validation(history: History) -> Verdict | None:
    name = "val_loss" if "val_loss" in history else next((n for n in history.names if n.startswith("val_")), None)
    if name is None:
        return None
    steps, values = history.series(name)
    kept = np.isfinite(values)
    if not kept.any():
        return Verdict("Validation", "not finite", name, "bad")
    steps, values = steps[kept], values[kept]
    # Of a loss the lowest counts; whether a metric should be high or low is not ours to guess.
    at = int(values.argmin()) if name == "val_loss" else len(values) - 1
    which = "best" if name == "val_loss" else "last"
    return Verdict("Validation", number(float(values[at])), f"{which} {name}, step {int(steps[at]):,}")


def _rate(history: History) -> Verdict | None:
    rates = {n.removesuffix("_per_second"): _total_rate(history, n) for n in history.names if n.endswith("_per_second")}
    known = sorted(((rate, what) for what, rate in rates.items() if math.isfinite(rate)), reverse=True)
    if not known:
        return None
    (rate, what), *others = known
    return Verdict("Throughput", f"{number(rate)} {what}/s", ", ".join(f"{number(r)} {w}/s" for r, w in others))


def _total_rate(history: History, name: str) -> float:
    """All that was done over all the time it took; the mean of the steps' rates where the amounts are not recorded."""
    amounts = _finite(history.series(name.removesuffix("_per_second")).values)
    busy = _busy(history)
    return float(amounts.sum()) / busy if len(amounts) and busy else _mean(history.series(name).values)


def _fill(history: History) -> Verdict | None:
    fill = _mean(history.series("batch_fill").values)
    if math.isnan(fill):
        return None
    return Verdict("Batch fill", f"{fill:.1%}", "mean over all steps", "good" if fill >= LEAST_FILL else "warn")


def _waiting(history: History) -> Verdict | None:
    busy = _busy(history)
    if not busy or "data_seconds" not in history:
        return None
    share = float(_finite(history.series("data_seconds").values).sum()) / busy
    return Verdict("Waiting for data", f"{share:.1%}", "of the time", "good" if share <= MOST_WAITING else "warn")


def _experts(run: RunFolder) -> Verdict | None:
    layers = layer_usage(run)
    if not layers:
        return None
    number_of_findings = len(alarms(layers))
    size = f"{len(layers)} layers, {len(layers[0].shares)} experts"
    if not number_of_findings:
        return Verdict("Expert warnings", "none", size, "good")
    return Verdict("Expert warnings", str(number_of_findings), size, "bad")


def layer_usage(run: RunFolder) -> list[LayerUsage]:
    """Every layer's routing over the last half of the run; empty when no usage was recorded."""
    usage = run.history.usage
    if not usage.records:
        return []
    k = min(run.experts_per_token or 1, usage.shape[2])
    return [_layer(index, counts, k) for index, counts in enumerate(usage.late().sum(axis=1))]


def _layer(index: int, counts: Counts, k: int) -> LayerUsage:
    shares = counts / max(int(counts.sum()), 1)
    some = shares[shares > 0]
    effective = float(np.exp(-(some * np.log(some)).sum())) if len(some) else 0.0
    return LayerUsage(index, shares, effective, collapse_warnings(torch.from_numpy(counts), k))


def alarms(layers: list[LayerUsage]) -> list[str]:
    """The collapse alarm: one line per finding, such as "layer 2: expert 3 takes 71% of the tokens"."""
    return [f"layer {usage.layer}: {finding}" for usage in layers for finding in usage.findings]


def number(value: float) -> str:
    """Four significant digits, thousands separated: 42,182 and 0.7401 and 2.000e-05."""
    if not math.isfinite(value):
        return "not finite"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}" if size < 1e9 else f"{value:.3e}"
    if size < 1e-3 and size > 0:
        return f"{value:.3e}"
    return f"{float(f'{value:.4g}'):g}"


def duration(seconds: float) -> str:
    """36.1 s, 12 min 5 s, 1 h 12 min, 2 d 3 h."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for size, unit, part, smaller in ((86_400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // part} {smaller}"
    raise AssertionError(seconds)


def _finite(values: Floats) -> Floats:
    return values[np.isfinite(values)]


def _mean(values: Floats) -> float:
    finite = _finite(values)
    return float(finite.mean()) if len(finite) else math.nan

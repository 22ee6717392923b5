"""Reports of a run, made from the files in its folder alone: one HTML page, plots as PNG, lines for a terminal.

    metrics.jsonl, config.json, run.json  ->  report.html, plots/*.png

A run may be finished, running, cut off or not yet begun: what is missing is left out, what is damaged is named.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from moeyard.train import plots
from moeyard.train.errors import UsageError
from moeyard.train.files import whole_file
from moeyard.train.reporting.charts import curve_data
from moeyard.train.reporting.history import Floats
from moeyard.train.reporting.page import render
from moeyard.train.reporting.run_folder import RunFolder, find_run, read_run
from moeyard.train.reporting.verdicts import LayerUsage, alarms, layer_usage, verdicts

__all__ = ["RunFolder", "UsageError", "find_run", "read_run", "summary_lines", "write_report"]

BLOCKS = "▁▂▃▄▅▆▇█"
#: Characters of a sparkline, and of a row of experts.
SPARKS = 40
MOST_EXPERTS = 64


def write_report(folder: Path | RunFolder) -> Path:
    """Writes `report.html` and the plots of a run; an earlier report is replaced at once, never half.

    Args:
        folder: the folder of the run, or what `read_run` read from it. A page for 10,000 steps stays under 3 MB.

    Returns:
        The path of the page. It needs no network and no other file.

    Raises:
        UsageError: `folder` holds none of the files of a run.
        OSError: it cannot be written.

    Determinism: the same files give the same page.
    """
    run = folder if isinstance(folder, RunFolder) else read_run(folder)
    # A run that drew its plots beside its metrics keeps them: it may know more than its files, such as domain names.
    if not (run.path / "loss.png").is_file():
        plots.draw(run.history, run.path / "plots", run.domains)
    page = run.path / "report.html"
    with whole_file(page) as part:
        part.write_text(render(run), encoding="utf-8")
    return page


def summary_lines(folder: Path | RunFolder) -> list[str]:
    """A run in a few lines of plain text: figures, the course of the loss, the experts of every layer, warnings.

    Raises:
        UsageError: `folder` holds none of the files of a run.
    """
    run = folder if isinstance(folder, RunFolder) else read_run(folder)
    layers = layer_usage(run)
    return [
        f"{run.name}: {run.status}",
        *_figures(run),
        *_loss_line(run),
        *_expert_lines(layers),
        *(f"warning: {line}" for line in [*alarms(layers), *run.problems]),
    ]


def _figures(run: RunFolder) -> list[str]:
    found = verdicts(run)
    label, value = max(len(v.label) for v in found), max(len(v.value) for v in found)
    marks = {"warn": "! ", "bad": "✕ "}
    return [f"  {v.label:<{label}}  {v.value:<{value}}  {marks.get(v.state, '')}{v.note}".rstrip() for v in found]


def _loss_line(run: RunFolder) -> list[str]:
    series = run.history.series("loss")
    if len(series.steps) < 2:
        return []
    data = curve_data(series, 2 * SPARKS)
    means = np.array([math.nan if m is None else m for m in data.get("my", data["y"])], dtype=np.float64)
    if np.nanmin(means, initial=math.inf) > 0:
        means = np.log(means)
    steps = f"steps {int(series.steps[0]):,} to {int(series.steps[-1]):,}"
    return [f"  loss  {sparkline(means)}  {steps}"]


def sparkline(values: Floats, low: float | None = None) -> str:
    """One block per value, between the lowest (or `low`) and the highest; a gap where a value is not finite."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return " " * len(values)
    bottom = float(finite.min()) if low is None else low
    height = float(finite.max()) - bottom or 1.0
    return "".join(
        " " if math.isnan(v) else BLOCKS[min(int((v - bottom) / height * len(BLOCKS)), len(BLOCKS) - 1)] for v in values
    )


def _expert_lines(layers: list[LayerUsage]) -> list[str]:
    if not layers:
        return []
    lines = ["  layer  largest           smallest          effective  shares of the experts"]
    for usage in layers:
        largest, smallest = int(usage.shares.argmax()), int(usage.shares.argmin())
        most = f"{usage.shares[largest]:.1%} (expert {largest})"
        least = f"{usage.shares[smallest]:.1%} (expert {smallest})"
        bars = sparkline(_grouped(usage.shares), low=0.0)
        lines.append(f"  {usage.layer:>5}  {most:<16}  {least:<16}  {usage.effective:>9.1f}  {bars}")
    return lines


def _grouped(shares: Floats) -> Floats:
    """At most `MOST_EXPERTS` values: of neighbours that share a character, the largest counts."""
    together = -(-len(shares) // MOST_EXPERTS)
    return np.maximum.reduceat(shares, np.arange(0, len(shares), together))

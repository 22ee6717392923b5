"""Plots of a run as PNG files, drawn from its metrics records without a display.

Figures are made directly, not through pyplot: nothing global is touched and no window system is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import LogLocator, NullFormatter
from numpy.typing import NDArray

Records = Sequence[dict[str, Any]]


def smoothed(values: NDArray[np.float64], span: int) -> NDArray[np.float64]:
    """Centred running mean over `span` values, of those that are finite; over fewer at both ends."""
    finite = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(values))
    low, high = np.maximum(index - span // 2, 0), np.minimum(index + span // 2 + 1, len(values))
    number = count[high] - count[low]
    return np.where(number > 0, (total[high] - total[low]) / np.maximum(number, 1), np.nan)


def _column(records: Records, name: str) -> NDArray[np.float64]:
    return np.array([np.nan if r[name] is None else r[name] for r in records], dtype=np.float64)


def _span(records: Records) -> int:
    return max(len(records) // 20, 1)


def plot_overview(records: Records, path: Path) -> None:
    """Loss and expert usage side by side: the run at one glance."""
    figure = Figure(figsize=(11, 4), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_loss(left, records)
    share = _shares(_late_usage(records).sum(axis=1))
    image = _draw_usage(right, share, float(share.max()))
    right.set_title("Expert usage, % of slots")
    figure.colorbar(image, ax=right)
    figure.savefig(path)


def plot_loss(records: Records, path: Path) -> None:
    """Loss, noise and element loss over steps: raw in pale, smoothed in full colour."""
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    _draw_loss(figure.subplots(), records)
    figure.savefig(path)


def _draw_loss(axes: Axes, records: Records) -> None:
    steps = _column(records, "step")
    for name, label in (("loss", "total"), ("loss_noise", "coordinate noise"), ("loss_element", "masked elements")):
        values = _column(records, name)
        (line,) = axes.plot(steps, values, linewidth=0.6, alpha=0.3)
        axes.plot(steps, smoothed(values, _span(records)), color=line.get_color(), linewidth=1.8, label=label)
    axes.set(xlabel="step", ylabel="loss", title="Training loss", yscale="log")
    # 0.5, 1, 2, not powers of ten.
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3, which="both")
    axes.legend()


def plot_experts(records: Records, path: Path, domains: Sequence[str]) -> None:
    """Share of the slots per layer and expert, over the last half of the run: all domains, then each that occurs."""
    usage = _late_usage(records)
    panels = [("all", usage.sum(axis=1))]
    if len(domains) > 1:
        panels += [(name, usage[:, d]) for d, name in enumerate(domains) if usage[:, d].any()]
    layers, experts = panels[0][1].shape
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    width = min(max(0.4 * experts, 2.6), 8.0) * columns + 1.2
    figure = Figure(figsize=(width, (0.45 * layers + 0.9) * rows + 0.5), dpi=120, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    shares = [_shares(counts) for _, counts in panels]
    top = max(float(share.max()) for share in shares)
    for axes, (title, _), share in zip(grid.flat, panels, shares, strict=False):
        image = _draw_usage(axes, share, top)
        axes.set_title(title)
        axes.label_outer()
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    figure.colorbar(image, ax=grid, label="share of slots")
    figure.suptitle("Expert usage, % of slots (last half of the run)")
    figure.savefig(path)


def _late_usage(records: Records) -> NDArray[np.int64]:
    """[L,D,E] slots over the last half of the run, when routing has settled."""
    usage: NDArray[np.int64] = np.sum([np.array(r["experts"]) for r in records[len(records) // 2 :]], axis=0)
    return usage


def _shares(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """[L,E] counts -> shares of each layer."""
    shares: NDArray[np.float64] = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return shares


def _draw_usage(axes: Axes, share: NDArray[np.float64], top: float) -> AxesImage:
    layers, experts = share.shape
    image = axes.imshow(share, vmin=0.0, vmax=top, cmap="viridis", aspect="auto")
    axes.set(xlabel="expert", ylabel="layer", yticks=range(layers))
    # Every expert named, and its number in the cell, for as long as they can be read.
    if experts <= 16:
        axes.set_xticks(range(experts))
        for (layer, expert), value in np.ndenumerate(share):
            colour = "black" if value > 0.6 * top else "white"
            axes.text(expert, layer, f"{100 * value:.0f}", ha="center", va="center", color=colour, fontsize=7)
    return image


def plot_throughput(records: Records, path: Path) -> None:
    """Atoms and structures per second, batch fill and step time over steps."""
    figure = Figure(figsize=(8, 6.5), dpi=120, layout="constrained")
    panels = figure.subplots(3, 1, sharex=True)
    steps, span = _column(records, "step"), _span(records)
    atoms, structures = panels[0], panels[0].twinx()
    atoms.plot(steps, smoothed(_column(records, "atoms_per_second"), span), color="C0")
    atoms.set_ylabel("atoms/s", color="C0")
    structures.plot(steps, smoothed(_column(records, "structures_per_second"), span), "--", color="C1")
    structures.set_ylabel("structures/s", color="C1")
    atoms.set(ylim=(0, None), title="Throughput and batch fill")
    structures.set_ylim(0, None)
    panels[1].plot(steps, 100 * _column(records, "batch_fill"), color="C2", linewidth=1.0)
    panels[1].set(ylabel="batch fill, %", ylim=(0, 105))
    panels[2].plot(steps, 1e3 * _column(records, "step_seconds"), color="C3", linewidth=1.0, label="step")
    panels[2].plot(steps, 1e3 * _column(records, "data_seconds"), color="C4", linewidth=1.0, label="waiting for data")
    panels[2].set(xlabel="step", ylabel="ms", yscale="log")
    panels[2].legend()
    for axes in panels:
        axes.grid(alpha=0.3)
    figure.savefig(path)

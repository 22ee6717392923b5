"""Plots of a run as PNG files, drawn from its metrics without a display.

Figures are made directly, not through pyplot: nothing global is touched and no window system is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import LogLocator, NullFormatter
from numpy.typing import NDArray

from moeyard.train.files import whole_file
from moeyard.train.reporting.charts import is_router_loss
from moeyard.train.reporting.history import Counts, Floats, History

Records = Sequence[dict[str, Any]]

#: Inches; more experts, layers or domains than fit are drawn smaller.
MAX_WIDTH, MAX_HEIGHT, MAX_PANEL_HEIGHT = 28.0, 40.0, 4.0
#: Series colours after Okabe and Ito, told apart without full colour vision too.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a4fa3", "#5f6670")
#: Where one share is this many times the even one, colours follow the root: the others would all be dark.
SPREAD = 5


def draw(run: History | Records, folder: Path, domains: Sequence[str]) -> list[Path]:
    """Draws every plot that the run has numbers for into `folder`; those of an earlier run go where it has none.

    Args:
        run: its history, or its records.
        folder: made when there is something to draw.
        domains: D names, for the panels of the usage.

    Returns:
        The paths written.
    """
    history = _history(run)
    speed = any(_has(history, name) for name in ("batch_fill", "step_seconds", "data_seconds")) or bool(_rates(history))
    loss, usage = "loss" in history, history.usage.records > 0
    plots: dict[str, tuple[bool, Callable[[Path], None]]] = {
        "overview.png": (loss and usage, lambda path: plot_overview(history, path)),
        "loss.png": (loss, lambda path: plot_loss(history, path)),
        "experts.png": (usage, lambda path: plot_experts(history, path, domains)),
        "throughput.png": (speed, lambda path: plot_throughput(history, path)),
    }
    for name, (wanted, plot) in plots.items():
        if wanted:
            folder.mkdir(parents=True, exist_ok=True)
            plot(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)
    return [folder / name for name, (wanted, _) in plots.items() if wanted]


def smoothed(values: Floats, span: int) -> Floats:
    """Centred running mean over `span` values, of those that are finite; over fewer at both ends."""
    finite = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(values))
    low, high = np.maximum(index - span // 2, 0), np.minimum(index + span // 2 + 1, len(values))
    number = count[high] - count[low]
    return np.where(number > 0, (total[high] - total[low]) / np.maximum(number, 1), np.nan)


def _history(run: History | Records) -> History:
    return run if isinstance(run, History) else History.of(run)


def _has(history: History, name: str) -> bool:
    return bool(np.isfinite(history.series(name).values).any())


def _save(figure: Figure, path: Path) -> None:
    with whole_file(path) as part:
        figure.savefig(part, format="png")


def plot_overview(run: History | Records, path: Path) -> None:
    """Loss and expert usage side by side: the run at one glance."""
    history = _history(run)
    figure = Figure(figsize=(11, 4), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_loss(left, history)
    share = _shares(history.usage.late().sum(axis=1))
    image = _draw_usage(right, share, _scale([share]))
    right.set_title("Expert usage, % of slots")
    figure.colorbar(image, ax=right)
    _save(figure, path)


def plot_loss(run: History | Records, path: Path) -> None:
    """The loss and its parts over steps: raw in pale, smoothed in full colour; evaluations dashed.

    What keeps the router in order is on the page, but not here, where it would hide what is learned.
    """
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    _draw_loss(figure.subplots(), _history(run))
    _save(figure, path)


def _draw_loss(axes: Axes, history: History) -> None:
    names = [n for n in history.names if n in ("loss", "val_loss") or n.startswith("loss_")]
    names = [name for name in names if not is_router_loss(name)]
    axes.set_prop_cycle(color=COLOURS)
    for name in (n for n in names if _has(history, n)):
        steps, values = history.series(name)
        if name == "val_loss":
            axes.plot(steps, values, "--", color="black", marker=".", linewidth=1.2, label="validation")
            continue
        label = "total" if name == "loss" else name.removeprefix("loss_").replace("_", " ")
        (line,) = axes.plot(steps, values, linewidth=0.6, alpha=0.3)
        axes.plot(steps, smoothed(values, _span(values)), color=line.get_color(), linewidth=1.8, label=label)
    axes.set(xlabel="step", ylabel="loss", title="Training loss")
    if any((history.series(name).values > 0).any() for name in names):
        _log_axis(axes)
    axes.grid(alpha=0.3, which="both")
    if axes.lines:
        axes.legend()


def _span(values: Floats) -> int:
    return max(len(values) // 20, 1)


def _log_axis(axes: Axes) -> None:
    axes.set_yscale("log")
    # 0.5, 1, 2, not powers of ten.
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def plot_experts(run: History | Records, path: Path, domains: Sequence[str]) -> None:
    """Share of the slots per layer and expert, over the last half of the run: all domains, then each that occurs."""
    usage = _history(run).usage.late()
    panels = [("all", usage.sum(axis=1))]
    if len(domains) > 1:
        panels += [(name, usage[:, d]) for d, name in enumerate(domains) if usage[:, d].any()]
    layers, experts = panels[0][1].shape
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    width = min(min(max(0.4 * experts, 2.6), 8.0) * columns + 1.2, MAX_WIDTH)
    height = min((min(0.45 * layers, MAX_PANEL_HEIGHT) + 0.9) * rows + 0.5, MAX_HEIGHT)
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    shares = [_shares(counts) for _, counts in panels]
    scale = _scale(shares)
    for axes, (title, _), share in zip(grid.flat, panels, shares, strict=False):
        image = _draw_usage(axes, share, scale)
        axes.set_title(title)
        axes.label_outer()
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    figure.colorbar(image, ax=grid, label="share of slots", shrink=1 / rows, anchor=(0.0, 1.0), pad=0.01)
    figure.suptitle("Expert usage, % of slots (last half of the run)")
    _save(figure, path)


def _shares(counts: Counts) -> NDArray[np.float64]:
    """[L,E] counts -> shares of each layer."""
    shares: NDArray[np.float64] = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return shares


def _scale(shares: Sequence[NDArray[np.float64]]) -> Normalize:
    """One colour scale for all; even usage looks calm, as it is never further up than the middle."""
    even = 1 / shares[0].shape[1]
    top = max(2 * even, *(float(share.max()) for share in shares))
    return PowerNorm(0.5, 0.0, top) if top > SPREAD * even else Normalize(0.0, top)


def _draw_usage(axes: Axes, share: NDArray[np.float64], scale: Normalize) -> AxesImage:
    layers, experts = share.shape
    image = axes.imshow(share, norm=scale, cmap="viridis", aspect="auto")
    axes.set(xlabel="expert", ylabel="layer")
    # Each layer and expert named, and its number in the cell, for as long as they can be read.
    if layers <= 16:
        axes.set_yticks(range(layers))
    if experts <= 16 and layers <= 16:
        axes.set_xticks(range(experts))
        for (layer, expert), value in np.ndenumerate(share):
            colour = "black" if scale(value) > 0.42 else "white"
            axes.text(expert, layer, f"{100 * value:.0f}", ha="center", va="center", color=colour, fontsize=7)
    return image


def _rates(history: History) -> list[str]:
    return [name for name in history.names if name.endswith("_per_second") and _has(history, name)]


def plot_throughput(run: History | Records, path: Path) -> None:
    """Throughput, batch fill and step time over steps; panels without numbers stay empty."""
    history = _history(run)
    figure = Figure(figsize=(8, 6.5), dpi=120, layout="constrained")
    rates, fill, seconds = figure.subplots(3, 1, sharex=True)
    _draw_rates(rates, history)
    steps, values = history.series("batch_fill")
    fill.plot(steps, 100 * values, color=COLOURS[2], linewidth=1.0)
    fill.set(ylabel="batch fill, %", ylim=(0, 105))
    for name, colour, label in (("step_seconds", COLOURS[0], "step"), ("data_seconds", COLOURS[1], "waiting for data")):
        if _has(history, name):
            steps, values = history.series(name)
            seconds.plot(steps, 1e3 * values, color=colour, linewidth=1.0, label=label)
    seconds.set(xlabel="step", ylabel="ms")
    if seconds.lines:
        seconds.set_yscale("log")
        seconds.legend()
    for axes in (rates, fill, seconds):
        axes.grid(alpha=0.3)
    _save(figure, path)


def _draw_rates(axes: Axes, history: History) -> None:
    """The two highest rates, each with an axis of its own."""
    axes.set_title("Throughput and batch fill")
    rates = sorted(_rates(history), key=lambda name: -float(np.nanmedian(history.series(name).values)))
    for name, style, colour, side in zip(rates, ("-", "--"), COLOURS, (axes, None), strict=False):
        side = side or axes.twinx()
        steps, values = history.series(name)
        side.plot(steps, smoothed(values, _span(values)), style, color=colour)
        side.set_ylabel(f"{name.removesuffix('_per_second')}/s", color=colour)
        side.set_ylim(0, None)

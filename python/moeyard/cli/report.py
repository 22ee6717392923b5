"""What the commands print at their end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from moeyard.train.demo import DemoSummary

#: Skipped structures that are named; the rest is counted here and listed in summary.json.
NAMED = 10


def print_summary(console: Console, summary: DemoSummary) -> None:
    """The demo's table, expert usage, skipped structures and where everything lies."""
    console.print(_figures(summary))
    if summary.expert_share:
        console.print(_experts(summary))
    if summary.comparison:
        console.print(_comparison(summary))
    _print_skipped(console, summary.skipped)
    if summary.interrupted:
        console.print("interrupted: what was done until then is written", style="yellow")
    console.print(
        f"written to {summary.out}/: {', '.join(summary.files)}", markup=False, highlight=False, soft_wrap=True
    )


def _figures(summary: DemoSummary) -> Table:
    table = Table(title="moeyard demo", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    domains = ", ".join(f"{count:,} {name}" for name, count in summary.domains.items())
    for name, value in (
        ("structures", f"{summary.structures:,} ({domains})"),
        ("atoms", f"{summary.atoms:,}"),
        ("steps", f"{summary.steps:,} in {summary.seconds:.1f} s"),
        ("structures/s", f"{summary.structures_per_second:,.{0 if summary.structures_per_second >= 10 else 2}f}"),
        ("atoms/s", f"{summary.atoms_per_second:,.0f}"),
        ("batch fill", f"{summary.batch_fill:.1%}"),
        ("median step", f"{1e3 * summary.median_step_seconds:,.1f} ms"),
        ("loss, first tenth -> last tenth", f"{summary.first_loss:.3f} -> {summary.last_loss:.3f}"),
        ("skipped", f"{len(summary.skipped):,}"),
    ):
        table.add_row(name, value)
    return table


def _experts(summary: DemoSummary) -> Table:
    table = Table(title="expert usage, % of slots")
    table.add_column("layer", justify="right")
    for expert in range(len(summary.expert_share[0])):
        table.add_column(str(expert), justify="right")
    for layer, shares in enumerate(summary.expert_share):
        table.add_row(str(layer), *(f"{100 * share:.0f}" for share in shares))
    return table


def _comparison(summary: DemoSummary) -> Table:
    table = Table(title="one batch, ms")
    for name in ("step", "plain PyTorch", "moeyard", "ratio"):
        table.add_column(name, justify="left" if name == "step" else "right")
    for row in summary.comparison:
        table.add_row(row.step, f"{row.plain_ms:.3f}", f"{row.ours_ms:.3f}", f"{row.ratio:.1f} x")
    return table


def _print_skipped(console: Console, skipped: list[tuple[str, str]]) -> None:
    for name, reason in skipped[:NAMED]:
        console.print(f"skipped {name}: {reason}", markup=False, highlight=False, soft_wrap=True)
    if len(skipped) > NAMED:
        console.print(f"... and {len(skipped) - NAMED} more, listed in summary.json", highlight=False)

"""moeyard sweep: a grid in, runs done, a table out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from moeyard.cli.shared import clear_errors, plain
from moeyard.cli.train import Out, Set, Steps, number, with_short

if TYPE_CHECKING:
    from moeyard.train.sweep import Outcome


def sweep(
    system: Annotated[str, typer.Argument(help="What to train.")],
    grid: Annotated[
        list[str] | None, typer.Option(metavar="A.B=X,Y", help="Values of one setting; may be repeated.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="Settings: a .toml, .yaml or .json file.")] = None,
    settings: Set = None,
    out: Out = Path("runs"),
    steps: Steps = None,
    engine: Annotated[str, typer.Option(help="local, slurm or ray.")] = "local",
    jobs: Annotated[int | None, typer.Option(help="Runs at a time; by default one locally, all elsewhere.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Most seconds of each run.")] = None,
    options: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="KEY=VALUE", help="For the engine, such as slurm_partition=gpu."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the runs; train nothing.")] = False,
) -> None:
    """Train every combination of some settings; called again, go on with what is not finished."""
    console = Console()
    with clear_errors("sweep"):
        from moeyard.train.errors import UsageError
        from moeyard.train.runs import RunStore
        from moeyard.train.sweep import ENGINES, Sweep, outcome, plan
        from moeyard.train.system import load_system

        if engine not in ENGINES:
            raise UsageError(f"--engine: expected one of {', '.join(ENGINES)}, got {engine}")
        if jobs is not None and jobs < 1:
            raise UsageError(f"--jobs: expected at least 1, got {jobs}")
        if not grid:
            raise UsageError("--grid: expected at least one, such as --grid seed=0,1,2")
        store = RunStore(out)
        overrides = with_short(settings, max_steps=steps)
        planned = plan(load_system(system), store, grid, file=config, settings=overrides)
        if dry_run:
            done = [outcome(job) for job in planned]
        else:
            runner = Sweep(store, engine, jobs, seconds, options or (), plain(console))
            done = runner.run(planned)
    console.print(_table(system, done))
    if any(item.status == "failed" for item in done):
        raise typer.Exit(1)


def _table(system: str, outcomes: Sequence[Outcome]) -> Table:
    table = Table(title=f"{system}: {len(outcomes)} runs")
    names = [setting.partition("=")[0] for setting in outcomes[0].job.point]
    for name in ("signature", *names, "status", "steps", "best", "at step"):
        table.add_column(name, overflow="fold")
    for item in outcomes:
        values = [setting.partition("=")[2] for setting in item.job.point]
        best, step = "-", "-"
        if item.best is not None:
            best, step = f"{item.best['name']} {number(item.best['value'])}", str(item.best["step"])
        table.add_row(item.job.run.signature, *values, item.status, str(item.steps), best, step)
    return table

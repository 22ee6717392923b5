"""moeyard runs: what is in the run store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from moeyard.cli.shared import clear_errors, plain
from moeyard.cli.train import Out, number

if TYPE_CHECKING:
    from moeyard.train.runs import Run

app = typer.Typer(help="List, show and compare runs.", no_args_is_help=True)

System = Annotated[str | None, typer.Option(help="Only this system's runs.")]


@app.command("list")
def list_runs(system: System = None, out: Out = Path("runs")) -> None:
    """List all runs."""
    console = Console()
    with clear_errors("runs"):
        from moeyard.train.runs import RunStore

        found = RunStore(out).runs(system)
        table = Table(title=f"runs in {out}")
        for name in ("system", "signature", "status", "steps", "best", "started"):
            table.add_column(name)
        for run in found:
            info = run.info
            table.add_row(
                run.system,
                run.signature,
                run.status,
                str(info.get("steps", "-")),
                _best(info),
                info.get("started", "-"),
            )
    if found:
        console.print(table)
    else:
        plain(console)(f"no runs in {out / system if system else out}")


@app.command()
def show(
    signature: Annotated[str, typer.Argument(help="Signature, its beginning, or system/signature.")],
    system: System = None,
    out: Out = Path("runs"),
) -> None:
    """Show a run: how it stands, its last numbers, its settings."""
    console = Console()
    with clear_errors("runs"):
        from moeyard.train.runs import RunStore, flat

        run = RunStore(out).find(signature, system)
        info, last, config = run.info, last_numbers(run), dict(flat(run.config))
        status = run.status
    facts = {"status": status, "steps": info.get("steps"), "best": _best(info)}
    facts |= {name: info[name] for name in ("started", "ended", "error", "machine") if info.get(name)}
    facts |= info.get("versions", {})
    for title, rows in ((f"{run.system}/{run.signature}", facts), ("last numbers", last), ("settings", config)):
        table = Table(title=title, show_header=False)
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        for name, value in rows.items():
            table.add_row(name, number(value))
        console.print(table)
    plain(console)(f"in {run.folder}/")


@app.command()
def compare(
    signatures: Annotated[list[str], typer.Argument(help="Two signatures or more.")],
    system: System = None,
    out: Out = Path("runs"),
) -> None:
    """Put runs side by side: the settings in which they differ, and how they did."""
    console = Console()
    with clear_errors("runs"):
        from moeyard.train.errors import UsageError
        from moeyard.train.runs import RunStore, differences

        if len(signatures) < 2:
            raise UsageError(f"signatures: expected two or more to compare, got {len(signatures)}")
        runs = [RunStore(out).find(name, system) for name in signatures]
        numbers = [last_numbers(run) for run in runs]
        rows: dict[str, list[Any]] = {"status": [run.status for run in runs], **differences(runs)}
        rows["steps"] = [run.info.get("steps") for run in runs]
        rows["best"] = [_best(run.info) for run in runs]
        for name in dict.fromkeys(name for table in numbers for name in table):
            rows[f"last {name}"] = [table.get(name) for table in numbers]
    table = Table()
    table.add_column("", style="bold")
    for run in runs:
        table.add_column(f"{run.system}/{run.signature}", justify="right")
    for name, values in rows.items():
        table.add_row(name, *map(number, values))
    console.print(table)


def _best(info: dict[str, Any]) -> str:
    best = info.get("best")
    return f"{best['name']} {number(best['value'])}" if best else "-"


def last_numbers(run: Run) -> dict[str, Any]:
    """The last training record's and the last evaluation's numbers that say how well a run does."""
    from moeyard.train.metrics import read_metrics

    path = run.folder / "metrics.jsonl"
    records = read_metrics(path) if path.exists() else []
    found: dict[str, Any] = {}
    for key in ("loss", "val_loss"):
        last = next((record for record in reversed(records) if key in record), {})
        names = [n for n in last if n.startswith(("loss", "val_")) or n in ("learning_rate", "grad_norm")]
        found.update({name: last[name] for name in names})
    return found

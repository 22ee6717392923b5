"""The commands: options in, a call into `moeyard.train`, tables out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import moeyard
from moeyard.cli import report, report_command, runs, sweep, train
from moeyard.cli.shared import clear_errors, loading, plain

app = typer.Typer(
    name="moeyard",
    help="Native ops and complete pipelines for mixture-of-experts training on scientific data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.command()(train.train)
app.command("eval")(train.evaluate)
app.command()(sweep.sweep)
app.command("report")(report_command.report)
app.add_typer(runs.app, name="runs")


def run(arguments: list[str]) -> int:
    """Runs the application; returns its exit status instead of leaving the interpreter."""
    try:
        app(args=arguments, prog_name="moeyard")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _version(wanted: bool) -> None:
    if wanted:
        print(f"moeyard {moeyard.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
def doctor(arguments: Annotated[list[str] | None, typer.Argument(hidden=True)] = None) -> None:
    """Tell what is installed, what is missing and how to mend it."""
    from moeyard import doctor as module

    raise typer.Exit(module.main(arguments or []))


@app.command()
def demo(
    structures: Annotated[
        Path | None,
        typer.Option(help="Folder of PDB, mmCIF and SDF files; without it, embedded molecules and peptides."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Most training steps.")] = 800,
    seconds: Annotated[float, typer.Option(help="Most seconds of training.")] = 60.0,
    max_atoms_per_batch: Annotated[int, typer.Option(help="Atom budget of a batch.")] = 2000,
    experts: Annotated[int, typer.Option(help="Experts per layer.")] = 8,
    top_k: Annotated[int, typer.Option(help="Experts per atom.")] = 2,
    seed: Annotated[int, typer.Option(help="Same seed, same losses (on a GPU to rounding).")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for metrics, plots and configuration.")] = Path("runs/demo"),
    workers: Annotated[int, typer.Option(help="DataLoader worker processes.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, or cuda: structures, batches and graphs stay on the GPU.")] = "cpu",
) -> None:
    """Train a small MoE structure encoder on molecules, and show how fast and how well."""
    options = locals()
    console = Console()
    with clear_errors("demo"):
        from moeyard.train.demo import DemoOptions, run_demo

        with loading(console) as progress:
            summary = run_demo(
                DemoOptions(**options), progress=progress, terminal=console.is_terminal, write=plain(console)
            )
    report.print_summary(console, summary)
    if summary.interrupted:
        raise typer.Exit(130)

"""moeyard train, moeyard eval: options in, a call into `moeyard.train`, lines and tables out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from moeyard.cli.shared import clear_errors, loading, plain

if TYPE_CHECKING:
    from moeyard.train.training import TrainResult

Out = Annotated[Path, typer.Option(help="Folder of all runs.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override one setting; may be repeated.")]
Steps = Annotated[int | None, typer.Option(help="Short for --set max_steps=N.")]


def train(
    system: Annotated[str, typer.Argument(help="What to train, such as tokens-demo.")],
    config: Annotated[Path | None, typer.Option(help="Settings: a .toml, .yaml or .json file.")] = None,
    settings: Set = None,
    out: Out = Path("runs"),
    steps: Steps = None,
    seconds: Annotated[float | None, typer.Option(help="Stop after so many seconds; the run can go on later.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--restart", help="Go on with an unfinished run, or forget it.")
    ] = True,
    workers: Annotated[int | None, typer.Option(help="Short for --set workers=N.")] = None,
) -> None:
    """Train a system; called again with the same settings, go on where it ended."""
    console = Console(quiet=not _first_process())
    with clear_errors("train", quiet=console.quiet):
        from moeyard.train.config import load_config
        from moeyard.train.errors import UsageError
        from moeyard.train.runs import RunStore
        from moeyard.train.system import load_system

        if seconds is not None and not 0 < seconds <= 1e9:
            raise UsageError(f"--seconds: expected a positive number up to 1e9, got {seconds:g}")
        chosen = load_system(system)
        overrides = with_short(settings, max_steps=steps, workers=workers)
        read = load_config(chosen.Config, defaults=chosen.defaults, file=config, settings=overrides)
        from moeyard.train import training  # Lightning takes seconds: a mistake is told before

        with loading(console) as progress:
            result = training.train(
                chosen,
                read,
                RunStore(out),
                restart=not resume,
                seconds=seconds,
                progress=progress,
                terminal=console.is_terminal and not console.quiet,
                write=plain(console),
            )
    _tell(console, result)
    if result.reason == "interrupted":
        raise typer.Exit(130)


def _first_process() -> bool:
    """False in all but the first process of torchrun: they work and say nothing."""
    import os

    return os.environ.get("RANK", "0") == "0"


def _tell(console: Console, result: TrainResult) -> None:
    say = plain(console)
    if result.already:
        say(f"already finished: {result.folder}, {result.steps:,} steps; --restart trains anew")
        return
    why = f" ({result.reason})" if result.reason not in ("", result.status) else ""
    more = "; the same command goes on" if result.reason else ""
    say(f"{result.status} after {result.steps:,} steps{why}{more}")
    if result.best is not None:
        say(f"best {result.best['name']} {result.best['value']:.4f} at step {result.best['step']:,}")
    say(f"written to {result.folder}/" + (f", the report to {result.report}" if result.report else ""))


def evaluate(
    system: Annotated[str, typer.Argument(help="What was trained.")],
    signature: Annotated[str, typer.Argument(help="Signature of the run, or its beginning.")],
    out: Out = Path("runs"),
    last: Annotated[bool, typer.Option("--last", help="The last weights, not the best ones.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default that of the training.")] = None,
) -> None:
    """Score a run's weights on what it was not trained on."""
    console = Console()
    with clear_errors("eval"):
        from moeyard.train.runs import RunStore
        from moeyard.train.system import load_system

        load_system(system)
        run = RunStore(out).find(signature, system)
        from moeyard.train.training import evaluate_run

        with loading(console) as progress:
            kind = "last" if last else "best"
            step, values = evaluate_run(run, kind=kind, device=device, progress=progress)
    table = Table(title=f"{run.system}/{run.signature}, step {step:,}", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in values.items():
        table.add_row(name, number(value))
    console.print(table)


def with_short(settings: Sequence[str] | None, **short: int | None) -> list[str]:
    """What was --set, and what was given by an option of its own."""
    return [*(settings or ()), *(f"{name}={value}" for name, value in short.items() if value is not None)]


def number(value: Any) -> str:
    """A value of a setting or a metric, in few characters."""
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)

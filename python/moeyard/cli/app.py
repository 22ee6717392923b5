"""The commands: options in, a call into `moeyard.train`, tables out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import moeyard
from moeyard.cli import report, report_command

if TYPE_CHECKING:
    from collections.abc import Callable

app = typer.Typer(
    name="moeyard",
    help="Native ops and complete pipelines for mixture-of-experts training on scientific data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

#: Which extra brings a module that may be missing.
EXTRA_OF = {
    "lightning": "train",
    "torchmetrics": "train",
    "matplotlib": "train",
    "pydantic": "train",
    "yaml": "train",
    "safetensors": "train",
    "tensorboard": "train",
    "gemmi": "structures",
    "rdkit": "structures",
    "pyarrow": "structures",
}


report_command.register(app)


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
    seed: Annotated[int, typer.Option(help="Same seed, same losses.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for metrics, plots and configuration.")] = Path("runs/demo"),
    workers: Annotated[int, typer.Option(help="DataLoader worker processes.")] = 0,
) -> None:
    """Train a small MoE structure encoder on molecules, and show how fast and how well."""
    options = locals()
    console = Console()
    with _clear_errors("demo"):
        from moeyard.train.demo import DemoOptions, run_demo

        with _loading(console) as progress:
            summary = run_demo(
                DemoOptions(**options), progress=progress, terminal=console.is_terminal, write=_plain(console)
            )
    report.print_summary(console, summary)
    if summary.interrupted:
        raise typer.Exit(130)


def _plain(console: Console) -> Callable[[str], None]:
    # Numbers and paths as they are: no markup, no colours, no line breaks of Rich's own.
    return lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _loading(console: Console) -> Iterator[Callable[[int, int, str], None]]:
    """A progress callback: a bar on a terminal, otherwise one line per stage. The bar goes when its stage is done."""
    bar: Progress | None = None
    told: set[str] = set()

    def progress(done: int, total: int, what: str) -> None:
        nonlocal bar
        if not console.is_terminal:
            if done >= total and what not in told:
                told.add(what)
                _plain(console)(f"{what}: {total}")
            return
        if bar is None:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            bar = Progress(*columns, console=console)
            bar.add_task(what, total=total)
            bar.start()
        bar.update(bar.task_ids[0], description=what, completed=done, total=total)
        if done >= total:
            bar.stop()
            bar = None

    try:
        yield progress
    finally:
        if bar is not None:
            bar.stop()


@contextmanager
def _clear_errors(command: str) -> Iterator[None]:
    """One line instead of a traceback for what a user can mend; a fault of ours still shows in full."""
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").split(".")[0]
        if module not in EXTRA_OF:
            raise
        _fail(f"{command} needs {module}: pip install moeyard[{EXTRA_OF[module]}]", 2)
    except ImportError as error:
        # The data room says itself what is missing, what for, and how to get it.
        if "pip install" not in str(error):
            raise
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except ValueError as error:
        if type(error).__name__ != "UsageError":
            raise
        _fail(str(error), 2)


def _fail(message: str, status: int) -> None:
    Console(stderr=True).print(f"moeyard: {message}", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(status)

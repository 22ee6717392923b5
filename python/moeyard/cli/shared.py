"""What the commands share: errors in one line, plain output, a bar while data are opened."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

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
    "submitit": "cluster",
    "ray": "cluster",
}


def plain(console: Console) -> Callable[[str], None]:
    """A function that prints a line as it is: no markup, no colours, no line breaks of Rich's own."""
    return lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def loading(console: Console) -> Iterator[Callable[[int, int, str], None]]:
    """A progress callback: a bar on a terminal, otherwise one line per stage. The bar goes when its stage is done."""
    bar: Progress | None = None
    told: set[str] = set()

    def progress(done: int, total: int, what: str) -> None:
        nonlocal bar
        if not console.is_terminal:
            if done >= total and what not in told:
                told.add(what)
                plain(console)(f"{what}: {total}")
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
def clear_errors(command: str, *, quiet: bool = False) -> Iterator[None]:
    """One line instead of a traceback for what a user can mend; a fault of ours still shows in full.

    Args:
        command: named where something is missing.
        quiet: only the exit status, for processes that are not the first.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").split(".")[0]
        if module not in EXTRA_OF:
            raise
        fail(f"{command} needs {module}: pip install moeyard[{EXTRA_OF[module]}]", 2, quiet=quiet)
    except ImportError as error:
        # The data room says itself what is missing, what for, and how to get it.
        if "pip install" not in str(error):
            raise
        fail(str(error), 2, quiet=quiet)
    except KeyboardInterrupt:
        fail("interrupted", 130, quiet=quiet)
    except ValueError as error:
        if type(error).__name__ != "UsageError":
            raise
        fail(str(error), 2, quiet=quiet)


def fail(message: str, status: int, *, quiet: bool = False) -> None:
    """Says what is wrong, on one line, and leaves."""
    Console(stderr=True, quiet=quiet).print(f"moeyard: {message}", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(status)

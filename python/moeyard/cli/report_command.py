"""`moeyard report`: the page and the plots of a run, and the run in a few lines."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from moeyard.cli.shared import clear_errors, fail, plain


def report(
    run: Annotated[str, typer.Argument(help="Folder of a run, or system/signature below --runs.")],
    runs: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("runs"),
    open_page: Annotated[bool, typer.Option("--open", help="Show the page in the browser.")] = False,
) -> None:
    """Write the HTML report and the plots of a run, and print its summary."""
    write = plain(Console())
    with clear_errors("report"):
        from moeyard.train.report import find_run, read_run, summary_lines, write_report

        folder = find_run(run, runs)
        read = read_run(folder)
        try:
            page = write_report(read)
        except OSError as error:
            fail(f"cannot write into {folder}: {error.strerror}", 1)
        for line in summary_lines(read):
            write(line)
        write(f"written to {page}")
        if open_page:
            webbrowser.open(page.resolve().as_uri())

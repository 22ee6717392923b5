"""Command line: parsing and printing only.

`main` itself needs nothing beyond the base install; Typer and Rich are loaded for the commands that use them.
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """The `moeyard` command. Returns the exit status: 0 done, 1 failed, 2 the caller's mistake, 130 interrupted."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ["doctor"]:
        from moeyard import doctor

        return doctor.main(arguments[1:])
    if arguments == ["--version"]:
        import moeyard

        print(f"moeyard {moeyard.__version__}")
        return 0
    try:
        from moeyard.cli.app import run
    except ModuleNotFoundError as error:
        # Only the extra's own packages: anything else that is missing is a fault of ours and must show.
        if (error.name or "").split(".")[0] not in {"typer", "rich", "click"}:
            raise
        print("moeyard: this command needs Typer and Rich: pip install moeyard[cli]", file=sys.stderr)
        return 2
    return run(arguments)

"""How many calls the fuzz makes, from which seed; and how many it made, at the end."""

from __future__ import annotations

import os

import pytest

CALLS = int(os.environ.get("MOEYARD_FUZZ_CALLS", "1000"))
SEED = int(os.environ.get("MOEYARD_FUZZ_SEED", "0"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.getreports(kind) if r.when == "call"]
    made = [n for report in reports for key, n in report.user_properties if key == "fuzz_calls"]
    if made:
        terminalreporter.write_line(f"fuzz: {sum(made)} calls, MOEYARD_FUZZ_SEED={SEED}")

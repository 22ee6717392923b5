"""`pytest benchmarks`: the bench_<op>.py files under pytest-benchmark, their rows as JSON and as a table at the end.

pytest-benchmark's own table shows our side of every comparison, per round (a round repeats calls that last under 2 ms).
Peers are timed in the setup hook between its rounds.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import _harness
import _machine


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="benchmarks: smaller sizes and fewer rounds, same targets")
    parser.addoption("--rows", type=Path, help="benchmarks: a folder for the rows, FOLDER/<machine>/<file>.json")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if hasattr(metafunc.function, "cases"):
        metafunc.parametrize("case", metafunc.function.cases, ids=str)


_suites: dict[str, _harness.Suite] = {}


@pytest.fixture
def suite(request: pytest.FixtureRequest) -> Iterator[_harness.Suite]:
    """The suite of this file; its first comparison runs inside pytest-benchmark."""
    stem = request.path.stem
    found = _suites.setdefault(stem, _harness.Suite(quick=request.config.getoption("--quick"), echo=False))

    def pedantic(ours: object, setup: object, rounds: int) -> None:
        found.runner = _harness.plain_runner  # the fixture can be used once
        request.getfixturevalue("benchmark").pedantic(ours, setup=setup, rounds=rounds)

    found.runner = pedantic
    yield found
    found.runner = _harness.plain_runner


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if call.when == "call" and call.excinfo is not None and item.path.stem in _suites:
        _suites[item.path.stem].rows.append(_harness.failed_row(item.name, call.excinfo.value))
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    folder = session.config.getoption("--rows")
    for stem, found in _suites.items():
        if folder is not None and found.rows:
            found.write(folder / _machine.folder_name(_machine.machine()) / f"{stem.removeprefix('bench_')}.json")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for stem, found in _suites.items():
        terminalreporter.section(stem)
        for row in found.rows:
            terminalreporter.write_line(_harness.line(row))

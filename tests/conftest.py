"""Shared fixtures: where the real data is, quiet threads, dtype rows of the op contract, what the ops run on."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

import emulation
import engines
from ops import contract

settings.register_profile("default", deadline=None, print_blob=True)
settings.load_profile("default")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    engines.generate(metafunc)
    contract.pytest_generate_dtypes(metafunc)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = engines.without_engine(items)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Builds the emulation before the first test's time runs; a test that needs it tells of what goes wrong."""
    wanted = any("emulated" in item.name for item in session.items)
    if wanted and not session.config.option.collectonly:
        with suppress(pytest.fail.Exception, pytest.skip.Exception):
            emulation.build(emulation.FLAVOUR)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """What has no GPU to run on is one line of the summary, not one per test."""
    report = yield
    if report.skipped and isinstance(report.longrepr, tuple) and engines.NO_GPU in report.longrepr[2]:
        report.longrepr = (engines.__file__, None, report.longrepr[2])
    return report


@pytest.fixture(scope="module")
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test on the CPU, under the emulation of CUDA and on a GPU: see tests/engines.py."""
    with engines.engine.run(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _schedule(request: pytest.FixtureRequest) -> None:
    if "engine" in request.fixturenames:
        request.getfixturevalue("engine")
        engines.choose_schedule(request.node.nodeid)


@pytest.fixture(autouse=True)
def _threads() -> object:
    """Every test starts and leaves with two threads, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data, which is not part of the project: $MOEYARD_DATA, default ../shared/data."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get("MOEYARD_DATA", default))
    if not path.is_dir():
        pytest.skip(f"no real data at {path}; set MOEYARD_DATA")
    return path

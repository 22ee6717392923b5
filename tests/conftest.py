"""Shared fixtures: where the real data is, quiet threads, dtype rows of the op contract."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from ops import contract

settings.register_profile("default", deadline=None, print_blob=True)
settings.load_profile("default")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    contract.pytest_generate_dtypes(metafunc)


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

"""Where the tests of a file run: on the CPU, under the emulation of CUDA, on a GPU.

A file opts in with one line,

    pytestmark = pytest.mark.usefixtures("engine")

and every test in it gets the ids cpu, emulated and cuda. `@pytest.mark.engines("cpu")` on a test names the ones that
make sense for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from zlib import crc32

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from emulation import emulated, set_options
from moeyard import _native

ENGINES = ("cpu", "emulated", "cuda")
NO_GPU = "needs a GPU and a build with CUDA"
#: Shuffled schedules that the contract tries, beside forward and backward.
SCHEDULES = int(os.environ.get("MOEYARD_EMULATION_SEEDS", "20"))
_SHARE = float(os.environ.get("MOEYARD_EXAMPLES", "1"))


def examples(n: int) -> int:
    """How many random cases a test tries; MOEYARD_EXAMPLES multiplies it, for slow checkers and for long runs."""
    return max(1, round(n * _SHARE))


def large(*values: Any) -> list[Any]:
    """Values of a parameter that are left out where threads and barriers cost most: see the marker `large`."""
    return [pytest.param(value, marks=pytest.mark.large) for value in values]


def has_gpu() -> bool:
    return torch.cuda.is_available() and _native.cuda_built


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """On a GPU: what makes the host wait for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class _On(TorchFunctionMode):
    """Tensors that a test makes without a device come to life on the CPU, generators included, and go to `device`."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _device_constructors() or kwargs.get("device") is not None:
            return func(*args, **kwargs)
        made = func(*args, **kwargs)
        return made.detach().to(self.device).requires_grad_(made.requires_grad)


class Engine:
    """What the tests of the moment run on."""

    name = "cpu"
    mode: _On | None = None

    @property
    def device(self) -> str:
        return "cuda" if self.name == "cuda" else "cpu"

    @property
    def is_emulated(self) -> bool:
        return self.name == "emulated"

    @contextmanager
    def run(self, name: str, seed: int = 0) -> Iterator[None]:
        """All inside runs there; `seed` is the emulation's schedule."""
        if name == "cuda" and not has_gpu():
            pytest.skip(NO_GPU)
        self.name = name
        try:
            with emulated(seed) if name == "emulated" else nullcontext(), self._mode(name):
                yield
        finally:
            self.name = "cpu"

    @contextmanager
    def _mode(self, name: str) -> Iterator[None]:
        if name != "cuda":
            yield
            return
        self.mode = _On(name)
        try:
            with self.mode:
                yield
        finally:
            self.mode = None

    @contextmanager
    def without_mode(self) -> Iterator[None]:
        """Tensors stay where torch makes them: compilers want to see no mode."""
        mode = self.mode
        if mode is None:
            yield
            return
        mode.__exit__(None, None, None)
        try:
            yield
        finally:
            mode.__enter__()


#: The one that the fixture `engine` sets.
engine = Engine()


def place(value: Any) -> Any:
    """Tensors that are older than the choice of the engine, such as those of a table, on its device; also the tensors
    in a tuple (a plan, say) and in a dict."""
    if isinstance(value, torch.Tensor) and value.device.type == "cpu" != engine.device:
        return value.detach().to(engine.device).requires_grad_(value.requires_grad)
    if isinstance(value, tuple):
        placed = map(place, value)
        return type(value)(*placed) if hasattr(value, "_fields") else tuple(placed)
    return {k: place(v) for k, v in value.items()} if isinstance(value, dict) else value


def choose_schedule(test: str) -> None:
    """Another schedule for every test, the same each time."""
    if engine.is_emulated:
        set_options(seed=crc32(test.encode()) % (SCHEDULES + 2))


def generate(metafunc: pytest.Metafunc) -> None:
    if "engine" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("engines")
        metafunc.parametrize("engine", marker.args if marker else ENGINES, indirect=True, scope="module")


def without_engine(items: list[pytest.Item]) -> list[pytest.Item]:
    """Tests for other engines than the CPU, in files that have not opted in."""
    marked = [(item, item.get_closest_marker("engines")) for item in items if "engine" not in item.fixturenames]
    return [item for item, marker in marked if marker and "cpu" not in marker.args]

"""What the trainer asks of a system, and where systems are found.

A system is a name, a settings class, data and a model. The trainer knows no more of it than this file says; the systems
of this package lie in `moeyard.models`, others announce themselves under the entry-point group "moeyard.systems":

    [project.entry-points."moeyard.systems"]
    my-system = "my_package.my_module:system"
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any, Protocol, cast

import torch
from pydantic import BaseModel

from moeyard.models import SYSTEMS
from moeyard.models.step import StepOutput
from moeyard.train.config import did_you_mean
from moeyard.train.errors import UsageError
from moeyard.train.loading import EpochSampler

__all__ = ["Data", "Model", "Progress", "StepOutput", "System", "load_system", "system_names"]

Progress = Callable[[int, int, str], object]


class Data(Protocol):
    """What is trained on. `domains` names the rows of the usage counts. A batch is a list of ids, or whatever else
    `loader` makes batches of.

    Data that come from outside, and not from the settings alone, also have `fingerprint: str`, a hash of what they
    hold: a run does not go on, and is not evaluated, on others.
    """

    @property
    def domains(self) -> Sequence[str]: ...

    @property
    def training_batches(self) -> EpochSampler:
        """Lists of ids, epoch by epoch; the same for the same epoch, whatever was iterated before."""

    @property
    def evaluation_batches(self) -> Sequence[Any]:
        """Lists of ids of what is never trained on; empty for no evaluation."""

    def loader(self, batches: Iterable[Any], *, num_workers: int, **options: Any) -> Iterable[Any]:
        """A DataLoader over these batches, or what stands for one; `options` are further arguments of DataLoader."""


class Model(Protocol):
    """An `nn.Module` that scores a batch. `experts_per_token` tells the collapse alarm what an even share is.

    Whatever is drawn at random comes from `generator`, which draws on the model's device, or from torch's global one:
    both are started from the seed and the number of the batch. A model may also have `evaluation_step` with the same
    arguments and result; without it, evaluations use `training_step`.
    """

    @property
    def experts_per_token(self) -> int: ...

    def training_step(self, batch: Any, generator: torch.Generator) -> StepOutput: ...


class System(Protocol):
    """A named thing to train. `Config` is a `moeyard.models.settings.Settings`; `defaults` are the system's choices for
    the trainer's settings. Functions get both in one object."""

    @property
    def name(self) -> str: ...

    @property
    def Config(self) -> type[BaseModel]: ...

    @property
    def defaults(self) -> Mapping[str, Any]: ...

    def open_data(self, config: Any, progress: Progress | None = None) -> Data:
        """Opens what is trained on. A ValueError or FileNotFoundError here is shown as the user's mistake."""

    def build_model(self, config: Any, data: Any) -> torch.nn.Module:
        """A fresh `Model`; the global generator is seeded before."""


def system_names() -> list[str]:
    """Every system that `load_system` finds."""
    return sorted({*SYSTEMS, *(entry.name for entry in metadata.entry_points(group="moeyard.systems"))})


def load_system(name: str) -> System:
    """The system of this name; its module is imported only now.

    Raises:
        UsageError: no such system; the nearest name is offered.
    """
    if name in SYSTEMS:
        module, _, attribute = SYSTEMS[name].partition(":")
        return cast(System, getattr(importlib.import_module(module), attribute))
    for entry in metadata.entry_points(group="moeyard.systems"):
        if entry.name == name:
            return cast(System, entry.load())
    names = system_names()
    raise UsageError(f"system {name}: expected one of {', '.join(names)}{did_you_mean(name, names)}")

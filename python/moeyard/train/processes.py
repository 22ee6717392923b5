"""The processes that train together, as torchrun starts them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

from moeyard.doctor import missing_for_cuda
from moeyard.train.errors import UsageError

T = TypeVar("T")


def need_device(device: str) -> None:
    """UsageError where there is no such device."""
    if device not in ("cpu", "cuda"):
        raise UsageError(f"device: expected cpu or cuda, got {device!r}")
    if device == "cuda" and (missing := missing_for_cuda()):
        raise UsageError(f"device = cuda: {missing}")


@dataclass(frozen=True)
class Processes:
    """This process among `count`, `here` of them on this machine. The first one writes and prints."""

    rank: int = 0
    count: int = 1
    here: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    @staticmethod
    def backend(device: str) -> str:
        return "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` gives in the first process, in all of them; so is a UsageError of its."""
        if self.count == 1:
            return make()
        answer: list[object] = [None, None]
        if self.first:
            try:
                answer[0] = make()
            except UsageError as error:
                answer[1] = str(error)
        dist.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            raise UsageError(str(answer[1]))
        return answer[0]  # type: ignore[return-value]


@contextmanager
def joined(device: str = "cpu") -> Iterator[Processes]:
    """The processes of this torchrun, connected; outside of torchrun this process alone."""
    if not dist.is_available() or not dist.is_torchelastic_launched():
        yield Processes()
        return
    environment = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    processes = Processes(*environment)
    if processes.count == 1:
        yield processes
        return
    dist.init_process_group(Processes.backend(device))
    try:
        yield processes
    finally:
        dist.destroy_process_group()

"""What stands between a batch sampler and the trainer."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Protocol

from torch.utils.data import Sampler


class EpochSampler(Protocol):
    """A batch sampler that reshuffles by epoch number."""

    def set_epoch(self, epoch: int) -> None: ...

    def __iter__(self) -> Iterator[list[int]]: ...


class RepeatedEpochs(Sampler[list[int]]):
    """Strings the epochs of a batch sampler together until `steps` batches have been given.

    Training counted in steps sees one long pass: workers are started once, and the progress bar shows the whole run.

    Args:
        sampler: gives one epoch of batches; `set_epoch` is called before each.
        steps: batches in total.
    """

    def __init__(self, sampler: EpochSampler, steps: int) -> None:
        self.sampler, self.steps = sampler, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        given, epoch = 0, 0
        while given < self.steps:
            self.sampler.set_epoch(epoch)
            before = given
            for batch in self.sampler:
                yield batch
                given += 1
                if given == self.steps:
                    return
            if given == before:
                raise ValueError("sampler: expected at least one batch per epoch, got none")
            epoch += 1


def ignore_interrupt(worker_id: int) -> None:
    """For `worker_init_fn`: Ctrl-C reaches the whole process group, but ending is the main process's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

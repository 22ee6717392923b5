"""What stands between a batch sampler and the trainer."""

from __future__ import annotations

import bisect
import itertools
import signal
from collections.abc import Iterator
from typing import Any, Protocol

from torch.utils.data import Sampler


class EpochSampler(Protocol):
    """A batch sampler that reshuffles by epoch number."""

    def set_epoch(self, epoch: int) -> None: ...

    def __iter__(self) -> Iterator[Any]: ...


class RepeatedEpochs(Sampler[Any]):
    """Strings the epochs of a batch sampler together until `steps` batches have been given.

    Training counted in steps sees one long pass: workers are started once, and the progress bar shows the whole run.

    Args:
        sampler: gives one epoch of batches; `set_epoch` is called before each.
        steps: batches in total, over all processes.
        rank, processes: this process gets batch `rank`, then every `processes`-th; `steps` is a multiple of
            `processes`, so all get as many, and none is lost or given twice.
        first: the batch to begin with; the ones before it are passed over unread.
        position: what `position(first)` said in the run that is continued; needed when `first` is not 0.
    """

    def __init__(
        self,
        sampler: EpochSampler,
        steps: int,
        *,
        rank: int = 0,
        processes: int = 1,
        first: int = 0,
        position: tuple[int, int] = (0, 0),
    ) -> None:
        if steps % processes or first % processes:
            raise ValueError(f"steps: expected multiples of {processes} processes, got {first} of {steps}")
        self.sampler, self.steps, self.rank, self.processes, self.first = sampler, steps, rank, processes, first
        #: Number and first batch of every epoch that has begun; loaders ask for batches ahead of those trained on.
        self._epochs: list[tuple[int, int]] = [(first - position[1], position[0])]

    def __len__(self) -> int:
        """The batches of this process in the whole run, those before `first` included."""
        return self.steps // self.processes

    def position(self, batch: int) -> tuple[int, int]:
        """(epoch, batches of this epoch before it) of a batch that has been given or is next, counted over all."""
        begin, epoch = self._epochs[bisect.bisect_right(self._epochs, (batch, 2**62)) - 1]
        return epoch, batch - begin

    def __iter__(self) -> Iterator[Any]:
        batches = self._all()
        # A step's batches of all processes at once: each process then knows of every epoch that a step has reached.
        for together in zip(*[batches] * self.processes, strict=True):
            yield together[self.rank]

    def _all(self) -> Iterator[Any]:
        (begin, epoch), given = self._epochs[0], self.first
        self._epochs = [(begin, epoch)]
        while given < self.steps:
            self.sampler.set_epoch(epoch)
            # Plain lists of ids: passing over those before `first` loads nothing.
            for batch in itertools.islice(iter(self.sampler), given - begin, None):
                yield batch
                given += 1
                if given == self.steps:
                    return
            if given == begin:
                raise ValueError("sampler: expected at least one batch per epoch, got none")
            begin, epoch = given, epoch + 1
            self._epochs.append((begin, epoch))


def leave_ending_to_the_main_process(worker_id: int) -> None:
    """For `worker_init_fn`: Ctrl-C and a cluster's SIGTERM reach every process of a group; the main one decides."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

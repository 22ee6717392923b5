"""Batch samplers (`AtomBudgetBatchSampler`, or any other) in Lightning and in the Trainer of transformers.

A plain DataLoader needs none of this: `DataLoader(dataset, batch_sampler=sampler)`, and `sampler.set_epoch(epoch)`
before each epoch. Trainers stand in between in two ways: they call `set_epoch` where a batch sampler does not hear it,
so that every epoch has the same batches, and they deal batches to several processes by repeating or dropping some.

    loader = EpochLoader(dataset, SharedBatchSampler(sampler), collate_fn=collate)

    Trainer(use_distributed_sampler=False).fit(model, loader)          # Lightning

    class MyTrainer(transformers.Trainer):
        def get_train_dataloader(self):
            return loader
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any, Protocol

import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, Sampler

from moeyard.ops import _check

__all__ = ["EpochLoader", "SharedBatchSampler"]


class BatchSampler(Sized, Iterable[list[int]], Protocol):
    """Lists of ids. Where it has a `set_epoch`, that is called before each epoch."""


class SharedBatchSampler(Sampler[list[int]]):
    """Deals the batches of a sampler to the ranks of a process group, and hears of the epochs.

    Rank r gets batches r, r + W, r + 2W ... of W ranks. Their number is made a multiple of W by halving the largest
    batches, so every rank has equally many, each sample comes once, and no batch grows beyond its budget. In a single
    process the batches are the sampler's own.

    Args:
        batch_sampler: lists of ids, the same on every rank.
        num_replicas: W; None asks torch.distributed at the start of each epoch (1 without a process group).
        rank: of this process, None likewise. Both or neither.

    Raises:
        TypeError, ValueError: bad arguments; at iteration, fewer samples than the missing batches need.

    Determinism: that of the sampler; no random numbers.
    """

    def __init__(
        self, batch_sampler: BatchSampler, *, num_replicas: int | None = None, rank: int | None = None
    ) -> None:
        # No super().__init__(): some versions of torch take an argument there and some warn about it.
        _check.integer("num_replicas", num_replicas, minimum=1, optional=True)
        _check.integer("rank", rank, minimum=0, optional=True)
        if (num_replicas is None) != (rank is None):
            raise ValueError(f"num_replicas, rank: expected both or neither, got {num_replicas} and {rank}")
        if num_replicas is not None and rank is not None and rank >= num_replicas:
            raise ValueError(f"rank: expected 0 to {num_replicas - 1}, got {rank}")
        self.batch_sampler, self.num_replicas, self.rank = batch_sampler, num_replicas, rank

    @property
    def sampler(self) -> SharedBatchSampler:
        """Itself: Lightning calls `set_epoch` on the sampler of a batch sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        set_epoch = getattr(self.batch_sampler, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)

    def __len__(self) -> int:
        """The exact number of batches of each rank."""
        return -(-len(self.batch_sampler) // self._place()[0])

    def __iter__(self) -> Iterator[list[int]]:
        replicas, rank = self._place()
        if replicas == 1:
            yield from self.batch_sampler
        else:
            yield from _evened(list(self.batch_sampler), replicas)[rank::replicas]

    def _place(self) -> tuple[int, int]:
        if self.num_replicas is not None and self.rank is not None:
            return self.num_replicas, self.rank
        # Asked late: loaders are often made before the trainer starts the process group.
        if dist.is_available() and dist.is_initialized():
            return dist.get_world_size(), dist.get_rank()
        return 1, 0


def _evened(batches: list[list[int]], replicas: int) -> list[list[int]]:
    """Halves the largest batch, the last of equals, until `replicas` divides their number."""
    while len(batches) % replicas:
        size, at = max((len(batch), i) for i, batch in enumerate(batches))
        if size < 2:
            raise ValueError(f"batch_sampler: expected samples for {replicas} ranks, got {len(batches)} batches of one")
        batches[at : at + 1] = [batches[at][: size // 2], batches[at][size // 2 :]]
    return batches


class EpochLoader(DataLoader[Any]):
    """A DataLoader over whole batches whose `set_epoch` reaches the batch sampler.

    The Trainer of transformers calls it before each epoch.

    Args:
        dataset: any map-style dataset.
        batch_sampler: lists of ids.
        options: further arguments of DataLoader (collate_fn, num_workers ...).
    """

    def __init__(self, dataset: Dataset[Any], batch_sampler: BatchSampler, **options: Any) -> None:
        super().__init__(dataset, batch_sampler=batch_sampler, **options)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        set_epoch = getattr(self.batch_sampler, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)

"""AtomBudgetBatchSampler: batches of about equal numbers of atoms instead of equal numbers of structures.

An epoch is planned from the sizes alone, by `pack_batches`: bounded best fit over the shuffled order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from moeyard import ops


class AtomBudgetBatchSampler(Sampler[list[int]]):
    """Lists of ids whose sizes add up to at most `max_atoms_per_batch`; the `batch_sampler` of a DataLoader.

    Args:
        sizes: [S] int64 or int32, the number of atoms of each structure (`table.sizes`), or a list of ints. On a GPU
            epochs are planned there, next-fit only (lookahead=0).
        max_atoms_per_batch: the budget, atoms.
        shuffle: a new order in every epoch (`set_epoch`); False keeps the order of the table.
        seed: of the order; together with the epoch it decides every batch.
        lookahead: how many batches are open at once: more fill better, fewer stay closer to the order. 0: each batch is
            closed as soon as the next structure does not fit.
        max_samples: at most so many structures in a batch; None for no limit.
        oversize: what happens to a structure above the budget: "error", "own_batch" or "skip" (see `skipped`).

    Raises:
        TypeError, ValueError: bad arguments, or, with oversize="error", a structure above the budget; at construction.

    Determinism: equal arguments and epoch give equal batches, whatever the machine, the number of DataLoader workers
    and of threads; the global random generators are neither read nor changed.
    """

    def __init__(
        self,
        sizes: Tensor | Sequence[int],
        max_atoms_per_batch: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        lookahead: int = 16,
        max_samples: int | None = None,
        oversize: str = "error",
    ) -> None:
        # No super().__init__(): some versions of torch take an argument there and some warn about it.
        # An empty list would become float32.
        self.sizes = sizes if isinstance(sizes, Tensor) else torch.as_tensor(sizes or torch.zeros(0, dtype=torch.int64))
        self.max_atoms_per_batch = _integer("max_atoms_per_batch", max_atoms_per_batch, 1)
        if not isinstance(shuffle, bool):
            raise TypeError(f"shuffle: expected True or False, got {type(shuffle).__name__}")
        self.shuffle = shuffle
        self.seed = _integer("seed", seed, 0)
        self.lookahead = lookahead
        self.max_samples = max_samples
        self.oversize = oversize
        self.epoch = 0
        self._plan: Any = None
        # Planned at once, so that a bad budget fails here and not in the middle of a run.
        self.plan()

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next iteration; one that has begun goes on undisturbed."""
        if _integer("epoch", epoch, 0) != self.epoch:
            self.epoch = epoch
            self._plan = None

    def plan(self) -> Any:
        """The `Packing` of the current epoch: index, ptr, fill, skipped."""
        if self._plan is None:
            self._plan = ops.pack_batches(
                self.sizes,
                self.max_atoms_per_batch,
                order=self._order(),
                lookahead=self.lookahead,
                max_samples=self.max_samples,
                oversize=self.oversize,
            )
        return self._plan

    def __len__(self) -> int:
        """The exact number of batches of the current epoch."""
        return int(self.plan().ptr.numel()) - 1

    def __iter__(self) -> Iterator[list[int]]:
        plan = self.plan()
        index, ptr = plan.index.tolist(), plan.ptr.tolist()
        for begin, end in itertools.pairwise(ptr):
            yield index[begin:end]

    @property
    def fill(self) -> float:
        """The mean share of the budget that the batches of the current epoch use; an oversize batch counts as full."""
        fill = self.plan().fill
        return float((fill / self.max_atoms_per_batch).clamp(max=1).mean()) if fill.numel() else 0.0

    @property
    def skipped(self) -> list[int]:
        """The ids that oversize="skip" leaves out of the current epoch."""
        ids: list[int] = self.plan().skipped.tolist()
        return ids

    def _order(self) -> Tensor | None:
        if not self.shuffle:
            return None
        # A hash of both numbers: seed 0 in epoch 1 shall not be seed 1 in epoch 0.
        state = np.random.SeedSequence([self.seed, self.epoch]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0]) >> 1)
        order = torch.randperm(self.sizes.shape[0] if self.sizes.dim() else 0, generator=generator)
        return order.to(self.sizes.device)


def _integer(name: str, value: int, minimum: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name}: expected at least {minimum}, got {value}")
    return value

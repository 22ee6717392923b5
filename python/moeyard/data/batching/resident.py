"""Structures that stay on one device: epochs planned there, batches gathered there, and nothing copied per step.

    table = ResidentTable(structures, "cuda")
    sampler = ResidentBatches(table, max_atoms_per_batch=25_000)
    for planned in sampler:
        batch = table.gather(planned)       # two launches per column; the host waits for none of them

The host learns the numbers of atoms of an epoch's batches once, when it is planned.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from moeyard import ops
from moeyard.data.batching.collate import StructureBatch
from moeyard.data.batching.sampler import AtomBudgetBatchSampler
from moeyard.data.structures.table import StructureTable


def own_gpu() -> torch.device:
    """The GPU of this process, where torchrun has started several."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


class PlannedBatch(NamedTuple):
    """The ids of a batch's structures, on the device, and how many atoms they have together."""

    index: Tensor  # type: ignore[assignment]  # a tuple has a method of that name
    atoms: int


class ResidentTable:
    """The columns of a table, copied to a device once.

    Args:
        table: the structures.
        device: where they stay.
    """

    def __init__(self, table: StructureTable, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.positions, self.elements, self.ptr, self.domain, self.row_ptr, self.sizes = (
            column.to(self.device)
            for column in (table.positions, table.elements, table.ptr, table.domain, table.row_ptr, table.sizes)
        )

    def gather(self, planned: PlannedBatch) -> StructureBatch:
        """The batch, equal to what `collate` makes of the same ids."""
        index, atoms = planned
        positions, ptr, batch = ops.gather_segments(self.positions, self.ptr, index, total=atoms)
        elements = ops.gather_segments(self.elements, self.ptr, index, total=atoms).values
        domain = ops.gather_segments(self.domain, self.row_ptr, index, total=index.shape[0]).values
        return StructureBatch(positions, elements.to(torch.int64), ptr, batch, domain, index)


class ResidentBatches:
    """Epochs of planned batches of a resident table's structures, or of some of them.

    Args:
        table: the structures.
        max_atoms_per_batch, shuffle, seed, oversize: see `AtomBudgetBatchSampler`; packing is next-fit.
        ids: [m] int64 on the CPU, the structures to take; None for all.

    Determinism: the same arguments and epoch give the same batches on every device.
    """

    def __init__(
        self,
        table: ResidentTable,
        max_atoms_per_batch: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        oversize: str = "error",
        ids: Tensor | None = None,
    ) -> None:
        self.ids = None if ids is None else ids.to(table.device)
        sizes = table.sizes if self.ids is None else table.sizes[self.ids]
        self.sampler = AtomBudgetBatchSampler(
            sizes, max_atoms_per_batch, shuffle=shuffle, seed=seed, lookahead=0, oversize=oversize
        )

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[PlannedBatch]:
        plan = self.sampler.plan()
        index = plan.index if self.ids is None else self.ids[plan.index]
        for (begin, end), atoms in zip(itertools.pairwise(plan.ptr.tolist()), plan.fill.tolist(), strict=True):
            yield PlannedBatch(index[begin:end], atoms)


class ResidentLoader:
    """Gathers planned batches as they are asked for: what a DataLoader is to structures in memory."""

    def __init__(self, table: ResidentTable, batches: Iterable[PlannedBatch]) -> None:
        self.table, self.batches = table, batches

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]  # where the batches have a length

    def __iter__(self) -> Iterator[StructureBatch]:
        return map(self.table.gather, self.batches)

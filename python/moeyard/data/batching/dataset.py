"""StructureDataset: a table behind a DataLoader whose workers collate with `gather_segments`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset

from moeyard.data.batching.collate import StructureBatch, collate
from moeyard.data.structures.table import StructureTable


class StructureDataset(Dataset[StructureBatch]):
    """The structures of a table. A list of ids gives one StructureBatch, and so does a single id.

    With a batch sampler a DataLoader asks for whole batches (`__getitems__`), in the worker. It would then try to stack
    what it got, so it needs `collate_fn=StructureDataset.keep`; `structure_loader` sets that.
    """

    def __init__(self, table: StructureTable) -> None:
        if not isinstance(table, StructureTable):
            raise TypeError(f"table: expected a StructureTable, got {type(table).__name__}")
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int | Sequence[int]) -> StructureBatch:
        return collate(self.table, [index] if isinstance(index, int) else index)

    def __getitems__(self, indices: Sequence[int]) -> StructureBatch:
        return collate(self.table, indices)

    @staticmethod
    def keep(batch: Any) -> Any:
        """The collate_fn: the batch is complete as it is."""
        return batch


def structure_loader(
    table: StructureTable | StructureDataset,
    batch_sampler: Iterable[list[int]],
    *,
    num_workers: int = 0,
    **options: Any,
) -> DataLoader[StructureBatch]:
    """A DataLoader that yields StructureBatch.

    Args:
        table: the structures.
        batch_sampler: lists of ids, such as an AtomBudgetBatchSampler.
        num_workers: processes that collate; 0 collates in this one. The batches are the same.
        options: further arguments of DataLoader (pin_memory, prefetch_factor, persistent_workers ...).
    """
    dataset = table if isinstance(table, StructureDataset) else StructureDataset(table)
    return DataLoader(
        dataset, batch_sampler=batch_sampler, collate_fn=StructureDataset.keep, num_workers=num_workers, **options
    )

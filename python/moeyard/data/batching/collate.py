"""Collation: chosen structures of a table become one batch, by one `gather_segments` per field.

Letters: S structures of the table, G of the batch, n atoms of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moeyard import ops
from moeyard.data.structures.table import StructureTable, structure_ids


class StructureBatch(NamedTuple):
    """G structures with n atoms in all.

    positions [n, 3] float32, angstrom; elements [n] int64, atomic numbers; ptr [G + 1] int64, structure g owns the
    atoms ptr[g] to ptr[g + 1]; batch [n] int64, the structure of each atom; domain [G] int64; index [G] int64, the ids
    of the structures in their table.
    """

    positions: Tensor
    elements: Tensor
    ptr: Tensor
    batch: Tensor
    domain: Tensor
    index: Tensor  # type: ignore[assignment]  # a tuple has a method of that name

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> StructureBatch:
        """The same batch on another device."""
        return StructureBatch(*(field.to(device, non_blocking=non_blocking) for field in self))


def collate(table: StructureTable, index: Tensor | Sequence[int]) -> StructureBatch:
    """The structures `index` of `table` as one batch, in that order.

    Args:
        table: where the structures are.
        index: [G] int64 or int32, ids from 0 to S - 1, or a list of ints; repeats are allowed, none is, too.

    Returns:
        A batch in memory of its own.

    Raises:
        TypeError, ValueError: `index` is no one-dimensional list of integers, or an id is out of range.

    Determinism: a copy, bit-identical for any number of threads.
    """
    ids = structure_ids(index, len(table))
    atoms = ops.gather_segments(table.positions, table.ptr, ids)
    elements = ops.gather_segments(table.elements, table.ptr, ids)
    domain = ops.gather_segments(table.domain, table.row_ptr, ids)
    return StructureBatch(
        positions=atoms.values,
        elements=elements.values.to(torch.int64),
        ptr=atoms.ptr,
        batch=atoms.batch,
        domain=domain.values,
        index=ids,
    )

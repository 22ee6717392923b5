"""StructureTable: the atoms of many structures in a few columns.

Letters: S structures, n atoms of all of them together.

    positions [n, 3]   ptr [S + 1]: structure s owns the atoms ptr[s] to ptr[s + 1]
    elements  [n]      names, domain [S]: one per structure
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

#: The heaviest element that has a name (oganesson).
MAX_ATOMIC_NUMBER = 118


class Progress(Protocol):
    """What the long-running functions report to: `what` is the thing just done, `done` of `total` are behind us."""

    def __call__(self, done: int, total: int, what: str) -> object: ...


class Skipped(NamedTuple):
    """Something that is not in the table, and why.

    `path` is the file, `file#record` for one record of an SDF file, or the name of a molecule of the embedded list.
    """

    path: str
    reason: str


class Structure(NamedTuple):
    """One structure on its way into a table: positions [m, 3] in angstrom, atomic numbers [m]."""

    name: str
    domain: str
    positions: NDArray[np.float32]
    elements: NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class StructureTable:
    """The atoms of S structures, column by column. Build one with `from_structures`, a reader or `embed_molecules`.

    Args:
        positions: [n, 3] float32, angstrom, finite.
        elements: [n] uint8, atomic numbers 1 to 118.
        ptr: [S + 1] int64, ascending from 0 to n.
        names: S names; they need not be unique.
        domain: [S] int64, an index into `domains`.
        domains: what the domains are called, such as ("protein", "molecule").

    Raises:
        TypeError, ValueError: a column has another type, dtype, shape or device, or its values do not fit; the message
            names the column, what was expected and what came.
    """

    positions: Tensor
    elements: Tensor
    ptr: Tensor
    names: tuple[str, ...]
    domain: Tensor
    domains: tuple[str, ...]

    def __post_init__(self) -> None:
        _check_column("positions", self.positions, torch.float32, 2)
        _check_column("elements", self.elements, torch.uint8, 1)
        _check_column("ptr", self.ptr, torch.int64, 1)
        _check_column("domain", self.domain, torch.int64, 1)
        _check_names("names", self.names)
        _check_names("domains", self.domains)
        _check_sizes(self)
        _check_values(self)

    def __len__(self) -> int:
        return self.ptr.numel() - 1

    def __repr__(self) -> str:
        return f"StructureTable({len(self):,} structures, {self.n_atoms:,} atoms, domains {', '.join(self.domains)})"

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of a hash over all columns: tables with one fingerprint are equal."""
        digest = hashlib.blake2b(digest_size=8)
        for column in (self.positions, self.elements, self.ptr, self.domain):
            digest.update(str(tuple(column.shape)).encode())
            digest.update(column.contiguous().numpy().data)
        digest.update(repr((self.names, self.domains)).encode())
        return digest.hexdigest()

    @property
    def n_atoms(self) -> int:
        return self.positions.shape[0]

    @cached_property
    def sizes(self) -> Tensor:
        """[S] int64: the number of atoms of each structure."""
        return self.ptr.diff()

    @cached_property
    def row_ptr(self) -> Tensor:
        """[S + 1] int64, 0 to S: the segments of a column that holds one value per structure."""
        return torch.arange(len(self) + 1)

    @staticmethod
    def from_structures(structures: Iterable[Structure], domains: Sequence[str] = ()) -> StructureTable:
        """A table of the given structures, in their order.

        Args:
            structures: positions in angstrom and atomic numbers, one `Structure` each.
            domains: names that come first in `domains`; those met on the way follow in order of appearance.
        """
        items = list(structures)
        ids = {name: i for i, name in enumerate(dict.fromkeys(domains))}
        for item in items:
            ids.setdefault(item.domain, len(ids))
            if item.positions.shape != (item.elements.shape[0], 3):
                raise ValueError(
                    f"structures: expected positions [{item.elements.shape[0]}, 3] for {item.name!r}, "
                    f"got {list(item.positions.shape)}"
                )
        ptr = torch.zeros(len(items) + 1, dtype=torch.int64)
        ptr[1:] = torch.tensor([item.elements.shape[0] for item in items], dtype=torch.int64).cumsum(0)
        positions = np.concatenate([np.zeros((0, 3), np.float32), *(item.positions for item in items)])
        elements = np.concatenate([np.zeros(0, np.uint8), *(item.elements for item in items)])
        return StructureTable(
            positions=torch.from_numpy(positions.astype(np.float32, copy=False)),
            elements=torch.from_numpy(elements.astype(np.uint8, copy=False)),
            ptr=ptr,
            names=tuple(item.name for item in items),
            domain=torch.tensor([ids[item.domain] for item in items], dtype=torch.int64),
            domains=tuple(ids),
        )

    def select(self, index: Tensor | Sequence[int]) -> StructureTable:
        """The structures `index` (ids from 0 to S - 1, repeats allowed), in that order; `domains` stays as it is.

        Raises:
            TypeError, ValueError: `index` is no one-dimensional list of integers, or an id is out of range.
        """
        ids = structure_ids(index, len(self))
        sizes = self.sizes[ids]
        ptr = torch.zeros(ids.numel() + 1, dtype=torch.int64)
        ptr[1:] = sizes.cumsum(0)
        # Atom j of the result lies at the start of its structure plus its place within it.
        atoms = torch.arange(int(ptr[-1])) + (self.ptr[:-1][ids] - ptr[:-1]).repeat_interleave(sizes)
        return StructureTable(
            positions=self.positions[atoms],
            elements=self.elements[atoms],
            ptr=ptr,
            names=tuple(self.names[i] for i in ids.tolist()),
            domain=self.domain[ids],
            domains=self.domains,
        )

    @staticmethod
    def concat(tables: Sequence[StructureTable]) -> StructureTable:
        """All structures of all tables, in order; equal domain names become one domain."""
        if not tables:
            raise ValueError("tables: expected at least one StructureTable, got none")
        domains = tuple(dict.fromkeys(name for table in tables for name in table.domains))
        offsets = np.cumsum([0] + [table.n_atoms for table in tables]).tolist()
        ptrs = [table.ptr[1:] + offset for table, offset in zip(tables, offsets[:-1], strict=True)]
        return StructureTable(
            positions=torch.cat([table.positions for table in tables]),
            elements=torch.cat([table.elements for table in tables]),
            ptr=torch.cat([torch.zeros(1, dtype=torch.int64), *ptrs]),
            names=tuple(name for table in tables for name in table.names),
            domain=torch.cat([_renumbered(table, domains) for table in tables]),
            domains=domains,
        )


def structure_ids(index: Tensor | Sequence[int], n_structures: int) -> Tensor:
    """`index` as an int64 tensor [M] of ids below `n_structures`.

    Raises:
        TypeError, ValueError: not one-dimensional, not integers, or an id out of range.
    """
    ids = index if isinstance(index, Tensor) else torch.as_tensor(index if len(index) else [], dtype=_id_dtype(index))
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"index: expected int64 or int32 ids, got {str(ids.dtype).removeprefix('torch.')}")
    if ids.dim() != 1:
        raise ValueError(f"index: expected shape [M], got {list(ids.shape)}")
    if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < n_structures):
        wrong = ids[(ids < 0) | (ids >= n_structures)][0]
        raise ValueError(f"index: expected ids from 0 to {n_structures - 1}, got {int(wrong)}")
    return ids.to(torch.int64)


def _id_dtype(index: Sequence[int]) -> torch.dtype | None:
    # An empty list would become float32; everything else keeps its own dtype and is checked afterwards.
    return None if len(index) else torch.int64


def _renumbered(table: StructureTable, domains: tuple[str, ...]) -> Tensor:
    return torch.tensor([domains.index(name) for name in table.domains], dtype=torch.int64)[table.domain]


def _check_column(name: str, column: Tensor, dtype: torch.dtype, rank: int) -> None:
    if not isinstance(column, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(column).__name__}")
    if column.dtype != dtype:
        want, got = (str(d).removeprefix("torch.") for d in (dtype, column.dtype))
        raise TypeError(f"{name}: expected dtype {want}, got {got}")
    if column.device.type != "cpu":
        raise ValueError(f"{name}: expected a tensor on the CPU, got device {column.device}")
    if column.dim() != rank or (rank == 2 and column.shape[1] != 3):
        raise ValueError(f"{name}: expected shape {['[n]', '[n, 3]'][rank - 1]}, got {list(column.shape)}")


def _check_names(name: str, value: tuple[str, ...]) -> None:
    if not isinstance(value, tuple) or not all(isinstance(item, str) for item in value):
        raise TypeError(f"{name}: expected a tuple of str, got {value!r:.80}")


def _check_sizes(table: StructureTable) -> None:
    n, ptr = table.positions.shape[0], table.ptr
    if table.elements.shape[0] != n:
        raise ValueError(f"elements: expected shape [{n}] (that of positions), got {list(table.elements.shape)}")
    if ptr.numel() < 1 or int(ptr[0]) != 0 or int(ptr[-1]) != n or bool((ptr.diff() < 0).any()):
        ends = f"{ptr[:4].tolist()} ... {ptr[-2:].tolist()}"
        raise ValueError(f"ptr: expected ascending offsets from 0 to {n}, got {ends}")
    n_structures = ptr.numel() - 1
    if len(table.names) != n_structures:
        raise ValueError(f"names: expected {n_structures} (ptr has {ptr.numel()} entries), got {len(table.names)}")
    if table.domain.numel() != n_structures:
        raise ValueError(f"domain: expected shape [{n_structures}], got {list(table.domain.shape)}")


def _check_values(table: StructureTable) -> None:
    finite = table.positions.isfinite().all(1)
    if not bool(finite.all()):
        atom = int((~finite).nonzero()[0])
        raise ValueError(f"positions: expected finite values, got {table.positions[atom].tolist()} at atom {atom}")
    wrong = (table.elements == 0) | (table.elements > MAX_ATOMIC_NUMBER)
    if bool(wrong.any()):
        atom = int(wrong.nonzero()[0])
        raise ValueError(
            f"elements: expected 1 to {MAX_ATOMIC_NUMBER}, got atomic number {int(table.elements[atom])} at atom {atom}"
        )
    if len(set(table.domains)) != len(table.domains):
        raise ValueError(f"domains: expected different names, got {table.domains}")
    if len(table) and not (int(table.domain.min()) >= 0 and int(table.domain.max()) < len(table.domains)):
        low, high = int(table.domain.min()), int(table.domain.max())
        raise ValueError(f"domain: expected ids from 0 to {len(table.domains) - 1}, got values from {low} to {high}")

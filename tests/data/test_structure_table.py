"""StructureTable: construction, selection, concatenation, and every way to build a wrong one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeyard.data.structures import Structure, StructureTable


def structure(name: str, n: int, domain: str = "molecule", seed: int = 0) -> Structure:
    rng = np.random.default_rng(seed)
    return Structure(name, domain, rng.normal(size=(n, 3)).astype(np.float32), rng.integers(1, 90, n).astype(np.uint8))


def columns(**changes: Any) -> dict[str, Any]:
    """Two structures of 2 and 1 atoms."""
    good = {
        "positions": torch.zeros(3, 3),
        "elements": torch.tensor([6, 7, 8], dtype=torch.uint8),
        "ptr": torch.tensor([0, 2, 3]),
        "names": ("a", "b"),
        "domain": torch.tensor([0, 1]),
        "domains": ("protein", "molecule"),
    }
    return good | changes


@pytest.mark.parametrize(
    "changes",
    [
        {"positions": torch.full((3, 3), 1e-30)},
        {"elements": torch.tensor([6, 7, 9], dtype=torch.uint8)},
        {"ptr": torch.tensor([0, 1, 3])},
        {"names": ("a", "c")},
        {"domain": torch.tensor([1, 1])},
        {"domains": ("protein", "ion")},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_column_is_in_the_fingerprint(changes: dict[str, Any]) -> None:
    fingerprint = StructureTable(**columns()).fingerprint
    assert len(fingerprint) == 16
    assert StructureTable(**columns(positions=torch.zeros(3, 6)[:, ::2])).fingerprint == fingerprint
    assert StructureTable(**columns(**changes)).fingerprint != fingerprint


def test_from_structures_by_hand() -> None:
    a = Structure("a", "drug", np.array([[1, 2, 3], [4, 5, 6]], np.float32), np.array([6, 8], np.uint8))
    b = Structure("b", "metabolite", np.array([[7, 8, 9]], np.float32), np.array([7], np.uint8))
    table = StructureTable.from_structures([a, b], domains=("peptide", "metabolite"))
    assert len(table) == 2
    assert table.n_atoms == 3
    assert table.positions.tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert table.elements.tolist() == [6, 8, 7]
    assert table.ptr.tolist() == [0, 2, 3]
    assert table.sizes.tolist() == [2, 1]
    assert table.sizes.dtype == torch.int64
    assert table.names == ("a", "b")
    assert table.domains == ("peptide", "metabolite", "drug")
    assert table.domain.tolist() == [2, 1]
    assert repr(table) == "StructureTable(2 structures, 3 atoms, domains peptide, metabolite, drug)"


def test_empty_tables() -> None:
    empty = StructureTable.from_structures([])
    assert (len(empty), empty.n_atoms, empty.sizes.tolist()) == (0, 0, [])
    assert len(empty.select([])) == 0
    assert len(StructureTable.concat([empty, empty])) == 0
    hollow = StructureTable.from_structures([structure("no atoms", 0), structure("one", 1)])
    assert hollow.sizes.tolist() == [0, 1]


def test_a_structure_whose_columns_do_not_fit_is_named() -> None:
    broken = Structure("odd one", "drug", np.zeros((2, 3), np.float32), np.array([6], np.uint8))
    with pytest.raises(ValueError, match="odd one"):
        StructureTable.from_structures([broken])


@given(st.lists(st.integers(0, 6), max_size=8), st.data())
def test_select_equals_picking_one_by_one(sizes: list[int], data: st.DataObject) -> None:
    items = [structure(str(i), n, "ab"[i % 2], seed=i) for i, n in enumerate(sizes)]
    table = StructureTable.from_structures(items, domains=("a", "b"))
    index = data.draw(st.lists(st.integers(0, len(sizes) - 1), max_size=10)) if sizes else []
    got, expected = table.select(index), StructureTable.from_structures([items[i] for i in index], domains=("a", "b"))
    assert got.names == expected.names
    assert got.domains == expected.domains
    for column in ("positions", "elements", "ptr", "domain"):
        assert torch.equal(getattr(got, column), getattr(expected, column)), column


def test_select_takes_tensors_and_keeps_the_domains() -> None:
    table = StructureTable.from_structures([structure("x", 2, "drug"), structure("y", 3, "peptide")])
    assert table.select(torch.tensor([1], dtype=torch.int32)).domains == ("drug", "peptide")
    assert table.select(torch.tensor([1, 1, 0])).names == ("y", "y", "x")


def test_concat_merges_domain_names() -> None:
    first = StructureTable.from_structures([structure("x", 2, "drug"), structure("y", 1, "protein")])
    second = StructureTable.from_structures([structure("z", 3, "protein"), structure("w", 1, "rna")])
    both = StructureTable.concat([first, second])
    assert both.names == ("x", "y", "z", "w")
    assert both.domains == ("drug", "protein", "rna")
    assert both.domain.tolist() == [0, 1, 1, 2]
    assert both.ptr.tolist() == [0, 2, 3, 6, 7]
    assert torch.equal(both.select([2, 3]).positions, second.positions)


def test_concat_of_nothing() -> None:
    with pytest.raises(ValueError, match="tables: expected at least one"):
        StructureTable.concat([])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"positions": np.zeros((3, 3))}, TypeError, "positions: expected a torch.Tensor, got ndarray"),
        ({"positions": torch.zeros(3, 3).double()}, TypeError, "positions: expected dtype float32, got float64"),
        ({"positions": torch.zeros(3, 2)}, ValueError, r"positions: expected shape \[n, 3\], got \[3, 2\]"),
        ({"positions": torch.zeros(9)}, ValueError, r"positions: expected shape \[n, 3\], got \[9\]"),
        ({"positions": torch.zeros(3, 3, device="meta")}, ValueError, "positions: expected a tensor on the CPU"),
        ({"positions": torch.tensor([[0.0, 0, 0], [0, float("nan"), 0], [0, 0, 0]])}, ValueError, "at atom 1"),
        ({"positions": torch.full((3, 3), float("inf"))}, ValueError, "positions: expected finite values"),
        ({"elements": torch.tensor([6, 7, 8])}, TypeError, "elements: expected dtype uint8, got int64"),
        ({"elements": torch.tensor([6, 7], dtype=torch.uint8)}, ValueError, r"elements: expected shape \[3\]"),
        ({"elements": torch.tensor([6, 0, 8], dtype=torch.uint8)}, ValueError, "atomic number 0 at atom 1"),
        ({"elements": torch.tensor([6, 7, 119], dtype=torch.uint8)}, ValueError, "atomic number 119 at atom 2"),
        ({"ptr": torch.tensor([0, 2, 3], dtype=torch.int32)}, TypeError, "ptr: expected dtype int64"),
        ({"ptr": torch.tensor([[0, 2, 3]])}, ValueError, r"ptr: expected shape \[n\]"),
        ({"ptr": torch.tensor([1, 2, 3])}, ValueError, "ptr: expected ascending offsets from 0 to 3"),
        ({"ptr": torch.tensor([0, 2, 4])}, ValueError, "ptr: expected ascending offsets from 0 to 3"),
        ({"ptr": torch.tensor([0, 4, 3])}, ValueError, "ptr: expected ascending offsets from 0 to 3"),
        ({"ptr": torch.zeros(0, dtype=torch.int64)}, ValueError, "ptr: expected ascending offsets"),
        ({"names": ["a", "b"]}, TypeError, "names: expected a tuple of str"),
        ({"names": ("a",)}, ValueError, "names: expected 2"),
        ({"names": ("a", 2)}, TypeError, "names: expected a tuple of str"),
        ({"domain": torch.tensor([0])}, ValueError, r"domain: expected shape \[2\]"),
        ({"domain": torch.tensor([0, 2])}, ValueError, "domain: expected ids from 0 to 1, got values from 0 to 2"),
        ({"domain": torch.tensor([-1, 1])}, ValueError, "domain: expected ids from 0 to 1, got values from -1 to 1"),
        ({"domains": ("x", "x")}, ValueError, "domains: expected different names"),
        ({"domains": "ab"}, TypeError, "domains: expected a tuple of str"),
    ],
)
def test_wrong_columns(change: dict[str, Any], error: type[Exception], message: str) -> None:
    StructureTable(**columns())
    with pytest.raises(error, match=message):
        StructureTable(**columns(**change))


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ([2], ValueError, "index: expected ids from 0 to 1, got 2"),
        ([0, -1], ValueError, "index: expected ids from 0 to 1, got -1"),
        ([0.5], TypeError, "index: expected int64 or int32 ids, got float32"),
        ([True, False], TypeError, "index: expected int64 or int32 ids, got bool"),
        (torch.tensor([[0]]), ValueError, r"index: expected shape \[M\], got \[1, 1\]"),
        (torch.tensor(0), ValueError, r"index: expected shape \[M\], got \[\]"),
        (torch.tensor([0.0]), TypeError, "index: expected int64 or int32 ids"),
    ],
)
def test_wrong_index(index: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        StructureTable(**columns()).select(index)

"""Structures that stay on a device: the batches of `collate`, planned and gathered there."""

from __future__ import annotations

import pytest
import torch

from engines import engine
from moeyard.data.batching import AtomBudgetBatchSampler, ResidentBatches, ResidentLoader, ResidentTable, collate
from moeyard.data.structures.table import Structure, StructureTable
from ops.compare import assert_equal

pytestmark = pytest.mark.usefixtures("engine")


def some_structures() -> StructureTable:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 30, (40,), generator=generator).tolist()
    return StructureTable.from_structures(
        Structure(
            f"s{i}",
            "odd" if i % 2 else "even",
            torch.randn(n, 3, generator=generator).numpy(),
            torch.randint(1, 9, (n,), generator=generator).to(torch.uint8).numpy(),
        )
        for i, n in enumerate(sizes)
    )


@pytest.mark.parametrize("ids", [None, torch.arange(3, 40, 2)])
def test_batches_are_those_of_collate(ids: torch.Tensor | None) -> None:
    with engine.without_mode():
        table = some_structures()
        resident = ResidentTable(table, engine.device)
        batches = ResidentBatches(resident, 64, seed=3, ids=ids)
        sizes = table.sizes if ids is None else table.sizes[ids]
        plain = AtomBudgetBatchSampler(sizes, 64, seed=3, lookahead=0)
        for epoch in (0, 1):
            batches.set_epoch(epoch)
            plain.set_epoch(epoch)
            assert len(batches) == len(plain)
            for got, chosen in zip(ResidentLoader(resident, batches), plain, strict=True):
                index = torch.tensor(chosen) if ids is None else ids[chosen]
                assert_equal(tuple(field.cpu() for field in got), tuple(collate(table, index)))


def test_a_structure_above_the_budget() -> None:
    with engine.without_mode():
        resident = ResidentTable(some_structures(), engine.device)
        with pytest.raises(ValueError, match="within budget = 20"):
            ResidentBatches(resident, 20)
        batches = list(ResidentBatches(resident, 20, oversize="own_batch"))
        assert sum(len(b.index) for b in batches) == 40
        assert all(b.atoms <= 20 or len(b.index) == 1 for b in batches)

"""Collation, the atom-budget sampler and the DataLoader around them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from moeyard.data.batching import (
    AtomBudgetBatchSampler,
    StructureBatch,
    StructureDataset,
    collate,
    structure_loader,
)
from moeyard.data.structures import Structure, StructureTable


def make_table(sizes: list[int], seed: int = 0) -> StructureTable:
    rng = np.random.default_rng(seed)
    return StructureTable.from_structures(
        [
            Structure(
                str(i), "abc"[i % 3], rng.normal(size=(n, 3)).astype(np.float32), rng.integers(1, 119, n, np.uint8)
            )
            for i, n in enumerate(sizes)
        ]
    )


TABLE = make_table(np.random.default_rng(1).integers(1, 60, 300).tolist())


def collate_reference(table: StructureTable, index: list[int]) -> StructureBatch:
    """One structure after the other."""
    parts = [slice(int(table.ptr[i]), int(table.ptr[i + 1])) for i in index]
    sizes = torch.tensor([part.stop - part.start for part in parts], dtype=torch.int64)
    return StructureBatch(
        positions=torch.cat([torch.zeros(0, 3), *(table.positions[part] for part in parts)]),
        elements=torch.cat([torch.zeros(0, dtype=torch.uint8), *(table.elements[part] for part in parts)]).long(),
        ptr=torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)]),
        batch=torch.cat([torch.zeros(0, dtype=torch.int64)] + [torch.full((int(n),), g) for g, n in enumerate(sizes)]),
        domain=torch.tensor([int(table.domain[i]) for i in index], dtype=torch.int64),
        index=torch.tensor(index, dtype=torch.int64),
    )


def assert_same(got: StructureBatch, expected: StructureBatch) -> None:
    assert isinstance(got, StructureBatch)
    for name, a, b in zip(StructureBatch._fields, got, expected, strict=True):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name


# ---- collate --------------------------------------------------------------------------------------------------------


def test_collate_by_hand() -> None:
    table = StructureTable(
        positions=torch.arange(12.0).reshape(4, 3),
        elements=torch.tensor([6, 7, 8, 16], dtype=torch.uint8),
        ptr=torch.tensor([0, 1, 1, 4]),
        names=("one", "none", "three"),
        domain=torch.tensor([1, 0, 2]),
        domains=("x", "y", "z"),
    )
    batch = collate(table, [2, 1, 0, 2])
    assert batch.positions[:, 0].tolist() == [3, 6, 9, 0, 3, 6, 9]
    assert batch.elements.tolist() == [7, 8, 16, 6, 7, 8, 16]
    assert batch.ptr.tolist() == [0, 3, 3, 4, 7]
    assert batch.batch.tolist() == [0, 0, 0, 2, 3, 3, 3]
    assert batch.domain.tolist() == [2, 0, 1, 2]
    assert batch.index.tolist() == [2, 1, 0, 2]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.data())
def test_collate_equals_the_reference(sizes: list[int], data: st.DataObject) -> None:
    table = make_table(sizes)
    index = data.draw(st.lists(st.integers(0, len(sizes) - 1), max_size=15))
    assert_same(collate(table, index), collate_reference(table, index))
    assert_same(collate(table, torch.tensor(index, dtype=torch.int32)), collate_reference(table, index))


def test_collate_copies() -> None:
    batch = collate(TABLE, [0])
    batch.positions.zero_()
    assert TABLE.positions[0].abs().sum() > 0


def test_collate_calls_gather_segments_once_per_field(monkeypatch: pytest.MonkeyPatch) -> None:
    from moeyard import ops

    calls: list[torch.Tensor] = []
    gather = ops.gather_segments

    def counted(values: torch.Tensor, *args: Any, **options: Any) -> Any:
        calls.append(values)
        return gather(values, *args, **options)

    monkeypatch.setattr(ops, "gather_segments", counted)
    collate(TABLE, [5, 1])
    assert [id(values) for values in calls] == [id(TABLE.positions), id(TABLE.elements), id(TABLE.domain)]


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ([300], ValueError, "index: expected ids from 0 to 299, got 300"),
        ([-1], ValueError, "index: expected ids from 0 to 299, got -1"),
        ([0.0], TypeError, "index: expected int64 or int32 ids"),
        (torch.zeros(1, 1, dtype=torch.int64), ValueError, r"index: expected shape \[M\]"),
    ],
)
def test_collate_bad_index(index: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        collate(TABLE, index)


def test_batches_move_to_devices() -> None:
    moved = collate(TABLE, [0, 1]).to("meta")
    assert isinstance(moved, StructureBatch)
    assert {field.device.type for field in moved} == {"meta"}


# ---- sampler --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("lookahead", [0, 1, 16])
def test_every_structure_once_and_no_batch_above_the_budget(shuffle: bool, lookahead: int) -> None:
    sampler = AtomBudgetBatchSampler(TABLE.sizes, 200, shuffle=shuffle, lookahead=lookahead, max_samples=9)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert sorted(i for batch in batches for i in batch) == list(range(300))
        totals = [int(TABLE.sizes[batch].sum()) for batch in batches]
        assert max(totals) <= 200
        assert max(map(len, batches)) <= 9
        assert sampler.fill == pytest.approx(np.mean(totals) / 200)
        assert all(type(i) is int for batch in batches for i in batch)


def test_by_hand() -> None:
    """Next fit in order: 4 + 5, then 3 + 6 + 1, then 9."""
    sampler = AtomBudgetBatchSampler([4, 5, 3, 6, 1, 9], 10, shuffle=False, lookahead=0)
    assert list(sampler) == [[0, 1], [2, 3, 4], [5]]
    assert len(sampler) == 3
    assert sampler.fill == pytest.approx((0.9 + 1.0 + 0.9) / 3)


def test_lookahead_fills_the_batches() -> None:
    sizes = torch.from_numpy(np.random.default_rng(0).integers(5, 400, 20_000))
    assert AtomBudgetBatchSampler(sizes, 4000, lookahead=16).fill > 0.99
    assert (
        AtomBudgetBatchSampler(sizes, 4000, lookahead=16).fill > AtomBudgetBatchSampler(sizes, 4000, lookahead=0).fill
    )


def test_seed_and_epoch_decide_everything() -> None:
    def batches(seed: int, epoch: int) -> list[list[int]]:
        sampler = AtomBudgetBatchSampler(TABLE.sizes, 200, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert batches(0, 3) == batches(0, 3)
    assert len({str(batches(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert list(AtomBudgetBatchSampler(TABLE.sizes, 200, seed=7)) == batches(7, 0)
    assert list(AtomBudgetBatchSampler(TABLE.sizes.int(), 200, seed=7)) == batches(7, 0)


def test_a_running_epoch_is_not_disturbed() -> None:
    sampler = AtomBudgetBatchSampler(TABLE.sizes, 200)
    expected, running = list(sampler), iter(sampler)
    first = next(running)
    sampler.set_epoch(1)
    assert [first, *running] == expected
    assert list(sampler) != expected
    sampler.set_epoch(0)
    assert list(sampler) == expected


def test_global_generators_are_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    sampler = AtomBudgetBatchSampler(TABLE.sizes, 200)
    batches = list(sampler)
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    torch.manual_seed(99)
    assert list(AtomBudgetBatchSampler(TABLE.sizes, 200)) == batches


def test_oversize() -> None:
    sizes = [3, 50, 4]
    with pytest.raises(ValueError, match="sizes"):
        AtomBudgetBatchSampler(sizes, 10)
    alone = AtomBudgetBatchSampler(sizes, 10, shuffle=False, oversize="own_batch")
    assert sorted(alone) == [[0, 2], [1]]
    assert alone.fill == pytest.approx((0.7 + 1.0) / 2)
    assert alone.skipped == []
    without = AtomBudgetBatchSampler(sizes, 10, shuffle=False, oversize="skip")
    assert list(without) == [[0, 2]]
    assert without.skipped == [1]


def test_nothing_to_sample() -> None:
    sampler = AtomBudgetBatchSampler(make_table([]).sizes, 10)
    assert (len(sampler), list(sampler), sampler.fill) == (0, [], 0.0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sizes": [1.5]}, TypeError, "sizes"),
        ({"sizes": [True]}, TypeError, "sizes"),
        ({"sizes": torch.ones(2, 2, dtype=torch.int64)}, ValueError, "sizes"),
        ({"sizes": torch.ones(2)}, TypeError, "sizes"),
        ({"sizes": [-1]}, ValueError, "sizes"),
        ({"max_atoms_per_batch": 0}, ValueError, "max_atoms_per_batch: expected at least 1, got 0"),
        ({"max_atoms_per_batch": 2.5}, TypeError, "max_atoms_per_batch: expected an int, got float"),
        ({"lookahead": -1}, ValueError, "lookahead"),
        ({"max_samples": 0}, ValueError, "max_samples"),
        ({"oversize": "drop"}, ValueError, "oversize"),
        ({"seed": -1}, ValueError, "seed: expected at least 0, got -1"),
        ({"seed": 1.0}, TypeError, "seed: expected an int, got float"),
        ({"shuffle": 1}, TypeError, "shuffle: expected True or False, got int"),
    ],
)
def test_bad_arguments_fail_at_construction(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AtomBudgetBatchSampler(**({"sizes": [1, 2], "max_atoms_per_batch": 10} | arguments))


def test_bad_epoch() -> None:
    with pytest.raises(ValueError, match="epoch: expected at least 0, got -1"):
        AtomBudgetBatchSampler([1], 10).set_epoch(-1)


# ---- DataLoader -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_loader_yields_the_planned_batches(workers: int) -> None:
    sampler = AtomBudgetBatchSampler(TABLE.sizes, 400, seed=2)
    loader = structure_loader(TABLE, sampler, num_workers=workers)
    assert len(loader) == len(sampler)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for batch, ids in zip(loader, sampler, strict=True):
            assert_same(batch, collate_reference(TABLE, ids))


def test_plain_loaders_work_too() -> None:
    """A batch sampler with our collate_fn, and a sampler of lists with batch_size=None."""
    sampler = AtomBudgetBatchSampler(TABLE.sizes, 400)
    dataset = StructureDataset(TABLE)
    one = DataLoader(dataset, batch_sampler=sampler, collate_fn=StructureDataset.keep)
    two = DataLoader(dataset, sampler=sampler, batch_size=None)
    for a, b, ids in zip(one, two, sampler, strict=True):
        assert_same(a, collate_reference(TABLE, ids))
        assert_same(b, collate_reference(TABLE, ids))


def test_dataset() -> None:
    dataset = StructureDataset(TABLE)
    assert len(dataset) == 300
    assert_same(dataset[7], collate_reference(TABLE, [7]))
    assert_same(dataset[[3, 1]], collate_reference(TABLE, [3, 1]))
    with pytest.raises(ValueError, match="index: expected ids from 0 to 299, got 300"):
        dataset[300]
    with pytest.raises(TypeError, match="table: expected a StructureTable, got list"):
        StructureDataset([])  # type: ignore[arg-type]

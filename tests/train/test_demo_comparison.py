"""The demo's comparison: both sides agree on structures of every size, or say which step does not."""

from __future__ import annotations

import sys

import pytest
import torch

pytest.importorskip("lightning")

from moeyard.data.structures import StructureTable
from moeyard.train.demo_comparison import compare_steps, plain_radius_graph

STEPS = ["collate", "radius graph", "gate", "permute", "experts", "unpermute"]
SIZES = {"cutoff": 5.0, "dim": 16, "hidden": 8, "num_experts": 4, "experts_per_token": 2}


def table(sizes: list[int]) -> StructureTable:
    g = torch.Generator().manual_seed(0)
    total = sum(sizes)
    return StructureTable(
        positions=torch.rand(total, 3, generator=g) * total ** (1 / 3) * 2,
        elements=torch.full((total,), 6, dtype=torch.uint8),
        ptr=torch.tensor([0, *sizes]).cumsum(0),
        names=tuple(map(str, range(len(sizes)))),
        domain=torch.zeros(len(sizes), dtype=torch.int64),
        domains=("carbon",),
    )


@pytest.mark.parametrize("sizes", [[30, 1, 12, 7], [2500], [1]])
def test_every_step_is_compared(sizes: list[int]) -> None:
    found = compare_steps(table(sizes), max_atoms_per_batch=100, **SIZES)  # type: ignore[arg-type]
    assert [row.step for row in found] == STEPS
    assert all(row.ours_ms > 0 and row.plain_ms > 0 for row in found)
    assert found[0].ratio == found[0].plain_ms / found[0].ours_ms


def test_structures_too_large_for_all_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["moeyard.train.demo_comparison"], "LARGEST", 20)
    found = compare_steps(table([30, 12]), max_atoms_per_batch=100, **SIZES)  # type: ignore[arg-type]
    assert [row.step for row in found] == [step for step in STEPS if step != "radius graph"]


def test_the_global_random_state_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    compare_steps(table([30, 12]), max_atoms_per_batch=100, **SIZES)  # type: ignore[arg-type]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_difference_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["moeyard.train.demo_comparison"]
    monkeypatch.setattr(module, "plain_radius_graph", lambda p, r, ptr: plain_radius_graph(p, 0.9 * r, ptr))
    with pytest.raises(ValueError, match="radius graph: ours and plain PyTorch disagree"):
        compare_steps(table([30, 12]), max_atoms_per_batch=100, **SIZES)  # type: ignore[arg-type]

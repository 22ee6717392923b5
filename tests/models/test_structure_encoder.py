"""The structure encoder: symmetry in float64, permutation of atoms, batches, domain routing, configuration."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moeyard.models import StructureEncoder, StructureEncoderConfig

SMALL = {"dim": 16, "num_layers": 2, "num_basis": 8, "num_experts": 4, "expert_hidden": 12}


def encoder(**changes: object) -> StructureEncoder:
    torch.manual_seed(1)
    return StructureEncoder(StructureEncoderConfig(**{**SMALL, **changes})).double()


def structures(n: int = 60) -> tuple[Tensor, Tensor, Tensor]:
    """Two structures of random atoms; dense enough that the limit of neighbours cuts."""
    generator = torch.Generator().manual_seed(2)
    positions = torch.rand(n, 3, dtype=torch.float64, generator=generator) * 6
    elements = torch.tensor([1, 6, 7, 8])[torch.randint(4, (n,), generator=generator)]
    return positions, elements, torch.tensor([0, n // 3, n])


def rotation(reflect: bool = False) -> Tensor:
    q, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5)))
    q = q * torch.linalg.det(q)
    return -q if reflect else q


@pytest.mark.parametrize("reflect", [False, True])
@pytest.mark.parametrize("max_neighbors", [32, 6])
def test_rotation_and_translation(reflect: bool, max_neighbors: int) -> None:
    model = encoder(max_neighbors=max_neighbors)
    positions, elements, ptr = structures()
    turn = rotation(reflect)
    moved = positions @ turn.T + torch.tensor([30.0, -7.0, 4.0], dtype=torch.float64)
    here, there = model(positions, elements, ptr), model(moved, elements, ptr)
    torch.testing.assert_close(there.features, here.features, rtol=0, atol=1e-9)
    torch.testing.assert_close(there.element_logits, here.element_logits, rtol=0, atol=1e-9)
    torch.testing.assert_close(there.noise, here.noise @ turn.T, rtol=0, atol=1e-9)
    assert here.noise.abs().max() > 1e-3


def test_order_of_atoms() -> None:
    model = encoder()
    positions, elements, ptr = structures()
    generator = torch.Generator().manual_seed(0)
    order = torch.cat([torch.randperm(20, generator=generator), 20 + torch.randperm(40, generator=generator)])
    here, there = model(positions, elements, ptr), model(positions[order], elements[order], ptr)
    torch.testing.assert_close(there.element_logits, here.element_logits[order], rtol=0, atol=1e-9)
    torch.testing.assert_close(there.noise, here.noise[order], rtol=0, atol=1e-9)


def test_a_batch_equals_its_structures() -> None:
    model = encoder()
    positions, elements, ptr = structures()
    together = model(positions, elements, ptr)
    for a, b in ((0, 20), (20, 60)):
        alone = model(positions[a:b], elements[a:b], torch.tensor([0, b - a]))
        torch.testing.assert_close(together.noise[a:b], alone.noise, rtol=0, atol=1e-9)


@pytest.mark.parametrize("max_neighbors", [32, 6])
def test_edges_that_fill_a_capacity_change_nothing(monkeypatch: pytest.MonkeyPatch, max_neighbors: int) -> None:
    """On a GPU a graph has room for all edges that it might have; here on the CPU."""
    model, batch = encoder(max_neighbors=max_neighbors), structures()
    free = model(*batch)
    room = model._capacity(len(batch[0]))
    assert room == 60 * max_neighbors
    graph_of = model._graph
    monkeypatch.setattr(model, "_graph", lambda positions, ptr, _: graph_of(positions, ptr, room))
    graph = model._graph(batch[0], batch[2], None)
    unused = graph.edge_index[:, int(graph.num_edges) :]
    assert unused.shape[1] == 0 or unused[0].bincount().max() <= max_neighbors
    fixed = model(*batch)
    assert fixed.num_edges == free.num_edges <= room
    torch.testing.assert_close(fixed.noise, free.noise, rtol=0, atol=1e-12)
    torch.testing.assert_close(fixed.element_logits, free.element_logits, rtol=0, atol=1e-12)


def test_every_parameter_learns() -> None:
    model = encoder(num_experts=2)
    out = model(*structures())
    (out.noise.square().sum() + out.element_logits.square().sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_domain_routing_forces_the_first_expert() -> None:
    model = encoder(routing="domain", max_neighbors=None)
    positions, elements, ptr = structures()
    out = model(positions, elements, ptr, torch.tensor([3, 5]))
    for gating in out.gatings:
        assert gating.experts[:20, 0].unique().tolist() == [3]
        assert gating.experts[20:, 0].unique().tolist() == [1]
    with pytest.raises(ValueError, match="domain"):
        model(positions, elements, ptr)


def test_no_atoms_and_lone_atoms() -> None:
    model = encoder()
    out = model(torch.zeros(0, 3, dtype=torch.float64), torch.zeros(0, dtype=torch.int64), torch.tensor([0, 0]))
    assert out.noise.shape == (0, 3)
    lone = model(torch.zeros(2, 3, dtype=torch.float64), torch.tensor([6, 8]), torch.tensor([0, 1, 2]))
    assert lone.num_edges == 0
    assert not lone.noise.any()
    assert lone.element_logits.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 0}, "dim: expected at least 1, got 0"),
        ({"experts_per_token": 9}, "experts_per_token: expected at most num_experts = 4, got 9"),
        ({"routing": "both"}, "routing: expected 'learned' or 'domain', got 'both'"),
    ],
)
def test_bad_configuration(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StructureEncoderConfig(**{**SMALL, **changes})

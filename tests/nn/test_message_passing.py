"""Message passing: hand-computed basis, smooth cutoff, invariance, equivariance, splitting a batch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moeyard.nn import Edges, RadialBasis, RadialInteraction, VectorReadout, edges_of
from moeyard.ops import radius_graph

R = 3.0


def rotation(seed: int = 0) -> Tensor:
    q, _ = torch.linalg.qr(
        torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), mode="complete"
    )
    return q * torch.linalg.det(q)


def graph(positions: Tensor, basis: RadialBasis, ptr: Tensor | None = None) -> Edges:
    ptr = torch.tensor([0, len(positions)]) if ptr is None else ptr
    g = radius_graph(positions, R, ptr=ptr)
    return edges_of(g.edge_index, g.distance, g.vector, basis)


def setup(n: int = 30) -> tuple[Tensor, Tensor, RadialBasis, RadialInteraction, VectorReadout]:
    torch.manual_seed(0)
    positions = torch.rand(n, 3, dtype=torch.float64) * 5
    h = torch.randn(n, 8, dtype=torch.float64)
    return positions, h, RadialBasis(6, R).double(), RadialInteraction(8, 6).double(), VectorReadout(8, 6).double()


def test_basis_by_hand() -> None:
    basis = RadialBasis(4, 3.0)
    d = torch.tensor([0.0, 1.5, 3.0, 4.0], dtype=torch.float64)
    got = basis(d)
    assert got.shape == (4, 4)
    torch.testing.assert_close(got[0], torch.exp(-0.5 * torch.arange(4.0, dtype=torch.float64) ** 2))
    assert got[1, 1].item() == pytest.approx(math.exp(-0.125) * 0.5)
    assert not got[2:].any()


def test_features_are_invariant_and_vectors_equivariant() -> None:
    positions, h, basis, interaction, readout = setup()
    turn, shift = rotation(), torch.tensor([10.0, -3.0, 2.0], dtype=torch.float64)
    here, there = graph(positions, basis), graph(positions @ turn.T + shift, basis)
    torch.testing.assert_close(interaction(h, there), interaction(h, here), rtol=0, atol=1e-10)
    vectors = readout(h, here)
    assert vectors.abs().max() > 1e-3
    torch.testing.assert_close(readout(h, there), vectors @ turn.T, rtol=0, atol=1e-10)


def test_an_edge_vanishes_smoothly() -> None:
    _, _, basis, interaction, readout = setup()
    h = torch.ones(2, 8, dtype=torch.float64)
    apart = graph(torch.tensor([[0.0, 0, 0], [R + 1, 0, 0]], dtype=torch.float64), basis)
    nearly = graph(torch.tensor([[0.0, 0, 0], [R - 1e-5, 0, 0]], dtype=torch.float64), basis)
    assert len(nearly.source) == 2
    assert len(apart.source) == 0
    torch.testing.assert_close(interaction(h, nearly), interaction(h, apart), rtol=0, atol=1e-8)
    torch.testing.assert_close(readout(h, nearly), torch.zeros(2, 3, dtype=torch.float64), rtol=0, atol=1e-8)


def test_structures_of_a_batch_do_not_see_each_other() -> None:
    positions, h, basis, interaction, readout = setup()
    ptr = torch.tensor([0, 12, 12, 30])
    for layer in (interaction, readout):
        together = layer(h, graph(positions, basis, ptr))
        alone = [layer(h[a:b], graph(positions[a:b], basis)) for a, b in ((0, 12), (12, 30))]
        torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-12)


def test_atoms_in_one_place_stay_finite() -> None:
    _, h, basis, interaction, readout = setup(2)
    positions = torch.zeros(2, 3, dtype=torch.float64)
    out = interaction(h, graph(positions, basis)).sum() + readout(h, graph(positions, basis)).sum()
    assert out.isfinite()


@pytest.mark.parametrize(("args", "name"), [((1, 3.0), "num_basis"), ((4, 0.0), "cutoff"), ((4, math.inf), "cutoff")])
def test_bad_arguments_name_themselves(args: tuple[int, float], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        RadialBasis(*args)

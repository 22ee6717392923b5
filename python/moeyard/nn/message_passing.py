"""Message passing on a radius graph: distances in, invariant features or equivariant vectors out.

Shape letters: N atoms, M edges, H features, B basis functions. Edges run from source j to target i; `distance` and
`vector` (source minus target, in the positions' unit) come from `radius_graph`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Edges(NamedTuple):
    """What every layer needs of the graph, computed once per batch."""

    source: Tensor  # [M] int64, neighbour j
    target: Tensor  # [M] int64, centre i
    basis: Tensor  # [M,B] radial basis times envelope
    direction: Tensor  # [M,3] from i to j: unit vector for all but the closest pairs


class RadialBasis(nn.Module):
    """B Gaussians on evenly spaced centres in [0, cutoff], times a smooth envelope that is 0 at the cutoff.

        b_m(d) = exp(-(d - c_m)^2 / (2 w^2)) * (cos(pi d / cutoff) + 1) / 2,   w = c_1 - c_0

    The envelope makes an edge appear and vanish without a jump when an atom crosses the cutoff.
    Source: Schütt et al. 2017 (arXiv:1706.08566), Behler 2011 (J. Chem. Phys. 134, 074106).

    Args:
        num_basis: B, at least 2.
        cutoff: in the unit of the distances (Å).
    """

    centers: Tensor

    def __init__(self, num_basis: int, cutoff: float) -> None:
        super().__init__()
        if num_basis < 2:
            raise ValueError(f"num_basis: expected at least 2, got {num_basis}")
        if not (math.isfinite(cutoff) and cutoff > 0):
            raise ValueError(f"cutoff: expected a positive finite number, got {cutoff}")
        self.cutoff, self.width = float(cutoff), cutoff / (num_basis - 1)
        # Not a parameter and not learned, hence not in checkpoints either: the arguments say it all.
        self.register_buffer("centers", torch.linspace(0.0, cutoff, num_basis, dtype=torch.float64), persistent=False)

    def forward(self, distance: Tensor) -> Tensor:
        """[M] distances -> [M,B]."""
        centers = self.centers.to(distance.dtype)
        gaussians = torch.exp(-0.5 * ((distance[:, None] - centers) / self.width).square())
        envelope = 0.5 * (torch.cos(distance * (math.pi / self.cutoff)) + 1.0)
        # Unused edges of a fixed-capacity graph lie at the cutoff: they weigh nothing here.
        return gaussians * torch.where(distance < self.cutoff, envelope, torch.zeros_like(envelope))[:, None]


def edges_of(edge_index: Tensor, distance: Tensor, vector: Tensor, basis: RadialBasis) -> Edges:
    """Prepares the fields of a `RadiusGraph` for the layers below.

    Args:
        edge_index: [2,M] int64, source and target.
        distance: [M]; vector: [M,3], source minus target.
        basis: the radial basis, whose cutoff is the graph's r.
    """
    # The small constant keeps the direction of two atoms in one place, and its gradient, finite.
    direction = vector / (distance + 0.1)[:, None]
    return Edges(edge_index[0], edge_index[1], basis(distance), direction)


def sum_to_target(values: Tensor, target: Tensor, num_atoms: int) -> Tensor:
    """[M,...] edge values summed per target: [N,...]. In edge order on the CPU, hence deterministic there."""
    return values.new_zeros(num_atoms, *values.shape[1:]).index_add(0, target, values)


class RadialInteraction(nn.Module):
    """Continuous-filter convolution: neighbours' features, weighed channel by channel by the distance.

        out_i = W_2 silu(W_1 sum_j (h_j W_0) * F(d_ij))

    Invariant under rotation, translation and reflection, equivariant under permutation of the atoms. F is linear in the
    radial basis, which can already form any smooth function of the distance.
    Source: Schütt et al. 2017 (arXiv:1706.08566).

    Args:
        dim: H.
        num_basis: B.
    """

    def __init__(self, dim: int, num_basis: int) -> None:
        super().__init__()
        self.source = nn.Linear(dim, dim, bias=False)
        self.filter = nn.Linear(num_basis, dim, bias=False)
        self.out = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, h: Tensor, edges: Edges) -> Tensor:
        """[N,H] features -> [N,H] update."""
        # index_select, not h[source]: its backward is one ordered index_add, about half the time on the CPU.
        messages = self.source(h).index_select(0, edges.source) * self.filter(edges.basis)
        out: Tensor = self.out(sum_to_target(messages, edges.target, h.shape[0]))
        return out


class VectorReadout(nn.Module):
    """One vector per atom, which turns with the structure: what denoising predicts.

        v_i = sum_j s(h_i, h_j, d_ij) direction_ij,   s -> 0 at the cutoff

    Equivariant under rotation and reflection, invariant under translation, as s sees invariants alone.
    Source: Satorras et al. 2021 (arXiv:2102.09844), equation 4; Zaidi et al. 2022 (arXiv:2206.00133) for denoising.

    Args:
        dim: H.
        num_basis: B.
        hidden: features of s between its two products.
    """

    def __init__(self, dim: int, num_basis: int, hidden: int = 32) -> None:
        super().__init__()
        # The products with h are taken per atom, not per edge: M is about 20 N.
        self.target = nn.Linear(dim, hidden)
        self.source = nn.Linear(dim, hidden, bias=False)
        self.filter = nn.Linear(num_basis, hidden, bias=False)
        self.strength = nn.Linear(hidden, num_basis, bias=False)

    def forward(self, h: Tensor, edges: Edges) -> Tensor:
        """[N,H] features -> [N,3] vectors, in units of what the loss asks for."""
        hidden = self.target(h).index_select(0, edges.target) + self.source(h).index_select(0, edges.source)
        hidden = nn.functional.silu(hidden + self.filter(edges.basis))
        # A product with the basis is a function of the distance that dies at the cutoff by itself.
        strength = (self.strength(hidden) * edges.basis).sum(1, keepdim=True)
        return sum_to_target(strength * edges.direction, edges.target, h.shape[0])

"""Structure encoder: message passing on the radius graph, a mixture of experts as feed-forward layer, two heads.

    h_i = embedding[element_i]                        0 = masked or unknown
    h   = h + interaction(norm(h), graph)             L times, over neighbours closer than the cutoff
    h   = h + MoE(norm(h))                            L times, per atom
    element logits = W norm(h)                        invariant
    noise          = vector read-out(norm(h), graph)  turns with the structure

Shape letters: n atoms, G structures, H features, L blocks, E experts.
Source: Zaidi et al. 2022 (arXiv:2206.00133) for the denoising target, Fedus et al. 2021 (arXiv:2101.03961) for the MoE.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moeyard.nn import MoE, RadialBasis, RadialInteraction, VectorReadout, edges_of
from moeyard.nn.message_passing import Edges
from moeyard.ops import Gating, RadiusGraph, radius_graph

MASK_ELEMENT = 0


@dataclass(frozen=True)
class StructureEncoderConfig:
    """Sizes of a `StructureEncoder`; lengths in Å.

    `routing` is "learned" (the router chooses all k experts) or "domain" (a structure's domain forces the first one,
    domain d to expert d modulo E; the router chooses the rest).
    """

    dim: int = 64
    num_layers: int = 3
    num_basis: int = 24
    cutoff: float = 5.0
    max_neighbors: int | None = 32
    num_experts: int = 8
    experts_per_token: int = 2
    expert_hidden: int = 64
    activation: str = "swiglu"
    routing: str = "learned"
    num_elements: int = 119

    def __post_init__(self) -> None:
        for name in ("dim", "num_layers", "num_experts", "experts_per_token", "expert_hidden", "num_elements"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token: expected at most num_experts = {self.num_experts}, got {self.experts_per_token}"
            )
        if self.routing not in ("learned", "domain"):
            raise ValueError(f"routing: expected 'learned' or 'domain', got {self.routing!r}")


class StructureEncoding(NamedTuple):
    """What the encoder says about every atom, and how each layer routed it."""

    features: Tensor  # [n,H] invariant
    element_logits: Tensor  # [n,num_elements] invariant
    noise: Tensor  # [n,3] equivariant, in units of the noise's standard deviation
    gatings: tuple[Gating, ...]  # one per block
    num_edges: Tensor  # int64 scalar


class _Block(nn.Module):
    def __init__(self, config: StructureEncoderConfig) -> None:
        super().__init__()
        self.norm_interaction = nn.LayerNorm(config.dim)
        self.interaction = RadialInteraction(config.dim, config.num_basis)
        self.norm_moe = nn.LayerNorm(config.dim)
        self.moe = MoE(
            config.dim,
            config.expert_hidden,
            config.num_experts,
            config.experts_per_token,
            activation=config.activation,
        )

    def forward(self, h: Tensor, edges: Edges, forced_experts: Tensor | None) -> tuple[Tensor, Gating]:
        h = h + self.interaction(self.norm_interaction(h), edges)
        update, gating, _ = self.moe(self.norm_moe(h), forced_experts=forced_experts)
        return h + update, gating


class StructureEncoder(nn.Module):
    """Encodes the atoms of a batch of structures.

    Args:
        config: sizes.

    Determinism: on the CPU bit-identical over runs with the same number of threads; on CUDA the sums over neighbours
    are atomic and agree to rounding.
    """

    def __init__(self, config: StructureEncoderConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or StructureEncoderConfig()
        self.embedding = nn.Embedding(config.num_elements, config.dim)
        self.basis = RadialBasis(config.num_basis, config.cutoff)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.dim)
        self.element_head = nn.Linear(config.dim, config.num_elements)
        self.noise_head = VectorReadout(config.dim, config.num_basis)

    def forward(
        self, positions: Tensor, elements: Tensor, ptr: Tensor, domain: Tensor | None = None
    ) -> StructureEncoding:
        """Encodes G structures.

        Args:
            positions: [n,3] float, Å; for denoising the noised ones, since the graph is built on them.
            elements: [n] int64 atomic numbers, `MASK_ELEMENT` where hidden.
            ptr: [G+1] int64, structure g is atoms ptr[g] to ptr[g+1].
            domain: [G] int64, needed for `routing="domain"`.

        Returns:
            `StructureEncoding`.
        """
        graph = self._graph(positions, ptr, self._capacity(len(positions)) if positions.is_cuda else None)
        edges = edges_of(graph.edge_index, graph.distance, graph.vector, self.basis)
        forced = self._forced_experts(ptr, domain, len(positions))
        h = self.embedding(elements)
        gatings = []
        for block in self.blocks:
            h, gating = block(h, edges, forced)
            gatings.append(gating)
        h = self.norm(h)
        noise = self.noise_head(h, edges)
        return StructureEncoding(h, self.element_head(h), noise, tuple(gatings), graph.num_edges)

    def _capacity(self, atoms: int) -> int | None:
        """The most edges that so many atoms have, if there is a limit: a GPU need not be waited for then."""
        limit = self.config.max_neighbors
        return None if limit is None else atoms * limit

    def _graph(self, positions: Tensor, ptr: Tensor, capacity: int | None) -> RadiusGraph:
        config = self.config
        graph = radius_graph(
            positions, config.cutoff, ptr=ptr, max_num_neighbors=config.max_neighbors, max_edges=capacity
        )
        if not capacity:
            return graph
        # Edges of no length weigh nothing, but at one atom together their sums would wait for each other.
        slot = torch.arange(capacity, device=positions.device)
        spread = torch.where(slot < graph.num_edges, graph.edge_index, slot % len(positions))
        return graph._replace(edge_index=spread)

    def _forced_experts(self, ptr: Tensor, domain: Tensor | None, atoms: int) -> Tensor | None:
        if self.config.routing == "learned":
            return None
        if domain is None:
            raise ValueError("domain: expected [G] ids, since routing='domain', got None")
        return torch.repeat_interleave(domain % self.config.num_experts, ptr[1:] - ptr[:-1], output_size=atoms)

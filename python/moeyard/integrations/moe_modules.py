"""`SparseGatingNetwork`, `MoELayer` and `FusionMoE`: the building blocks of the CheMoE family of drug-response models.

    from moeyard.integrations.moe_modules import FusionMoE, MoELayer, SparseGatingNetwork

    y = sum over the k best experts e of w_e expert_e(x),   w = softmax(gate(x)) over those k

An expert computes only the samples that chose it (permuted to lie together), where the usual code for this family
computes every expert on every sample and multiplies by zero: the same numbers for k / E of the work.

Shape letters: B samples, D input features, O output features, E experts, k experts per sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moeyard.nn import squared_deviation, switch_load_balancing
from moeyard.ops import Gating, _check, permute_tokens, plan_permutation, topk_gating, unpermute_tokens

__all__ = ["FusionMoE", "MoELayer", "SparseGatingNetwork"]

_BALANCE = ("squared_deviation", "switch")


class SparseGatingNetwork(nn.Module):
    """Scores the experts with a two-layer network and keeps the k best.

        gate(x) = W_2 dropout(relu(layer_norm(W_1 x)))

    Args:
        input_dim: D.
        num_experts: E.
        hidden_dim: features between the two products.
        dropout: probability, 0 to 1.
    """

    def __init__(self, input_dim: int, num_experts: int = 4, hidden_dim: int = 128, dropout: float = 0.1) -> None:
        super().__init__()
        _check_sizes(input_dim=input_dim, num_experts=num_experts, hidden_dim=hidden_dim)
        self.num_experts = num_experts
        self.gate = _mlp(input_dim, [hidden_dim], num_experts, dropout, layernorm=True)

    def forward(self, x: Tensor, top_k: int = 2) -> tuple[Tensor, Tensor]:
        """Weighs the experts of [B,D] samples.

        Returns:
            weights [B,E], which sum to 1 per sample and are zero but for the k best; indices [B,k] int64, best first.
        """
        gating = self.route(x, top_k)
        indices = gating.experts.long()
        return gating.weights.new_zeros(x.shape[0], self.num_experts).scatter(1, indices, gating.weights), indices

    def route(self, x: Tensor, top_k: int = 2) -> Gating:
        """The same as a `Gating`: weights and ids [B,k], and the statistics that the balance losses need."""
        return topk_gating(self.gate(x), top_k, renormalize=True)


class MoELayer(nn.Module):
    """A mixture of multilayer perceptrons, gated by a `SparseGatingNetwork`.

    Args:
        input_dim: D.
        output_dim: O.
        num_experts: E.
        top_k: k, 1 <= k <= E.
        expert_hidden_dims: features between the products of an expert; empty makes it linear.
        dropout: probability in gate and experts, 0 to 1.
        use_layernorm: normalise the experts' hidden features before the ReLU.
        gate_hidden_dim: `hidden_dim` of the gate.

    `last_gating` is the `Gating` of the last call (None before), for usage counts and losses.
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        num_experts: int = 4,
        top_k: int = 2,
        *,
        expert_hidden_dims: Sequence[int] = (256, 128),
        dropout: float = 0.1,
        use_layernorm: bool = True,
        gate_hidden_dim: int = 128,
    ) -> None:
        super().__init__()
        _check_sizes(output_dim=output_dim, top_k=top_k)
        if top_k > num_experts:
            raise ValueError(f"top_k: expected 1 <= top_k <= num_experts = {num_experts}, got {top_k}")
        self.num_experts, self.top_k = num_experts, top_k
        self.gating = SparseGatingNetwork(input_dim, num_experts, gate_hidden_dim, dropout)
        self.experts = nn.ModuleList(
            _mlp(input_dim, expert_hidden_dims, output_dim, dropout, use_layernorm) for _ in range(num_experts)
        )
        self.last_gating: Gating | None = None

    def __getstate__(self) -> dict[str, Any]:
        # The gating hangs on the graph of its call, which no copy can take along.
        return {**self.__dict__, "last_gating": None}

    def forward(self, x: Tensor) -> Tensor:
        """[...,D] -> [...,O]; the leading dimensions are samples."""
        samples = x.reshape(-1, x.shape[-1])
        gating = self.last_gating = self.gating.route(samples, self.top_k)
        plan = plan_permutation(gating.experts, self.num_experts)
        rows = permute_tokens(samples, plan).split(plan.counts.tolist())
        # Every expert runs, over no rows too: its gradients are then zeros, which DDP waits for, and not None.
        out = torch.cat([expert(part) for expert, part in zip(self.experts, rows, strict=True)])
        return unpermute_tokens(out, plan, gating.weights).reshape(*x.shape[:-1], out.shape[1])

    def compute_load_balance_loss(self, weight: float = 0.01, kind: str = "squared_deviation") -> Tensor:
        """The balance loss of the last call, times `weight`: a scalar; zero before the first call.

        Args:
            weight: factor.
            kind: "squared_deviation" (`moeyard.nn.squared_deviation`), 0 when balanced, which cannot revive a dead
                expert, or "switch" (`moeyard.nn.switch_load_balancing`), 1 when balanced, which can.
        """
        _check.option("kind", kind, _BALANCE)
        gating = self.last_gating
        if gating is None:
            return torch.zeros(())
        return weight * (switch_load_balancing if kind == "switch" else squared_deviation)(gating)


class FusionMoE(nn.Module):
    """Fuses a latent vector with an embedding: a `MoELayer` over both side by side.

    Args:
        latent_dim, embed_dim: features of the two; D is their sum.
        num_experts, top_k, dropout: see `MoELayer`.
        output_dim: O; None is D.
        expert_hidden_dims: see `MoELayer`; None is (D,).
    """

    def __init__(
        self,
        latent_dim: int,
        embed_dim: int,
        num_experts: int = 4,
        top_k: int = 2,
        *,
        dropout: float = 0.1,
        output_dim: int | None = None,
        expert_hidden_dims: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(latent_dim=latent_dim, embed_dim=embed_dim)
        dim = latent_dim + embed_dim
        self.moe = MoELayer(
            dim,
            dim if output_dim is None else output_dim,
            num_experts,
            top_k,
            expert_hidden_dims=(dim,) if expert_hidden_dims is None else expert_hidden_dims,
            dropout=dropout,
        )

    def forward(self, z: Tensor, feat_embed: Tensor) -> Tensor:
        """z [...,latent_dim] and feat_embed [...,embed_dim] -> [...,O]."""
        out: Tensor = self.moe(torch.cat([z, feat_embed], dim=-1))
        return out

    def compute_load_balance_loss(self, weight: float = 0.01, kind: str = "squared_deviation") -> Tensor:
        """See `MoELayer.compute_load_balance_loss`."""
        return self.moe.compute_load_balance_loss(weight, kind)


def _mlp(input_dim: int, hidden_dims: Sequence[int], output_dim: int, dropout: float, layernorm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in hidden_dims:
        _check_sizes(expert_hidden_dims=width)
        layers += [nn.Linear(input_dim, width), nn.LayerNorm(width)] if layernorm else [nn.Linear(input_dim, width)]
        layers += [nn.ReLU(), nn.Dropout(dropout)]
        input_dim = width
    return nn.Sequential(*layers, nn.Linear(input_dim, output_dim))


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        _check.integer(name, size, minimum=1)

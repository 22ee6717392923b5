"""Experts: E feed-forward networks with stacked weights, each run over its own contiguous rows.

Shape letters: R rows sorted by expert, E experts, H features, I hidden features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moeyard.ops import _check
from moeyard.ops.expert_ffn import PARTS, expert_ffn


class Experts(nn.Module):
    """E independent two-layer networks; row r goes through the expert whose segment holds it.

    Args:
        num_experts: E.
        dim: H, features in and out.
        hidden: I, features between the two products.
        activation: "swiglu", "gelu" or "relu".
        recompute: keep no hidden features for the backward, see `expert_ffn`.

    The weights are `up` [E,H,2I or I] and `down` [E,I,H]; see `expert_ffn` for the formula.
    """

    def __init__(
        self, num_experts: int, dim: int, hidden: int, *, activation: str = "swiglu", recompute: bool = False
    ) -> None:
        super().__init__()
        for name, value in (("num_experts", num_experts), ("dim", dim), ("hidden", hidden)):
            _check.integer(name, value, minimum=1)
        _check.option("activation", activation, tuple(PARTS))
        self.activation, self.recompute = activation, recompute
        self.up = nn.Parameter(torch.empty(num_experts, dim, PARTS[activation] * hidden))
        self.down = nn.Parameter(torch.empty(num_experts, hidden, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        # nn.init would take fans over all experts together; each is a matrix of its own.
        nn.init.normal_(self.up, std=self.up.shape[1] ** -0.5)
        nn.init.normal_(self.down, std=self.down.shape[1] ** -0.5)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Runs every expert over its rows.

        Args:
            x: [R,H] rows sorted by expert, as `permute_tokens` gives them.
            offsets: [E] END offsets of the experts' rows (`PermutationPlan.offsets`).

        Returns:
            [R,H]; rows past the last offset are zero, and so is their gradient.
        """
        return expert_ffn(x, self.up, self.down, offsets, self.activation, recompute=self.recompute)

    def extra_repr(self) -> str:
        experts, dim, _ = self.up.shape
        return f"num_experts={experts}, dim={dim}, hidden={self.down.shape[1]}, activation={self.activation!r}"

"""Experts: E feed-forward networks with stacked weights, each run over its own contiguous rows.

    SwiGLU:  y = (silu(x G_e) * (x U_e)) D_e        GELU:  y = gelu(x U_e) D_e

Shape letters: R rows sorted by expert, E experts, H features, I hidden features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

#: Width of the first product in units of I: SwiGLU holds gate and value side by side.
_PARTS = {"swiglu": 2, "gelu": 1}


class Experts(nn.Module):
    """E independent two-layer networks; row r goes through the expert whose segment holds it.

    Args:
        num_experts: E.
        dim: H, features in and out.
        hidden: I, features between the two products.
        activation: "swiglu" or "gelu".

    The weights are `up` [E, H, 2I or I] and `down` [E, I, H], laid out as `torch.nn.functional.grouped_mm` takes them.
    Source: Shazeer 2020, "GLU variants improve Transformer" (arXiv:2002.05202).
    """

    def __init__(self, num_experts: int, dim: int, hidden: int, *, activation: str = "swiglu") -> None:
        super().__init__()
        if activation not in _PARTS:
            raise ValueError(f"activation: expected one of {', '.join(map(repr, _PARTS))}, got {activation!r}")
        self.activation = activation
        self.up = nn.Parameter(torch.empty(num_experts, dim, _PARTS[activation] * hidden))
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
        # unbind: its backward stacks E gradients once, where indexing would add E full-size ones.
        ups, downs = self.up.unbind(), self.down.unbind()
        pieces, start = [], 0
        for e, stop in enumerate(offsets.tolist()):
            # Expert 0 runs over no rows as well: weights of a batch without rows have zero gradients, not None.
            if stop > start or e == 0:
                pieces.append(self._expert(x[start:stop], ups[e], downs[e]))
            start = stop
        tail = x.shape[0] - start
        if tail:
            pieces.append(pieces[0].new_zeros(tail, self.down.shape[2]))
        return torch.cat(pieces)

    def _expert(self, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        hidden = x @ up
        if self.activation == "swiglu":
            gate, value = hidden.chunk(2, dim=-1)
            return (nn.functional.silu(gate) * value) @ down
        return nn.functional.gelu(hidden) @ down

    def extra_repr(self) -> str:
        experts, dim, _ = self.up.shape
        return f"num_experts={experts}, dim={dim}, hidden={self.down.shape[1]}, activation={self.activation!r}"

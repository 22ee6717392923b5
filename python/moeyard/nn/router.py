"""Router: one linear layer and the native top-k gating.

    logits = x @ W^T        gating = topk_gating(logits, k)

Shape letters: T tokens, H features, E experts, k experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moeyard.ops import Gating, _check, topk_gating


class Router(nn.Module):
    """Chooses k of E experts for every token.

    Args:
        dim: H, features per token.
        num_experts: E.
        k: experts per token, 1 <= k <= E.
        score: score function of `topk_gating`: "softmax", "softmax_topk", "sigmoid" or "sqrtsoftplus".
        renormalize: divide a token's k weights by their sum.

    Determinism: that of the matrix product and of `topk_gating`. Autocast: the logits are computed in float32, since
    rounding them to a half type would decide close calls at random. Source: Shazeer et al. 2017 (arXiv:1701.06538).
    """

    def __init__(
        self, dim: int, num_experts: int, k: int, *, score: str = "softmax", renormalize: bool = False
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("num_experts", num_experts), ("k", k)):
            _check.integer(name, value, minimum=1)
        if k > num_experts:
            raise ValueError(f"k: expected 1 <= k <= num_experts = {num_experts}, got {k}")
        self.num_experts, self.k, self.score, self.renormalize = num_experts, k, score, renormalize
        # Small initial logits: an even start, so that no expert wins by the draw of the weights (Switch, section 2.4).
        self.weight = nn.Parameter(torch.empty(num_experts, dim).normal_(std=0.1 * dim**-0.5))

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        forced_experts: Tensor | None = None,
        forced_weights: str = "score",
    ) -> Gating:
        """Gates [T,H] tokens.

        Args:
            x: [T,H] float.
            mask: [T] bool, False = padding: routed nowhere, in no statistic.
            forced_experts: [T] or [T,k] integer ids, -1 = choose freely.
            forced_weights: "score" or "one", the weights of forced slots.

        Returns:
            `Gating` with weights and ids [T,k] and the statistics that the losses need.
        """
        if x.shape[-1:] != self.weight.shape[1:]:
            raise ValueError(f"x: expected {self.weight.shape[1]} features in the last dimension, got {list(x.shape)}")
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
            logits = nn.functional.linear(x.to(dtype), self.weight.to(dtype))
            return topk_gating(
                logits,
                self.k,
                score=self.score,
                renormalize=self.renormalize,
                mask=mask,
                forced_experts=forced_experts,
                forced_weights=forced_weights,
            )

    def extra_repr(self) -> str:
        return f"dim={self.weight.shape[1]}, num_experts={self.num_experts}, k={self.k}, score={self.score!r}"

"""MoE: the sparse feed-forward layer, tokens -> router -> permutation -> experts -> weighted sum.

    y_t = sum_j w_tj expert_{e_tj}(x_t)

Shape letters: T tokens, H features, E experts, k experts per token.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from moeyard.nn.experts import Experts
from moeyard.nn.router import Router
from moeyard.ops import Gating, permute_tokens, plan_permutation, unpermute_tokens


class MoEOutput(NamedTuple):
    """`output` [...,H] and the `gating` whose statistics feed losses and usage counts."""

    output: Tensor
    gating: Gating


class MoE(nn.Module):
    """A mixture of experts in place of a feed-forward layer.

    Args:
        dim: H, features in and out.
        hidden: I, hidden features of one expert.
        num_experts: E.
        k: experts per token.
        activation: "swiglu" or "gelu".
        score, renormalize: see `Router`.

    Determinism: that of the matrix products; routing and permutation are bit-identical for any number of threads.
    Autocast: the router stays in float32, the experts' products follow autocast.
    Source: Shazeer et al. 2017 (arXiv:1701.06538), Fedus et al. 2021 (arXiv:2101.03961).
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        k: int,
        *,
        activation: str = "swiglu",
        score: str = "softmax",
        renormalize: bool = True,
    ) -> None:
        super().__init__()
        self.router = Router(dim, num_experts, k, score=score, renormalize=renormalize)
        self.experts = Experts(num_experts, dim, hidden, activation=activation)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        forced_experts: Tensor | None = None,
        forced_weights: str = "score",
    ) -> MoEOutput:
        """Sends every token through its k experts.

        Args:
            x: [...,H]; the leading dimensions are flattened to T tokens.
            mask: [T] bool, False = padding: output 0, in no statistic.
            forced_experts: [T] or [T,k] integer ids, -1 = choose freely: hard routing by domain, or router replay.
            forced_weights: "score" or "one", see `topk_gating`.

        Returns:
            `MoEOutput`: the output in x's shape, and the gating.
        """
        tokens = x.reshape(-1, x.shape[-1])
        gating = self.router(tokens, mask=mask, forced_experts=forced_experts, forced_weights=forced_weights)
        plan = plan_permutation(gating.experts, self.router.num_experts)
        rows = self.experts(permute_tokens(tokens, plan), plan.offsets)
        return MoEOutput(unpermute_tokens(rows, plan, gating.weights).reshape(x.shape), gating)

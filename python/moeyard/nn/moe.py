"""MoE: the sparse feed-forward layer, tokens -> router -> permutation -> experts -> weighted sum.

    y_t = shared(x_t) + sum_j w_tj expert_{e_tj}(x_t)

Shape letters: T tokens, H features, E experts, k experts per token.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moeyard.nn.experts import Experts
from moeyard.nn.router import Router
from moeyard.nn.usage import count_ids
from moeyard.ops import Gating, _check, permute_tokens, plan_permutation, unpermute_tokens

ROUTINGS = ("learned", "forced", "mixed")


class MoEOutput(NamedTuple):
    """`output` [...,H], the `gating` whose statistics feed losses and usage counts, and `dropped` [], the number of
    slots that found their expert full.
    """

    output: Tensor
    gating: Gating
    dropped: Tensor


class MoE(nn.Module):
    """A mixture of experts in place of a feed-forward layer.

    Args:
        dim: H, features in and out.
        hidden: I, hidden features of one expert.
        num_experts: E.
        k: experts per token.
        routing: "learned": the router chooses; "forced": the caller does, every slot weighs 1/k, and there is no router
            (nor an unused parameter to trouble DDP); "mixed": the caller names slot 0, which weighs 1, and the router
            adds the k - 1 others with their own weights.
        activation: "swiglu", "gelu" or "relu".
        shared_hidden: hidden features of an expert that every token passes; 0 for none.
        capacity_factor: an expert takes at most this many times its even share T*k/E, rounded up; None: no limit.
        drop: whom a full expert turns away: the latest tokens ("position") or the lightest ("weight").
        recompute: see `expert_ffn`.
        renormalize: divide the learned weights by their sum. None: where there are two or more; of a single one nothing
            would be left but a 1, from which the router learns nothing.
        **router: further options of `Router`.

    Determinism: that of the matrix products; routing and permutation are bit-identical for any number of threads.
    Autocast: the router stays in float32, the experts' products follow autocast.
    Source: Shazeer et al. 2017 (arXiv:1701.06538), Fedus et al. 2021 (arXiv:2101.03961); DeepSeek-AI 2024
    (arXiv:2401.06066) for shared experts.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        k: int,
        *,
        routing: str = "learned",
        activation: str = "swiglu",
        shared_hidden: int = 0,
        capacity_factor: float | None = None,
        drop: str = "position",
        recompute: bool = False,
        renormalize: bool | None = None,
        **router: Any,
    ) -> None:
        super().__init__()
        _check.option("routing", routing, ROUTINGS)
        _check.option("drop", drop, ("position", "weight"))
        _check.integer("shared_hidden", shared_hidden, minimum=0)
        _check.integer("k", k, minimum=1)
        if capacity_factor is not None and not (math.isfinite(capacity_factor) and capacity_factor > 0):
            raise ValueError(f"capacity_factor: expected None or a positive finite number, got {capacity_factor}")
        if routing == "mixed" and k < 2:
            raise ValueError(f"k: expected at least 2 with routing='mixed' (slot 0 is the caller's), got {k}")
        self.num_experts, self.k, self.routing = num_experts, k, routing
        self.capacity_factor, self.drop = capacity_factor, drop
        if routing == "forced" and router:
            raise ValueError(f"{next(iter(router))}: expected no router option with routing='forced'")
        self.router = None
        if routing != "forced":
            learned = k if routing == "learned" else k - 1
            renormalize = learned > 1 if renormalize is None else renormalize
            self.router = Router(dim, num_experts, k, renormalize=renormalize, **router)
        self.experts = Experts(num_experts, dim, hidden, activation=activation, recompute=recompute)
        self.shared = None
        if shared_hidden:
            self.shared = Experts(1, dim, shared_hidden, activation=activation, recompute=recompute)

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
            mask: [T] bool, False = padding: output 0, in no statistic. Padding must be finite: 0 times NaN would still
                reach the gradients of the weights.
            forced_experts: integer ids. "learned": [T] for slot 0 or [T,k], -1 = choose freely (router replay).
                "mixed": the same, and needed. "forced": [T] (with k = 1) or [T,k], needed; -1 = no expert.
            forced_weights: "score" or "one", see `topk_gating`; for "learned" routing.

        Returns:
            `MoEOutput`: the output in x's shape, the gating, and how many slots were dropped.
        """
        tokens = x.reshape(-1, x.shape[-1])
        gating = self._gate(tokens, mask, forced_experts, forced_weights)
        plan = plan_permutation(
            gating.experts,
            self.num_experts,
            capacity=self._capacity(tokens.shape[0]),
            drop=self.drop if self.capacity_factor else "position",
            weights=gating.weights if self.capacity_factor and self.drop == "weight" else None,
        )
        rows = self.experts(permute_tokens(tokens, plan), plan.offsets)
        # One slot of weight one needs no multiplication.
        weights = None if self.router is None and self.k == 1 else gating.weights
        output = unpermute_tokens(rows, plan, weights)
        if self.shared is not None:
            everyone = torch.full((1,), tokens.shape[0], dtype=torch.int32, device=x.device)
            shared = self.shared(tokens, everyone)
            output = output + (shared if mask is None else shared.masked_fill(~mask[:, None], 0))
        return MoEOutput(output.reshape(x.shape), gating, plan.dropped)

    def _gate(self, tokens: Tensor, mask: Tensor | None, forced: Tensor | None, forced_weights: str) -> Gating:
        if self.routing != "learned" and forced is None:
            raise ValueError(f"forced_experts: expected ids, since routing={self.routing!r}, got None")
        if self.router is None:
            assert forced is not None
            return self._forced_gating(tokens, mask, forced)
        gating: Gating = self.router(tokens, mask=mask, forced_experts=forced, forced_weights=forced_weights)
        if self.routing == "learned":
            return gating
        residual = gating.weights[:, 1:]
        if self.router.renormalize:
            total = residual.sum(1, keepdim=True).clamp(min=torch.finfo(residual.dtype).tiny)
            residual = self.router.scale * residual / total
        first = (gating.experts[:, :1] >= 0).to(residual.dtype)
        weights = torch.cat([first, residual], dim=1)
        chosen = gating.experts.clamp(min=0).long().flatten()  # padding weighs nothing
        weight_sum = torch.zeros_like(gating.weight_sum).scatter_add(0, chosen, weights.flatten())
        return gating._replace(weights=weights, weight_sum=weight_sum)

    def _forced_gating(self, tokens: Tensor, mask: Tensor | None, forced: Tensor) -> Gating:
        """A gating in which everything is the caller's choice."""
        _check.dtype("forced_experts", forced, [torch.int32, torch.int64])
        experts = forced.unsqueeze(1) if forced.dim() == 1 else forced
        _check.shape("forced_experts", experts, [tokens.shape[0], self.k])
        # What does not fit into 32 bits stays out of range, for the plan to refuse.
        experts = experts.clamp(-2, 2**31 - 1).int()
        if mask is not None:
            _check.dtype("mask", mask, [torch.bool])
            _check.shape("mask", mask, [tokens.shape[0]])
            experts = experts.masked_fill(~mask[:, None], -1)
        dtype = torch.float64 if tokens.dtype == torch.float64 else torch.float32
        weights = (experts >= 0).to(dtype) / self.k
        slots = torch.where(experts < 0, self.num_experts, experts).clamp(max=self.num_experts).flatten().long()
        counts = count_ids(slots, self.num_experts).int()
        share, zero = counts.to(dtype) / self.k, weights.new_zeros(())
        return Gating(weights, experts, counts, share, share, zero, zero)

    def _capacity(self, tokens: int) -> int | None:
        if self.capacity_factor is None:
            return None
        return math.ceil(self.capacity_factor * tokens * self.k / self.num_experts)

"""Router: one linear layer and the native top-k gating.

    logits = x @ W^T        gating = topk_gating(logits, k)

Shape letters: T tokens, H features, E experts, k experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, distributed, nn

from moeyard.ops import Gating, _check, topk_gating


class Router(nn.Module):
    """Chooses k of E experts for every token.

    Args:
        dim: H, features per token.
        num_experts: E.
        k: experts per token, 1 <= k <= E.
        score: score function of `topk_gating`: "softmax", "softmax_topk", "sigmoid" or "sqrtsoftplus".
        renormalize: divide a token's k weights by their sum.
        scale: multiplies all weights.
        num_groups, topk_groups: only the best groups of experts stay eligible, see `topk_gating`.
        bias_rate: balance by a bias on the selection instead of a loss: `update_selection_bias` moves each expert's by
            this much a step (DeepSeek-V3: 0.001). None: no bias.

    Determinism: that of the matrix product and of `topk_gating`. Autocast: the logits are computed in float32, since
    rounding them to a half type would decide close calls at random.
    Source: Shazeer et al. 2017 (arXiv:1701.06538); Wang et al. 2024 (arXiv:2408.15664) for the bias.
    """

    selection_bias: Tensor | None
    load: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int,
        *,
        score: str = "softmax",
        renormalize: bool = False,
        scale: float = 1.0,
        num_groups: int | None = None,
        topk_groups: int | None = None,
        bias_rate: float | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("num_experts", num_experts), ("k", k)):
            _check.integer(name, value, minimum=1)
        if k > num_experts:
            raise ValueError(f"k: expected 1 <= k <= num_experts = {num_experts}, got {k}")
        if bias_rate is not None and not (math.isfinite(bias_rate) and bias_rate > 0):
            raise ValueError(f"bias_rate: expected None or a positive finite number, got {bias_rate}")
        self.num_experts, self.k, self.score, self.renormalize = num_experts, k, score, renormalize
        self.scale, self.num_groups, self.topk_groups, self.bias_rate = scale, num_groups, topk_groups, bias_rate
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.register_buffer("selection_bias", None if bias_rate is None else torch.zeros(num_experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        # Small initial logits: an even start, so that no expert wins by the draw of the weights (Switch, section 2.4).
        nn.init.normal_(self.weight, std=0.1 * self.weight.shape[1] ** -0.5)
        if self.selection_bias is not None:
            nn.init.zeros_(self.selection_bias)
        # No buffer: DDP would overwrite what the ranks have counted with rank 0's.
        self.load = torch.zeros(self.num_experts, dtype=torch.int64, device=self.weight.device)

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
        with _no_autocast(x.device.type):
            dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
            logits = nn.functional.linear(x.to(dtype), self.weight.to(dtype))
            gating = topk_gating(
                logits,
                self.k,
                score=self.score,
                renormalize=self.renormalize,
                selection_bias=self.selection_bias,
                num_groups=self.num_groups,
                topk_groups=self.topk_groups,
                scale=self.scale,
                mask=mask,
                forced_experts=forced_experts,
                forced_weights=forced_weights,
            )
        if self.training and self.selection_bias is not None:
            self.load = self.load.to(gating.counts.device) + gating.counts.detach()
        return gating

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        bias = self.selection_bias
        super()._apply(fn, recurse)
        if bias is not None and self.selection_bias is not None and self.selection_bias.dtype.itemsize < 4:
            # A half type would swallow steps of 0.001: the bias stays in float32 whatever the model is cast to.
            self.selection_bias = bias.to(self.selection_bias.device)
        return self

    @torch.no_grad()
    def update_selection_bias(self, group: distributed.ProcessGroup | None = None) -> None:
        """Lowers the bias of experts above the mean load since the last call and raises the others', by `bias_rate`.

        Call it after every optimizer step. Where torch.distributed is initialised, the loads of all ranks of `group`
        (None: of all) are added first, so that every rank keeps the same bias. Without `bias_rate` nothing happens.
        """
        if self.selection_bias is None or self.bias_rate is None:
            return
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(self.load, group=group)
        load = self.load.double()
        self.selection_bias += self.bias_rate * torch.sign(load.mean() - load).to(self.selection_bias)
        self.load.zero_()

    def extra_repr(self) -> str:
        return f"dim={self.weight.shape[1]}, num_experts={self.num_experts}, k={self.k}, score={self.score!r}"


def _no_autocast(device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()

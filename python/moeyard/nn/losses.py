"""Auxiliary losses of the router, all from the statistics that `topk_gating` gathered in its one pass.

Shape letters: T tokens that are not padding, E experts, k experts per token. Every function takes a `Gating` and
returns a scalar of its dtype; weigh and add them to the task's loss. Zero tokens give zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeyard.ops import Gating


def num_tokens(gating: Gating) -> Tensor:
    """T as a scalar tensor, at least 1: every routed token fills k slots. No copy to the host."""
    slots = gating.counts.sum().to(gating.score_sum.dtype)
    return (slots / max(gating.weights.shape[1], 1)).clamp(min=1.0)


def switch_load_balancing(gating: Gating) -> Tensor:
    """E * sum_e f_e P_e: 1 when balanced, E when one expert has all.

    f_e is the share of the T*k slots that expert e got (no gradient), P_e the mean of its full softmax score. The
    gradient reaches experts that nobody chose, so this loss revives a dead one. For softmax scores.
    Source: Fedus et al. 2021 (arXiv:2101.03961), equations 4 to 6.
    """
    tokens = num_tokens(gating)
    num_experts, k = gating.counts.shape[0], gating.weights.shape[1]
    share = gating.counts.to(gating.score_sum.dtype) / (tokens * k)
    return num_experts * (share * (gating.score_sum / tokens)).sum()


def router_z_loss(gating: Gating) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2: keeps logits small.

    Source: Zoph et al. 2022 (arXiv:2202.08906), equation 5.
    """
    return gating.logsumexp_sq / num_tokens(gating)


def routing_entropy(gating: Gating) -> Tensor:
    """Mean over tokens of the full softmax's entropy, in nats, 0 to log E: add it to sharpen, subtract it to spread."""
    return gating.entropy_sum / num_tokens(gating)


def importance_loss(gating: Gating) -> Tensor:
    """Squared coefficient of variation of the experts' summed weights: 0 when balanced.

    Only chosen experts carry a gradient: unlike `switch_load_balancing` it cannot revive a dead one.
    Source: Shazeer et al. 2017 (arXiv:1701.06538), equations 6 and 7 (population variance).
    """
    importance = gating.weight_sum
    mean = importance.mean()
    # Without tokens everything is zero; the smallest positive number keeps 0 / 0 out.
    return (importance - mean).square().mean() / mean.square().clamp(min=torch.finfo(mean.dtype).tiny)


def squared_deviation(gating: Gating) -> Tensor:
    """Mean over experts of the squared distance of their mean weight from the average one, which is 1/E for weights
    that sum to one: 0 when balanced. The balance loss of the CheMoE models.

    Only chosen experts carry a gradient: like `importance_loss` it cannot revive a dead one.
    """
    mean = gating.weight_sum / num_tokens(gating)
    return (mean - mean.mean()).square().mean()

"""topk_gating in plain torch: slow and obvious, differentiable by torch's own autograd. Tests and docs use it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeyard.ops.topk_gating import Gating

_INF = float("inf")


def topk_gating_reference(
    logits: Tensor,
    k: int,
    *,
    score: str = "softmax",
    renormalize: bool = False,
    selection_bias: Tensor | None = None,
    num_groups: int | None = None,
    topk_groups: int | None = None,
    group_score_experts: int = 2,
    scale: float = 1.0,
    mask: Tensor | None = None,
    forced_experts: Tensor | None = None,
    forced_weights: str = "score",
) -> Gating:
    """The same as `topk_gating` (see there), row by row; values in float64, the choice on float32 scores."""
    T, E = logits.shape
    compute = torch.float64 if logits.dtype == torch.float64 else torch.float32
    live = torch.ones(T, dtype=torch.bool) if mask is None else mask
    raw = logits.detach().to(compute)
    # NaN and -inf take no part: replaced by 0 before any arithmetic, so that their gradients are 0 and not NaN.
    usable = ~raw.isnan() & (raw > -_INF)
    x = torch.where(usable, logits.double().clamp(max=torch.finfo(compute).max), 0.0)
    p = _softmax(x, usable)
    scores = p if score in ("softmax", "softmax_topk") else torch.where(usable, _elementwise(score, x), 0.0)

    monotone = selection_bias is None and num_groups is None
    value = raw if monotone or score == "softmax_topk" else scores.detach().to(compute)
    if selection_bias is not None:
        value = value + selection_bias.detach().to(compute)
    value = value.masked_fill(~usable | value.isnan(), -_INF)
    experts = torch.full((T, k), -1, dtype=torch.int64)
    for t in range(T):
        if live[t]:
            groups = _groups(value[t], num_groups, topk_groups, group_score_experts)
            forced = [] if forced_experts is None else torch.atleast_1d(forced_experts[t]).tolist()
            experts[t] = torch.tensor(_choose(value[t], k, groups, forced))

    slot = experts.clamp(min=0)
    if forced_weights == "one":
        weights = torch.full((T, k), 1.0 / k, dtype=torch.float64)
    elif score == "softmax_topk":
        weights = _softmax(x.gather(1, slot), usable.gather(1, slot))
    else:
        weights = scores.gather(1, slot)
        if renormalize:
            total = weights.sum(1, keepdim=True)
            weights = weights / torch.where(total > 0, total, 1.0)
    weights = weights * scale * live[:, None]

    one_hot = (experts[:, :, None] == torch.arange(E)).double()
    seen = scores.masked_fill(raw.isnan(), float("nan"))[live]
    lse_sq, entropy = _row_statistics(x[live], usable[live], p[live], raw[live])
    return Gating(
        weights.to(compute),
        experts.int(),
        one_hot.sum((0, 1)).int(),
        seen.sum(0).to(compute),
        (weights[:, :, None] * one_hot).sum((0, 1)).to(compute),
        lse_sq.to(compute),
        entropy.to(compute),
    )


def _elementwise(score: str, x: Tensor) -> Tensor:
    # torch's softplus turns into the identity above its threshold; logaddexp does not.
    return torch.sigmoid(x) if score == "sigmoid" else torch.logaddexp(x, torch.zeros_like(x)).sqrt()


def _softmax(x: Tensor, usable: Tensor) -> Tensor:
    """Softmax over the usable entries of a row; 0 elsewhere, and for a row without any."""
    some = usable.any(1, keepdim=True)
    p = torch.where(usable | ~some, x, -_INF).softmax(1)
    return torch.where(usable, p, 0.0)


def _row_statistics(x: Tensor, usable: Tensor, p: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
    some = usable.any(1)
    lse = torch.where(usable | ~some[:, None], x, -_INF).logsumexp(1)
    lse_sq = torch.where(some, lse.square(), 0.0).masked_fill(raw.isnan().any(1), float("nan"))
    log_p = torch.where(p > 0, p, 1.0).log()
    return lse_sq.sum(), -(p * log_p).sum()


def _groups(value: Tensor, num_groups: int | None, topk_groups: int | None, best_of: int) -> list[int]:
    """Ids of the experts in the groups that stay."""
    E = len(value)
    if num_groups is None or topk_groups is None:
        return list(range(E))
    size = E // num_groups
    ranking: list[tuple[Any, ...]] = []
    for g in range(num_groups):
        best = sorted((v for v in value[g * size : (g + 1) * size] if v > -_INF), reverse=True)[:best_of]
        total = torch.zeros((), dtype=value.dtype)
        for v in best:
            total = total + v
        ranking.append((not best, -total.clamp(min=torch.finfo(value.dtype).min).item(), g))
    kept = [g for _, _, g in sorted(ranking)[:topk_groups]]
    return [i for g in sorted(kept) for i in range(g * size, (g + 1) * size)]


def _choose(value: Tensor, k: int, eligible: list[int], forced: list[int]) -> list[int]:
    """k distinct ids: forced ones in their slots, the others in descending order of value, then by index."""
    v = value.tolist()
    free = iter(sorted((i for i in eligible if i not in forced), key=lambda i: (-v[i], i)))
    slots = forced + [-1] * (k - len(forced))
    return [f if f >= 0 else next(free) for f in slots]

"""The permutation ops in plain Python and torch: slow, obvious, differentiable; for tests and for reading."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moeyard.ops.plan_permutation import PermutationPlan, plan_rows


def plan_permutation_reference(
    experts: Tensor,
    num_experts: int,
    *,
    capacity: int | None = None,
    drop: str = "position",
    weights: Tensor | None = None,
    align: int = 1,
) -> PermutationPlan:
    tokens, k = experts.shape
    ids = experts.reshape(-1).tolist()
    row_of_slot = [-1] * len(ids)
    slot_of_row = [-1] * plan_rows(tokens, k, num_experts, capacity, align)
    counts, offsets, dropped, end = [], [], 0, 0
    for e in range(num_experts):
        routed = [slot for slot, expert in enumerate(ids) if expert == e]
        ranking = routed
        if drop == "weight":
            assert weights is not None
            heavy = [-math.inf if math.isnan(w) else w for w in weights.reshape(-1).tolist()]
            nan = weights.reshape(-1).isnan().tolist()
            ranking = sorted(routed, key=lambda slot: (nan[slot], -heavy[slot], slot))
        kept = sorted(ranking[: len(routed) if capacity is None else capacity])
        for row, slot in enumerate(kept, start=end):
            row_of_slot[slot], slot_of_row[row] = row, slot
        dropped += len(routed) - len(kept)
        end += math.ceil(len(kept) / align) * align
        counts.append(len(kept))
        offsets.append(end)

    def ints(values: list[int] | int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    rows_TK = ints(row_of_slot).reshape(tokens, k)
    return PermutationPlan(rows_TK, ints(slot_of_row), ints(counts), ints(offsets), ints(dropped))


def permute_tokens_reference(x: Tensor, plan: PermutationPlan, *, slot_weights: Tensor | None = None) -> Tensor:
    k = plan.row_of_slot.shape[1]
    precise = x if slot_weights is None else x.to(torch.promote_types(x.dtype, torch.float32))
    rows = []
    for slot in plan.slot_of_row.tolist():
        if slot < 0:
            rows.append(torch.zeros(x.shape[1], dtype=precise.dtype))
        elif slot_weights is None:
            rows.append(precise[slot // k])
        else:
            rows.append(slot_weights[slot // k, slot % k].to(precise.dtype) * precise[slot // k])
    return torch.stack(rows).to(x.dtype) if rows else x.new_empty(0, x.shape[1])


def unpermute_tokens_reference(y: Tensor, plan: PermutationPlan, weights: Tensor | None = None) -> Tensor:
    precise = y.to(torch.promote_types(y.dtype, torch.float32)) if y.is_floating_point() else y
    out = []
    for t, rows in enumerate(plan.row_of_slot.tolist()):
        total = torch.zeros(y.shape[1], dtype=precise.dtype)
        for j, row in enumerate(rows):
            if row >= 0:
                total = total + (precise[row] if weights is None else weights[t, j].to(precise.dtype) * precise[row])
        out.append(total)
    return torch.stack(out).to(y.dtype) if out else y.new_empty(0, y.shape[1])

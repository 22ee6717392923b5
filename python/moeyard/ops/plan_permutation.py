"""plan_permutation: where the row of every (token, choice) goes, so that the rows of one expert lie together.

A slot is one (token, choice) pair with the number token * k + choice. Expert e's rows are its slots in slot order:

    row_of_slot[s] = offsets[e - 1] + #{s' < s : experts[s'] = e, s' kept},      e = experts[s]
    offsets[e]     = offsets[e - 1] + ceil(counts[e] / align) * align,           offsets[-1] = 0

Shape letters: T tokens, k experts per token, E experts, R rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeyard import _native
from moeyard.ops import _check
from moeyard.ops._register import address, device_and_stream, int_view, register

_SCHEMA = (
    "plan_permutation(Tensor experts, SymInt num_experts, SymInt? capacity, str drop, Tensor? weights, SymInt align)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LIMIT = 2**31 - 1
_DROP = ("position", "weight")
_WEIGHTS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class PermutationPlan(NamedTuple):
    """All int32. `row_of_slot[T,k]`: the row of a slot, -1 if it has none. `slot_of_row[R]`: token * k + choice, -1 for
    padding and tail rows. `counts[E]`: rows per expert, without padding. `offsets[E]`: where each expert's block ENDS,
    padding included. `dropped[]`: slots that capacity left without a row.
    """

    row_of_slot: Tensor
    slot_of_row: Tensor
    counts: Tensor
    offsets: Tensor
    dropped: Tensor


def plan_permutation(
    experts: Tensor,
    num_experts: int,
    *,
    capacity: int | None = None,
    drop: str = "position",
    weights: Tensor | None = None,
    align: int = 1,
) -> PermutationPlan:
    """Plans the move of tokens to their experts; `permute_tokens` and `unpermute_tokens` carry it out.

    Args:
        experts: [T, k] int32 or int64, ids in [-1, num_experts); -1 is not routed: no row, not counted as dropped.
        num_experts: E, at least 1.
        capacity: at most this many rows per expert; None is no limit.
        drop: which slots an over-full expert loses: the latest ("position"), or the lightest ("weight"; equal weights
            keep the earlier slot, NaN is lightest). The kept ones stay in slot order.
        weights: [T, k] float, the weights of drop="weight"; must be None otherwise.
        align: every expert's block of rows is padded to a multiple of this.

    Returns:
        PermutationPlan. R is static (`plan_rows`), so nothing waits for a device and `torch.compile` sees no new size.

    Raises:
        TypeError, ValueError: a wrong type, shape, device or option, an id out of range (naming row and slot; on a GPU
            it counts as -1, and `check_device_errors` tells of it), more than 2^31 - 1 slots or rows.

    Determinism: integers, equal on every device and for any number of threads. Autocast and gradients do not apply.
    Source: GShard (arXiv 2006.16668) for capacity; MegaBlocks (arXiv 2211.15841) for blocks without dropping.
    """
    if isinstance(weights, Tensor) and weights.requires_grad:
        weights = weights.detach()
    return PermutationPlan(*_op(experts, num_experts, capacity, drop, weights, align))


def plan_rows(tokens: Any, k: Any, num_experts: Any, capacity: Any, align: Any) -> Any:
    """R, from sizes alone (ints or symbolic ints): an upper bound of the rows that any routing fills.

    At most min(E, T*k) experts have rows, and each of them pads at most align - 1 more.
    """
    slots = tokens * k
    if capacity is None and isinstance(align, int) and align == 1:
        return slots
    rows = (slots + torch.sym_min(num_experts, slots) * (align - 1)) // align * align
    if capacity is not None:
        rows = torch.sym_min(rows, num_experts * ((capacity + align - 1) // align * align))
    return rows


# ---- below the dispatcher ---------------------------------------------------------------------------------------


def _validate(experts: Tensor, num_experts: Any, capacity: Any, drop: str, weights: Tensor | None, align: Any) -> Any:
    """Checks everything but values; returns R."""
    _check.rank("experts", experts, ("T", "k"))
    _check.dtype("experts", experts, (torch.int32, torch.int64))
    _check.integer("num_experts", num_experts, minimum=1)
    _check.integer("capacity", capacity, minimum=0, optional=True)
    _check.integer("align", align, minimum=1)
    _check.option("drop", drop, _DROP)
    if drop == "weight" and weights is None:
        raise ValueError('weights: expected a tensor with drop="weight", got None')
    if weights is not None:
        if drop != "weight":
            raise ValueError(f'weights: expected None unless drop="weight", got a tensor with drop={drop!r}')
        _check.shape("weights", weights, list(experts.shape))
        _check.dtype("weights", weights, _WEIGHTS)
    tokens, k = experts.shape
    rows = plan_rows(tokens, k, num_experts, capacity, align)
    limited = (("experts: T * k", tokens * k), ("num_experts", num_experts), ("experts: rows with padding", rows))
    for what, size in limited:
        # A symbolic size is checked when it is known: in the implementation.
        if isinstance(size, int) and size > _LIMIT:
            raise ValueError(f"{what}: expected at most 2^31 - 1 (the maps are int32), got {size}")
    return rows


def _outputs(experts: Tensor, num_experts: Any, rows: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, k = experts.shape
    row_of_slot = experts.new_empty(tokens, k, dtype=torch.int32)
    counts = row_of_slot.new_empty(num_experts)
    return row_of_slot, row_of_slot.new_empty(rows), counts, torch.empty_like(counts), row_of_slot.new_empty(size=())


def _request(
    experts: Tensor, num_experts: int, capacity: int | None, drop: str, weights: Tensor | None, align: int
) -> tuple[tuple[Tensor, ...], tuple[Any, ...], tuple[Tensor | None, ...]]:
    """The outputs, the fields of the native PlanRequest, and the tensors that these point to."""
    rows = _validate(experts, num_experts, capacity, drop, weights, align)
    tokens, k = experts.shape
    experts = experts.contiguous()
    if weights is not None:
        weights = weights.to(torch.promote_types(weights.dtype, torch.float32)).contiguous()
    request = (
        int_view(experts),
        tokens,
        k,
        num_experts,
        tokens * k if capacity is None else min(capacity, tokens * k),
        align,
        rows,
        address(weights),
        weights is not None and weights.dtype == torch.float64,
    )
    return _outputs(experts, num_experts, rows), request, (experts, weights)


def _cpu(
    experts: Tensor, num_experts: int, capacity: int | None, drop: str, weights: Tensor | None, align: int
) -> tuple[Tensor, ...]:
    out, request, _held = _request(experts, num_experts, capacity, drop, weights, align)
    _native.cpu.plan_permutation(*[*request, [o.data_ptr() for o in out], torch.get_num_threads()])
    return out


def _cuda(
    experts: Tensor, num_experts: int, capacity: int | None, drop: str, weights: Tensor | None, align: int
) -> tuple[Tensor, ...]:
    out, fields, _held = _request(experts, num_experts, capacity, drop, weights, align)
    native, (device, stream) = _native.cuda(), device_and_stream(experts)
    request = native.PlanRequest(*fields)
    workspace = experts.new_empty(native.plan_permutation_workspace(request), dtype=torch.uint8)
    addresses = [o.data_ptr() for o in out]
    native.plan_permutation(request, addresses, workspace.data_ptr(), native.device_errors(device), device, stream)
    return out


def _fake(
    experts: Tensor, num_experts: Any, capacity: Any, drop: str, weights: Tensor | None, align: Any
) -> tuple[Tensor, ...]:
    return _outputs(experts, num_experts, _validate(experts, num_experts, capacity, drop, weights, align))


_op = register(_SCHEMA, cpu=_cpu, cuda=_cuda, fake=_fake, options={"drop": _DROP})

"""permute_tokens, unpermute_tokens: moves token rows to their experts by a plan, and combines the experts' rows again.

    permute:    out[row] = w[slot] * x[token]                       rows without a slot are zero
    unpermute:  out[token] = sum over its slots of w[slot] * y[row]   slots without a row add nothing

With P the (weighted) matrix from tokens to rows, permute is P x and unpermute P^T y: each is the other's gradient, and
the gradient of a weight is the dot product <x[token], y[row]>, taken in the same pass.

Shape letters: T tokens, k experts per token, H features, R rows.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from moeyard import _native
from moeyard.ops import _check
from moeyard.ops._register import (
    DTYPE_CODE,
    Gradient,
    Op,
    address,
    compute_dtype,
    contiguous,
    device_and_stream,
    register,
)
from moeyard.ops.plan_permutation import PermutationPlan

_ARGS = "Tensor row_of_slot, Tensor slot_of_row, Tensor? {weights}"
_PERMUTE = f"permute_tokens(Tensor x, {_ARGS.format(weights='slot_weights')}) -> Tensor"
_UNPERMUTE = f"unpermute_tokens(Tensor y, {_ARGS.format(weights='weights')}) -> Tensor"
_PERMUTE_BACKWARD = (
    f"permute_tokens_backward(Tensor grad, Tensor? x, {_ARGS.format(weights='slot_weights')}, bool need_x,"
    " bool need_weights) -> (Tensor, Tensor)"
)
_UNPERMUTE_BACKWARD = (
    f"unpermute_tokens_backward(Tensor grad, Tensor? y, {_ARGS.format(weights='weights')}, bool need_y,"
    " bool need_weights) -> (Tensor, Tensor)"
)
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_MAP = (torch.int32,)
_SUMMED = (*_FLOATS, torch.int32, torch.int64)


def permute_tokens(x: Tensor, plan: PermutationPlan, *, slot_weights: Tensor | None = None) -> Tensor:
    """Copies every token's row to the row of each of its slots.

    Args:
        x: [T, H], any dtype of 1, 2, 4 or 8 bytes; float32, float64, float16 or bfloat16 with `slot_weights`.
        plan: from `plan_permutation`.
        slot_weights: [T, k] float, multiplied in here, before the experts, instead of in `unpermute_tokens`.

    Returns:
        [R, H] in x's dtype; padding and tail rows are zero.

    Raises:
        TypeError, ValueError: a wrong type, shape, dtype or device, or a plan whose two maps contradict each other. A
            GPU looks at the ranges of the maps alone: what is out of range counts as -1, and `check_device_errors`
            tells of it.

    Determinism: bit-identical for any number of threads. Autocast: x keeps its dtype. Gradients of any order for the
    four float dtypes, accumulated in float32 (float64 for float64) in slot order; `slot_weights` is used in that
    precision and gets its gradient in its own dtype.
    Source: MegaBlocks (arXiv 2211.15841).
    """
    _check_plan_type(plan)
    out: Tensor = _OPS["permute_tokens"](x, plan.row_of_slot, plan.slot_of_row, slot_weights)
    return out


def unpermute_tokens(y: Tensor, plan: PermutationPlan, weights: Tensor | None = None) -> Tensor:
    """Sums every token's rows, each multiplied by its weight.

    Args:
        y: [R, H] float32, float64, float16 or bfloat16; without `weights` also int32 or int64 (sums wrap around).
        plan: the one that `permute_tokens` used.
        weights: [T, k] float; None is 1 for every slot.

    Returns:
        [T, H] in y's dtype; a token without a row is zero. Padding and tail rows of y are never read.

    Raises:
        TypeError, ValueError: as `permute_tokens`.

    Determinism: sums in slot order in float32 (float64 for float64), bit-identical for any number of threads. Autocast:
    y keeps its dtype. Gradients of any order; padding and tail rows get zeros.
    Source: MegaBlocks (arXiv 2211.15841).
    """
    _check_plan_type(plan)
    out: Tensor = _OPS["unpermute_tokens"](y, plan.row_of_slot, plan.slot_of_row, weights)
    return out


# ---- checks -----------------------------------------------------------------------------------------------------


def _check_plan_type(plan: Any) -> None:
    if not isinstance(plan, PermutationPlan):
        raise TypeError(f"plan: expected a PermutationPlan, got {type(plan).__name__}")


def _validate(name: str, source: Tensor, row_of_slot: Tensor, slot_of_row: Tensor, weights: Tensor | None) -> None:
    """`source` is x (a row per token) or y (a row per row); `name` says which."""
    weights_name = "slot_weights" if name == "x" else "weights"
    _check.rank(name, source, ("T" if name == "x" else "R", "H"))
    _check.rank("plan.row_of_slot", row_of_slot, ("T", "k"))
    if name == "x":
        _check.shape("plan.row_of_slot", row_of_slot, (source.shape[0], "k"))
        _check.rank("plan.slot_of_row", slot_of_row, ("R",))
    else:
        _check.shape("plan.slot_of_row", slot_of_row, source.shape[:1])
    _check.dtype("plan.row_of_slot", row_of_slot, _MAP)
    _check.dtype("plan.slot_of_row", slot_of_row, _MAP)
    if weights is not None:
        _check.shape(weights_name, weights, row_of_slot.shape)
        _check.dtype(weights_name, weights, _FLOATS)
        _check.dtype(f"{name} (with {weights_name})", source, _FLOATS)
    elif name == "y":
        _check.dtype("y", source, _SUMMED)
    elif source.element_size() not in (1, 2, 4, 8):
        raise TypeError(f"x: expected a dtype of 1, 2, 4 or 8 bytes, got {source.dtype}")


def _validate_backward(
    name: str,
    grad: Tensor,
    source: Tensor | None,
    row_of_slot: Tensor,
    slot_of_row: Tensor,
    weights: Tensor | None,
    need_weights: bool,
) -> None:
    # The gradient of permute is checked like unpermute's y, and the other way round.
    _validate("y" if name == "x" else "x", grad, row_of_slot, slot_of_row, weights)
    _check.dtype("grad", grad, _FLOATS)
    if not need_weights:
        return
    if source is None or weights is None:
        raise ValueError(f"need_weights: expected {name} and the weights with it, got None")
    _validate(name, source, row_of_slot, slot_of_row, weights)
    _check.dtype(name, source, (grad.dtype,))
    _check.shape(name, source, [source.shape[0], grad.shape[1]])


# ---- CPU and CUDA ------------------------------------------------------------------------------------------------


#: Gives the native module for a tensor, and the last arguments that its functions take.
_Backend = Callable[[Tensor], tuple[ModuleType, tuple[int, ...]]]


def _on_cpu(x: Tensor) -> tuple[ModuleType, tuple[int, ...]]:
    return _native.cpu, (torch.get_num_threads(),)


def _on_cuda(x: Tensor) -> tuple[ModuleType, tuple[int, ...]]:
    native, (device, stream) = _native.cuda(), device_and_stream(x)
    return native, (native.device_errors(device), device, stream)


def _move(
    backend: _Backend,
    to_rows: bool,
    source: Tensor,
    other: Tensor | None,
    row_of_slot: Tensor,
    slot_of_row: Tensor,
    weights: Tensor | None,
    need_out: bool,
    need_dots: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Permute (`to_rows`) or unpermute `source`, and the dots of its rows with those of `other`, each if needed."""
    source, row_of_slot, slot_of_row = source.contiguous(), row_of_slot.contiguous(), slot_of_row.contiguous()
    (tokens, k), rows, features = row_of_slot.shape, slot_of_row.shape[0], source.shape[1]
    plan, (native, last) = (row_of_slot.data_ptr(), slot_of_row.data_ptr(), tokens, k, rows), backend(source)
    out = source.new_empty(rows if to_rows else tokens, features) if need_out else None
    if to_rows and weights is None:
        if out is not None:
            native.permute_rows(source.data_ptr(), plan, features * source.element_size(), out.data_ptr(), *last)
        return out, None
    precision = compute_dtype(source.dtype)
    dots = source.new_empty(tokens, k, dtype=precision) if need_dots else None
    if out is None and dots is None:
        return None, None
    other = other.contiguous() if need_dots and other is not None else None
    if weights is not None and weights.dtype != precision:
        weights = weights.to(precision)
    exact = contiguous(weights)
    kernel = native.permute_weighted if to_rows else native.unpermute_rows
    kernel(
        source.data_ptr(),
        address(exact),
        address(other),
        plan,
        features,
        DTYPE_CODE[source.dtype],
        address(out),
        address(dots),
        *last,
    )
    return out, dots


def _forward(backend: _Backend, name: str) -> Any:
    """permute_tokens for the name of its source, "x", and unpermute_tokens for "y"."""

    def forward(source: Tensor, row_of_slot: Tensor, slot_of_row: Tensor, weights: Tensor | None) -> Tensor:
        _validate(name, source, row_of_slot, slot_of_row, weights)
        out, _ = _move(backend, name == "x", source, None, row_of_slot, slot_of_row, weights, True, False)
        assert out is not None
        return out

    return forward


def _backward(backend: _Backend, name: str) -> Any:
    def backward(
        grad: Tensor,
        source: Tensor | None,
        row_of_slot: Tensor,
        slot_of_row: Tensor,
        weights: Tensor | None,
        need_source: bool,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor]:
        _validate_backward(name, grad, source, row_of_slot, slot_of_row, weights, need_weights)
        plan = (row_of_slot, slot_of_row)
        out, dots = _move(backend, name == "y", grad, source, *plan, weights, need_source, need_weights)
        dtype = compute_dtype(grad.dtype) if weights is None else weights.dtype
        return (
            grad.new_empty(0) if out is None else out,
            grad.new_empty(0, dtype=dtype) if dots is None else dots.to(dtype),
        )

    return backward


# ---- fake -------------------------------------------------------------------------------------------------------


def _permute_fake(x: Tensor, row_of_slot: Tensor, slot_of_row: Tensor, slot_weights: Tensor | None) -> Tensor:
    _validate("x", x, row_of_slot, slot_of_row, slot_weights)
    return x.new_empty(slot_of_row.shape[0], x.shape[1])


def _unpermute_fake(y: Tensor, row_of_slot: Tensor, slot_of_row: Tensor, weights: Tensor | None) -> Tensor:
    _validate("y", y, row_of_slot, slot_of_row, weights)
    return y.new_empty(row_of_slot.shape[0], y.shape[1])


def _backward_fake(name: str) -> Any:
    def backward(
        grad: Tensor,
        source: Tensor | None,
        row_of_slot: Tensor,
        slot_of_row: Tensor,
        weights: Tensor | None,
        need_source: bool,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor]:
        _validate_backward(name, grad, source, row_of_slot, slot_of_row, weights, need_weights)
        rows = row_of_slot.shape[0] if name == "x" else slot_of_row.shape[0]
        dtype = compute_dtype(grad.dtype) if weights is None else weights.dtype
        return (
            grad.new_empty((rows, grad.shape[1]) if need_source else 0),
            grad.new_empty(row_of_slot.shape if need_weights else 0, dtype=dtype),
        )

    return backward


# ---- gradients --------------------------------------------------------------------------------------------------


def _gradients(op_name: str, name: str) -> tuple[type[Gradient], type[Gradient]]:
    """The functions of an op F(source, weights) and of its backward; permute and unpermute have the same form.

    F is bilinear, F(s, w), and its backward computes (F^T(g, w), D(s, g)) with D the dots. The gradients of those are
    again an F and one more call of the backward op, so derivatives of any order come for free.
    """

    class Forward(Gradient):
        @staticmethod
        def save(ctx: Any, args: Any, out: Any) -> None:
            source, row_of_slot, slot_of_row, weights = args
            if source.requires_grad:
                _check.dtype(f"{name} (with a gradient)", source, _FLOATS)
            kept = source if weights is not None and ctx.needs_input_grad[3] else None
            ctx.save_for_backward(kept, row_of_slot, slot_of_row, weights)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            need_source, _, _, need_weights = ctx.needs_input_grad
            grads = _OPS[op_name + "_backward"](grad, *ctx.saved_tensors, need_source, need_weights)
            return grads[0] if need_source else None, None, None, grads[1] if need_weights else None

    class Backward(Gradient):
        @staticmethod
        def save(ctx: Any, args: Any, out: Any) -> None:
            ctx.save_for_backward(*args[:5])
            ctx.need_source, ctx.need_weights = args[5:]

        @staticmethod
        def backward(ctx: Any, grad_source: Tensor, grad_weights: Tensor) -> Any:
            grad, source, row_of_slot, slot_of_row, weights = ctx.saved_tensors
            plan = (row_of_slot, slot_of_row)
            terms = []
            if ctx.needs_input_grad[0] and ctx.need_source:
                terms.append(_OPS[op_name](grad_source, *plan, weights))
            if ctx.needs_input_grad[0] and ctx.need_weights:
                terms.append(_OPS[op_name](source, *plan, grad_weights))
            to_source = ctx.need_weights and ctx.needs_input_grad[1]
            to_weights = ctx.need_source and ctx.needs_input_grad[4]
            more: Any = (None, None)
            if to_source or to_weights:
                upstream = grad_weights if ctx.need_weights else weights
                again = _OPS[op_name + "_backward"]
                more = again(grad, grad_source if to_weights else None, *plan, upstream, to_source, to_weights)
            return (
                sum(terms[1:], terms[0]) if terms else None,
                more[0] if to_source else None,
                None,
                None,
                more[1] if to_weights else None,
                None,
                None,
            )

    return Forward, Backward


_OPS: dict[str, Op] = {}
for _name, _source, _schema, _backward_schema, _fake in (
    ("permute_tokens", "x", _PERMUTE, _PERMUTE_BACKWARD, _permute_fake),
    ("unpermute_tokens", "y", _UNPERMUTE, _UNPERMUTE_BACKWARD, _unpermute_fake),
):
    _gradient, _second = _gradients(_name, _source)
    _op = register(
        _schema, cpu=_forward(_on_cpu, _source), cuda=_forward(_on_cuda, _source), fake=_fake, gradient=_gradient
    )
    _OPS[_name] = _op.named(row_of_slot="plan.row_of_slot", slot_of_row="plan.slot_of_row")
    _OPS[_name + "_backward"] = register(
        _backward_schema,
        cpu=_backward(_on_cpu, _source),
        cuda=_backward(_on_cuda, _source),
        fake=_backward_fake(_source),
        gradient=_second,
    )

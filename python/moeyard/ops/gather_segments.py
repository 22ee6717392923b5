"""gather_segments: copies the ragged segments of chosen samples into one contiguous batch: the collation.

    out[out_ptr[m] + i] = values[ptr[index[m]] + i] (+ add[m]),   0 <= i < out_ptr[m + 1] - out_ptr[m]

Shape letters: n rows of values, S segments, M chosen segments, R rows of the batch.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeyard import _native
from moeyard.ops import _check
from moeyard.ops._register import DTYPE_CODE, Gradient, contiguous, device_and_stream, int_view, register

_SCHEMA = (
    "gather_segments(Tensor values, Tensor ptr, Tensor index, Tensor? add, SymInt? total) -> (Tensor, Tensor, Tensor)"
)
_BACKWARD = "gather_segments_backward(Tensor grad, Tensor ptr, Tensor index, SymInt num_values) -> Tensor"
_INTS = (torch.int32, torch.int64)
_ADDABLE = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
_MAX_CHOSEN = 2**31 - 1
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Segments(NamedTuple):
    """`values[R,...]`: the rows. `ptr[M+1]` int64: where each chosen segment starts in them. `batch[R]` int64: the
    number m of the chosen segment of every row (M for rows past the last).
    """

    values: Tensor
    ptr: Tensor
    batch: Tensor


def gather_segments(
    values: Tensor, ptr: Tensor, index: Tensor, *, add: Tensor | None = None, total: int | None = None
) -> Segments:
    """Collates chosen segments of `values` in the order of `index`.

    For edge lists keep all sources, then all targets, two segments per sample: with `index` and those ids + S again the
    values are a batch's [2, M], flattened.

    Args:
        values: [n, ...] of any dtype of 1, 2, 4 or 8 bytes; may be memory-mapped and read-only (only the chosen rows
            are read, if it is contiguous).
        ptr: [S + 1] int64 or int32; segment s is values[ptr[s]:ptr[s + 1]]. Only chosen entries are read and checked.
        index: [M] int64 or int32, ids in [0, S), repeats allowed.
        add: [M] int64 or int32, a number added to all of segment m's values (the atom offset of its edges), wrapping
            around; for int8 ... int64 and uint8.
        total: a fixed R, for static shapes; rows past the last segment are 0 with batch number M, and ptr[M] says how
            many rows are real. None: R is their number, for which a GPU is waited for.

    Returns:
        Segments.

    Raises:
        TypeError, ValueError: a wrong type, shape, dtype or device; an id or a chosen segment out of range (naming it),
            more rows than `total`. On a GPU a bad segment counts as empty, rows beyond `total` are cut off, overlapping
            segments get too small a gradient, and `check_device_errors` tells of it.

    Determinism: bit-identical for any number of threads. Autocast: values keep their dtype. Gradients of any order for
    float32, float64, float16 and bfloat16, summed in the order of `index` in float32 (float64 for float64); chosen
    segments that overlap have none (ValueError).
    Source: the batching of PyTorch Geometric (arXiv 1903.02428): `Batch.from_data_list`.
    """
    return Segments(*_op(values, ptr, index, add, total))


def gather_segments_reference(
    values: Tensor, ptr: Tensor, index: Tensor, *, add: Tensor | None = None, total: int | None = None
) -> Segments:
    """The same in plain torch."""
    numbers = [0] * index.shape[0] if add is None else add.tolist()
    parts = [values[:0]]
    lengths = []
    for s, number in zip(index.tolist(), numbers, strict=True):
        part = values[int(ptr[s]) : int(ptr[s + 1])]
        lengths.append(part.shape[0])
        parts.append(part if add is None else (part.long() + number).to(values.dtype))
    out_ptr = torch.tensor([0, *lengths]).cumsum(0)
    batch = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))
    if total is not None:
        tail = total - batch.shape[0]
        parts.append(torch.zeros(tail, *values.shape[1:], dtype=values.dtype))
        batch = torch.cat([batch, torch.full((tail,), len(lengths))])
    return Segments(torch.cat(parts), out_ptr, batch)


# ---- below the dispatcher ---------------------------------------------------------------------------------------


def _validate_ids(ptr: Tensor, index: Tensor) -> None:
    _check.rank("ptr", ptr, ("S + 1",))
    _check.rank("index", index, ("M",))
    _check.dtype("ptr", ptr, _INTS)
    _check.dtype("index", index, _INTS)


def _validate(values: Tensor, ptr: Tensor, index: Tensor, add: Tensor | None, total: Any) -> None:
    if values.dim() == 0:
        raise ValueError("values: expected shape [n, ...], got []")
    if values.element_size() not in (1, 2, 4, 8):
        raise TypeError(f"values: expected a dtype of 1, 2, 4 or 8 bytes, got {values.dtype}")
    _validate_ids(ptr, index)
    if total is not None:
        _check.integer("total", total, minimum=0)
    if add is not None:
        _check.shape("add", add, [index.shape[0]])
        _check.dtype("add", add, _INTS)
        _check.dtype("values (with add)", values, _ADDABLE)


def _request(ptr: Tensor, index: Tensor, num_values: int) -> tuple[Any, Tensor]:
    """The native request, and room for the pointers of the output. `ptr` and `index` are contiguous and outlive it."""
    segments, count = ptr.shape[0] - 1, index.shape[0]
    if segments < 0:
        raise ValueError("ptr: expected shape [S + 1], got [0]")
    request = _native.cpu.SegmentsRequest(int_view(ptr), segments, num_values, int_view(index), count)
    return request, ptr.new_empty(count + 1, dtype=torch.int64)


def _new_rows(name: str, rows: int, like: Tensor) -> tuple[Tensor, int]:
    """A tensor of so many rows like those of `like`, and their items; ValueError where torch could not count bytes."""
    _, *row = like.shape
    items = math.prod(row)
    if rows * max(like.element_size() * items, 8) > 2**63 - 1:
        size = like.element_size() * items
        raise ValueError(f"{name}: expected fewer than 2^63 bytes, got {rows} rows of {size}")
    return like.new_empty(rows, *row), items if rows else 0


def _cpu(
    values: Tensor, ptr: Tensor, index: Tensor, add: Tensor | None, total: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    _validate(values, ptr, index, add, total)
    values, ptr, index = values.contiguous(), ptr.contiguous(), index.contiguous()
    add = contiguous(add)
    request, out_ptr = _request(ptr, index, values.shape[0])
    rows = _native.cpu.segments_ptr(request, out_ptr.data_ptr())
    if total is not None and rows > total:
        raise ValueError(f"total: expected at least {rows} (the rows of the chosen segments), got {total}")
    rows = rows if total is None else total
    out, row_items = _new_rows("index" if total is None else "total", rows, values)
    batch = out_ptr.new_empty(rows)
    _native.cpu.gather_segments(
        request,
        out_ptr.data_ptr(),
        values.data_ptr(),
        row_items,
        values.element_size(),
        int_view(add),
        rows,
        out.data_ptr(),
        batch.data_ptr(),
        torch.get_num_threads(),
    )
    return out, out_ptr, batch


def _start_cuda(
    values: Tensor, ptr: Tensor, index: Tensor, num_values: int, limit: int
) -> tuple[Any, Tensor, Tensor, tuple[int, int]]:
    """The native request, the pointers of the output, cut at `limit`, what the kernels keep beside them, and where the
    kernels run: where `values` is."""
    native, (device, stream) = _native.cuda(), device_and_stream(values)
    request, out_ptr = _request(ptr, index, num_values)
    workspace = out_ptr.new_empty(native.segments_workspace(index.shape[0]), dtype=torch.uint8)
    errors = native.device_errors(device)
    native.segments_ptr(request, limit, out_ptr.data_ptr(), workspace.data_ptr(), errors, device, stream)
    return request, out_ptr, workspace, (device, stream)


def _cuda(
    values: Tensor, ptr: Tensor, index: Tensor, add: Tensor | None, total: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    _validate(values, ptr, index, add, total)
    values, ptr, index = values.contiguous(), ptr.contiguous(), index.contiguous()
    add = contiguous(add)
    native = _native.cuda()
    limit = native.too_many_rows if total is None else total
    request, out_ptr, workspace, where = _start_cuda(values, ptr, index, values.shape[0], limit)
    rows = int(out_ptr[-1]) if total is None else total  # the first waits for the device
    if total is None and rows == limit:
        raise ValueError(f"index: expected a total length below {limit}, got more")
    out, row_items = _new_rows("index" if total is None else "total", rows, values)
    batch = out_ptr.new_empty(rows)
    native.gather_segments(
        request,
        out_ptr.data_ptr(),
        workspace.data_ptr(),
        values.data_ptr(),
        row_items,
        values.element_size(),
        int_view(add),
        rows,
        out.data_ptr(),
        batch.data_ptr(),
        *where,
    )
    return out, out_ptr, batch


def _fake(values: Tensor, ptr: Tensor, index: Tensor, add: Tensor | None, total: Any) -> tuple[Tensor, Tensor, Tensor]:
    _validate(values, ptr, index, add, total)
    rows = torch.library.get_ctx().new_dynamic_size() if total is None else total
    return (
        values.new_empty(rows, *values.shape[1:]),
        values.new_empty(index.shape[0] + 1, dtype=torch.int64),
        values.new_empty(rows, dtype=torch.int64),
    )


def _validate_backward(grad: Tensor, ptr: Tensor, index: Tensor, num_values: Any) -> None:
    if grad.dim() == 0:
        raise ValueError("grad: expected shape [R, ...], got []")
    _check.dtype("grad", grad, _FLOATS)
    _validate_ids(ptr, index)
    _check.integer("num_values", num_values, minimum=0)


def _backward_cpu(grad: Tensor, ptr: Tensor, index: Tensor, num_values: int) -> Tensor:
    _validate_backward(grad, ptr, index, num_values)
    grad, ptr, index = grad.contiguous(), ptr.contiguous(), index.contiguous()
    request, out_ptr = _request(ptr, index, num_values)
    rows = _native.cpu.segments_ptr(request, out_ptr.data_ptr())
    if rows > grad.shape[0]:
        raise ValueError(f"grad: expected at least {rows} rows (those of the chosen segments), got {grad.shape[0]}")
    out, row_items = _new_rows("num_values", num_values, grad)
    workspace = torch.empty(2 * index.shape[0], dtype=torch.int64)
    _native.cpu.gather_segments_backward(
        request,
        out_ptr.data_ptr(),
        grad.data_ptr(),
        row_items,
        DTYPE_CODE[grad.dtype],
        workspace.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def _backward_cuda(grad: Tensor, ptr: Tensor, index: Tensor, num_values: int) -> Tensor:
    _validate_backward(grad, ptr, index, num_values)
    if index.shape[0] > _MAX_CHOSEN:
        raise ValueError(f"index: expected at most 2^31 - 1 ids for a gradient, got {index.shape[0]}")
    grad, ptr, index = grad.contiguous(), ptr.contiguous(), index.contiguous()
    native = _native.cuda()
    request, out_ptr, _workspace, where = _start_cuda(grad, ptr, index, num_values, grad.shape[0])
    out, row_items = _new_rows("num_values", num_values, grad)
    workspace = grad.new_empty(native.gather_segments_backward_workspace(request), dtype=torch.uint8)
    native.gather_segments_backward(
        request,
        out_ptr.data_ptr(),
        grad.data_ptr(),
        row_items,
        DTYPE_CODE[grad.dtype],
        workspace.data_ptr(),
        out.data_ptr(),
        native.device_errors(where[0]),
        *where,
    )
    return out


def _backward_fake(grad: Tensor, ptr: Tensor, index: Tensor, num_values: Any) -> Tensor:
    _validate_backward(grad, ptr, index, num_values)
    return grad.new_empty(num_values, *grad.shape[1:])


class _Gradient(Gradient):
    @staticmethod
    def save(ctx: Any, args: Any, out: Any) -> None:
        values, ptr, index, _, _ = args
        if values.requires_grad:
            _check.dtype("values (with a gradient)", values, _FLOATS)
        ctx.save_for_backward(ptr, index)
        ctx.num_values = values.shape[0]
        ctx.mark_non_differentiable(*out[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _ptr: Tensor, _batch: Tensor) -> Any:
        return _backward_op(grad, *ctx.saved_tensors, ctx.num_values), None, None, None, None


class _BackwardGradient(Gradient):
    @staticmethod
    def save(ctx: Any, args: Any, out: Any) -> None:
        grad, ptr, index, _ = args
        ctx.save_for_backward(ptr, index)
        ctx.rows = grad.shape[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        # The scatter's gradient is the gather, to as many rows as there were.
        return _op(grad, *ctx.saved_tensors, None, ctx.rows)[0], None, None, None


_op = register(_SCHEMA, cpu=_cpu, cuda=_cuda, fake=_fake, gradient=_Gradient)
_backward_op = register(
    _BACKWARD, cpu=_backward_cpu, cuda=_backward_cuda, fake=_backward_fake, gradient=_BackwardGradient
)

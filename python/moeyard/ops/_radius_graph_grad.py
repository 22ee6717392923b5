"""Gradients of radius_graph: the backward is an op of its own, and so is the backward's backward.

Per edge with vector v, distance d and incoming g_v, g_d:

    y = g_v + g_d v / d        grad pos[neighbour] += y      grad pos[centre] -= y      grad cell += shift^T y

y depends on v and d, which are outputs of the forward: saved as such, the chain through them goes on by itself. With
G = gg[neighbour] - gg[centre] + shift @ gg_cell the second backward gives <G, v> / d to g_d, G to g_v, g_d G / d to v
and -g_d <G, v> / d^2 to d. Terms with 1 / d are 0 where d is 0. A third derivative is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moeyard import _native
from moeyard.ops import _check
from moeyard.ops._radius_graph_native import given, ids, point_set
from moeyard.ops._register import DTYPE_CODE, Gradient, contiguous, device_and_stream, register

_EDGES = (
    "Tensor? grad_distance, Tensor? grad_vector, Tensor edge_index, Tensor distance, Tensor vector, Tensor cell_shift, "
    "Tensor num_edges, Tensor? batch_centres, Tensor? ptr_centres, SymInt num_points, SymInt? num_centres, "
    "SymInt[]? cell_shape, bool centre_is_source"
)


def save(ctx: Any, args: tuple[Any, ...], out: tuple[Tensor, ...]) -> None:
    """What the backward of a forward call with these arguments and outputs needs."""
    pos, centres, _, _, batch, batch_centres, ptr, ptr_centres, cell = args[:9]
    centre_is_source, geometry = args[14:16]
    edge_index, distance, vector, cell_shift, num_neighbors, truncated, num_edges, overflow = out
    if centres is None:
        batch_centres, ptr_centres = batch, ptr
    ctx.save_for_backward(edge_index, distance, vector, cell_shift, num_edges, batch_centres, ptr_centres)
    ctx.rest = (
        pos.shape[0],
        None if centres is None else centres.shape[0],
        list(cell.shape) if cell is not None and ctx.needs_input_grad[8] else None,
        centre_is_source,
    )
    constant = () if geometry else (distance, vector)
    ctx.mark_non_differentiable(edge_index, cell_shift, num_neighbors, truncated, num_edges, overflow, *constant)
    ctx.set_materialize_grads(False)


def input_gradients(ctx: Any, grad_distance: Tensor | None, grad_vector: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients in the order of the forward's arguments."""
    grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    if grad_distance is None and grad_vector is None:
        return tuple(grads)
    found = _backward(grad_distance, grad_vector, *ctx.saved_tensors, *ctx.rest)
    for argument, grad in zip((0, 1, 8), found, strict=True):
        if ctx.needs_input_grad[argument]:
            grads[argument] = grad
    return tuple(grads)


# ---- implementations ------------------------------------------------------------------------------------------------


class _Edges:
    """An edge list's native structs, and the contiguous copies that they point into. Arguments as in the schema."""

    def __init__(
        self,
        grad_distance: Tensor | None,
        grad_vector: Tensor | None,
        edge_index: Tensor,
        distance: Tensor,
        vector: Tensor,
        cell_shift: Tensor,
        num_edges: Tensor,
        batch: Tensor | None,
        ptr: Tensor | None,
        num_points: int,
        num_centres: int | None,
        cell_shape: list[int] | None,
        centre_is_source: bool,
    ) -> None:
        _check.shape("distance", distance, ["M"])
        m = distance.shape[0]
        _check.dtype("distance", distance, [torch.float32, torch.float64])
        float_dtype, shift_rows = distance.dtype, 0 if cell_shape is None else m
        for name, value, dtype, shape in (
            ("grad_distance", grad_distance, float_dtype, [m]),
            ("grad_vector", grad_vector, float_dtype, [m, 3]),
            ("edge_index", edge_index, torch.int64, [2, m]),
            ("vector", vector, float_dtype, [m, 3]),
            ("cell_shift", cell_shift if shift_rows else None, torch.int32, [m, 3]),
            ("num_edges", num_edges, torch.int64, []),
        ):
            if value is not None:
                _check.dtype(name, value, [dtype])
                _check.shape(name, value, shape)
        _check_nodes(batch, ptr, num_points, num_centres, cell_shape)
        per_edge = [contiguous(x) for x in (distance, vector, cell_shift, grad_distance, grad_vector)]
        edge_index, num_edges, batch, ptr = edge_index.contiguous(), num_edges.contiguous(), ids(batch), ids(ptr)
        self._kept = (per_edge, edge_index, num_edges, batch, ptr)
        rows = given(edge_index)
        centre, neighbour = (rows, rows + 8 * m) if centre_is_source else (rows + 8 * m, rows)
        self.edges = _native.cpu.RadiusEdges(m, given(num_edges), centre, neighbour, *map(given, per_edge))
        self.count = num_points if num_centres is None else num_centres
        self.centres = point_set(None, self.count, batch, ptr)
        self.capacity, self.num_points, self.code = m, num_points, DTYPE_CODE[distance.dtype]
        self.two_sets, self.has_cell = num_centres is not None, cell_shape is not None
        self.num_cells = cell_shape[0] if cell_shape is not None and len(cell_shape) == 3 else -1


def _check_nodes(
    batch: Tensor | None, ptr: Tensor | None, num_points: int, num_centres: int | None, cell_shape: list[int] | None
) -> None:  # fmt: skip
    count = num_points if num_centres is None else num_centres
    for name, number in (("num_points", num_points), ("num_centres", count)):
        if not 0 <= number < 2**31:
            raise ValueError(f"{name}: expected 0 to 2^31 - 1, got {number}")
    if batch is not None and ptr is not None:
        raise ValueError("batch_centres, ptr_centres: expected at most one of them, got both")
    for name, value, shape in (("batch_centres", batch, [count]), ("ptr_centres", ptr, ["G + 1"])):
        if value is not None:
            _check.dtype(name, value, [torch.int64, torch.int32])
            _check.shape(name, value, shape)
    if ptr is not None and ptr.shape[0] == 0:
        raise ValueError("ptr_centres: expected at least one entry, got none")
    if cell_shape is not None and (
        len(cell_shape) not in (2, 3) or cell_shape[-2:] != [3, 3] or not 0 <= cell_shape[0] < 2**31
    ):
        raise ValueError(f"cell_shape: expected [3, 3] or [G, 3, 3], got {cell_shape}")


def _point_gradients(
    like: Tensor, num_points: int, num_centres: int | None, cell_shape: list[int] | None
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        like.new_empty(num_points, 3),
        like.new_empty(0 if num_centres is None else num_centres, 3),
        like.new_empty(*((0, 3, 3) if cell_shape is None else cell_shape)),
    )


def _backward_cpu(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    e = _Edges(*args)
    points, centres, cell = _backward_fake(*args)
    _native.cpu.radius_graph_backward(
        e.code, e.edges, e.num_points, e.centres, e.num_cells, points.data_ptr(),
        centres.data_ptr() if e.two_sets else 0, cell.data_ptr() if e.has_cell else 0, torch.get_num_threads(),
    )  # fmt: skip
    return points, centres, cell


def _backward_cuda(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    e = _Edges(*args)
    if e.capacity >= 2**31:
        raise ValueError(f"distance: expected at most 2^31 - 1 edges for a gradient on a GPU, got {e.capacity}")
    points, centres, cell = _backward_fake(*args)
    native, where = _native.cuda(), device_and_stream(points)
    sizes = e.capacity, e.num_points, e.count, e.has_cell, e.num_cells
    workspace = points.new_empty(native.radius_graph_backward_workspace(*sizes), dtype=torch.uint8)
    native.radius_graph_backward(
        e.code, e.edges, e.num_points, e.centres, e.num_cells, points.data_ptr(),
        given(centres) if e.two_sets else 0, given(cell) if e.has_cell else 0, workspace.data_ptr(),
        native.device_errors(where[0]), *where,
    )  # fmt: skip
    return points, centres, cell


def _backward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _point_gradients(args[3], *args[9:12])


_Addresses = tuple[int, int, int, int, int, int, int]


def _double(
    gg_points: Tensor,
    gg_centres: Tensor,
    gg_cell: Tensor,
    args: tuple[Any, ...],
    run: Callable[[_Edges, _Addresses], None],
) -> tuple[Tensor, ...]:
    """`run` gets the edges and where the incoming gradients and the outputs lie."""
    e = _Edges(*args)
    incoming = (("gg_points", gg_points), ("gg_centres", gg_centres), ("gg_cell", gg_cell))
    for (name, value), want in zip(incoming, _backward_fake(*args), strict=True):
        _check.dtype(name, value, [want.dtype])
        _check.shape(name, value, list(want.shape))
    to_grad_distance, to_grad_vector, to_distance, to_vector = out = _double_fake(gg_points, gg_centres, gg_cell, *args)
    gg_points, gg_centres, gg_cell = gg_points.contiguous(), gg_centres.contiguous(), gg_cell.contiguous()
    run(
        e,
        (
            given(gg_points), given(gg_centres) if e.two_sets else 0, given(gg_cell) if e.has_cell else 0,
            to_grad_distance.data_ptr(), to_grad_vector.data_ptr(), to_distance.data_ptr(), to_vector.data_ptr(),
        ),
    )  # fmt: skip
    return out


def _double_cpu(gg_points: Tensor, gg_centres: Tensor, gg_cell: Tensor, *args: Any) -> tuple[Tensor, ...]:
    def run(e: _Edges, addresses: _Addresses) -> None:
        native, threads = _native.cpu, torch.get_num_threads()
        native.radius_graph_double_backward(e.code, e.edges, e.num_points, e.centres, e.num_cells, *addresses, threads)

    return _double(gg_points, gg_centres, gg_cell, args, run)


def _double_cuda(gg_points: Tensor, gg_centres: Tensor, gg_cell: Tensor, *args: Any) -> tuple[Tensor, ...]:
    def run(e: _Edges, addresses: _Addresses) -> None:
        native, where = _native.cuda(), device_and_stream(gg_points)
        errors = native.device_errors(where[0])
        native.radius_graph_double_backward(
            e.code, e.edges, e.num_points, e.centres, e.num_cells, *addresses, errors, *where
        )

    return _double(gg_points, gg_centres, gg_cell, args, run)


def _double_fake(gg_points: Tensor, gg_centres: Tensor, gg_cell: Tensor, *args: Any) -> tuple[Tensor, ...]:
    distance, vector = args[3:5]
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (distance, vector) * 2)


class _BackwardGradient(Gradient):
    @staticmethod
    def save(ctx: Any, args: Any, out: Any) -> None:
        ctx.save_for_backward(*args[:9])
        ctx.rest = args[9:]

    @staticmethod
    def backward(ctx: Any, *gg: Tensor) -> tuple[Tensor | None, ...]:
        to_grad_distance, to_grad_vector, to_distance, to_vector = _double_backward(*gg, *ctx.saved_tensors, *ctx.rest)
        none_given = ctx.saved_tensors[0] is None, ctx.saved_tensors[1] is None
        grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        grads[0] = None if none_given[0] else to_grad_distance
        grads[1] = None if none_given[1] else to_grad_vector
        grads[3], grads[4] = to_distance, to_vector
        return tuple(grads)


_backward = register(
    f"radius_graph_backward({_EDGES}) -> (Tensor, Tensor, Tensor)",
    cpu=_backward_cpu,
    cuda=_backward_cuda,
    fake=_backward_fake,
    gradient=_BackwardGradient,
)
_double_backward = register(
    f"radius_graph_double_backward(Tensor gg_points, Tensor gg_centres, Tensor gg_cell, {_EDGES}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    cpu=_double_cpu,
    cuda=_double_cuda,
    fake=_double_fake,
    gradient="radius_graph: third derivatives are not supported",
)

"""radius_graph, radius, knn_graph: neighbours in space, batched, free or periodic, differentiable.

    edge i <- j with shift s   when   |v| < r,   v = pos[j] + s @ cell - pos[i]

The test is `(vx*vx + vy*vy) + vz*vz < r*r` in the dtype of the coordinates, differences first, no fused multiply-add
and no shift of the origin, so that every device finds the same edges. Of a periodic pair the difference is taken from
the smaller index to the larger and mirrored, so that an edge and its reverse always come together.

Shape letters: N points, K centres of `radius`, M edges, G graphs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeyard import _native
from moeyard.ops import _check, _radius_graph_grad
from moeyard.ops._radius_graph_native import NO_POINTS, NOT_PERIODIC, ids, periodicity, point_set
from moeyard.ops._register import DTYPE_CODE, Gradient, contiguous, device_and_stream, register

_SCHEMA = (
    "radius_graph(Tensor pos, Tensor? centres, float r, int? k, Tensor? batch, Tensor? batch_centres, Tensor? ptr, "
    "Tensor? ptr_centres, Tensor? cell, Tensor? pbc, int? max_num_neighbors, bool symmetric, bool loop, bool half, "
    "bool centre_is_source, bool geometry, SymInt? max_edges) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_FLOATS = (torch.float32, torch.float64)
_INTS = (torch.int64, torch.int32)
_FLOWS = ("source_to_target", "target_to_source")
_AXES = 3
_MAX_POINTS = 2**31 - 1
_MAX_EDGES = 2**48
_MAX_IMAGES = 2**27


class RadiusGraph(NamedTuple):
    """Edges sorted by (centre, neighbour, shift).

    Fields:
        edge_index: [2, M] int64, source above target (for `radius`: row of y above row of x).
        distance: [M] norm of `vector`; empty without geometry.
        vector: [M, 3] from the centre to the neighbour's image; empty without geometry.
        cell_shift: [M, 3] int32, how many cell vectors the neighbour is moved by; empty without a cell.
        num_neighbors: [N] ([K] for `radius`) int32, edges found per centre; their sum is `num_edges`.
        truncated: int64 scalar, centres that had more than `max_num_neighbors` neighbours within r.
        num_edges: int64 scalar, edges found, also when `max_edges` cuts some off.
        overflow: bool scalar, whether `max_edges` did so.
    """

    edge_index: Tensor
    distance: Tensor
    vector: Tensor
    cell_shift: Tensor
    num_neighbors: Tensor
    truncated: Tensor
    num_edges: Tensor
    overflow: Tensor


def radius_graph(
    pos: Tensor,
    r: float,
    batch: Tensor | None = None,
    *,
    ptr: Tensor | None = None,
    max_num_neighbors: int | None = None,
    symmetric: bool = False,
    loop: bool = False,
    flow: str = "source_to_target",
    cell: Tensor | None = None,
    pbc: Tensor | None = None,
    half: bool = False,
    geometry: bool = True,
    max_edges: int | None = None,
) -> RadiusGraph:
    """Connects every point with all points of its graph that are closer than r.

    Args:
        pos: [N, 3] float32 or float64, in any unit of length.
        r: cutoff in the same unit; an edge needs a distance strictly below it.
        batch: [N] int64 or int32 graph of each point, sorted, any ids >= 0. Without batch and ptr all is one graph.
        ptr: [G + 1] first point of each graph, from 0 to N; instead of `batch`.
        max_num_neighbors: keep the nearest this many (>= 1) per centre, ties by (neighbour, shift); with `loop` the
            point itself counts. None: no limit.
        symmetric: with `max_num_neighbors`, keep an edge if either end keeps it; a centre may then exceed the limit.
        loop: keep (i, i, shift 0). Edges to a point's own periodic images are always kept.
        flow: "source_to_target" makes the centre the target (`edge_index[1]`), "target_to_source" the source.
        cell: [3, 3], or [G, 3, 3] by graph id, cell vectors as rows, in the dtype of `pos`. Points may lie outside,
            as far as their rounding stays below r or the shortest cell vector.
        pbc: [3] or [G, 3] bool, the periodic axes; None with a cell: all three. Other axes' vectors are ignored.
        half: one direction per pair: centre < neighbour, or the lexicographically positive shift of an own image.
        geometry: False leaves `distance` and `vector` empty.
        max_edges: fixed M. Edges beyond it are left out (`overflow`), unused ones are 0 -> 0 with vector 0 and distance
            r; their gradient is zero.

    Returns:
        RadiusGraph.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices, unsorted `batch`, `ptr` that is no partition, both of them, non-finite coordinates
            or cells, singular cells, more than 2^27 periodic images of a graph's points within reach, r not in (0, inf)
            or with a square that the dtype cannot hold, `half` with `max_num_neighbors`, `pbc` without `cell`.

        On a GPU bad values have no edges, and `check_device_errors` tells of them.

    Determinism: bit-identical for any thread count and SIMD level; equal edges in equal order on every device.
    Autocast: `pos` keeps its dtype. Gradient: `distance` and `vector` to `pos` and `cell`, twice; the distance of
    coincident points has gradient 0. On a GPU a call without `max_edges` waits for the device, once, and only fewer
    than 2^31 edges have a gradient.

    Source: cell lists (Hockney and Eastwood 1981; Allen and Tildesley 1987) and k-d trees (Bentley 1975); on a GPU a
    hashed grid (Teschner et al. 2003, Vision, Modeling and Visualization), or for selections and cells a tree of boxes
    over points along a Z-order curve (Morton 1966; Lauterbach et al. 2009, Computer Graphics Forum 28).
    """
    r = _cutoff(r)
    _check.option("flow", flow, _FLOWS)
    backwards = flow == "target_to_source"
    return RadiusGraph(
        *_op(
            pos, None, r, None, batch, None, ptr, None, cell, pbc, max_num_neighbors, symmetric, loop, half, backwards,
            geometry, max_edges,
        )
    )  # fmt: skip


def radius(
    x: Tensor,
    y: Tensor,
    r: float,
    batch_x: Tensor | None = None,
    batch_y: Tensor | None = None,
    *,
    ptr_x: Tensor | None = None,
    ptr_y: Tensor | None = None,
    max_num_neighbors: int | None = None,
    cell: Tensor | None = None,
    pbc: Tensor | None = None,
    geometry: bool = True,
    max_edges: int | None = None,
) -> RadiusGraph:
    """Connects every point of y with all points of x in the same graph that are closer than r.

    The centres are the rows of y: `edge_index[0]` holds rows of y, `edge_index[1]` rows of x, and
    `vector = x[edge_index[1]] + shift @ cell - y[edge_index[0]]`. Points of x and y meet where their graph ids agree.

    Args:
        x, y: [N, 3] and [K, 3], both float32 or both float64.
        batch_x, batch_y, ptr_x, ptr_y: graphs of x and of y; see `radius_graph`. A set without them is graph 0.
        r, max_num_neighbors, cell, pbc, geometry, max_edges: see `radius_graph`.

    Returns:
        RadiusGraph, with `num_neighbors` per row of y.

    Raises, Determinism, Autocast, Gradient, Source: see `radius_graph`; gradients reach x, y and cell.
    """
    r = _cutoff(r)
    return RadiusGraph(
        *_radius_op(
            x, y, r, None, batch_x, batch_y, ptr_x, ptr_y, cell, pbc, max_num_neighbors, False, True, False, True,
            geometry, max_edges,
        )
    )  # fmt: skip


def knn_graph(
    pos: Tensor,
    k: int,
    batch: Tensor | None = None,
    *,
    ptr: Tensor | None = None,
    loop: bool = False,
    flow: str = "source_to_target",
    cell: Tensor | None = None,
    pbc: Tensor | None = None,
    geometry: bool = True,
    max_edges: int | None = None,
) -> RadiusGraph:
    """Connects every point with the k nearest points of its graph, ties by (neighbour, shift).

    A point has fewer neighbours where its graph holds fewer; a periodic graph always has k, counting images. Edges come
    in the order of all three functions, (centre, neighbour, shift), not by distance.

    Args:
        pos: [N, 3] float32 or float64.
        k: neighbours per point, >= 1; with `loop` the point itself counts.
        batch, ptr, loop, flow, cell, pbc, geometry: see `radius_graph`.
        max_edges: as there, but unused edges have distance 0.

    Returns:
        RadiusGraph; `truncated` is 0.

    Raises: as `radius_graph`; ValueError also where a squared distance among the nearest overflows the dtype.

    Determinism, Autocast, Gradient: see `radius_graph`. Source: k-d trees (Bentley 1975; Friedman et al. 1977).
    """
    _check.integer("k", k, minimum=1)
    _check.option("flow", flow, _FLOWS)
    backwards = flow == "target_to_source"
    return RadiusGraph(
        *_op(
            pos, None, 0.0, k, batch, None, ptr, None, cell, pbc, None, False, loop, False, backwards, geometry,
            max_edges,
        )
    )  # fmt: skip


def _cutoff(r: Any) -> float:
    if isinstance(r, float):
        return r
    _check.number("r", r)
    if isinstance(r, int) and abs(r) > 2**1023:
        raise ValueError("r: expected a finite distance, got an int beyond float64")
    return float(r) if isinstance(r, int) else r


# ---- checks by shape, for real and fake tensors ---------------------------------------------------------------------


def _validate(
    pos: Tensor, centres: Tensor | None, k: int | None, batch: Tensor | None, batch_centres: Tensor | None,
    ptr: Tensor | None, ptr_centres: Tensor | None, cell: Tensor | None, pbc: Tensor | None,
    max_num_neighbors: int | None, symmetric: bool, half: bool, max_edges: Any,
) -> None:  # fmt: skip
    two_sets = centres is not None
    _validate_set(pos, batch, ptr, "x" if two_sets else "pos", "_x" if two_sets else "")
    if centres is not None:
        _validate_set(centres, batch_centres, ptr_centres, "y", "_y")
        if centres.dtype != pos.dtype:
            _check.dtype("y", centres, (pos.dtype,))
        if symmetric or half or k is not None:
            raise ValueError("centres: expected one set of points with symmetric, half or k, got two")
    elif batch_centres is not None or ptr_centres is not None:
        raise ValueError("batch_centres, ptr_centres: expected None without centres")
    if cell is not None:
        _check.dtype("cell", cell, (pos.dtype,))
        _check.shape("cell", cell, ["G", 3, 3] if cell.dim() == 3 else [3, 3])
    if pbc is not None:
        if cell is None:
            raise ValueError("pbc: expected a cell with it, got cell None")
        _check.dtype("pbc", pbc, (torch.bool,))
        _check.shape("pbc", pbc, ["G", 3] if pbc.dim() == 2 else [3])
    # What was not given is not looked at: on a small graph these calls would be felt.
    if k is not None:
        _check.integer("k", k, minimum=1, optional=True)
    if max_num_neighbors is not None:
        _check.integer("max_num_neighbors", max_num_neighbors, minimum=1, optional=True)
    if max_edges is not None:
        _check.integer("max_edges", max_edges, minimum=0, optional=True)
    if k is not None and (symmetric or half or max_num_neighbors is not None):
        raise ValueError("k: expected no symmetric, half or max_num_neighbors with it, got one")
    if half and max_num_neighbors is not None:
        raise ValueError(f"half: expected max_num_neighbors None with it, got {max_num_neighbors}")


def _validate_set(pos: Tensor, batch: Tensor | None, ptr: Tensor | None, name: str, suffix: str) -> None:
    # What is plainly right is not looked at again: on a small graph the two calls would be felt.
    if pos.dtype not in _FLOATS or pos.dim() != 2 or pos.shape[1] is not _AXES:
        _check.dtype(name, pos, _FLOATS)
        _check.shape(name, pos, ("N", _AXES))
    if batch is not None and ptr is not None:
        raise ValueError(f"batch{suffix}, ptr{suffix}: expected at most one of them, got both")
    if batch is not None:
        _check.dtype(f"batch{suffix}", batch, _INTS)
        _check.shape(f"batch{suffix}", batch, [pos.shape[0]])
    if ptr is not None:
        _check.dtype(f"ptr{suffix}", ptr, _INTS)
        _check.rank(f"ptr{suffix}", ptr, ("G + 1",))
        if ptr.shape[0] == 0:
            raise ValueError(f"ptr{suffix}: expected at least one entry, got none")


# ---- implementations ------------------------------------------------------------------------------------------------


def _counts_within_limits(pos: Tensor, centres: Tensor | None, max_edges: int | None) -> tuple[int, int]:
    count, count_centres = pos.shape[0], 0 if centres is None else centres.shape[0]
    if count > _MAX_POINTS or count_centres > _MAX_POINTS:
        name, found = ("y", count_centres) if count <= _MAX_POINTS else ("pos" if centres is None else "x", count)
        raise ValueError(f"{name}: expected at most 2^31 - 1 points, got {found}")
    if max_edges is not None and max_edges > _MAX_EDGES:
        raise ValueError(f"max_edges: expected at most 2^48, got {max_edges}")
    return count, count_centres


def _cpu(
    pos: Tensor, centres: Tensor | None, r: float, k: int | None, batch: Tensor | None, batch_centres: Tensor | None,
    ptr: Tensor | None, ptr_centres: Tensor | None, cell: Tensor | None, pbc: Tensor | None,
    max_num_neighbors: int | None, symmetric: bool, loop: bool, half: bool, centre_is_source: bool, geometry: bool,
    max_edges: int | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    _validate(
        pos, centres, k, batch, batch_centres, ptr, ptr_centres, cell, pbc, max_num_neighbors, symmetric, half,
        max_edges,
    )  # fmt: skip
    count, count_centres = _counts_within_limits(pos, centres, max_edges)
    cpu, threads, code = _native.cpu, torch.get_num_threads(), DTYPE_CODE[pos.dtype]
    # Held by name until the kernels are done.
    pos, batch, ptr = pos.contiguous(), ids(batch), ids(ptr)
    points, homes, periodic = point_set(pos, count, batch, ptr), NO_POINTS, NOT_PERIODIC
    if centres is not None:
        centres, batch_centres, ptr_centres = centres.contiguous(), ids(batch_centres), ids(ptr_centres)
        homes = point_set(centres, count_centres, batch_centres, ptr_centres)
    if cell is not None:
        cell, pbc = cell.contiguous(), contiguous(pbc)
        periodic = periodicity(cell, pbc)
    hits = cpu.radius_graph_search(
        code, points, homes, periodic, r, k or -1, max_num_neighbors or -1, symmetric, loop, half, threads
    )
    m = hits.num_edges if max_edges is None else max_edges
    out = _outputs(pos, centres, cell, geometry, m)
    edge_index, distance, vector, cell_shift, num_neighbors, truncated, num_edges, overflow = out
    sources = edge_index.data_ptr()
    targets = sources + m * edge_index.element_size()
    centre, neighbour = (sources, targets) if centre_is_source else (targets, sources)
    cpu.radius_graph_fill(
        hits, code, points, homes, periodic, m, centre, neighbour,
        distance.data_ptr() if geometry else 0, vector.data_ptr() if geometry else 0,
        cell_shift.data_ptr() if cell is not None else 0, num_neighbors.data_ptr(), truncated.data_ptr(),
        num_edges.data_ptr(), overflow.data_ptr(), r if k is None else 0.0, threads,
    )  # fmt: skip
    return out


def _outputs(pos: Tensor, centres: Tensor | None, cell: Tensor | None, geometry: bool, m: Any) -> tuple[Tensor, ...]:
    per_edge = m if geometry else 0
    edge_index = pos.new_empty(2, m, dtype=torch.int64)
    num_neighbors = pos.new_empty((pos if centres is None else centres).shape[0], dtype=torch.int32)
    truncated = edge_index.new_empty(size=())
    return (
        edge_index,
        pos.new_empty(per_edge),
        pos.new_empty(per_edge, 3),
        num_neighbors.new_empty(m if cell is not None else 0, 3),
        num_neighbors,
        truncated,
        torch.empty_like(truncated),
        torch.empty_like(truncated, dtype=torch.bool),
    )


def _cuda(
    pos: Tensor, centres: Tensor | None, r: float, k: int | None, batch: Tensor | None, batch_centres: Tensor | None,
    ptr: Tensor | None, ptr_centres: Tensor | None, cell: Tensor | None, pbc: Tensor | None,
    max_num_neighbors: int | None, symmetric: bool, loop: bool, half: bool, centre_is_source: bool, geometry: bool,
    max_edges: int | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    _validate(
        pos, centres, k, batch, batch_centres, ptr, ptr_centres, cell, pbc, max_num_neighbors, symmetric, half,
        max_edges,
    )  # fmt: skip
    count, count_centres = _counts_within_limits(pos, centres, max_edges)
    # Held by name until the kernels are enqueued.
    pos, batch, ptr = pos.contiguous(), ids(batch), ids(ptr)
    points, homes, periodic = point_set(pos, count, batch, ptr), NO_POINTS, NOT_PERIODIC
    if centres is not None:
        centres, batch_centres, ptr_centres = centres.contiguous(), ids(batch_centres), ids(ptr_centres)
        homes = point_set(centres, count_centres, batch_centres, ptr_centres)
    if cell is not None:
        cell, pbc = cell.contiguous(), contiguous(pbc)
        periodic = periodicity(cell, pbc)
    native, where = _native.cuda(), device_and_stream(pos)
    # A cap that no centre can exceed is none: all edges need no lists of that length, and are found faster.
    if max_num_neighbors is not None and max_num_neighbors >= (count if cell is None else _MAX_IMAGES):
        max_num_neighbors = None
    options = native.RadiusOptions(r, k or -1, max_num_neighbors or -1, symmetric, loop, half)
    request = DTYPE_CODE[pos.dtype], points, homes, periodic, options
    errors = native.device_errors(where[0])
    workspace = pos.new_empty(native.radius_graph_workspace(*request), dtype=torch.uint8)
    counts = _counts(pos, centres)
    before = (0, 0, 0, 0, 0, *[t.data_ptr() for t in counts])
    native.radius_graph_search(*request, before, workspace.data_ptr(), errors, *where)
    m = int(counts[2]) if max_edges is None else max_edges  # the first waits for the device
    out = (*_per_edge(pos, cell, geometry, m), *counts)
    edge_index, distance, vector, cell_shift = out[:4]
    sources = edge_index.data_ptr()
    targets = sources + m * edge_index.element_size()
    centre, neighbour = (sources, targets) if centre_is_source else (targets, sources)
    addresses = (
        centre, neighbour, distance.data_ptr() if geometry else 0, vector.data_ptr() if geometry else 0,
        cell_shift.data_ptr() if cell is not None else 0, *before[5:],
    )  # fmt: skip
    keys = pos.new_empty(m + 32 if native.radius_graph_wants_keys(options) else 0, dtype=torch.int64)
    native.radius_graph_fill(
        *request, m, addresses, r if k is None else 0.0, workspace.data_ptr(), keys.data_ptr(), errors,
        *where,
    )  # fmt: skip
    return out


def _per_edge(pos: Tensor, cell: Tensor | None, geometry: bool, m: Any) -> tuple[Tensor, ...]:
    with_geometry = m if geometry else 0
    return (
        pos.new_empty(2, m, dtype=torch.int64),
        pos.new_empty(with_geometry),
        pos.new_empty(with_geometry, 3),
        pos.new_empty(m if cell is not None else 0, 3, dtype=torch.int32),
    )


def _counts(pos: Tensor, centres: Tensor | None) -> tuple[Tensor, ...]:
    """num_neighbors, truncated, num_edges, overflow."""
    num_neighbors = pos.new_empty((pos if centres is None else centres).shape[0], dtype=torch.int32)
    truncated = pos.new_empty((), dtype=torch.int64)
    return num_neighbors, truncated, torch.empty_like(truncated), torch.empty_like(truncated, dtype=torch.bool)


def _fake(
    pos: Tensor, centres: Tensor | None, r: float, k: int | None, batch: Tensor | None, batch_centres: Tensor | None,
    ptr: Tensor | None, ptr_centres: Tensor | None, cell: Tensor | None, pbc: Tensor | None,
    max_num_neighbors: int | None, symmetric: bool, loop: bool, half: bool, centre_is_source: bool, geometry: bool,
    max_edges: int | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    _validate(
        pos, centres, k, batch, batch_centres, ptr, ptr_centres, cell, pbc, max_num_neighbors, symmetric, half,
        max_edges,
    )  # fmt: skip
    m = torch.library.get_ctx().new_dynamic_size() if max_edges is None else max_edges
    return _outputs(pos, centres, cell, geometry, m)


class _Gradient(Gradient):
    save = staticmethod(_radius_graph_grad.save)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _radius_graph_grad.input_gradients(ctx, grads[1], grads[2])


_op = register(_SCHEMA, cpu=_cpu, cuda=_cuda, fake=_fake, gradient=_Gradient)
_radius_op = _op.named(
    "centres", pos="x", centres="y", batch="batch_x", batch_centres="batch_y", ptr="ptr_x", ptr_centres="ptr_y"
)

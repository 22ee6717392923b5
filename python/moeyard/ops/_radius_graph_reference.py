"""radius_graph, radius and knn_graph in plain torch: all pairs, all images, nothing clever. Slow, and the truth."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from moeyard.ops.radius_graph import RadiusGraph


def radius_graph_reference(
    pos: Tensor, r: float, batch: Tensor | None = None, *, ptr: Tensor | None = None,
    max_num_neighbors: int | None = None, symmetric: bool = False, loop: bool = False, flow: str = "source_to_target",
    cell: Tensor | None = None, pbc: Tensor | None = None, half: bool = False, geometry: bool = True,
    max_edges: int | None = None,
) -> RadiusGraph:  # fmt: skip
    """The same as `radius_graph`."""
    graphs = _graph_ids(pos, batch, ptr)
    found, truncated = [], 0
    for rows, _, box in _each_graph(graphs, graphs, cell, pbc):
        i, j, s, d2 = _pairs(pos, pos, rows, rows, r, box, same=True)
        keep = d2 < _square(r, pos)
        if not loop:
            keep &= (i != j) | (s != 0).any(1)
        if half:
            keep &= (i < j) | ((i == j) & ~_negative(s))
        i, j, s, d2 = i[keep], j[keep], s[keep], d2[keep]
        if max_num_neighbors is not None:
            nearest, cut = _nearest(i, d2, max_num_neighbors)
            truncated += cut
            if symmetric:
                edges = torch.cat([i[:, None], j[:, None], s], 1)
                kept = {tuple(e) for e in edges[nearest].tolist()}
                mirrored = torch.cat([j[:, None], i[:, None], -s], 1)
                other = [tuple(e) in kept for e in mirrored.tolist()]
                nearest |= torch.tensor(other, dtype=torch.bool)
            i, j, s = i[nearest], j[nearest], s[nearest]
        found.append((i, j, s))
    return _assemble(pos, pos, found, truncated, cell, graphs, flow != "source_to_target", geometry, max_edges, r)


def radius_reference(
    x: Tensor, y: Tensor, r: float, batch_x: Tensor | None = None, batch_y: Tensor | None = None, *,
    ptr_x: Tensor | None = None, ptr_y: Tensor | None = None, max_num_neighbors: int | None = None,
    cell: Tensor | None = None, pbc: Tensor | None = None, geometry: bool = True, max_edges: int | None = None,
) -> RadiusGraph:  # fmt: skip
    """The same as `radius`."""
    of_x, of_y = _graph_ids(x, batch_x, ptr_x), _graph_ids(y, batch_y, ptr_y)
    found, truncated = [], 0
    for rows_x, rows_y, box in _each_graph(of_x, of_y, cell, pbc):
        i, j, s, d2 = _pairs(x, y, rows_x, rows_y, r, box, same=False)
        keep = d2 < _square(r, x)
        i, j, s, d2 = i[keep], j[keep], s[keep], d2[keep]
        if max_num_neighbors is not None:
            nearest, cut = _nearest(i, d2, max_num_neighbors)
            truncated += cut
            i, j, s = i[nearest], j[nearest], s[nearest]
        found.append((i, j, s))
    return _assemble(x, y, found, truncated, cell, of_y, True, geometry, max_edges, r)


def knn_graph_reference(
    pos: Tensor, k: int, batch: Tensor | None = None, *, ptr: Tensor | None = None, loop: bool = False,
    flow: str = "source_to_target", cell: Tensor | None = None, pbc: Tensor | None = None, geometry: bool = True,
    max_edges: int | None = None,
) -> RadiusGraph:  # fmt: skip
    """The same as `knn_graph`."""
    graphs = _graph_ids(pos, batch, ptr)
    found = []
    for rows, _, box in _each_graph(graphs, graphs, cell, pbc):
        # Along one periodic vector alone there are k images within (k / 2 + 1) lengths.
        lengths = [] if box is None else box[0].double()[box[1]].norm(dim=1).tolist()
        i, j, s, d2 = _pairs(pos, pos, rows, rows, (k / 2 + 1) * min(lengths, default=0.0), box, same=True)
        if not loop:
            other = (i != j) | (s != 0).any(1)
            i, j, s, d2 = i[other], j[other], s[other], d2[other]
        nearest, _ = _nearest(i, d2, k)
        found.append((i[nearest], j[nearest], s[nearest]))
    return _assemble(pos, pos, found, 0, cell, graphs, flow != "source_to_target", geometry, max_edges, 0.0)


def _graph_ids(pos: Tensor, batch: Tensor | None, ptr: Tensor | None) -> Tensor:
    if batch is not None:
        return batch.long()
    if ptr is not None:
        return torch.repeat_interleave(torch.arange(len(ptr) - 1), ptr.long().diff())
    return torch.zeros(len(pos), dtype=torch.int64)


def _each_graph(of_points: Tensor, of_centres: Tensor, cell: Tensor | None, pbc: Tensor | None):  # type: ignore[no-untyped-def]
    for g in torch.cat([of_points, of_centres]).unique().tolist():
        box = None
        if cell is not None:
            axes = torch.ones(3, dtype=torch.bool) if pbc is None else pbc if pbc.dim() == 1 else pbc[g]
            box = (cell if cell.dim() == 2 else cell[g], axes)
        yield (of_points == g).nonzero()[:, 0], (of_centres == g).nonzero()[:, 0], box


def _square(r: float, like: Tensor) -> Tensor:
    r_ = torch.tensor(r, dtype=like.dtype)
    return r_ * r_


def _negative(s: Tensor) -> Tensor:
    first = torch.where(s[:, 0] != 0, s[:, 0], torch.where(s[:, 1] != 0, s[:, 1], s[:, 2]))
    return first < 0


def _shift_ranges(p: Tensor, c: Tensor, r: float, box: tuple[Tensor, Tensor] | None) -> list[range]:
    """Shifts that can bring a point within r of a centre: by the distances of lattice planes."""
    ranges = [range(1)] * 3
    if box is None or not bool(box[1].any()):
        return ranges
    axes = box[1].nonzero()[:, 0]
    to_fraction = torch.linalg.pinv(box[0].double()[axes])
    span = (c.double() @ to_fraction).unsqueeze(1) - (p.double() @ to_fraction).unsqueeze(0)
    for column, axis in enumerate(axes.tolist()):
        reach = r * float(to_fraction[:, column].norm()) + 1e-3
        low, high = float(span[..., column].min()) - reach, float(span[..., column].max()) + reach
        ranges[axis] = range(math.ceil(low), math.floor(high) + 1)
    return ranges


def _pairs(
    x: Tensor, y: Tensor, rows_x: Tensor, rows_y: Tensor, r: float, box: tuple[Tensor, Tensor] | None, same: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All (centre, neighbour, shift) of a graph in order, with the squared distances that decide."""
    if len(rows_x) == 0 or len(rows_y) == 0:
        none = torch.zeros(0, dtype=torch.int64)
        return none, none, torch.zeros(0, 3, dtype=torch.int64), x.new_zeros(0)
    shifts = torch.tensor(list(itertools.product(*_shift_ranges(x[rows_x], y[rows_y], r, box))), dtype=torch.int64)
    shifts = shifts.reshape(-1, 3)
    i, j, s = (t.reshape(-1) for t in torch.meshgrid(rows_y, rows_x, torch.arange(len(shifts)), indexing="ij"))
    vector = _vectors(x, y, i, j, shifts[s], None if box is None else box[0].expand(len(i), 3, 3), same)
    return i, j, shifts[s], _squared_norm(vector.detach())


def _vectors(x: Tensor, y: Tensor, i: Tensor, j: Tensor, s: Tensor, cell: Tensor | None, same: bool) -> Tensor:
    """From centre i to point j; within one set from the smaller index to the larger, else mirrored."""
    swap = ((i > j) | ((i == j) & _negative(s))) if same else torch.zeros_like(i, dtype=torch.bool)
    one = torch.where(swap[:, None], x[i] if same else x[j], x[j])
    other = torch.where(swap[:, None], x[j], y[i])
    if cell is None:
        d = one - other
    else:
        t = torch.where(swap[:, None], -s, s).to(x.dtype)[:, :, None] * cell
        d = (one + ((t[:, 0] + t[:, 1]) + t[:, 2])) - other
    return torch.where(swap[:, None], -d, d)


def _squared_norm(v: Tensor) -> Tensor:
    return (v[:, 0] * v[:, 0] + v[:, 1] * v[:, 1]) + v[:, 2] * v[:, 2]


def _nearest(i: Tensor, d2: Tensor, count: int) -> tuple[Tensor, int]:
    """Which pairs are among the nearest of their centre, and how many centres have more."""
    keep = torch.zeros(len(i), dtype=torch.bool)
    cut = 0
    for centre in i.unique().tolist():
        own = (i == centre).nonzero()[:, 0]
        keep[own[torch.argsort(d2[own], stable=True)[:count]]] = True
        cut += len(own) > count
    return keep, cut


def _assemble(
    x: Tensor, y: Tensor, found: list[tuple[Tensor, Tensor, Tensor]], truncated: int, cell: Tensor | None,
    graph_of_centre: Tensor, centre_is_source: bool, geometry: bool, max_edges: int | None, padding: float,
) -> RadiusGraph:  # fmt: skip
    none = torch.zeros(0, dtype=torch.int64)
    i, j = (torch.cat([none, *(f[c] for f in found)]) for c in (0, 1))
    s = torch.cat([torch.zeros(0, 3, dtype=torch.int64), *(f[2] for f in found)])
    counts, total = torch.bincount(i, minlength=len(y)), len(i)
    i, j, s = i[:max_edges], j[:max_edges], s[:max_edges]
    box = None if cell is None else cell.expand(len(i), 3, 3) if cell.dim() == 2 else cell[graph_of_centre[i]]
    vector = _vectors(x, y, i, j, s, box, x is y)
    distance = _squared_norm(vector).sqrt()
    edge_index = torch.stack([i, j] if centre_is_source else [j, i])
    if max_edges is not None:
        unused = max_edges - len(i)
        edge_index = torch.cat([edge_index, edge_index.new_zeros(2, unused)], 1)
        vector, s = (torch.cat([t, t.new_zeros(unused, 3)]) for t in (vector, s))
        distance = torch.cat([distance, distance.new_full((unused,), padding)])
    return RadiusGraph(
        edge_index,
        distance if geometry else x.new_zeros(0),
        vector if geometry else x.new_zeros(0, 3),
        s.int() if cell is not None else torch.zeros(0, 3, dtype=torch.int32),
        counts.int(),
        torch.tensor(truncated),
        torch.tensor(total),
        torch.tensor(max_edges is not None and total > max_edges),
    )

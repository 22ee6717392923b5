"""`radius` and `radius_graph` with the argument order and defaults of torch_cluster 1.6; torch_cluster is not needed.

    from moeyard.integrations.torch_cluster import radius_graph

The edge sets are equal whenever no point has more than `max_num_neighbors` neighbours. Where one has, the first by
index are kept, which is torch_cluster's rule on CUDA; the order in which its CPU tree happens to find them is not
copied. Edges come sorted by (centre, neighbour).

Shape letters: N points, K centres, D dimensions, M edges.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeyard.ops import RadiusGraph, _check
from moeyard.ops import radius as _radius
from moeyard.ops import radius_graph as _radius_graph

__all__ = ["radius", "radius_graph"]


def radius(
    x: Tensor,
    y: Tensor,
    r: float,
    batch_x: Tensor | None = None,
    batch_y: Tensor | None = None,
    max_num_neighbors: int | None = 32,
    num_workers: int = 1,
    batch_size: int | None = None,
    ignore_same_index: bool = False,
) -> Tensor:
    """For each row of y, the rows of x in the same graph that are closer than r.

    Args:
        x, y: [N, D] and [K, D] float32 or float64, D <= 3; [N] counts as D = 1.
        r: cutoff; an edge needs a distance strictly below it.
        batch_x, batch_y: [N] and [K] sorted graph ids.
        max_num_neighbors: at most so many per row of y, the first by index; None is no limit.
        num_workers, batch_size: accepted and not needed.
        ignore_same_index: leave out row i of x for row i of y.

    Returns:
        [2, M] int64: rows of y above rows of x.

    Raises:
        TypeError, ValueError: as `moeyard.radius`; more than three dimensions.
    """
    _check.integer("max_num_neighbors", max_num_neighbors, minimum=0, optional=True)
    _check.flag("ignore_same_index", ignore_same_index)
    points, centres = _in_space("x", x), _in_space("y", y)
    if _columns(x) != _columns(y):
        raise ValueError(f"y: expected {_columns(x)} dimensions like x, got {_columns(y)}")
    graph = _radius(points, centres, r, batch_x, batch_y, geometry=False)
    keep = torch.ones_like(graph.edge_index[0], dtype=torch.bool)
    if ignore_same_index:
        keep = graph.edge_index[0] != graph.edge_index[1]
    return _first_by_index(graph.edge_index[:, keep], graph.edge_index[0, keep], y.shape[0], max_num_neighbors)


def radius_graph(
    x: Tensor,
    r: float,
    batch: Tensor | None = None,
    loop: bool = False,
    max_num_neighbors: int | None = 32,
    flow: str = "source_to_target",
    num_workers: int = 1,
    batch_size: int | None = None,
) -> Tensor:
    """Connects every point with the points of its graph that are closer than r.

    Args:
        x: [N, D] float32 or float64, D <= 3; [N] counts as D = 1.
        r, batch, max_num_neighbors, num_workers, batch_size: see `radius`; with `loop` the point itself counts.
        loop: keep edges from a point to itself.
        flow: "source_to_target" makes the centre the target (row 1), "target_to_source" the source.

    Returns:
        [2, M] int64.

    Raises:
        TypeError, ValueError: as `moeyard.radius_graph`; more than three dimensions.
    """
    _check.integer("max_num_neighbors", max_num_neighbors, minimum=0, optional=True)
    graph: RadiusGraph = _radius_graph(_in_space("x", x), r, batch, loop=loop, flow=flow, geometry=False)
    centre = graph.edge_index[1 if flow == "source_to_target" else 0]
    return _first_by_index(graph.edge_index, centre, x.shape[0], max_num_neighbors)


def _in_space(name: str, x: Tensor) -> Tensor:
    """Coordinates padded with zeros to three dimensions, which changes no distance."""
    _check.tensor(name, x)
    x = x.reshape(-1, 1) if x.dim() == 1 else x
    if x.dim() != 2 or not 1 <= x.shape[1] <= 3:
        raise ValueError(f"{name}: expected shape [N, D] with D from 1 to 3, got {list(x.shape)}")
    return torch.nn.functional.pad(x, (0, 3 - x.shape[1]))


def _columns(x: Tensor) -> int:
    return 1 if x.dim() == 1 else x.shape[1]


def _first_by_index(edge_index: Tensor, centre: Tensor, centres: int, limit: int | None) -> Tensor:
    """Keeps each centre's first `limit` edges; they are sorted by centre and neighbour."""
    if limit is None:
        return edge_index
    counts = torch.bincount(centre, minlength=centres)
    if counts.numel() == 0 or int(counts.max()) <= limit:
        return edge_index
    first = counts.cumsum(0) - counts
    rank = torch.arange(centre.shape[0], device=centre.device) - first[centre]
    return edge_index[:, rank < limit]
